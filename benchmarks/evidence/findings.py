"""What the runs of a family wrote, and what follows from it: curves, steps to a goal, spread over seeds."""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.evidence.setup import Group, Run
from dreamer_jax.evaluation.comparison.statistics import Efficiency, data_efficiency

CONFIG, RECORDS, FINAL = "config.json", "metrics.jsonl", "final.json"
"""What a run has in its folder; the last when it is finished."""
GOAL = 0.9
"""The accuracy whose steps are counted."""


class Curve(NamedTuple):
    """Accuracy along a training."""

    steps: tuple[int, ...]
    values: tuple[float, ...]


class Finding(NamedTuple):
    """What a run has written so far."""

    run: Run
    records: list[dict[str, Any]]
    """Of RECORDS, by rising steps."""
    final: dict[str, Any] | None
    """None of a run that is not finished."""
    config: dict[str, Any] | None
    """None of a run that has not started."""


class Spread(NamedTuple):
    """A figure over seeds."""

    mean: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        """As a percentage: the mean, and the range where there are several seeds."""
        several = f" ({100 * self.low:.1f} to {100 * self.high:.1f})" if self.seeds > 1 else ""
        return f"{100 * self.mean:.1f}{several}"


# Reading.


def finding(run: Run, out: Path) -> Finding:
    """What a run has written; a line that a kill cut off is left out."""
    folder = out / run.name
    records = [json.loads(line) for line in _lines(folder / RECORDS) if line.endswith("}")]
    return Finding(run, records, _json(folder / FINAL), _json(folder / CONFIG))


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def _json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None


def is_done(one: Finding, steps: int) -> bool:
    """Whether a run has been trained for so many steps and evaluated."""
    return one.final is not None and one.final["steps"] == steps


def lacking(found: Sequence[Finding], steps_of: Callable[[Run], int]) -> list[str]:
    """A line for each run that is not finished."""
    lines = []
    for one in found:
        wanted = steps_of(one.run)
        if not is_done(one, wanted):
            at = one.records[-1]["step"] if one.records else 0
            lines.append(f"{one.run.name}: " + (f"at step {at} of {wanted}" if at else "not started"))
    return lines


# What follows.


def curve(one: Finding, group: Group) -> Curve:
    """The mean accuracy of those tests of a group that were asked along the training."""
    points = []
    for record in one.records:
        values = [record[key] for test in group.tests if (key := f"accuracy/{test}") in record]
        known = [value for value in values if value is not None]
        if known:
            points.append((record["step"], sum(known) / len(known)))
    return Curve(tuple(step for step, _ in points), tuple(value for _, value in points))


def steps_to(goal: float, of: Curve) -> int | None:
    """The first step at which the accuracy is `goal` at least; None if it never is."""
    return next((step for step, value in zip(of.steps, of.values, strict=True) if value >= goal), None)


def spread(values: Iterable[float]) -> Spread | None:
    """Mean and range; None without values."""
    known = [value for value in values if math.isfinite(value)]
    return Spread(sum(known) / len(known), min(known), max(known), len(known)) if known else None


def band(curves: Sequence[Curve]) -> tuple[tuple[int, ...], list[Spread]]:
    """The steps that any seed has, and the spread over the seeds that have them."""
    by_step: dict[int, list[float]] = {}
    for of in curves:
        for step, value in zip(of.steps, of.values, strict=True):
            by_step.setdefault(step, []).append(value)
    steps = tuple(sorted(by_step))
    return steps, [found for step in steps if (found := spread(by_step[step]))]


def efficiency(baseline: Curve, of: Curve) -> Efficiency | None:
    """The paper's DE (Table 2): training that the baseline needs for its best accuracy, over that of another run.

    Batches are equally large, so steps stand for tokens.
    """
    return data_efficiency(baseline.steps, baseline.values, of.steps, of.values)


def final_accuracy(tests: dict[str, Any], names: Sequence[str]) -> float:
    """The mean accuracy of some tests in final.json; NaN where none was asked."""
    shares = [tests[name]["right"] / tests[name]["asked"] for name in names if tests.get(name, {}).get("asked")]
    return sum(shares) / len(shares) if shares else math.nan


def none_accuracy(tests: dict[str, Any], names: Sequence[str]) -> float:
    """The share of right answers among those that say that there is none; NaN where there are no such."""
    asked = sum(tests[name]["none_asked"] for name in names if name in tests)
    return sum(tests[name]["none_right"] for name in names if name in tests) / asked if asked else math.nan


def minutes(one: Finding) -> float | None:
    """Minutes that the training takes at the median of its speeds, without evaluations and compilations.

    Speeds count tokens without padding, and here rows count as full: it is a little more than it was.
    """
    speeds = [speed for record in one.records if (speed := record.get("speed/tokens_per_second"))]
    if one.config is None or not speeds:
        return None
    positions = one.records[-1]["step"] * one.config["train"]["batch"] * one.config["data"]["context"]
    return positions / statistics.median(speeds) / 60


def last_of(one: Finding, key: str) -> float | None:
    """The newest value of a figure in the records."""
    return next((record[key] for record in reversed(one.records) if record.get(key) is not None), None)


def worst_of(one: Finding, key: str, begin: float = 0.5) -> float | None:
    """The highest value of a figure in the last part of the records, from the share `begin` of the steps on."""
    last = one.records[-1]["step"] if one.records else 0
    values = [r[key] for r in one.records if r.get(key) is not None and r["step"] >= begin * last]
    return max(values, default=None)


def of_variant(found: Sequence[Finding], variant: str, width: int) -> list[Finding]:
    """The runs of a variant that have begun, by seeds."""
    return [one for one in found if one.run[1:3] == (variant, width) and one.records]


def final_spread(found: Sequence[Finding], tests: Sequence[str]) -> Spread | None:
    """The spread of the mean accuracy of some tests at the end of the training, over the runs that are finished."""
    return over_seeds(found, lambda one: final_accuracy(one.final["trained"]["tests"], tests) if one.final else None)


def over_seeds(found: Sequence[Finding], of: Callable[[Finding], float | None]) -> Spread | None:
    """A figure's spread over the runs that have it."""
    return spread(value for one in found if (value := of(one)) is not None)
