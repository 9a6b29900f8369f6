"""Raw sets from the Hugging Face hub: streamed into Parquet files, where raw.files_of finds them.

    <root>/<owner>/<set>/<subset or "all">/<split>/[<subset>/]00000.parquet, 00001.parquet, ...

A set appears when all of it is there. What a run that was killed has left behind lies beside it and is never read.
"""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from dreamer_jax.data.files import DataError
from dreamer_jax.data.unfinished import unfinished
from dreamer_jax.preparation.raw import folder_of
from dreamer_jax.preparation.recipe import RawSource

FILE_BYTES = 256 << 20
"""Size at which a file ends: what a worker reads at once, and a few of them are work for many."""
BATCH_ROWS = 1000


def fetch(source: RawSource, root: Path) -> Path:
    """Fetch a source's subset, or all of them, below the folder of the raw sets; the folder it lies in.

    Raises:
        DataError: no module `datasets`, no network, no access, no such set, subset or split, or no room.
    """
    folder = folder_of(source, root)
    try:
        from datasets.exceptions import DatasetsError
    except ImportError:
        raise DataError(
            f"source '{source.name}' is to be fetched, which the module datasets does: pip install datasets, or put "
            f"the set's files in '{folder}' yourself"
        ) from None
    final = folder / (source.subset or "all") / source.split
    try:
        with unfinished(folder) as draft:
            for subset in _subsets(source):
                _write(_batches(source, subset), draft if source.subset else draft / subset)
            final.parent.mkdir(parents=True, exist_ok=True)
            os.rename(draft, final)
    except (OSError, ValueError, DatasetsError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(_failure(source, error, folder)) from error
    return final


def _subsets(source: RawSource) -> list[str]:
    """The names of the subsets that are wanted, of those that the hub has."""
    from datasets import get_dataset_config_names

    names = get_dataset_config_names(source.hub)
    if source.subset and source.subset not in names:
        raise DataError(f"source '{source.name}': {source.hub} has no subset '{source.subset}'; it has {names}")
    return [source.subset] if source.subset else names


def _batches(source: RawSource, subset: str) -> Iterator[pa.Table]:
    """The rows of a subset as they come from the hub, which nothing keeps; a bar counts them."""
    from datasets import load_dataset

    stream = load_dataset(source.hub, subset, split=source.split, streaming=True)
    with tqdm(total=_rows(stream, source.split), desc=f"fetch {source.name}", unit="row", dynamic_ncols=True) as bar:
        for batch in stream.with_format("arrow").iter(BATCH_ROWS):
            yield batch
            bar.update(len(batch))


def _rows(stream: Any, split: str) -> int | None:
    """How many rows a stream will have, if the hub says so."""
    known = (stream.info.splits or {}).get(split)
    return known.num_examples if known else None


def _write(batches: Iterator[pa.Table], folder: Path) -> None:
    """Write Parquet files of some size, all with the columns of the first batch."""
    folder.mkdir(parents=True, exist_ok=True)
    first = next(batches, None)
    if first is None:
        raise ValueError("it has no rows")
    batches = itertools.chain([first], batches)
    for number in itertools.count():
        batch = next(batches, None)
        if batch is None:
            return
        path = folder / f"{number:05d}.parquet"
        with path.open("wb") as file, pq.ParquetWriter(file, first.schema, compression="zstd") as writer:
            writer.write_table(batch)
            while file.tell() < FILE_BYTES and (batch := next(batches, None)) is not None:
                writer.write_table(batch)


def _failure(source: RawSource, error: Exception, folder: Path) -> str:
    """What went wrong, in one line with a remedy."""
    said = " ".join(str(error).split())[:300] or type(error).__name__
    page = f"https://huggingface.co/datasets/{source.hub}"
    if source.gated or "gated" in said.lower():
        remedy = f"ask for access at {page}, and export HF_TOKEN with a token of yours"
    elif isinstance(error, ConnectionError):
        remedy = f"check the network, or put the set's files in '{folder}' yourself"
    else:
        remedy = f"compare the source's hub, subset and split with {page}"
    return f"source '{source.name}': {source.hub} was not fetched ({said}); {remedy}, or leave it out with --exclude"
