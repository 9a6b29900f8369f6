"""What a task's own answers score: all must be right, and, dealt out to other questions, no better than chance."""

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dreamer_jax.data.template import DEFAULT_TEMPLATE
from dreamer_jax.evaluation.requests import (
    Choose,
    EvaluationError,
    Generate,
    Generated,
    Item,
    Likelihoods,
    Outcome,
    Task,
    Verdict,
)


@dataclass(frozen=True)
class GoldCheck:
    """How a task judges answers that are known to be right, and answers to other questions."""

    items: int
    gold: dict[str, float]
    """The mean of each metric on the right answers; it should be 1."""
    shuffled: dict[str, float]
    """The same on answers to other questions; it should be near the metric's chance, or 0. Empty with one question."""
    exceptions: dict[str, list[str]]
    """The items whose right answer scores less than 1, by metric; metrics without any are left out."""
    notes: dict[str, int]
    """Rows that are odd or were left out, as the task counts them."""


def check(task: Task, root: Path, seed: int = 0) -> GoldCheck:
    """Judge a task's own answers, in their places and dealt out to other questions.

    Raises:
        EvaluationError: its files cannot be read; it has no items, or some without a right answer.
    """
    questions = task.questions(root)
    items = questions.items
    if not items:
        raise EvaluationError(f"{task.name}: no row has an answer; fetch its file again")
    gold = list(task.verdicts(items, gold_outcomes(items)))
    alone = min(map(len, _by_kind(items).values())) == 1  # no other question could lend its answer
    shuffled = [] if alone else list(task.verdicts(items, shuffled_outcomes(items, seed)))
    exceptions = {
        metric: [item.id for item, verdict in zip(items, gold, strict=True) if verdict.scores.get(metric, 1.0) < 1.0]
        for metric in task.metrics
    }
    exceptions = {metric: ids for metric, ids in exceptions.items() if ids}
    return GoldCheck(len(items), _means(gold), _means(shuffled), exceptions, questions.notes)


def gold_outcomes(items: Sequence[Item]) -> list[Outcome]:
    """What a model would return that knows all right answers.

    A text is the item's solution, whose tokens are not counted. The right option has probability 1; where several are
    right, the first of them.

    Raises:
        EvaluationError: an item has no right answer.
    """
    return [_outcome(item, item) for item in items]


def shuffled_outcomes(items: Sequence[Item], seed: int) -> list[Outcome]:
    """The same with the right answers of other items that ask for the same kind of thing, of each item once.

    Raises:
        EvaluationError: an item has no right answer, or is the only one that asks for its kind of thing.
    """
    givers: dict[int, Item] = {}
    for places in _by_kind(items).values():
        if len(places) == 1:
            raise EvaluationError(f"item {items[places[0]].id}: no other item's answer to give to it; use more rows")
        random.Random(seed).shuffle(places)
        givers |= {place: items[giver] for place, giver in zip(places, places[1:] + places[:1], strict=True)}
    return [_outcome(item, givers[place]) for place, item in enumerate(items)]


def _by_kind(items: Sequence[Item]) -> Mapping[type, list[int]]:
    places: dict[type, list[int]] = defaultdict(list)
    for place, item in enumerate(items):
        places[type(item.request)].append(place)
    return places


def _outcome(item: Item, giver: Item) -> Outcome:
    """The right answer of `giver` as an outcome of `item`."""
    match item.request:
        case Generate() if giver.solution:
            return Generated(DEFAULT_TEMPLATE.answered(giver.solution), tokens=0, finished=True)
        case Choose(options=options) if giver.gold is not None:
            right = _right_option(giver) % len(options)
            nats = tuple(0.0 if option == right else -1000.0 for option in range(len(options)))
            return Likelihoods(nats, tuple(n == 0.0 for n in nats), tuple(1 for _ in options))
    raise EvaluationError(f"item {giver.id}: no right answer, so that there is nothing to check")


def _right_option(item: Item) -> int:
    return int(item.gold[0] if isinstance(item.gold, Sequence) else item.gold)


def _means(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """The mean of each metric over the items that have it."""
    scores: dict[str, list[float]] = defaultdict(list)
    for verdict in verdicts:
        for metric, score in verdict.scores.items():
            scores[metric].append(score)
    return {metric: sum(values) / len(values) for metric, values in scores.items()}
