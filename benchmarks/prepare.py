"""How fast is each stage of a preparation, what memory does it need, and what would 100 billion tokens cost?

    python benchmarks/prepare.py --raw RAW
    python benchmarks/prepare.py --synthetic 200000 2000000

RAW is what benchmarks/planted.py made. Each stage runs in a process of its own, one task after the other, so that its
processor seconds and its peak memory are those of one worker. Beside them, the tokenizer and the MinHash library alone,
on the same texts. With --synthetic, the memory of finding duplicates among so many rows: the one stage that sees all
rows at once. Processor seconds are those of all threads; they equal a core's wall-clock seconds where nothing else
runs.
"""

import argparse
import concurrent.futures
import dataclasses
import multiprocessing
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import daft
import numpy as np
import planted
import pyarrow as pa
import pyarrow.parquet as pq
from daft import col
from daft import functions as F

from dreamer_jax.data.template import Template
from dreamer_jax.data.tokenizer import load_tokenizer
from dreamer_jax.preparation import dedup, duplicates
from dreamer_jax.preparation.pipeline import prepare
from dreamer_jax.preparation.recipe import DuplicatesConfig, Recipe
from dreamer_jax.preparation.stage import Executor, Record, Task, perform, rows

TOKENS = 100_000_000_000
"""Of the paper's training."""
CORES = (16, 256)
SHARD = 100_000
"""Rows of a synthetic shard."""
COPIES = 0.05
"""Part of the synthetic rows that share a key with another one."""


class Cost(NamedTuple):
    """What some work took, in a process of its own."""

    result: Any
    cpu: float
    """Seconds of processor."""
    memory: float
    """MB that were resident at most."""
    before: float
    """MB of it that the process needed for its imports."""


def alone(do: Callable[..., Any], *arguments: Any) -> Cost:
    """Do some work in a new process."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_measured, do, arguments).result()


def _measured(do: Callable[..., Any], arguments: tuple[Any, ...]) -> Cost:
    before, started = peak_memory(), time.process_time()
    result = do(*arguments)
    return Cost(result, time.process_time() - started, peak_memory(), before)


def peak_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# All stages


COSTS: dict[str, list[Cost]] = defaultdict(list)
"""What stages cost, in their order."""


class Measuring(Executor):
    """An executor whose stages each run in one new process."""

    def here(self) -> Executor:
        """The same: what compares all shards is measured, too."""
        return self

    def _results(self, folder: Path, tasks: Sequence[Task]) -> Iterator[tuple[str, Record]]:
        cost = alone(perform_all, folder, tasks)
        name = tasks[0].stage if len(tasks) > 1 else f"{tasks[0].stage}, {tasks[0].name}"
        COSTS[name].append(cost)
        yield from cost.result


def perform_all(folder: Path, tasks: Sequence[Task]) -> list[tuple[str, Record]]:
    return [perform(folder, task) for task in tasks]


def measure_stages(recipe: Recipe) -> None:
    """Prepare, and print a line for each stage."""
    out = prepare(recipe, Measuring("local", 1))
    print("| stage | rows | rows/s a core | tokens/s a core | peak memory, MB (imports) |")
    print("|---|---|---|---|---|")
    [documents, *_] = COSTS["documents"]
    length = total("tokens", documents) / total("out", documents)
    rows_in = total("in", COSTS["read"][0])
    each = 0.0
    for stage, costs in COSTS.items():
        cost = costs[0]
        count = total("in", cost) or rows_in
        print(
            f"| {stage} | {count:,} | {count / cost.cpu:,.0f} | {count * length / cost.cpu:,.0f} | "
            f"{cost.memory:.0f} ({cost.before:.0f}) |"
        )
        each += 0 if stage.startswith("tokenizer") else cost.cpu / count
    print_price(each, length)
    measure_libraries(out, documents)


def total(name: str, cost: Cost) -> int:
    return sum(record.counts.get(name, 0) for _, record in cost.result)


def print_price(each: float, length: float) -> None:
    """By arithmetic: the same cost for each row of the corpus."""
    count = TOKENS / length
    hours = each * count / 3600
    print(f"\n{length:.0f} tokens a row: {TOKENS:,} tokens are {count / 1e6:,.0f} M rows, if every raw row stays")
    print(f"{each * 1e3:.2f} ms a row in all stages: {hours:,.0f} core hours")
    for cores in CORES:
        print(f"  {hours / cores:.1f} hours on {cores} cores, if nothing waits")


def measure_libraries(out: Path, documents: Cost) -> None:
    """The tokenizer and MinHash alone, on the texts of the stages."""
    done = out / "work"
    shards = sorted((done / "decontaminate").glob("*/*[0-9].parquet"))
    [tokenizer] = (done / "tokenizer").glob("all.tokenizer.*")
    texts = alone(encode, tokenizer, shards)
    tokens, seconds = texts.result
    stage = total("tokens", documents) / documents.cpu
    print(f"\ntokenizer alone: {tokens / seconds:,.0f} tokens/s a core")
    print(f"documents: {stage:,.0f} tokens/s a core, {stage * seconds / tokens:.0%} of it")
    canonical = sorted((done / "keys").glob("*/*.canonical.parquet"))
    count, seconds = alone(minhash, canonical).result
    print(f"MinHash alone: {count / seconds:,.0f} documents/s a core")
    [keys, *_] = COSTS["keys"]
    print(f"keys: {total('in', keys) / keys.cpu:,.0f} documents/s a core")


def encode(path: Path, shards: Sequence[Path]) -> tuple[int, float]:
    """Tokens of all texts, and the seconds of processor that it took to find them."""
    tokenizer, template = load_tokenizer(path), Template()
    count, seconds = 0, 0.0
    for shard in shards:
        texts = [text for row in rows(shard) for text in (template.asked(row.prompt), template.answered(row.response))]
        started = time.process_time()
        count += sum(len(tokenizer.encode(text)) for text in texts)
        seconds += time.process_time() - started
    return count, seconds


def minhash(paths: Sequence[Path]) -> tuple[int, float]:
    """Rows, and the seconds of processor for the hashes of texts that are in memory."""
    daft.set_runner_native(num_threads=1)
    rule = dedup.Rule()
    texts = daft.read_parquet([str(path) for path in paths]).select((col("question") + " " + col("answer")).alias("t"))
    held = texts.collect()
    started = time.process_time()
    hashes = F.minhash(col("t"), num_hashes=rule.bands * rule.rows, ngram_size=rule.shingle)
    count = len(held.select(hashes.alias("hashes")).collect())
    return count, time.process_time() - started


# Memory of finding duplicates


def measure_synthetic(count: int) -> None:
    """Find duplicates among so many rows."""
    with tempfile.TemporaryDirectory() as folder:
        shards = [
            write_shard(Path(folder), first, min(SHARD, count - first), count) for first in range(0, count, SHARD)
        ]
        canonical, bands = ([shard[part] for shard in shards] for part in (0, 1))
        before: list[Path] = []
        kinds: tuple[duplicates.Kind, ...] = ("exact", "near", "answers")
        for kind in kinds:
            draft = Path(folder) / kind
            draft.mkdir()
            settings = dataclasses.asdict(DuplicatesConfig())
            wall = time.perf_counter()
            cost = alone(duplicates.find, draft, kind, canonical, bands, list(before), settings)
            [counts, _] = cost.result
            print(
                f"{count:,} rows, {kind}: {counts['out']:,} found, {cost.cpu:.0f} processor seconds, "
                f"{time.perf_counter() - wall:.0f} s, peak memory {cost.memory:.0f} MB ({cost.before:.0f} imports)"
            )
            before.append(draft / "parquet")


def write_shard(folder: Path, first: int, size: int, count: int) -> tuple[Path, Path]:
    """Canonical rows and band keys, as `key_shard` would write them, but of no texts that anybody wrote."""
    draw, rule = np.random.default_rng(first), dedup.Rule()
    ranks = np.arange(first, first + size)
    origins = np.where(draw.random(size) < COPIES, draw.integers(0, count, size), ranks).astype(np.uint64)
    questions = [" ".join(f"{word}" for word in range(origin, origin + 40)) for origin in origins.tolist()]
    table = {
        "rank": ranks,
        "question": questions,
        "answer": questions,
        "asked": origins,
        "pair": ranks.astype(np.uint64),
    }
    keys = (origins[:, None] * np.uint64(rule.bands) + np.arange(rule.bands, dtype=np.uint64)).ravel()
    paths = folder / f"{first}.canonical.parquet", folder / f"{first}.bands.parquet"
    pq.write_table(pa.table(table), paths[0], compression="zstd")
    pq.write_table(pa.table({"rank": ranks.repeat(rule.bands), "key": keys}), paths[1], compression="zstd")
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--raw", type=Path, help="folder that benchmarks/planted.py made")
    parser.add_argument("--synthetic", type=int, nargs="+", default=[], metavar="ROWS")
    known = parser.parse_args()
    if known.raw:
        with tempfile.TemporaryDirectory() as out:
            recipe = dataclasses.replace(planted.get_config(), root=str(known.raw), out=out)
            guarded = dataclasses.replace(recipe.decontaminate, root=str(known.raw / "data"))
            measure_stages(dataclasses.replace(recipe, decontaminate=guarded))
    for count in known.synthetic:
        measure_synthetic(count)


if __name__ == "__main__":
    main()
