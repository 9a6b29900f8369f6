"""Rows to look at: what stages cut, changed and dropped, a few for each source and cause."""

import json
from collections.abc import Iterator
from pathlib import Path

from dreamer_jax.data.files import DataError, expanded
from dreamer_jax.preparation.recipe import Recipe, included

STAGES = ("read", "strip", "clean", "unique", "decontaminate", "documents")
"""Those that keep samples."""


def shown(recipe: Recipe, count: int) -> Iterator[str]:
    """Lines that show at most so many rows for each stage, source and cause of what has been done so far.

    Raises:
        DataError: nothing has been done in the recipe's folder.
    """
    work = expanded(recipe.out, "out") / "work"
    if not any(work.glob("*/*/*.samples.json")):
        raise DataError(f"'{work}' has nothing to look at; run the same command without --inspect first")
    for stage in STAGES:
        for source in included(recipe).values():
            for cause, samples in _samples(work / stage / source.name, count).items():
                yield f"\n{stage}, {source.name}: {cause}"
                for number, sample in enumerate(samples, start=1):
                    yield f"  {number}."
                    yield from (f"    {name}: {_indented(text)}" for name, text in sample.items())


def _samples(folder: Path, count: int) -> dict[str, list[dict[str, str]]]:
    """By cause, from the first shards that have any."""
    found: dict[str, list[dict[str, str]]] = {}
    for path in sorted(folder.glob("*.samples.json")):
        for cause, samples in json.loads(path.read_bytes()).items():
            kept = found.setdefault(cause, [])
            kept += samples[: count - len(kept)]
    return dict(sorted(found.items()))


def _indented(text: str) -> str:
    return text.replace("\n", "\n      ")
