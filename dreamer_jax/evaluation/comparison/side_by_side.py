"""Runs side by side: a column for each task, and the differences from a baseline, question by question.

Only what was asked and scored alike is put side by side; all else is an error that names the two evaluations.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from dreamer_jax.evaluation.comparison.results import (
    Items,
    Results,
    Run,
    TaskResult,
    evaluate_again,
    evaluate_command,
    read_items,
)
from dreamer_jax.evaluation.comparison.statistics import (
    Difference,
    Efficiency,
    Estimate,
    average,
    average_difference,
    data_efficiency,
    paired_difference,
    paired_rate_difference,
    running_best,
)
from dreamer_jax.evaluation.requests import EvaluationError

PERPLEXITY = "perplexity"
"""A first metric of this name is better when lower, no accuracy, and no part of the average."""
AVERAGE = "average"


class Point(NamedTuple):
    """A score of a checkpoint."""

    step: int
    tokens: float
    estimate: Estimate


@dataclass(frozen=True)
class Column:
    """What all runs reach on one task, or on average."""

    title: str
    metric: str
    chance: float | None
    """What guessing gives; None where it gives nothing."""
    points: tuple[tuple[Point, ...], ...]
    """By run, in the order of training."""

    @property
    def accuracy(self) -> bool:
        """Whether higher is better and the unit is percent; else it is a perplexity."""
        return self.metric != PERPLEXITY

    @cached_property
    def best(self) -> tuple[Point | None, ...]:
        """By run; the first of equally good checkpoints."""
        return tuple(points[running_best(self._rising(points))[-1]] if points else None for points in self.points)

    def last(self, runs: Sequence[Run]) -> tuple[Point | None, ...]:
        """By run, of its newest checkpoint; None where that one was not asked this."""
        newest = (points[-1] if points else None for points in self.points)
        return tuple(p if p and p.step == run.last.step else None for p, run in zip(newest, runs, strict=True))

    def efficiency(self, run: int, baseline: int) -> Efficiency | None:
        """Data efficiency of an accuracy; None where it cannot be told (see `data_efficiency`).

        Nor is there one where the baseline's best is no better than chance: any run has that from the beginning.
        """
        ours, theirs, goal = self.points[run], self.points[baseline], self.best[baseline]
        if not self.accuracy or min(len(ours), len(theirs)) < 2:
            return None
        if goal is None or goal.estimate.value <= (self.chance or 0):
            return None
        if run == baseline:
            return Efficiency(1.0, 1.0, 1.0)
        return data_efficiency(
            [p.tokens for p in theirs], self._rising(theirs), [p.tokens for p in ours], self._rising(ours)
        )

    def _rising(self, points: Sequence[Point]) -> list[float]:
        """Their scores, such that higher is better."""
        return [p.estimate.value if self.accuracy else -p.estimate.value for p in points]


class Pair(NamedTuple):
    """A run against the baseline on the same questions, each at its last checkpoint."""

    run: str
    task: str
    unit: str
    """Of the difference: `accuracy`, `nats per token` or `nats per byte`."""
    difference: Difference


@dataclass(frozen=True)
class Comparison:
    """All that is said of some runs."""

    runs: tuple[Run, ...]
    baseline: int
    columns: tuple[Column, ...]
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...]


def compared(runs: tuple[Run, ...], baseline: int = 0) -> Comparison:
    """All figures of a comparison.

    Raises:
        EvaluationError: two evaluations asked different things.
    """
    for run in runs:
        if not run.checkpoints:
            raise EvaluationError(
                f"'{run.path}' has no evaluation at the trained depth; make it: {evaluate_command(run.path)}"
            )
    tasks = [name for name in _tasks(runs) if all(_scored(run, name) for run in runs)]
    if not tasks:
        have = "; ".join(f"'{run.label}': {', '.join(_tasks([run])) or 'none'}" for run in runs)
        raise EvaluationError(f"no task has been evaluated for all runs ({have}): {evaluate_command(runs[-1].path)}")
    _check_comparable([r for run in runs for r in run.checkpoints], tasks)
    columns = [_column(runs, name) for name in tasks]
    columns.sort(key=lambda column: column.accuracy)
    accuracies = [column for column in columns if column.accuracy]
    if len(accuracies) > 1:
        columns.append(_mean_column(accuracies))
    return Comparison(runs, baseline, tuple(columns), _pairs(runs, baseline, columns), tuple(_notes(runs, tasks)))


def depth_columns(run: Run) -> tuple[Column, ...]:
    """A column for each task that the run was asked at any of its `Run.depths`; the points are from low to high.

    Raises:
        EvaluationError: two evaluations asked different things.
    """
    deep = Run(run.label, run.path, run.depths, run.depths)
    tasks = _tasks([deep])
    _check_comparable(deep.checkpoints, tasks)
    return tuple(_column([deep], name) for name in tasks)


def amount(n: float | int) -> str:
    """A number of tokens or parameters for people, with three digits."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{float(f'{n / size:.3g}'):g}{unit}"
    return f"{n:g}"


def _tasks(runs: Sequence[Run]) -> list[str]:
    """All tasks of some runs' checkpoints, in the order in which they appear."""
    return list(dict.fromkeys(name for run in runs for r in run.checkpoints for name in r.tasks))


def _scored(run: Run, task: str) -> list[tuple[Results, TaskResult]]:
    """The checkpoints of a run that were asked a task."""
    return [(r, r.tasks[task]) for r in run.checkpoints if task in r.tasks]


def _check_comparable(results: Sequence[Results], tasks: Sequence[str]) -> None:
    """All must have asked the same of their models.

    Raises:
        EvaluationError: one did not.
    """
    for task in tasks:
        asked = [(r, r.tasks[task]) for r in results if task in r.tasks]
        first, reference = asked[0]
        for r, result in asked:
            apart = _apart(result, reference)
            if apart:
                raise EvaluationError(
                    f"{task} cannot be compared, for {apart}: '{r.folder}' and '{first.folder}'; evaluate both alike"
                )


def _apart(a: TaskResult, b: TaskResult) -> str:
    """In what two evaluations of a task differ that have to be alike; empty if in nothing."""
    if a.limit != b.limit:
        return f"the limits of questions differ ({a.limit or 'none'} and {b.limit or 'none'})"
    if a.prompts != b.prompts:
        return f"the prompts differ (hashes {a.prompts[:12]} and {b.prompts[:12]})"
    if a.reading != b.reading:
        context, stride = zip(a.reading, b.reading, strict=True)
        return f"context and stride differ ({context[0]}, {stride[0]} and {context[1]}, {stride[1]})"
    return f"the metrics differ ({a.metric} and {b.metric})" if a.metric != b.metric else ""


def _notes(runs: Sequence[Run], tasks: Sequence[str]) -> list[str]:
    """What a reader should know of these runs before comparing them."""
    notes = []
    for name in _tasks(runs):
        lacking = [_name(run, r) for run in runs for r in run.checkpoints if name not in r.tasks]
        if lacking:
            fate = "is left out where it is missing" if name in tasks else "is left out: some run has none of it"
            notes.append(f"{name} {fate}. Not evaluated: {_few(lacking)}.")
    limits = {name: _scored(runs[0], name)[0][1].limit for name in tasks}
    for limit in dict.fromkeys(limit for limit in limits.values() if limit is not None):
        limited = ", ".join(name for name in tasks if limits[name] == limit)
        notes.append(f"Limited to the first {limit:,} questions of each part: {limited}.")
    if len({run.last.tokens for run in runs}) > 1:
        each = ", ".join(f"{run.label} {amount(run.last.tokens)}" for run in runs)
        notes.append(f"The last checkpoints have seen different numbers of training tokens: {each}.")
    return notes


def _name(run: Run, results: Results) -> str:
    """Of a checkpoint of a run; an evaluation that was named by itself has its step in its label."""
    return run.label if run.path == results.folder else f"{run.label} (step {results.step})"


def _few(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _column(runs: Sequence[Run], task: str) -> Column:
    points = tuple(tuple(Point(r.step, r.tokens, result.estimate) for r, result in _scored(run, task)) for run in runs)
    result = _scored(runs[0], task)[0][1]
    return Column(task, result.metric, result.chance, points)


def _mean_column(columns: Sequence[Column]) -> Column:
    """The mean over tasks of each checkpoint that has all of them."""
    points = []
    for run in range(len(columns[0].points)):
        by_step = [{p.step: p for p in column.points[run]} for column in columns]
        shared = [p for step, p in by_step[0].items() if all(step in steps for steps in by_step)]
        means = [average([steps[p.step].estimate for steps in by_step]) for p in shared]
        points.append(tuple(Point(p.step, p.tokens, mean) for p, mean in zip(shared, means, strict=True)))
    guessed = sum(column.chance or 0 for column in columns) / len(columns)
    return Column(AVERAGE, "mean of tasks", guessed or None, tuple(points))


def _pairs(runs: Sequence[Run], baseline: int, columns: Sequence[Column]) -> tuple[Pair, ...]:
    """Each other run against the baseline, where both last checkpoints have the task."""
    if len(runs) == 1:
        return ()
    reference = read_items(runs[baseline].last.folder)
    pairs = []
    for run in (run for i, run in enumerate(runs) if i != baseline):
        items = read_items(run.last.folder)
        tasks = [c for c in columns if c.title in run.last.tasks and c.title in runs[baseline].last.tasks]
        mine = [_pair(run, runs[baseline], column, items, reference) for column in tasks]
        accuracies = [pair.difference for pair in mine if pair.unit == "accuracy"]
        if 1 < len(accuracies) == sum(c.accuracy and c.title != AVERAGE for c in columns):
            mine.append(Pair(run.label, AVERAGE, "accuracy", average_difference(accuracies)))
        pairs += mine
    return tuple(pairs)


def _pair(run: Run, baseline: Run, column: Column, items: Items, reference: Items) -> Pair:
    ours, theirs = _judged(run.last, items, column), _judged(baseline.last, reference, column)
    if ours.keys() != theirs.keys():
        raise EvaluationError(
            f"{column.title}: questions are missing, {len(theirs.keys() - ours.keys()):,} in '{run.last.folder}' and "
            f"{len(ours.keys() - theirs.keys()):,} in '{baseline.last.folder}'; remove both and evaluate again"
        )

    def both(metric: str) -> tuple[list[float], list[float]]:
        return _scores(ours, theirs, metric, run.last.folder), _scores(theirs, theirs, metric, baseline.last.folder)

    if column.accuracy:
        return Pair(run.label, column.title, "accuracy", paired_difference(*both(column.metric)))
    # Tokens of one tokenizer are worth more than those of another; bytes are bytes.
    tokens, other = both("tokens")
    unit, sizes = ("nats per token", tokens) if tokens == other else ("nats per byte", both("bytes")[0])
    return Pair(run.label, column.title, unit, paired_rate_difference(*both("nats"), sizes))


def _judged(results: Results, items: Items, column: Column) -> dict[str, dict[str, float]]:
    """The items that the metric of a column is made of; a task may have others, for its other metrics."""
    metric = column.metric if column.accuracy else "nats"
    found = {name: scores for name, scores in items.get(column.title, {}).items() if metric in scores}
    counted = results.tasks[column.title].estimate.n
    if len(found) != counted:
        raise EvaluationError(
            f"'{results.folder / 'items.jsonl'}': {len(found):,} items of {column.title} have a score '{metric}', "
            f"scores.json counts {counted:,}; {evaluate_again(results.folder)}"
        )
    return found


def _scores(items: dict[str, dict[str, float]], order: Iterable[str], metric: str, folder: Path) -> list[float]:
    """Of one metric, in the order of the names."""
    try:
        return [items[name][metric] for name in order]
    except KeyError:
        path = folder / "items.jsonl"
        raise EvaluationError(f"'{path}': an item has no score '{metric}'; {evaluate_again(folder)}") from None
