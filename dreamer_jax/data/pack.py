"""Packing: which documents share which row, in every epoch, without ever listing an epoch.

Documents are packed into rows once, each file of documents (shard) by itself. Two documents of the same length fit the
same place, so each epoch deals the documents of every length anew over the places of that length in their shard, and
the rows of all shards anew over the epoch, both by a permutation that is computed element by element. Row i of the
endless stream is therefore found from (seed, i) and the numbers of rows of the shards, and only its own shard's packing
is looked at; every epoch holds each document exactly once, in other company than before.
"""

import bisect
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

PACKING_SEED = 0
"""Order in which documents are offered to the packer. Fixed: a run's own seed enters through the permutations."""


class Packing(NamedTuple):
    """N documents of a shard packed in R rows of at most T tokens. A document's rank is its place by length.

    All arrays are int32, and lie in the file if the packing was loaded.
    """

    documents: Int[np.ndarray, "N"]
    """Document of each rank, by its index in the shard, which may hold longer ones that are in no row."""
    lengths: Int[np.ndarray, "T_plus_2"]
    """First rank of each length 0, 1, ... T, and N at the end."""
    slots: Int[np.ndarray, "N"]
    """Ranks, row by row."""
    starts: Int[np.ndarray, "R_plus_1"]
    """First slot of each row, and N at the end."""

    @property
    def rows(self) -> int:
        """R: rows of one epoch."""
        return len(self.starts) - 1

    @property
    def tokens(self) -> int:
        """Tokens of the N documents."""
        return int(np.arange(len(self.lengths) - 1) @ np.diff(self.lengths))

    @property
    def fill(self) -> float:
        """Share of the R * T positions that hold a token."""
        return self.tokens / max(1, self.rows * (len(self.lengths) - 2))


class Place(NamedTuple):
    """Where a row of the endless stream lies."""

    epoch: int
    shard: int
    row: int
    """Among those of the shard."""


def assign_rows(lengths: Sequence[int], size: int) -> list[int]:
    """Best fit: each document, in the given order, goes to the fullest row that still has room for it.

    The free space of the open rows is one integer with a bit per size, so the best row is a shift and a lowest bit
    away: about a microsecond a document, whatever the number of open rows.

    Args:
        lengths: tokens of each document, at most `size`.
        size: tokens of a row.

    Returns:
        The row of each document; rows count from 0 in order of opening.
    """
    rows_with_space: list[list[int]] = [[] for _ in range(size + 1)]
    spaces, opened, assigned = 0, 0, []
    for length in lengths:
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = rows_with_space[space].pop()
            if not rows_with_space[space]:
                spaces ^= 1 << space
        else:
            space, row, opened = size, opened, opened + 1
        assigned.append(row)
        left = space - length
        if left:
            rows_with_space[left].append(row)
            spaces |= 1 << left
    return assigned


def pack_documents(lengths: Int[np.ndarray, "D"], size: int) -> Packing:
    """Pack the documents of a shard, of 1 or more tokens each, in rows of `size` tokens; longer ones are left out."""
    fitting = np.flatnonzero(lengths <= size)
    fitted = lengths[fitting]
    order = np.random.default_rng(PACKING_SEED).permutation(len(fitted))
    row_of = np.asarray(assign_rows(fitted[order].tolist(), size), np.int64)
    by_length = np.argsort(fitted, kind="stable")
    rank_of = np.empty(len(fitted), np.int64)
    rank_of[by_length] = np.arange(len(fitted))
    slots = rank_of[order[np.argsort(row_of, kind="stable")]]
    starts = np.concatenate([[0], np.cumsum(np.bincount(row_of))])
    first_ranks = np.concatenate([[0], np.cumsum(np.bincount(fitted, minlength=size + 1))])
    return Packing(*(array.astype(np.int32) for array in (fitting[by_length], first_ranks, slots, starts)))


def find_row(ends: Sequence[int], index: int, seed: int | None) -> Place:
    """Where row `index` of the endless stream lies; `seed` None takes the rows in their packed order.

    Args:
        ends: rows of the shards, each with those before it; an epoch is the last of these.
        index: row, from 0.
        seed: what the order depends on, besides the epoch.
    """
    epoch, row = divmod(index, ends[-1])
    if seed is not None:
        row = permute(row, ends[-1], seed, epoch, 0)
    shard = bisect.bisect_right(ends, row)
    return Place(epoch, shard, row - (ends[shard - 1] if shard else 0))


def row_documents(packing: Packing, place: Place, seed: int | None) -> list[int]:
    """Documents of a row, by their index in the shard; `seed` None leaves each in its packed place.

    Args:
        packing: that of the shard.
        place: what `find_row` gives.
        seed: as there.
    """
    ranks = packing.slots[packing.starts[place.row] : packing.starts[place.row + 1]]
    if seed is not None:
        lengths = np.searchsorted(packing.lengths, ranks, side="right") - 1
        dealt = [
            _deal(packing, rank, length, seed, place)
            for rank, length in zip(ranks.tolist(), lengths.tolist(), strict=True)
        ]
        ranks = np.asarray(dealt)
    documents: list[int] = packing.documents[ranks].tolist()
    return documents


def _deal(packing: Packing, rank: int, length: int, seed: int, place: Place) -> int:
    """The rank whose document takes the place of `rank` in this epoch: one of the same length."""
    first, end = int(packing.lengths[length]), int(packing.lengths[length + 1])
    key = (seed, place.epoch, length, place.shard) if place.shard else (seed, place.epoch, length)
    return first + permute(rank - first, end - first, *key)


def permute(index: int, count: int, *key: int) -> int:
    """Place of `index` in a pseudo-random permutation of `count` that depends on `key`.

    A Feistel network of eight rounds permutes the numbers of the next even count of bits; walking on until the result
    is below `count` restricts it. Our own, because it is part of what the stream of batches is: no library's release
    may change it, and Grain's index_shuffle takes milliseconds where the count is small.
    """
    half = (max(1, (count - 1).bit_length()) + 1) // 2
    mask = (1 << half) - 1
    keys = _round_keys(key)
    while True:
        left, right = index >> half, index & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        index = left << half | right
        if index < count:
            return index


@functools.lru_cache(maxsize=1 << 14)
def _round_keys(key: tuple[int, ...]) -> tuple[int, ...]:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=64).digest()
    return tuple(int.from_bytes(digest[i : i + 8], "little") for i in range(0, 64, 8))


def _mix(value: int) -> int:
    """32 well mixed bits of a 64-bit number (multiply, fold, multiply: the constants of SplitMix64)."""
    value = value * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    return value >> 32


def save_packing(packing: Packing, path: Path) -> None:
    """Write a packing as `.npy`: one array of int32, so that it can be mapped into memory."""
    sizes = np.array([len(array) for array in packing], np.int32)
    np.save(path, np.concatenate([sizes, *packing]))


def load_packing(path: Path) -> Packing:
    """What `save_packing` wrote, mapped: what is not looked at is not read.

    Raises:
        OSError, ValueError: no such file, or another one.
    """
    # A plain array over the mapped one: looking things up in numpy's memmap takes several times as long.
    content = np.asarray(np.load(path, mmap_mode="r"))
    ends = np.cumsum(content[: len(Packing._fields)]) + len(Packing._fields)
    if content.dtype != np.int32 or ends[-1] != len(content):
        raise ValueError(f"'{path}' is no packing")
    first = len(Packing._fields)
    return Packing(*(content[start:end] for start, end in zip([first, *ends[:-1]], ends, strict=True)))
