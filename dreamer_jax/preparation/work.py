"""What all stages of a preparation share: the recipe, what has been done, and how tasks over shards are made."""

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dreamer_jax.preparation.recipe import RawSource, Recipe
from dreamer_jax.preparation.stage import Done, Executor, Record, Shard, Task, done, key_of

VERSIONS = {
    "read": 2,
    "strip": 1,
    "clean": 1,
    "keys": 2,
    "duplicates": 1,
    "choose": 1,
    "unique": 1,
    "questions": 1,
    "decontaminate": 2,
    "tokenizer": 1,
    "documents": 1,
    "packing": 1,
}
"""Raise one when its stage would give other rows of the same ones: it and what follows it are done anew."""
LIBRARIES = {
    "clean": ("ftfy",),
    "keys": ("daft",),
    "duplicates": ("daft",),
    "questions": ("ftfy",),
    "tokenizer": ("sentencepiece", "tokenizers"),
    "documents": ("sentencepiece", "tokenizers"),
}
"""On which the result of a stage depends."""


class Work(NamedTuple):
    """What all stages share."""

    recipe: Recipe
    sources: dict[int, RawSource]
    """Those that are used, by their place in the recipe."""
    folder: Path
    """Of the shards between the stages."""
    executor: Executor
    records: dict[str, dict[str, Record]]
    """What has been done, by stage and task."""


def shard_task(stage: str, shard: Shard, run: Callable[..., Done], value: Any) -> Task:
    """A task that makes a shard of a shard, with one value of the recipe."""
    return Task(stage, shard.name, stage_key(stage, shard.sha256, value), run, (shard.path, value))


def stage_key(stage: str, *parts: Any) -> str:
    """A key for a task of a stage: a hash of these parts, and of the code that works on them."""
    libraries = [(name, importlib.metadata.version(name)) for name in LIBRARIES.get(stage, ())]
    return key_of(stage, VERSIONS[stage], libraries, *parts)


def all_done(work: Work, tasks: Sequence[Task]) -> dict[str, Record]:
    """The records of tasks of one stage, by name; those that are not done are done now."""
    records = done(work.folder, tasks, work.executor)
    if tasks:
        work.records.setdefault(tasks[0].stage, {}).update(records)
    return records


def done_here(work: Work, task: Task) -> Record:
    """A task that compares all shards: in this process, from which daft uses all cores, or the Ray cluster."""
    record = done(work.folder, [task], work.executor.here())[task.name]
    work.records.setdefault(task.stage, {})[task.name] = record
    return record


def shards_of(work: Work, stage: str, records: Mapping[str, Record], ending: str = "parquet") -> list[Shard]:
    """The shards that tasks have made."""
    return [
        Shard(
            source_name(task),
            f"{source_name(task)}/{name.removesuffix(f'.{ending}')}",
            work.folder / stage / source_name(task) / name,
            file["sha256"],
        )
        for task, record in records.items()
        for name, file in record.files.items()
        if name.endswith(f".{ending}")
    ]


def source_name(name: str) -> str:
    """The source that a task belongs to."""
    return name.partition("/")[0]


def source_of(work: Work, shard: Shard) -> RawSource:
    """The source that a shard is of."""
    return next(source for source in work.sources.values() if source.name == shard.source)
