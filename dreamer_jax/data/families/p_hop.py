"""p_hop: follow a chain of p hops back through a sequence of letters, from every position.

From position i one hop leads to the position after the last earlier occurrence of the same letter:

    hop(i) = 1 + max {j < i : x_j = x_i},    answer_i = x at hop(hop(... i)), p times

A chain breaks at a letter that has not occurred before; then the answer is "-". A document gives p and the first
letter, and after each letter its answer follows, in capitals, so that an answer is never taken for a part of the
sequence:

    p=2 a -> -   b -> -   a -> -   b -> B   c -> -   a -> A   b -> - ...

The answer before mostly belongs to another chain, so copying it does not help. But the answers given at hop(i),
hop(hop(i)), ... are the letters of the same chain that follow answer_i, and no letter of a chain equals the next. So a
model that does two hops guesses right more often (docs/data.md has the figures). `asked="ends"` gives no such answers:
it asks where no later hop leads to, and puts a dot in the place of all other answers.

After "Transformers, parallel computation, and logarithmic depth" (Sanford et al., arXiv 2402.09268) and "Reasoning with
latent thoughts" (Saunshi et al., arXiv 2502.17416).

No letter stands twice in a row. Where one does, a hop leads from the second of the two to itself, and the chain goes no
further. Among independent letters of an alphabet of 4 a quarter of all chains would stop so at each hop, and 16 hops
would be no harder than 8.
"""

import itertools
from collections.abc import Iterator
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Int
from pydantic import Field
from pydantic.dataclasses import dataclass

from dreamer_jax.data.document import Document
from dreamer_jax.data.families.parts import PARTS, Part, distinct, part_of
from dreamer_jax.data.families.settings import LISTED, STRICT, Range, Size
from dreamer_jax.data.files import DataError

LETTERS = ("a", "b", "c", "d")
NONE = "-"
"""The answer where the chain breaks."""
ANSWERS = (*(letter.upper() for letter in LETTERS), NONE)
"""By the number of the letter, and by `BROKEN`."""
BROKEN = len(LETTERS)
NOT_ASKED = "."
"""In the place of an answer that is not asked for. So letters and answers stand alike in all documents."""
MEAN_HOP = 3
"""Positions that a hop leads back on average: a letter comes again after 4 positions."""
TRIES = 100_000
"""Sequences that are drawn for a document, before there is held to be none."""


@dataclass(frozen=True, config=STRICT)
class Settings:
    """How many hops, and how long the sequences are."""

    hops: Range = (1, 16)
    """p, in training and validation."""
    length: Range = (64, 128)
    """Letters of a sequence. With an answer after each, a document of n letters has 2 n + 3 tokens."""
    asked: Literal["all", "some", "ends"] = "all"
    """Where answers are asked for: after each letter; after a share of them that is drawn for each document, and at
    the ends; or at the ends alone, where no later hop leads to. These are 3 in a sequence, each at the end of a chain
    of its own, and no answer tells anything of another's chain."""
    test_hops: Annotated[tuple[Size, ...], Field(max_length=100), LISTED] = (18, 20, 22, 24)
    """Further p to test with, beside all those of the training."""
    test_size: Size = 200
    """Documents of each test."""
    spelling: Literal["word", "marks"] = "word"
    """How p is given: as a word of its own ("p=3"), or as so many marks ("> > >"). Only by marks does a model know
    what a p means that it was not trained with."""

    def __post_init__(self) -> None:
        """Check what no single setting shows."""
        asked = {"hops": max(self.hops), "test_hops": max(self.test_hops, default=0)}
        name = max(asked, key=asked.__getitem__)
        needed = MEAN_HOP * asked[name]
        if self.length[1] < needed:
            raise ValueError(
                f"length = {self.length} is too short for {name} = {getattr(self, name)}: {asked[name]} hops lead back "
                f"{needed} letters on average; give a greatest length of {needed} or more, or lower {name}"
            )


def hop(letters: Int[np.ndarray, "N"]) -> Int[np.ndarray, "N_plus_1"]:
    """Where one hop leads to from each position; N where the chain breaks, and from N to N."""
    last: dict[int, int] = {}
    found = np.full(len(letters) + 1, len(letters))
    for place, letter in enumerate(letters.tolist()):
        found[place] = last.get(letter, len(letters))
        last[letter] = place + 1
    return found


def answers(letters: Int[np.ndarray, "N"], hops: int) -> Int[np.ndarray, "N"]:
    """The letter at the end of the chain of `hops` hops from each position; `BROKEN` where the chain breaks."""
    place, once = np.arange(len(letters)), hop(letters)
    for _ in range(hops):
        place = once[place]
    return np.append(letters, BROKEN)[place]


def train(settings: Settings, count: int, seed: int) -> Iterator[Document]:
    """So many documents, each with its own p."""
    return itertools.islice(_documents(settings, settings.hops, seed, "train"), count)


def validation(settings: Settings, count: int, seed: int) -> Iterator[Document]:
    """So many documents as those of the training, and none of them."""
    return itertools.islice(_documents(settings, settings.hops, seed, "validation"), count)


def tests(settings: Settings, seed: int) -> dict[str, list[Document]]:
    """Documents of each p by its name, such as p=16: those of the training, then `test_hops`. None comes twice."""
    drawn = {p: _documents(settings, (p, p), seed, "tests") for p in _tested(settings)}
    return {f"p={p}": distinct(of, settings.test_size, same) for p, of in drawn.items()}


def words(settings: Settings) -> tuple[str, ...]:
    """Every word of the documents, those of the tests included."""
    numbers = _tested(settings) if settings.spelling == "word" else [1]
    dot = () if settings.asked == "all" else (NOT_ASKED,)
    return (*(_number(p, settings) for p in numbers), *LETTERS, *ANSWERS, *dot)


def same(document: Document) -> str:
    """A key that is equal for two documents with the same p and letters, wherever they ask."""
    return document.given.replace(f" {NOT_ASKED}", "")


def _tested(settings: Settings) -> list[int]:
    """Each p that there is a test of."""
    return list(dict.fromkeys([*range(settings.hops[0], settings.hops[1] + 1), *settings.test_hops]))


def _documents(settings: Settings, hops: tuple[int, int], seed: int, part: Part) -> Iterator[Document]:
    """Endless documents of a part of all sequences.

    Each p is drawn once, so all are equally frequent. Only the sequence is drawn again until it fits.
    """
    draw = np.random.default_rng([seed, PARTS.index(part), *hops])
    while True:
        p = int(draw.integers(hops[0], hops[1] + 1))
        letters = _fitting(draw, settings, p, part)
        places = _places(draw, letters, settings)
        yield _document(_number(p, settings), letters, places, answers(letters, p)[places])


def _fitting(draw: np.random.Generator, settings: Settings, p: int, part: Part) -> Int[np.ndarray, "N"]:
    """A sequence of the part in which a chain has p hops.

    Some answer is then asked for, even with `asked="ends"`: the chain goes on to an end, which has p hops as well.

    Raises:
        DataError: there is none, or next to none.
    """
    for _ in range(TRIES):
        letters = _sequence(draw, int(draw.integers(settings.length[0], settings.length[1] + 1)))
        text = "".join([LETTERS[letter] for letter in letters.tolist()])
        if part_of(text) == part and (answers(letters, p) != BROKEN).any():
            return letters
    raise DataError(
        f"p_hop: of {TRIES} sequences of length = {settings.length} none is for {part} and has a chain of {p} hops: "
        f"give a greater length"
    )


def _sequence(draw: np.random.Generator, length: int) -> Int[np.ndarray, "N"]:
    """Letters by number; each is one of the three that are not the letter before, with equal chances."""
    steps = draw.integers(1, len(LETTERS), size=length)
    steps[0] = draw.integers(len(LETTERS))
    return np.cumsum(steps) % len(LETTERS)


def _places(draw: np.random.Generator, letters: Int[np.ndarray, "N"], settings: Settings) -> Int[np.ndarray, "A"]:
    """The positions after which an answer is asked for; the last is always one of them."""
    share = {"all": 1.0, "some": draw.random(), "ends": 0.0}[settings.asked]
    is_asked = draw.random(len(letters)) < share
    is_end = np.ones(len(letters) + 1, bool)
    is_end[hop(letters)] = False
    is_end[0] = False  # no hop leads to the first letter, nor from it
    return np.flatnonzero(is_asked | is_end[:-1])


def _number(p: int, settings: Settings) -> str:
    return f"p={p}" if settings.spelling == "word" else " ".join(">" * p)


def _document(
    number: str, letters: Int[np.ndarray, "N"], places: Int[np.ndarray, "A"], found: Int[np.ndarray, "A"]
) -> Document:
    """The letters up to each place are given, and its answer follows."""
    texts = [LETTERS[letter] for letter in letters.tolist()]
    ends = [place + 1 for place in places.tolist()]
    given = [f" {NOT_ASKED} ".join(texts[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
    answered = [ANSWERS[answer] for answer in found.tolist()]
    return Document(f"{number} {given[0]}", answered[0], tuple(zip(given[1:], answered[1:], strict=True)))
