"""Stages: what is done to each shard once, by whichever worker, however often it is begun.

A task makes files, and then a record of them. The record has the task's key, which is a hash of all that shapes the
files: the recipe's values that matter, the code's version, and the digests of the files that the task reads. A task
whose record has its key and whose files are there is done. So a finished shard is not made again, a half-written one is
never taken for whole, and a changed recipe redoes what the change reaches, and no more.

    <work>/<stage>/<task>.parquet       its files appear by a rename
                   <task>.json          its record, after them
                   <task>.samples.json  rows to look at, a few for each cause
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from dreamer_jax.data.files import DataError
from dreamer_jax.data.prepared import fingerprint
from dreamer_jax.files import write_whole

ROWS = pa.schema([("rank", pa.int64()), ("prompt", pa.string()), ("response", pa.string())])
"""Columns of a shard. The rank is known from the first stage on: it names the row, and is its claim to be kept."""
BATCH_ROWS = 8192
"""Rows that are held at once."""
DRAFT = ".draft-"
"""Beginning of the names of folders in which tasks make their files."""
SAMPLES = 20
"""Rows of each cause that a shard keeps for a person to look at."""
SAMPLE_LENGTH = 600
"""Characters of each of their texts."""


Done = tuple[Counter[str], dict[str, Any]]
"""What a task returns: counts of rows by cause, and facts."""


class Row(NamedTuple):
    """A question and its answer."""

    rank: int
    prompt: str
    response: str


class Shard(NamedTuple):
    """A file of rows."""

    source: str
    name: str
    """Unique in all stages: the source, and a number."""
    path: Path
    sha256: str


class Record(NamedTuple):
    """What a finished task has done."""

    key: str
    files: dict[str, dict[str, Any]]
    """Bytes and SHA-256 of its files, by name: the task's name and an ending."""
    counts: dict[str, int]
    """Rows: "in", "out", and by cause."""
    facts: dict[str, Any]
    """What else later stages and the manifest need to know."""


class Task(NamedTuple):
    """What one worker does at once."""

    stage: str
    name: str
    """Unique in its stage; may have slashes."""
    key: str
    run: Callable[..., Done]
    """A function of a module: `run(draft, *arguments)` makes files in an empty folder, named by their endings, and
    returns counts and facts."""
    arguments: tuple[Any, ...]


def key_of(*parts: Any) -> str:
    """A hash of values that JSON can hold, and of dataclasses of such."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=dataclasses.asdict).encode()).hexdigest()


# What is done already


def record_path(work: Path, stage: str, name: str) -> Path:
    """Where the record of a task is."""
    return work / stage / f"{name}.json"


def file_path(work: Path, stage: str, name: str, ending: str = "parquet") -> Path:
    """Where a file of a task is."""
    return work / stage / f"{name}.{ending}"


def finished(work: Path, stage: str, name: str, key: str | None = None) -> Record | None:
    """The record of a task, if it has this key (or if any will do) and its files are there."""
    path = record_path(work, stage, name)
    try:
        record = Record(**json.loads(path.read_bytes()))
        whole = all((path.parent / name).stat().st_size == file["bytes"] for name, file in record.files.items())
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return record if whole and key in (None, record.key) else None


# Doing it


def done(work: Path, tasks: Sequence[Task], executor: "Executor") -> dict[str, Record]:
    """The records of tasks of one stage, by name, in the order of the tasks; those that are not done are done now."""
    records = {task.name: finished(work, task.stage, task.name, task.key) for task in tasks}
    missing = [task for task in tasks if records[task.name] is None]
    if len(missing) < len(tasks):
        print(f"{tasks[0].stage}: {len(tasks) - len(missing)} of {len(tasks)} done already", flush=True)
    for name, record in executor.results(work, missing):
        records[name] = record
    return {name: record for name, record in records.items() if record is not None}


def perform(work: Path, task: Task) -> tuple[str, Record]:
    """Do a task: its files appear one by one, its record last."""
    path = record_path(work, task.stage, task.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        path.unlink()  # of other files of these names
    with tempfile.TemporaryDirectory(prefix=DRAFT, dir=path.parent) as draft:
        with _damage_named(work):
            counts, facts = task.run(Path(draft), *task.arguments)
        files = {}
        for made in sorted(Path(draft).iterdir()):
            final = path.with_name(f"{path.stem}.{made.name}")
            if not made.name.startswith("samples"):
                files[final.name] = fingerprint(made)
            _on_disk(made)
            os.replace(made, final)
    record = Record(task.key, files, dict(sorted(counts.items())), facts)
    write_whole(path, json.dumps(record._asdict(), indent=1) + "\n")
    return task.name, record


def _on_disk(path: Path) -> None:
    """Wait until a file is on the disk, so that its record is not there before it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def _damage_named(work: Path) -> Iterator[None]:
    """Say of a shard that libraries cannot read what to do about it."""
    try:
        yield
    except Exception as error:
        of_daft = type(error).__module__.startswith("daft")
        of_arrow = isinstance(error, pa.ArrowException) or (isinstance(error, OSError) and error.errno is None)
        if isinstance(error, DataError) or not (of_daft or of_arrow):
            raise
        said = " ".join(str(error).split())[:300]
        raise DataError(
            f"a shard of an earlier stage in '{work}' cannot be read ({said}); delete the file that is named, or "
            f"the whole folder, and run again"
        ) from error


def remove_drafts(work: Path) -> None:
    """Delete what killed tasks have left behind. No other process may be at work there."""
    for draft in list(work.rglob(f"{DRAFT}*")):
        shutil.rmtree(draft, ignore_errors=True)


class Executor:
    """Runs tasks: in this process, in processes of this machine, or on a Ray cluster."""

    def __init__(self, engine: str, workers: int):
        """See `recipe.WorkConfig`."""
        self.engine, self.workers = engine, workers or (os.cpu_count() or 1)
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def here(self) -> "Executor":
        """One that runs tasks in this process."""
        return Executor("local", 1)

    def results(self, work: Path, tasks: Sequence[Task]) -> Iterator[tuple[str, Record]]:
        """Name and record of each task, as they come; a bar shows how far it is."""
        if not tasks:
            return
        title = tasks[0].stage if len(tasks) > 1 else f"{tasks[0].stage}, {tasks[0].name}"
        rows = 0
        with tqdm(total=len(tasks), desc=title, unit="task", dynamic_ncols=True) as bar:
            for name, record in self._results(work, tasks):
                rows += record.counts.get("out", 0)
                bar.set_postfix_str(f"{rows:,} rows", refresh=False)
                bar.update()
                yield name, record

    def _results(self, work: Path, tasks: Sequence[Task]) -> Iterator[tuple[str, Record]]:
        if self.engine == "ray":
            yield from _by_ray(work, tasks)
        elif self.workers == 1 or len(tasks) == 1:
            yield from (perform(work, task) for task in tasks)
        else:
            futures = [self._started().submit(perform, work, task) for task in tasks]
            try:
                yield from (future.result() for future in concurrent.futures.as_completed(futures))
            except concurrent.futures.process.BrokenProcessPool:
                raise DataError(
                    "a worker process died, most likely for want of memory: give fewer --work.workers, or smaller "
                    "--work.shard_rows; what is finished stays"
                ) from None
            finally:
                for future in futures:
                    future.cancel()

    def _started(self) -> concurrent.futures.ProcessPoolExecutor:
        """The processes. They begin anew, because a fork of a process with threads may hang."""
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = concurrent.futures.ProcessPoolExecutor(self.workers, context, _begin_worker)
        return self._pool

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    """Of a worker's process: it has one thread for daft, and ends when the main process does, however that ends."""
    _use_one_thread()
    main = multiprocessing.parent_process()
    assert main is not None  # it has been spawned

    def end_with_it() -> None:
        main.join()
        os._exit(1)

    threading.Thread(target=end_with_it, daemon=True).start()


@functools.cache
def _use_one_thread() -> None:
    """Of a process beside which there are others; a process can say so once."""
    import daft

    daft.set_runner_native(num_threads=1)


def _join_ray() -> None:
    """Connect to the cluster that RAY_ADDRESS names, or start one on this machine; daft works there from then on."""
    try:
        import ray
    except ImportError:
        raise DataError("work.engine = 'ray', and Ray is not installed: pip install 'daft[ray]'") from None
    import daft

    ray.init(ignore_reinit_error=True, log_to_driver=False)
    daft.set_runner_ray(noop_if_initialized=True)


def _by_ray(work: Path, tasks: Sequence[Task]) -> Iterator[tuple[str, Record]]:
    import ray

    performed = ray.remote(_perform_in_ray)
    running = [performed.remote(work, task) for task in tasks]
    while running:
        ready, running = ray.wait(running)
        try:
            yield from ray.get(ready)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None


def _perform_in_ray(work: Path, task: Task) -> tuple[str, Record]:
    """A task, whose daft works here: plans that several tasks start on one cluster at once would mix up."""
    _use_one_thread()
    return perform(work, task)


@contextlib.contextmanager
def executing(engine: str, workers: int) -> Iterator[Executor]:
    """An executor, whose workers end with the block.

    Raises:
        DataError: Ray is asked for, and not installed.
    """
    if engine == "ray":
        _join_ray()
    executor = Executor(engine, workers)
    try:
        yield executor
    finally:
        executor.close()


# Reading and writing shards


def read(path: Path, columns: Sequence[str] | None = None) -> Iterator[dict[str, list[Any]]]:
    """Batches of rows of a Parquet file, as columns of Python values."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(BATCH_ROWS, columns=columns):
            yield batch.to_pydict()


def rows(path: Path) -> Iterator[Row]:
    """The rows of a shard."""
    for batch in read(path):
        yield from map(Row, batch["rank"], batch["prompt"], batch["response"])


def write(path: Path, rows: Iterable[tuple[Any, ...]], schema: pa.Schema = ROWS) -> int:
    """Write tuples of a schema's values as Parquet; the same rows give the same bytes.

    Returns:
        The number of rows.
    """
    count, held = 0, list[tuple[Any, ...]]()
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for row in rows:
            held.append(row)
            if len(held) == BATCH_ROWS:
                count += _flush(writer, held, schema)
        count += _flush(writer, held, schema)
    return count


def _flush(writer: pq.ParquetWriter, held: list[tuple[Any, ...]], schema: pa.Schema) -> int:
    columns = zip(*held, strict=True) if held else ([] for _ in schema)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    writer.write_batch(pa.record_batch(arrays, schema=schema))
    count = len(held)
    held.clear()
    return count


class Samples:
    """Some rows of each cause, for a person to look at."""

    def __init__(self) -> None:
        """None yet."""
        self.found: dict[str, list[dict[str, str]]] = {}

    def add(self, cause: str, **texts: str) -> None:
        """Keep a row if there are not enough of its cause."""
        kept = self.found.setdefault(cause, [])
        if len(kept) < SAMPLES:
            kept.append({name: _shortened(text) for name, text in texts.items()})

    def write(self, draft: Path) -> None:
        """Write them beside a task's files."""
        text = json.dumps(self.found, indent=1, ensure_ascii=True)
        (draft / "samples.json").write_text(text, encoding="utf-8")


def _shortened(text: str) -> str:
    """The two ends of a text; with no half surrogates, which no file takes."""
    half = SAMPLE_LENGTH // 2
    text = text if len(text) <= SAMPLE_LENGTH else f"{text[:half]} [...] {text[-half:]}"
    return text.encode(errors="backslashreplace").decode()
