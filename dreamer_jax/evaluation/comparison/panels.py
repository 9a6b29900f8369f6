"""What the figures of a comparison show: its accuracies against training tokens, and scores against depth."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from dreamer_jax.evaluation.comparison.figures import Curve, Panel, Saving
from dreamer_jax.evaluation.comparison.results import Run
from dreamer_jax.evaluation.comparison.side_by_side import PERPLEXITY, Column, Comparison
from dreamer_jax.evaluation.comparison.statistics import Estimate

ACCURACY = "accuracy (%)"


def accuracy_panels(comparison: Comparison) -> list[Panel]:
    """Each accuracy against training tokens, with the tokens that are saved on the way to the baseline's best."""
    return [_accuracy_panel(comparison, column) for column in comparison.columns if column.accuracy]


def depth_panels(runs: Sequence[Run]) -> list[Panel]:
    """The metric of each task against depth (see `Run.depths`), if some run was asked it at several."""
    tasks = dict.fromkeys(name for run in runs for r in run.depths for name in r.tasks)
    several = [name for name in tasks if any(sum(name in r.tasks for r in run.depths) > 1 for run in runs)]
    return [_depth_panel(runs, name) for name in several]


def _accuracy_panel(comparison: Comparison, column: Column) -> Panel:
    curves = [
        _curve(run.label, [p.tokens for p in points], [p.estimate for p in points], scale=100)
        for run, points in zip(comparison.runs, column.points, strict=True)
    ]
    panel = Panel(column.title, ACCURACY, tuple(curves), chance=_percent(column.chance))
    goal = column.best[comparison.baseline]
    if goal is None or len(column.points[comparison.baseline]) < 2:
        return panel
    savings = tuple(_savings(comparison, column, goal.tokens))
    return replace(panel, goal=100 * goal.estimate.value, savings=savings, baseline=comparison.baseline)


def _savings(comparison: Comparison, column: Column, needed: float) -> Iterator[Saving]:
    """Of the runs that reach the baseline's best score, for which it needed so many tokens."""
    for i in range(len(comparison.runs)):
        found = column.efficiency(i, comparison.baseline)
        if i != comparison.baseline and found is not None and found.low > 0:
            yield Saving(i, needed, needed / (found.value or found.low), f"{found}×")


def _depth_panel(runs: Sequence[Run], task: str) -> Panel:
    asked = [[r for r in run.depths if task in r.tasks] for run in runs]
    first = next(r.tasks[task] for results in asked for r in results)
    unit, scale = ("perplexity", 1) if first.metric == PERPLEXITY else (ACCURACY, 100)
    curves = tuple(
        _curve(
            run.label,
            [r.depth for r in results],
            [r.tasks[task].estimate for r in results],
            scale,
            run.depths[0].trained_depth,
        )
        for run, results in zip(runs, asked, strict=True)
    )
    return Panel(task, unit, curves, chance=_percent(first.chance))


def _curve(
    label: str, x: Sequence[float | int], estimates: Sequence[Estimate], scale: int, trained: int | None = None
) -> Curve:
    value, low, high = (tuple(scale * e[i] for e in estimates) for i in range(3))
    return Curve(label, tuple(map(float, x)), value, low, high, None if trained is None else float(trained))


def _percent(chance: float | None) -> float | None:
    return None if chance is None else 100 * chance
