"""Packing: which documents share which row, in every epoch, without ever listing an epoch.

Documents are packed into rows once. Two documents of the same length fit the same place, so each epoch deals the
documents of every length anew over the places of that length, and the rows anew over the epoch, both by a permutation
that is computed element by element. Row i of the endless stream is therefore found from (seed, i) alone, in constant
time; every epoch holds each document exactly once, in other company than before.
"""

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
    """N documents packed in R rows of at most T tokens. A document's rank is its place in the order by length."""

    documents: Int[np.ndarray, "N"]
    """Document of each rank."""
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
    def fill(self) -> float:
        """Share of the R * T positions that hold a token."""
        size = len(self.lengths) - 2
        return float(np.arange(size + 1) @ np.diff(self.lengths)) / max(1, self.rows * size)


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


def pack_documents(lengths: Int[np.ndarray, "N"], size: int) -> Packing:
    """Pack documents of the given lengths (1 to `size` tokens) in rows of `size` tokens."""
    order = np.random.default_rng(PACKING_SEED).permutation(len(lengths))
    row_of = np.asarray(assign_rows(lengths[order].tolist(), size), np.int64)
    documents = np.argsort(lengths, kind="stable")
    rank_of = np.empty(len(lengths), np.int64)
    rank_of[documents] = np.arange(len(lengths))
    slots = rank_of[order[np.argsort(row_of, kind="stable")]]
    starts = np.concatenate([[0], np.cumsum(np.bincount(row_of))])
    first_ranks = np.concatenate([[0], np.cumsum(np.bincount(lengths, minlength=size + 1))])
    return Packing(documents, first_ranks, slots, starts)


def row_documents(packing: Packing, index: int, seed: int | None) -> list[int]:
    """Documents of row `index` of the endless stream; `seed` None leaves everything in its packed place.

    Args:
        packing: the packing of one source.
        index: row, from 0; an epoch is `packing.rows` rows.
        seed: what the order depends on, besides the epoch.
    """
    epoch, row = divmod(index, packing.rows)
    if seed is not None:
        row = permute(row, packing.rows, seed, epoch, 0)
    ranks = packing.slots[packing.starts[row] : packing.starts[row + 1]].tolist()
    if seed is not None:
        ranks = [_deal(packing, rank, seed, epoch) for rank in ranks]
    return packing.documents[ranks].tolist()


def _deal(packing: Packing, rank: int, seed: int, epoch: int) -> int:
    """The rank whose document takes the place of `rank` in this epoch: one of the same length."""
    length = int(np.searchsorted(packing.lengths, rank, side="right")) - 1
    first, end = int(packing.lengths[length]), int(packing.lengths[length + 1])
    return first + permute(rank - first, end - first, seed, epoch, length)


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
    """Write a packing as `.npz`."""
    np.savez(path, **packing._asdict())


def load_packing(path: Path) -> Packing:
    """Read what `save_packing` wrote."""
    with np.load(path) as arrays:
        return Packing(**{name: arrays[name] for name in Packing._fields})
