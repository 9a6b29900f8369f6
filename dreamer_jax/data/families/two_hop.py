"""two_hop: facts of a random knowledge graph, and questions that put two of them together.

    e17 r3      -> e42      a fact: relation r3 leads from entity e17 to e42
    e17 r3 r8   -> e99      a composition: on from e42 by relation r8

Only its length tells a composition from a fact. All facts are trained on. So are most compositions of two facts that
are not held out. What is asked for in a test was never trained on: the other compositions of such facts
(in_distribution), and those whose first fact, second fact or both are held out, which were trained on as facts alone.

After "Grokked Transformers are Implicit Reasoners" (Wang et al., arXiv 2405.15071), whose numbers these are on a
smaller graph, and "Loop, Think & Generalize" (arXiv 2604.07822).
"""

import itertools
from collections.abc import Iterator
from typing import Annotated, NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from pydantic import Field
from pydantic.dataclasses import dataclass

from dreamer_jax.data.document import Document
from dreamer_jax.data.families.settings import STRICT, Size
from dreamer_jax.data.files import DataError

VALIDATION = 500
"""Compositions of the validation split, where no number is given."""


@dataclass(frozen=True, config=STRICT)
class Settings:
    """The size of the graph, and what is held out."""

    entities: Annotated[int, Field(ge=2, le=100_000)] = 200
    relations: Size = 20
    out_degree: Size = 10
    """Facts of each entity, all of different relations."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the facts that no composition of the training has."""
    compositions: Annotated[float, Field(gt=0, le=1000)] = 7.0
    """Compositions in the training for each fact."""

    def __post_init__(self) -> None:
        """Check what no single setting shows."""
        if self.out_degree > self.relations:
            raise ValueError(f"out_degree = {self.out_degree} needs as many relations, and there are {self.relations}")


class Graph(NamedTuple):
    """F facts, those of entity e at e * out_degree and after. All arrays are [F]."""

    head: Int[np.ndarray, "F"]
    relation: Int[np.ndarray, "F"]
    tail: Int[np.ndarray, "F"]
    is_held_out: Bool[np.ndarray, "F"]


class Compositions(NamedTuple):
    """C pairs of facts, by their numbers; the second begins where the first leads to."""

    first: Int[np.ndarray, "C"]
    second: Int[np.ndarray, "C"]


def graph(settings: Settings, seed: int) -> Graph:
    """The graph of a seed: for each entity distinct relations, each of which leads to another entity."""
    draw = np.random.default_rng([seed, 0])
    size = (settings.entities, settings.relations)
    relation = np.sort(np.argsort(draw.random(size), axis=1)[:, : settings.out_degree], axis=1).ravel()
    head = np.repeat(np.arange(settings.entities), settings.out_degree)
    tail = draw.integers(settings.entities - 1, size=len(head))
    tail += tail >= head
    is_held_out = np.zeros(len(head), bool)
    is_held_out[draw.permutation(len(head))[: max(1, round(settings.held_out * len(head)))]] = True
    return Graph(head, relation, tail, is_held_out)


def compositions(settings: Settings, seed: int) -> dict[str, Compositions]:
    """All compositions of the graph: those of `train` and of each test, in random order.

    Raises:
        DataError: there are fewer than are to be trained on.
    """
    facts = graph(settings, seed)
    first = np.repeat(np.arange(len(facts.head)), settings.out_degree)
    second = (facts.tail[:, None] * settings.out_degree + np.arange(settings.out_degree)).ravel()
    order = np.random.default_rng([seed, 1]).permutation(len(first))
    first, second = first[order], second[order]
    first_is, second_is = facts.is_held_out[first], facts.is_held_out[second]
    trained = round(settings.compositions * len(facts.head))
    kept = np.flatnonzero(~first_is & ~second_is)
    if trained >= len(kept):
        most = max(len(kept) - 1, 0) * 1000 // len(facts.head) / 1000
        remedy = f"give at most compositions = {most:g}, or" if most else "give"
        raise DataError(
            f"two_hop: {settings.compositions:g} compositions for each of {len(facts.head)} facts are {trained}, and "
            f"of facts that are not held out there are {len(kept)}, of which one at least must be left to test with: "
            f"{remedy} a greater out_degree or a smaller held_out"
        )
    chosen = {
        "train": kept[:trained],
        "in_distribution": kept[trained:],
        "first_held_out": np.flatnonzero(first_is & ~second_is),
        "second_held_out": np.flatnonzero(~first_is & second_is),
        "both_held_out": np.flatnonzero(first_is & second_is),
    }
    return {name: Compositions(first[which], second[which]) for name, which in chosen.items()}


def train(settings: Settings, count: int, seed: int) -> Iterator[Document]:
    """All facts, then the compositions that are trained on, in random order; `count` in all, where it is not 0.

    Raises:
        DataError: `count` does not suffice for the facts, all of which the tests put together.
    """
    facts = graph(settings, seed)
    if 0 < count < len(facts.head):
        raise DataError(
            f"two_hop: {count} documents do not hold the {len(facts.head)} facts, which the tests ask for: give "
            f"documents_per_task = {len(facts.head)} or more, or 0 for all documents"
        )
    found = itertools.chain(_facts(facts), _composed(facts, compositions(settings, seed)["train"]))
    return itertools.islice(found, count or None)


def validation(settings: Settings, count: int, seed: int) -> Iterator[Document]:
    """The first compositions of the test in_distribution: `count`, or 500 where it is 0."""
    found = _composed(graph(settings, seed), compositions(settings, seed)["in_distribution"])
    return itertools.islice(found, count or VALIDATION)


def tests(settings: Settings, seed: int) -> dict[str, list[Document]]:
    """All compositions that are not trained on, by what is held out of them."""
    facts = graph(settings, seed)
    return {
        name: list(_composed(facts, chosen)) for name, chosen in compositions(settings, seed).items() if name != "train"
    }


def words(settings: Settings) -> tuple[str, ...]:
    """Every word of the documents."""
    return (
        *(f"e{entity}" for entity in range(settings.entities)),
        *(f"r{relation}" for relation in range(settings.relations)),
    )


def _facts(facts: Graph) -> Iterator[Document]:
    for head, relation, tail in zip(facts.head, facts.relation, facts.tail, strict=True):
        yield Document(f"e{head} r{relation}", f"e{tail}")


def _composed(facts: Graph, chosen: Compositions) -> Iterator[Document]:
    for first, second in zip(chosen.first, chosen.second, strict=True):
        prompt = f"e{facts.head[first]} r{facts.relation[first]} r{facts.relation[second]}"
        yield Document(prompt, f"e{facts.tail[second]}")
