"""How fast is the data pipeline, and how full are its rows?

    python benchmarks/data_pipeline.py --config configs/tiny.py [--data.root ...]

Prepares into an empty temporary folder, reads batches in one thread, and packs a million synthetic documents. Processor
seconds are those of this process; they equal a core's wall-clock seconds where the machine is otherwise idle.
"""

import argparse
import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from dreamer_jax.config import Config, load
from dreamer_jax.data.builder import Prepared, prepare
from dreamer_jax.data.loader import batches
from dreamer_jax.data.pack import pack_documents, row_documents


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


def measure_planning(documents: int, context: int) -> None:
    draws = np.random.default_rng(0).lognormal(5.2, 0.6, documents)
    lengths = np.clip(draws, 10, context).astype(np.int64)
    packing, _, cpu = timed(lambda: pack_documents(lengths, context))
    print(f"packing {documents:,} documents: {cpu:.1f} processor seconds, {packing.fill:.1%} full at context {context}")
    rows = range(7 * packing.rows, 7 * packing.rows + 1000)
    _, _, cpu = timed(lambda: [row_documents(packing, row, 0) for row in rows])
    print(f"documents of one row of epoch 7: {cpu * 1e3:.0f} us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="configs/tiny.py")
    parser.add_argument("--batches", type=int, default=200, help="batches to read")
    parser.add_argument("--documents", type=int, default=1_000_000, help="synthetic documents to pack")
    args, overrides = parser.parse_known_args()
    config = load(args.config, overrides)
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, prepared=folder))
        measure_reading(measure_preparation(config), config, args.batches)
    measure_planning(args.documents, config.data.context)


if __name__ == "__main__":
    main()
