"""Batches: the mixture of the sources' rows, read from ArrayRecord through Grain.

Row i of the mixture depends on the prepared data, the weights, the seed and i only, and a batch is the next B rows.
Position in the stream is therefore the number of rows behind it, whatever the batches were, and each process reads the
rows of every batch that its own devices hold.

Of a shard that is not open, a process knows the number of its rows. Few are open at a time, so that neither memory nor
the time to the first batch grows with the data.
"""

import contextlib
import functools
import itertools
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np

from dreamer_jax.config import Config
from dreamer_jax.data.batch import Batch
from dreamer_jax.data.dataset import RECORDS, Documents, ids_and_answers, is_whole
from dreamer_jax.data.pack import Packing, find_row, load_packing, row_documents
from dreamer_jax.data.prepared import PACKING, Prepared, sha256, shard_names
from dreamer_jax.data.sources import DataError, Split

ENDLESS = 2**48
"""Rows of a training stream, which has no end."""
OPEN_SHARDS = 64
"""Shards of all sources that a process holds open: some 20 bytes for each document of them, half of it in files."""


class OpenShard(NamedTuple):
    """A shard that rows are read from."""

    packing: Packing
    documents: Documents


@functools.lru_cache(maxsize=OPEN_SHARDS)
def _open_shard(directory: Path, records: str, packing: str, *_digests: str) -> OpenShard:
    """A shard by the names of its files; their digests tell it from another one that took its place."""
    return OpenShard(load_packing(directory / packing), Documents(directory / records))


class PackedRows:
    """Rows of one source and split by index, endless when shuffled; a Grain random-access source."""

    def __init__(self, prepared: Prepared, name: str, split: Split, context: int, seed: int | None):
        self._directory, self._files = prepared.directory, prepared.report["files"]
        self._name, self._split, self._context = name, split, context
        self._seed = None if seed is None else seed << 32 | zlib.crc32(name.encode())
        self._ends = list(itertools.accumulate(prepared.report["sources"][name][split]["shards"]["rows"]))
        self._checked: set[int] = set()

    def __len__(self) -> int:
        return self._ends[-1] if self._seed is None else ENDLESS

    def __repr__(self) -> str:
        return f"PackedRows({self._name}, {self._split}, {self._ends[-1]} rows)"

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        place = find_row(self._ends, int(index), self._seed)
        shard = self._shard(place.shard)
        wanted = row_documents(shard.packing, place, self._seed)
        which = f" of shard {place.shard}" if len(self._ends) > 1 else ""
        with self._mendable(f"documents {wanted}{which} of"):
            found = [shard.documents[document] for document in wanted]
        for document, stored in zip(wanted, found, strict=True):
            if not is_whole(stored):
                raise self._damaged(f"document {document}{which} of", "it is not what was written")
        return lay_out(found, self._context)

    def _shard(self, number: int) -> OpenShard:
        """A shard, whose packing is compared with its digest when it is first opened."""
        names = shard_names(self._name, self._split, number, len(self._ends))
        records, packing = (f"{self._name}/{names[end]}" for end in (RECORDS, PACKING))
        digests = (self._files[records]["sha256"], self._files[packing]["sha256"])
        with self._mendable(f"shard {number} of"):
            if number not in self._checked:
                if sha256(self._directory / packing) != digests[1]:
                    raise self._damaged(f"the packing of shard {number} of", "it is not what was written")
                self._checked.add(number)
            return _open_shard(self._directory, records, packing, *digests)

    @contextlib.contextmanager
    def _mendable(self, what: str) -> Iterator[None]:
        """Say of an error of reading what to do about it."""
        try:
            yield
        except DataError:
            raise
        except Exception as error:  # ArrayRecord and TFDS raise many kinds
            raise self._damaged(what, str(error)) from error

    def _damaged(self, what: str, cause: str) -> DataError:
        return DataError(
            f"cannot read {what} {self._name}/{self._split} ({cause}); the prepared data are damaged: delete the "
            f"folder '{self._directory}' and start again"
        )


class HeldRows:
    """Some rows of every batch, batch after batch from row `start` on; a Grain random-access source."""

    def __init__(self, stream: grain.MapDataset, start: int, batch: int, held: Sequence[int]):
        self._stream, self._start, self._batch, self._held = stream, start, batch, tuple(held)

    def __len__(self) -> int:
        return max(0, len(self._stream) - self._start) // self._batch * len(self._held)

    def __repr__(self) -> str:
        return f"HeldRows({self._stream!r}, rows {self._held} of {self._batch} from {self._start})"

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        step, place = divmod(int(index), len(self._held))
        row = self._stream[self._start + step * self._batch + self._held[place]]
        assert row is not None  # no dataset here filters
        return row


def lay_out(documents: list[dict[str, Any]], size: int) -> dict[str, np.ndarray]:
    """Documents one after another in a row of `size` tokens.

    Args:
        documents: `tokens` int32 as they are stored, and `response_start` of each; together at most `size` tokens.
        size: T.

    Returns:
        tokens int32 [T]; positions int32 [T], from 0 in each document; segment_ids int32 [T], 1, 2, ... and 0 where the
        row is empty; response_mask bool [T], True on response tokens and the eos after them, but not on what further
        turns give.
    """
    row = empty_row(size)
    start = 0
    for segment, document in enumerate(documents, start=1):
        ids, answered = ids_and_answers(document["tokens"], int(document["response_start"]))
        end = start + len(ids)
        row["tokens"][start:end] = ids
        row["positions"][start:end] = np.arange(len(ids))
        row["segment_ids"][start:end] = segment
        row["response_mask"][start:end] = answered
        start = end
    return row


def empty_row(size: int) -> dict[str, np.ndarray]:
    """A row without documents."""
    row = {name: np.zeros(size, np.int32) for name in ("tokens", "positions", "segment_ids")}
    return row | {"response_mask": np.zeros(size, bool)}


def rows(prepared: Prepared, config: Config, split: Split) -> grain.MapDataset:
    """The mixture's rows by index: endless and shuffled for training; finite, each row at most once, for validation."""
    seed = config.train.seed if split == "train" else None
    mixture = prepared.mixed(split)
    parts = [grain.MapDataset.source(PackedRows(prepared, name, split, config.data.context, seed)) for name in mixture]
    if len(parts) == 1:
        return parts[0]
    return grain.MapDataset.mix(parts, weights=list(mixture.values())) if parts else grain.MapDataset.source(())


def batches(
    prepared: Prepared,
    config: Config,
    *,
    split: Split,
    start_row: int = 0,
    held: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Every batch from row `start_row` on, or its rows `held` in their order; close the iterator to end its threads.

    `start_row` is the number of rows of the mixture that are behind a run; its batches may have been of another size.

    Training batches never end. Validation is the first `train.validation_batches` batches of the held-out rows in a
    fixed order, the same at every call; where the held-out rows are fewer there are fewer batches, and the last is
    filled up with empty rows (segment ids all 0): no row comes twice.

    Returns:
        Arrays [B, T], or [len(held), T].

    Raises:
        DataError: damaged prepared data.
    """
    held = range(config.train.batch) if held is None else held
    stream = rows(prepared, config, split)
    if split == "validation":
        stream = _whole_batches(stream, config)
    chosen = grain.MapDataset.source(HeldRows(stream, start_row, config.train.batch, held))
    parts = chosen.batch(len(held))
    options = grain.ReadOptions(num_threads=min(1, config.data.prefetch), prefetch_buffer_size=config.data.prefetch)
    return _closing(iter(parts.to_iter_dataset(options)))


def _whole_batches(stream: grain.MapDataset, config: Config) -> grain.MapDataset:
    """At most the rows of one validation, filled up with empty rows to whole batches."""
    batch = config.train.batch
    count = min(len(stream), config.train.validation_batches * batch)
    missing = -count % batch
    stream = stream[:count]
    if not missing:
        return stream
    padding = grain.MapDataset.source([empty_row(config.data.context)]).repeat(missing)
    return grain.MapDataset.concatenate([stream, padding])


def _closing(iterator: Any) -> Iterator[Batch]:
    try:
        for rows in iterator:
            yield Batch(**rows)
    finally:
        iterator.close()
