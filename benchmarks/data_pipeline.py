"""How fast is the data pipeline, and how full are its rows?

    python benchmarks/data_pipeline.py --config configs/tiny.py [--data.root ...]
    python benchmarks/data_pipeline.py --synthetic 20000000

Prepares into an empty temporary folder, reads batches in one thread, and packs a million synthetic documents. Processor
seconds are those of this process; they equal a core's wall-clock seconds where the machine is otherwise idle.

With --synthetic, what a training process needs to open so many documents and to read 1,000 rows, beside the same for
200,000: its time and its memory must not grow. One shard is written, and stands under the names of all of them; to the
process they are as many shards, but their files are always in the machine's cache.
"""

import argparse
import dataclasses
import itertools
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dreamer_jax.config import Config, load
from dreamer_jax.data.builder import SHARD_DOCUMENTS, prepare
from dreamer_jax.data.loader import batches, rows
from dreamer_jax.data.pack import find_row, pack_documents, row_documents
from dreamer_jax.data.prepared import Prepared, Shard, assemble, open_prepared, write_shard
from dreamer_jax.data.tokenizer import load_tokenizer, train_sentencepiece

CONTEXT = 1024
ROWS = 1000


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def measure_preparation(config: Config) -> Prepared:
    prepared, wall, cpu = timed(lambda: prepare(config))
    print(f"preparation: {wall:.1f} s, {cpu:.1f} processor seconds (with the imports of the generator)")
    _, wall, _ = timed(lambda: prepare(config))
    print(f"finding it again: {wall:.3f} s")
    return prepared


def measure_reading(prepared: Prepared, config: Config, count: int) -> None:
    stream = batches(prepared, config, split="train", start_row=10**6 * config.train.batch)
    _, wall, _ = timed(lambda: next(stream))
    print(f"first batch, a million steps on: {wall:.2f} s")
    found, wall, cpu = timed(lambda: list(itertools.islice(stream, count)))
    stream.close()
    tokens = sum(int((batch.segment_ids > 0).sum()) for batch in found)
    places = sum(batch.tokens.size for batch in found)
    print(
        f"reading: {tokens / wall:,.0f} tokens/s, {tokens / cpu:,.0f} per processor second; {tokens / places:.1%} full"
    )


def synthetic_lengths(documents: int, context: int, seed: int = 0) -> np.ndarray:
    draws = np.random.default_rng(seed).lognormal(5.2, 0.6, documents)
    return np.clip(draws, 10, context).astype(np.int32)


def measure_planning(documents: int, context: int) -> None:
    packing, _, cpu = timed(lambda: pack_documents(synthetic_lengths(documents, context), context))
    print(f"packing {documents:,} documents: {cpu:.1f} processor seconds, {packing.fill:.1%} full at context {context}")
    places = [find_row([packing.rows], 7 * packing.rows + row, 0) for row in range(ROWS)]
    _, _, cpu = timed(lambda: [row_documents(packing, place, 0) for place in places])
    print(f"documents of one row of epoch 7: {cpu / ROWS * 1e6:.0f} us")


def synthetic_documents(lengths: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    for length in lengths:
        yield np.full(length, 7, np.int32), int(length) // 3


def measure_synthetic(documents: int) -> None:
    """Plan shard by shard; then open and read in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        (scratch / "tokenizer.model").write_bytes(train_sentencepiece([f"{n} words" for n in range(999)], 280))
        tokenizer = load_tokenizer(scratch / "tokenizer.model")
        lengths = synthetic_lengths(SHARD_DOCUMENTS, CONTEXT)
        report, wall, _ = timed(lambda: write_shard(scratch, "one", synthetic_documents(lengths), CONTEXT))
        print(f"writing a shard of {SHARD_DOCUMENTS:,} documents: {wall:.1f} s, {report.tokens / wall:,.0f} tokens/s")
        for count in (200_000, documents):
            shards = max(1, count // SHARD_DOCUMENTS)
            whole = scratch / str(count)
            whole.mkdir()
            sources = {
                "synthetic": {"train": [Shard(scratch, report)] * shards, "validation": [Shard(scratch, report)]}
            }
            assemble(whole, sources, tokenizer, key=str(count), weights={"synthetic": 1.0})
            print(f"{count:,} documents in {shards} shards:")
            _, _, cpu = timed(lambda shards=shards: plan(shards))
            print(f"  planned in {cpu:.1f} processor seconds")
            process = multiprocessing.get_context("spawn").Process(target=measure_opening, args=(whole,))
            process.start()
            process.join()


def plan(shards: int) -> None:
    for shard in range(shards):
        pack_documents(synthetic_lengths(SHARD_DOCUMENTS, CONTEXT, shard), CONTEXT)


def measure_opening(folder: Path) -> None:
    config = Config(name="synthetic")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocab=512),
        data=dataclasses.replace(config.data, prepared=str(folder), context=CONTEXT),
    )
    before = memory()
    (stream, wall, _) = timed(lambda: rows(open_prepared(folder, config), config, "train"))
    opened = memory()
    _, first, _ = timed(lambda: stream[0])
    _, _, cpu = timed(lambda: [stream[row] for row in range(1, ROWS)])
    print(f"  opened in {wall:.3f} s, the first row {first:.3f} s later; {cpu / ROWS * 1e3:.2f} processor ms a row")
    print(f"  memory: {before} before, {opened} open, {memory()} after {ROWS:,} rows")


def memory() -> str:
    """Of this process: all that is resident, and what of it is not pages of files."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    total, own = (int(status[key].split()[0]) / 1024 for key in ("VmRSS", "RssAnon"))
    return f"{total:.0f} MB ({own:.0f} its own)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="configs/tiny.py")
    parser.add_argument("--batches", type=int, default=200, help="batches to read")
    parser.add_argument("--documents", type=int, default=1_000_000, help="synthetic documents to pack")
    parser.add_argument("--synthetic", type=int, help="measure this alone: opening so many documents")
    args, overrides = parser.parse_known_args()
    if args.synthetic:
        measure_synthetic(args.synthetic)
        return
    config = load(args.config, overrides)
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, prepared=folder))
        measure_reading(measure_preparation(config), config, args.batches)
    measure_planning(args.documents, config.data.context)


if __name__ == "__main__":
    main()
