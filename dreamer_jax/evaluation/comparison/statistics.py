"""What scores say beyond their mean: 95 % intervals, paired differences of two models, and data efficiency."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dreamer_jax.evaluation.requests import EvaluationError

Z = 1.959963984540054
"""Standard deviations on either side of a normal's mean that hold 95 % of it."""
Numbers = Sequence[float | int] | np.ndarray
"""A score for each question, document or checkpoint."""
SAME = 1e-12
"""Means of the same scores may differ by this much in floating point."""


class Estimate(NamedTuple):
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int
    """Questions."""


class Difference(NamedTuple):
    """How much higher one model scores than another on the same questions."""

    value: float
    low: float
    high: float
    p: float
    """Two-sided: the chance of a difference this large, either way, between models that are equally good."""
    correlation: float | None
    """Of their scores, question by question; None where a model scores the same on all of them."""
    n: int


class Efficiency(NamedTuple):
    """Training tokens that a baseline needed for its best score, divided by those that another run needs for it."""

    value: float | None
    """None where only a bound is known."""
    low: float
    """At least this much: the run has the score at a checkpoint. 0: no checkpoint has it."""
    high: float
    """Less than this: the checkpoint before has not. Infinite: the first one has it already."""

    def __str__(self) -> str:
        """As it stands in a table; bounds are rounded to the safe side."""
        if self.value is not None:
            return f"{self.value:.1f}"
        if self.low > 0:
            return f"≥ {math.floor(round(10 * self.low, 6)) / 10:.1f}"
        return f"< {math.ceil(round(10 * self.high, 6)) / 10:.1f}" if self.high <= 1 else "not reached"


def mean_interval(scores: Numbers) -> Estimate:
    """The mean of per-question scores with a 95 % interval.

    The questions count as a sample of all that could have been asked. Scores of 0 and 1 get Wilson's interval, which
    stays within [0, 1], holds for few questions and does not vanish when all answers are right. Others get the normal
    one of the central limit theorem. Where that has no spread to go by (one question, or all scores equal), scores
    within [0, 1] get Wilson's again, the widest that their mean allows; one score outside [0, 1] says nothing of the
    spread, and its interval is infinite.

    Raises:
        EvaluationError: there are no scores.
    """
    x = np.asarray(scores, dtype=np.float64)
    if not x.size:
        raise EvaluationError("there are no scores to average: ask at least one question (see --limit)")
    mean, n = float(x.mean()), x.size
    flat = n == 1 or float(np.ptp(x)) == 0
    if _binary(x) or (flat and 0 <= mean <= 1):
        return Estimate(mean, *_wilson(mean, n), n)
    half = math.inf if n == 1 else Z * float(x.std(ddof=1)) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def average(estimates: Sequence[Estimate]) -> Estimate:
    """The plain mean of the means of independent tasks.

    Each bound is as far from it as the root of the tasks' squared distances, over their number (Zou and Donner, 2008).
    For normal intervals that is the usual sum of variances; Wilson's keep their asymmetry.

    Raises:
        EvaluationError: there are no tasks.
    """
    if not estimates:
        raise EvaluationError("there are no tasks to average")
    k = len(estimates)
    mean = math.fsum(e.value for e in estimates) / k
    below = math.hypot(*(e.value - e.low for e in estimates)) / k
    above = math.hypot(*(e.high - e.value for e in estimates)) / k
    return Estimate(mean, mean - below, mean + above, sum(e.n for e in estimates))


def paired_difference(a: Numbers, b: Numbers) -> Difference:
    """Mean of a - b over the same questions in the same order, with a 95 % interval.

    Two models tend to fail on the same questions. The variance of the mean difference is therefore
    (Var a + Var b - 2 Cov(a, b)) / n, mostly far below that of unpaired means (Miller, arXiv 2411.00640, section 4.2).
    The interval is put together from those of the two means in this way, each in its own direction: for the normal
    intervals of arbitrary scores that gives this very variance; for the Wilson intervals of 0 and 1 it is Newcombe's
    (1998, method 10), which holds for few questions, too. The p-value comes from the normal distribution or, for 0 and
    1, from the questions on which the models differ, of which each should win half (McNemar's test, mid-p).

    Raises:
        EvaluationError: no questions, or not as many for one as for the other.
    """
    x, y = _pairs(a, b)
    left, right = mean_interval(a), mean_interval(b)
    binary = _binary(x) and _binary(y)
    r = _correlation(x, y)
    together = (_corrected(r, x, y) if binary else r) or 0.0
    value = left.value - right.value
    low = value - _side(left.value - left.low, right.high - right.value, together)
    high = value + _side(left.high - left.value, right.value - right.low, together)
    p = _mcnemar(int(np.sum(x > y)), int(np.sum(x < y))) if binary else _two_sided(value, (high - low) / 2 / Z)
    return Difference(value, low, high, p, r, x.size)


def paired_rate_difference(a: Numbers, b: Numbers, sizes: Numbers) -> Difference:
    """sum(a - b) / sum(sizes) over the same documents, with a 95 % interval: of two models' nats per token or byte.

    Perplexity is the exponential of such a rate, so the exponential of the difference is the ratio of two perplexities.
    Documents, not tokens, are the independent sample. The interval is that of a ratio of two sums by the delta method:
    the variance of (a - b) - difference x size, over documents, divided by the squared mean size.

    Raises:
        EvaluationError: no documents, not as many of each kind, or all of size 0.
    """
    x, y = _pairs(a, b)
    size = np.asarray(sizes, dtype=np.float64)
    if size.shape != x.shape or not size.sum() > 0:
        raise EvaluationError(f"{x.size} documents need as many sizes, not all 0; there are {size.size}")
    value = float((x - y).sum() / size.sum())
    n = x.size
    residual = (x - y) - value * size
    error = math.sqrt(n / (n - 1) * float(residual @ residual)) / float(size.sum()) if n > 1 else math.inf
    return Difference(value, value - Z * error, value + Z * error, _two_sided(value, error), _correlation(x, y), n)


def average_difference(differences: Sequence[Difference]) -> Difference:
    """The plain mean of the differences on independent tasks; its p-value is of the normal distribution.

    Raises:
        EvaluationError: there are no tasks.
    """
    mean = average([Estimate(d.value, d.low, d.high, d.n) for d in differences])
    p = _two_sided(mean.value, (mean.high - mean.low) / 2 / Z)
    return Difference(mean.value, mean.low, mean.high, p, None, mean.n)


def running_best(scores: Numbers) -> list[int]:
    """For each checkpoint, which one has the highest score so far: the first of equal ones."""
    best: list[int] = []
    for i, score in enumerate(scores):
        best.append(i if not best or score > scores[best[-1]] + SAME else best[-1])
    return best


def data_efficiency(baseline_tokens: Numbers, baseline: Numbers, tokens: Numbers, scores: Numbers) -> Efficiency | None:
    """The saving factor of training tokens to reach the baseline's best score.

    The baseline needs the tokens of its first checkpoint with its best score. The other run reaches that score between
    the first checkpoint that has it and the one before, and where is found on the straight line between the two in the
    running best over tokens. `low` and `high` are what the two checkpoints prove without that line.

    Args:
        baseline_tokens: training tokens at the baseline's checkpoints, in rising order.
        baseline: its scores there; higher is better.
        tokens: training tokens at the other run's checkpoints, in rising order.
        scores: its scores there.

    Returns:
        None with fewer than two checkpoints of either run, and where a score counts that was there before training.
    """
    if min(len(baseline), len(scores)) < 2:
        return None
    best = running_best(baseline)[-1]
    needed, goal = baseline_tokens[best], baseline[best]
    reached = next((i for i, score in enumerate(scores) if score >= goal - SAME), None)
    if needed <= 0 or (reached is not None and tokens[reached] <= 0):
        return None
    if reached is None:
        return Efficiency(None, 0.0, needed / tokens[-1])
    low = needed / tokens[reached]
    if reached == 0:
        return Efficiency(None, low, math.inf)
    before = tokens[reached - 1]
    start = max(scores[:reached])
    share = min((goal - start) / (scores[reached] - start), 1.0)
    crossing = before + share * (tokens[reached] - before)
    return Efficiency(needed / crossing, low, needed / before if before > 0 else math.inf)


def _binary(x: np.ndarray) -> bool:
    return bool(np.all((x == 0) | (x == 1)))


def _wilson(p: float, n: int) -> tuple[float, float]:
    middle = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    # At 0 and 1 the bound is p itself, which rounding may miss.
    return min(max(middle - half, 0.0), p), max(min(middle + half, 1.0), p)


def _pairs(a: Numbers, b: Numbers) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.shape != y.shape or not x.size:
        raise EvaluationError(
            f"a paired difference needs both scores of each question: {x.size} and {y.size} are given"
        )
    return x, y


def _correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    dx, dy = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(dx @ dx) * float(dy @ dy))
    return max(-1.0, min(1.0, float(dx @ dy) / scale)) if np.ptp(x) > 0 and np.ptp(y) > 0 else None


def _corrected(r: float | None, x: np.ndarray, y: np.ndarray) -> float | None:
    """Newcombe's correlation of 0 and 1: a positive one is made smaller, as if half a question disagreed more."""
    if r is None or r <= 0:
        return r
    n = x.size
    return max(r - 1 / (2 * n * float(x.std()) * float(y.std())), 0.0)


def _side(mine: float, other: float, correlation: float) -> float:
    """How far the bound of a difference is from it, by the distances of the bounds of its two means."""
    if math.isinf(mine) or math.isinf(other):
        return math.inf
    return math.sqrt(max(mine**2 + other**2 - 2 * correlation * mine * other, 0.0))


def _two_sided(value: float, error: float) -> float:
    if error == 0:
        return 1.0 if value == 0 else 0.0
    return math.erfc(abs(value) / error / math.sqrt(2))


def _mcnemar(wins: int, losses: int) -> float:
    """Twice the chance of so few wins of the loser among fair coins, the observed number counted half."""
    fewer, n = min(wins, losses), wins + losses
    ways, below = 1, 0
    for k in range(fewer):
        below += ways
        ways = ways * (n - k) // (k + 1)
    return min((2 * below + ways) / 2**n, 1.0)
