"""dag_mod7: definitions modulo 7 that depend on each other, and the value of one of them, answered without working.

    4 = v3 . v3 * 5 = v11 . v3 - v11 = v8 . v8 + 2 = v1 . ; v8   -> 5

A line says what is computed and then the name of the result; a dot stands where its value would. So a name and its
value are neighbours, and a name finds its value behind an earlier one as induction heads do. Where a name comes first
("v11 = v3 * 5"), the way from it to its value is longer for a longer definition.

A definition is a number, or an earlier variable with a number (+ or - 1 to 6, * 2 to 6), or the sum or difference of
two earlier variables. Nothing is multiplied by another variable or by 0: where an operand changes, so does the result,
and all answers are nearly equally frequent. The variable that is asked for depends on at least half as many others as
there are definitions, so that several values must be kept until they are used.

`asked="some"` shows working: values of some lines are asked for in their places, and in the end all values are. It is
there to be trained on beside the other kind, in which one answer of 30 tokens has to teach everything.

Two problems are the same if they differ only in the names of variables, in the order of lines or of what is added, or
in what is asked. In this sense no problem of the training is in a test.

The family follows no paper. Arithmetic modulo a small prime over a graph of dependencies, answered in one token, is
common in work on what models compute without writing it down.
"""

import hashlib
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

from pydantic import Field
from pydantic.dataclasses import dataclass

from dreamer_jax.data.document import Document
from dreamer_jax.data.families.parts import Part, distinct, part_of
from dreamer_jax.data.families.settings import STRICT, Range, Size

MODULUS = 7
NOT_ASKED = "."
"""In the place of a value that is not asked for."""
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
    asked: Literal["query", "some"] = "query"
    """What is asked for: one value at the end; or the values of a share of the lines, which is drawn for each document,
    and at the end those of all variables."""
    order: Literal["topological", "shuffled"] = "topological"
    """Whether a definition follows those that it depends on. Then its value can be found as soon as it is read; where
    they are shuffled, most of the work is left for the last token."""

    def __post_init__(self) -> None:
        """Check what no single setting shows."""
        for name, (least, most) in {
            "definitions": self.definitions,
            "test_definitions": self.test_definitions,
        }.items():
            if least < 2:
                raise ValueError(f"{name} = {(least, most)}: one alone depends on no other; begin with 2")
            if most > self.names:
                raise ValueError(
                    f"names = {self.names} do not suffice for {name} = {(least, most)}: give names = {most} or more, "
                    f"or lower {name}"
                )


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


def read(given: str) -> Problem:
    """The problem of all that a document gives, whatever the order of its lines."""
    body, query = given.replace(f" {NOT_ASKED}", "").split(" ; ")
    first, *others = body.split(" = ")
    names, rest = zip(*(other.partition(" ")[::2] for other in others), strict=True)
    texts = dict(zip(names, [first, *rest], strict=False))  # behind the last name there is nothing
    waiting = {name: [term for term in text.split() if term in texts] for name, text in texts.items()}
    place: dict[str, int] = {}
    while len(place) < len(texts):
        ready = [name for name in texts if name not in place and place.keys() >= set(waiting[name])]
        place |= {name: len(place) + i for i, name in enumerate(ready)}
    return Problem(tuple(_definition_of(texts[name], place) for name in place), place[query.split()[0]])


def _definition_of(text: str, place: Mapping[str, int]) -> Definition:
    """What stands after the = of a line, with the places of the variables before it."""
    terms = text.split()
    operands = tuple(place[term] for term in terms if term in place)
    number = 0 if len(operands) == 2 else int(terms[-1])
    return Definition(terms[1] if operands else "", operands, number)


def shape_of(given: str) -> Shape:
    """How much there is to do for the first variable that a document asks for at its end."""
    definitions, query = read(given)
    depth: list[int] = []
    behind: list[set[int]] = []
    for made in definitions:
        depth.append(max((depth[i] + 1 for i in made.operands), default=0))
        behind.append(set(made.operands).union(*(behind[i] for i in made.operands)))
    return Shape(len(definitions), depth[query], len(behind[query]))


def same(document: Document) -> str:
    """A key that is equal for two documents with the same problem."""
    return _key(read(document.given).definitions)


def _key(definitions: Sequence[Definition]) -> str:
    """Digests of all definitions, each with those behind it in the place of their names."""
    found: list[str] = []
    for operator, operands, number in definitions:
        terms = [found[operand] for operand in operands]
        if operator == "+":
            terms.sort()
        text = f"{operator} {terms} {number}"
        found.append(hashlib.blake2b(text.encode(), digest_size=8).hexdigest())
    return " ".join(sorted(found))


def train(settings: Settings, count: int, seed: int) -> Iterator[Document]:
    """So many documents of all numbers of definitions."""
    return itertools.islice(_documents(settings, settings.definitions, seed, "train"), count)


def validation(settings: Settings, count: int, seed: int) -> Iterator[Document]:
    """So many documents as those of the training, and none of them."""
    return itertools.islice(_documents(settings, settings.definitions, seed, "validation"), count)


def tests(settings: Settings, seed: int) -> dict[str, list[Document]]:
    """Documents by their number of definitions, as definitions=8: those of the training, then the further ones.

    No problem comes twice, so that tests of 2 or 3 definitions may have fewer documents than `test_size`.
    """
    ranges = (settings.definitions, settings.test_definitions)
    every = dict.fromkeys(n for low, high in ranges for n in range(low, high + 1))
    drawn = {n: _documents(settings, (n, n), seed, "tests") for n in every}
    return {f"definitions={n}": distinct(of, settings.test_size, same) for n, of in drawn.items()}


def words(settings: Settings) -> tuple[str, ...]:
    """Every word of the documents."""
    numbers = (str(n) for n in range(MODULUS))
    return (*(f"v{n}" for n in range(1, settings.names + 1)), *numbers, "=", "+", "-", "*", ";", NOT_ASKED)


def _documents(settings: Settings, definitions: tuple[int, int], seed: int, part: Part) -> Iterator[Document]:
    """Endless documents of a part of all problems. Of 2 definitions each part has some, of more it has many more."""
    draw = random.Random(f"{seed} {part} {definitions}")  # single numbers come faster from it than from NumPy
    while True:
        size = draw.randint(*definitions)
        problem = _problem(draw, size)
        while part_of(_key(problem.definitions)) != part:
            problem = _problem(draw, size)
        yield _document(problem, settings, draw)


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


def _document(problem: Problem, settings: Settings, draw: random.Random) -> Document:
    """A problem, with names drawn for its variables, its lines in the order of the settings, and what is asked."""
    definitions, query = problem
    names = [f"v{n}" for n in draw.sample(range(1, settings.names + 1), len(definitions))]
    found = [str(value) for value in values(definitions)]
    order = list(range(len(definitions)))
    if settings.order == "shuffled":
        draw.shuffle(order)
    share, queries = 0.0, [query]
    if settings.asked == "some":
        share, queries = draw.random(), draw.sample(order, len(order))
    turns: list[tuple[str, str]] = []
    given: list[str] = []
    for place in order:
        given += [*_terms(definitions[place], names), "=", names[place]]
        if draw.random() < share:
            turns.append((" ".join(given), found[place]))
            given = []
        else:
            given.append(NOT_ASKED)
    given.append(";")
    for place in queries:
        turns.append((" ".join([*given, names[place]]), found[place]))
        given = []
    return Document(*turns[0], tuple(turns[1:]))


def _terms(made: Definition, names: Sequence[str]) -> list[str]:
    """The words of a definition."""
    if not made.operands:
        return [str(made.number)]
    left, *others = (names[operand] for operand in made.operands)
    return [left, made.operator, *(others or [str(made.number)])]
