"""What is read of runs: their evaluations, each with the scores of its tasks and, question by question, of its items.

An evaluation is a folder with scores.json and items.jsonl (dreamer_jax/evaluation/evaluation.py writes it). A run has
one for each checkpoint and depth that was evaluated, in its folder `evaluation`. What is missing or broken is an error
that names the file and the command that makes it anew.
"""

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from dreamer_jax.evaluation.comparison.statistics import Estimate
from dreamer_jax.evaluation.requests import EvaluationError

FORMAT = 1
"""Of the folders that are read."""

Kind = TypeVar("Kind")
Items = dict[str, dict[str, dict[str, float]]]
"""Scores by task, item and metric."""


@dataclass(frozen=True)
class TaskResult:
    """What an evaluation says of one task."""

    metrics: dict[str, Estimate]
    """The first is the one that stands in tables."""
    chance: float | None
    prompts: str
    """Hash of all that the model was asked."""
    limit: int | None
    reading: tuple[int | None, int | None]
    """(tokens of the context, stride of the window over longer texts); the stride is None for half a context."""

    @property
    def metric(self) -> str:
        """The name of the metric that stands in tables."""
        return next(iter(self.metrics))

    @property
    def estimate(self) -> Estimate:
        """Its value."""
        return self.metrics[self.metric]


@dataclass(frozen=True)
class Results:
    """What an evaluation says: of one checkpoint at one depth."""

    folder: Path
    run: str
    step: int
    tokens: float
    """Training tokens until then."""
    depth: int
    trained_depth: int
    variant: str
    parameters: int
    tasks: dict[str, TaskResult]


@dataclass(frozen=True)
class Run:
    """The evaluations of one run."""

    label: str
    """Unique among the runs that are compared."""
    path: Path
    """As it was given."""
    checkpoints: tuple[Results, ...]
    """Those at the trained depth, in the order of training; or the only one that was named, at whatever depth."""
    results: tuple[Results, ...]
    """Of all its evaluations."""

    @property
    def last(self) -> Results:
        """The newest checkpoint."""
        return self.checkpoints[-1]

    @property
    def depths(self) -> tuple[Results, ...]:
        """The newest checkpoint that was evaluated at several depths, at each of them; else the newest alone."""
        steps = [r.step for r in self.results]
        step = max((s for s in steps if steps.count(s) > 1), default=max(steps))
        return tuple(sorted((r for r in self.results if r.step == step), key=lambda r: r.depth))


def read_runs(paths: Sequence[Path]) -> tuple[Run, ...]:
    """The evaluations of each run, with labels that tell the runs apart.

    Raises:
        EvaluationError: no evaluation, a broken one, or a run that is given twice.
    """
    if not paths:
        raise EvaluationError("there is nothing to compare: name two runs or more")
    places = [path.resolve() for path in paths]
    for path, place in zip(paths, places, strict=True):
        if places.count(place) > 1:
            raise EvaluationError(f"'{path}' is given twice: name each run once")
    runs = [_run(path) for path in paths]
    labels = [run.label for run in runs]
    return tuple(
        Run(str(run.path), run.path, run.checkpoints, run.results) if labels.count(run.label) > 1 else run
        for run in runs
    )


def at_depths(folders: Sequence[Path], tasks: Sequence[str]) -> Run:
    """Evaluations of one run at several depths as a run of their own, with these tasks alone.

    Raises:
        EvaluationError: one of them is broken.
    """
    found = [_results(folder) for folder in folders]
    results = tuple(replace(r, tasks={name: r.tasks[name] for name in tasks if name in r.tasks}) for r in found)
    return Run(results[-1].run, folders[-1], results, results)


def read_items(folder: Path) -> Items:
    """The scores of an evaluation's items: of those that have some, as the items of unfinished tasks have not.

    Raises:
        EvaluationError: items.jsonl is missing or broken.
    """
    path = folder / "items.jsonl"
    if not path.is_file():
        raise EvaluationError(f"'{path}' is missing; {evaluate_again(folder)}")
    items: Items = {}
    whole = path.read_bytes().rpartition(b"\n")[0]  # without a last line that was cut off
    for row, line in enumerate(whole.splitlines(), 1):
        item = _json(line, f"'{path}', row {row}", folder)
        try:
            task, name, scores = item["task"], str(item["id"]), item.get("scores")
            if scores is None:
                continue
            twice = name in items.setdefault(task, {})
            items[task][name] = {metric: float(score) for metric, score in scores.items()}
        except (KeyError, TypeError, ValueError, AttributeError):
            raise EvaluationError(f"'{path}', row {row} is not an item; {evaluate_again(folder)}") from None
        if twice:
            raise EvaluationError(f"'{path}', row {row}: '{name}' of {task} is there twice; {evaluate_again(folder)}")
    return items


def evaluate_command(path: Path) -> str:
    """What makes the evaluations of a run, or of the run that a folder of an evaluation lies in."""
    run = path.parent.parent if path.parent.name.startswith("evaluation") else path
    return f"python -m dreamer_jax.evaluate --checkpoint {shlex.quote(str(run))} --data ROOT --all"


def evaluate_again(folder: Path) -> str:
    """What to do about an evaluation that is broken."""
    return f"remove '{folder}' and evaluate again: {evaluate_command(folder)}"


def _run(path: Path) -> Run:
    if (path / "scores.json").is_file():
        only = _results(path)
        other = f", depth {only.depth}" if only.depth != only.trained_depth else ""
        return Run(f"{only.run} (step {only.step}{other})", path, (only,), (only,))
    results = tuple(_results(file.parent) for file in sorted(path.glob("evaluation/*/scores.json")))
    if not path.is_dir():
        raise EvaluationError(f"'{path}' is not a folder: give that of a run, or of one of its evaluations")
    if not results:
        raise EvaluationError(f"'{path}' has no evaluation; make it: {evaluate_command(path)}")
    places = [(r.step, r.depth) for r in results]
    for r in results:
        if places.count((r.step, r.depth)) > 1:
            raise EvaluationError(
                f"'{r.folder}' is one of two evaluations of step {r.step} at depth {r.depth}: remove one"
            )
    checkpoints = sorted((r for r in results if r.depth == r.trained_depth), key=lambda r: (r.tokens, r.step))
    return Run(results[-1].run, path, tuple(checkpoints), results)


def _results(folder: Path) -> Results:
    path = folder / "scores.json"
    scores = _json(path.read_bytes(), f"'{path}'", folder)
    if _get(scores, "format", int, path) != FORMAT:
        raise EvaluationError(f"'{path}': format {scores['format']} is not {FORMAT}, which this version reads")
    return Results(
        folder=folder,
        run=_get(scores, "run", str, path),
        step=_get(scores, "step", int, path),
        tokens=_number(scores, "tokens", path),
        depth=_get(scores, "depth", int, path),
        trained_depth=_get(scores, "trained_depth", int, path),
        variant=_get(scores, "variant", str, path),
        parameters=_get(scores, "parameters", int, path),
        tasks={
            name: _task_result(task, name, path, (scores.get("context"), scores.get("stride")))
            for name, task in _get(scores, "tasks", dict, path).items()
        },
    )


def _task_result(task: Any, name: str, path: Path, reading: tuple[int | None, int | None]) -> TaskResult:
    where = f"tasks.{name}"
    metrics = _get(task, "metrics", dict, path, where)
    if not metrics:
        raise EvaluationError(f"'{path}': {where}.metrics is empty; evaluate again: {evaluate_command(path.parent)}")
    limit = task.get("limit")
    return TaskResult(
        metrics={metric: _estimate(values, path, f"{where}.metrics.{metric}") for metric, values in metrics.items()},
        chance=next(iter(metrics.values())).get("chance"),
        prompts=_get(task, "prompts", str, path, where),
        limit=None if limit is None else _get(task, "limit", int, path, where),
        reading=reading,
    )


def _estimate(values: Any, path: Path, where: str) -> Estimate:
    low, high = (_number(values, key, path, where, bound) for key, bound in (("low", -math.inf), ("high", math.inf)))
    return Estimate(_number(values, "value", path, where), low, high, _get(values, "n", int, path, where))


def _number(values: Any, key: str, path: Path, where: str = "", null: float | None = None) -> float:
    """A number; `null`, if given, stands for one that is not there."""
    if null is not None and isinstance(values, dict) and values.get(key) is None:
        return null
    return float(_get(values, key, (int, float), path, where))


def _get(values: Any, key: str, kind: type[Kind] | tuple[type[Kind], ...], path: Path, where: str = "") -> Kind:
    found = values.get(key) if isinstance(values, dict) else None
    if not isinstance(found, kind):
        name = f"{where}.{key}" if where else key
        raise EvaluationError(f"'{path}': {name} is missing or not what it should be; {evaluate_again(path.parent)}")
    return found


def _json(text: bytes, where: str, folder: Path) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise EvaluationError(f"{where} is not JSON ({error}); {evaluate_again(folder)}") from None
