"""dag_mod7: definitions modulo 7 that depend on each other, and the value of one of them, answered without working.

    v3 = 4 ; v11 = v3 * 5 ; v8 = v3 - v11 ; v1 = v8 + 2 ; ? v8   -> 5

A definition is a number, or an earlier variable with a number (+ or - 1 to 6, * 2 to 6), or the sum or difference of
two earlier variables. Nothing is multiplied by another variable or by 0: where an operand changes, so does the result,
and all answers are nearly equally frequent. The variable that is asked for depends on at least half as many others as
there are definitions, so that several values must be kept until they are used.

The family follows no paper. Arithmetic modulo a small prime over a graph of dependencies, answered in one token, is
common in work on what models compute without writing it down.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, NamedTuple

from pydantic import Field
from pydantic.dataclasses import dataclass

from dreamer_jax.data.document import Document
from dreamer_jax.data.families.parts import Part, part_of
from dreamer_jax.data.families.settings import STRICT, Range, Size

MODULUS = 7
NUMBER, WITH_NUMBER = 0.2, 0.45
"""Of random numbers from 0 to 1: below the first a definition is a number, below the second it has one."""


@dataclass(frozen=True, config=STRICT)
class Settings:
    """How many definitions there are, and how they are written."""

    definitions: Range = (2, 8)
    """Of a document, in training and validation."""
    test_definitions: Range = (9, 16)
    """Further numbers of definitions to test with, beside all those of the training."""
    test_size: Size = 200
    """Documents of each test."""
    names: Annotated[int, Field(ge=8, le=10_000)] = 20
    """Variables to choose from: v1, v2, ..."""
    order: Literal["topological", "shuffled"] = "topological"
    """Whether a definition follows those that it depends on. Then its value can be found as soon as it is read; where
    they are shuffled, most of the work is left for the last token."""

    def __post_init__(self) -> None:
        """Check what no single setting shows."""
        most = max(self.definitions[1], self.test_definitions[1])
        if self.definitions[0] < 2:
            raise ValueError(f"definitions = {self.definitions}: one alone depends on no other; begin with 2")
        if most > self.names:
            raise ValueError(f"names = {self.names} do not suffice for {most} definitions")


class Definition(NamedTuple):
    """A number; or an earlier variable, an operator and a number or another earlier variable."""

    operator: str
    """+, - or *; empty for a number alone."""
    operands: tuple[int, ...]
    """None, one or two, by the places of their definitions."""
    number: int
    """The one it has; 0 where it has none."""


class Problem(NamedTuple):
    """Definitions in an order in which each follows those it depends on, and which is asked for."""

    definitions: tuple[Definition, ...]
    query: int


class Shape(NamedTuple):
    """How much there is to do for the variable that is asked for."""

    definitions: int
    depth: int
    """Steps of the longest chain of definitions behind it; 0 of a number."""
    ancestors: int
    """Other variables that it depends on."""


def values(definitions: Sequence[Definition]) -> list[int]:
    """The value of each definition, from 0 to 6."""
    found: list[int] = []
    for operator, operands, number in definitions:
        left, right, *_ = [*(found[i] for i in operands), number, 0]
        result = {"": left, "+": left + right, "-": left - right, "*": left * right}[operator]
        found.append(result % MODULUS)
    return found


def shape_of(prompt: str) -> Shape:
    """What the text of a problem asks for, whatever the order of its definitions."""
    *lines, question = prompt.split(" ; ")
    needs = {name: [w for w in text.split() if w[0] == "v"] for name, text in (line.split(" = ") for line in lines)}
    depth: dict[str, int] = {}
    while len(depth) < len(needs):
        known = {name for name, others in needs.items() if depth.keys() >= set(others)} - depth.keys()
        depth |= {name: max((depth[other] + 1 for other in needs[name]), default=0) for name in known}
    query = question.removeprefix("? ")
    reached = {query}
    for name in sorted(needs, key=depth.__getitem__, reverse=True):
        reached |= set(needs[name]) if name in reached else set()
    return Shape(len(lines), depth[query], len(reached) - 1)


def train(settings: Settings, count: int, seed: int) -> Iterator[Document]:
    """So many documents of all numbers of definitions."""
    return _documents(settings, settings.definitions, count, seed, "train")


def validation(settings: Settings, count: int, seed: int) -> Iterator[Document]:
    """So many documents as those of the training, and none of them."""
    return _documents(settings, settings.definitions, count, seed, "validation")


def tests(settings: Settings, seed: int) -> dict[str, list[Document]]:
    """Documents by their number of definitions, as definitions=8: those of the training, then the further ones."""
    ranges = (settings.definitions, settings.test_definitions)
    every = dict.fromkeys(n for low, high in ranges for n in range(low, high + 1))
    found = {n: _documents(settings, (n, n), settings.test_size, seed, "tests") for n in every}
    return {f"definitions={n}": list(documents) for n, documents in found.items()}


def words(settings: Settings) -> tuple[str, ...]:
    """Every word of the documents."""
    numbers = (str(n) for n in range(MODULUS))
    return (*(f"v{n}" for n in range(1, settings.names + 1)), *numbers, "=", "+", "-", "*", ";", "?")


def _documents(
    settings: Settings, definitions: tuple[int, int], count: int, seed: int, part: Part
) -> Iterator[Document]:
    """Documents of a part of all problems."""
    draw = random.Random(f"{seed} {part} {definitions}")  # single numbers come faster from it than from NumPy
    for _ in range(count):
        problem = _problem(draw, draw.randint(*definitions))
        answer = str(values(problem.definitions)[problem.query])
        prompt = _written(problem, settings, draw)
        while part_of(prompt) != part:
            prompt = _written(problem, settings, draw)
        yield Document(prompt, answer)


def _problem(draw: random.Random, size: int) -> Problem:
    """Definitions, and one of those that depend on at least half as many others; others are drawn again."""
    while True:
        definitions: list[Definition] = []
        behind: list[int] = []  # those that each depends on, a bit for each
        unused: list[int] = []
        for place in range(size):
            made = _definition(draw, place, unused)
            behind.append(0)
            for operand in made.operands:
                behind[place] |= behind[operand] | 1 << operand
            unused = [other for other in unused if other not in made.operands] + [place]
            definitions.append(made)
        fitting = [place for place in range(size) if 2 * behind[place].bit_count() >= size]
        if fitting:
            return Problem(tuple(definitions), draw.choice(fitting))


def _definition(draw: random.Random, place: int, unused: Sequence[int]) -> Definition:
    """A definition that follows `place` others, and rather uses one that none has used so far."""
    kind = draw.random()
    if not place or kind < NUMBER:
        return Definition("", (), draw.randrange(MODULUS))
    first = draw.choice(unused)
    if place == 1 or kind < WITH_NUMBER:
        operator = draw.choice("+-*")
        return Definition(operator, (first,), draw.randrange(2 if operator == "*" else 1, MODULUS))
    second = draw.randrange(place - 1)
    operands = [first, second + (second >= first)]
    draw.shuffle(operands)
    return Definition(draw.choice("+-"), tuple(operands), 0)


def _written(problem: Problem, settings: Settings, draw: random.Random) -> str:
    """The text of a problem, with names drawn for its variables and in the order of the settings."""
    names = [f"v{n}" for n in draw.sample(range(1, settings.names + 1), len(problem.definitions))]
    lines = [_line(name, made, names) for name, made in zip(names, problem.definitions, strict=True)]
    if settings.order == "shuffled":
        draw.shuffle(lines)
    return f"{' '.join(lines)} ? {names[problem.query]}"


def _line(name: str, made: Definition, names: Sequence[str]) -> str:
    terms = [names[operand] for operand in made.operands]
    if len(terms) < 2:
        terms.append(str(made.number))
    return f"{name} = {f' {made.operator} '.join(terms)} ;"
