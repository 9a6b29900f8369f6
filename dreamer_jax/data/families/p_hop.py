"""p_hop: follow a chain of p hops back through a sequence of letters, from every position.

From position i one hop leads to the position after the last earlier occurrence of the same letter:

    hop(i) = 1 + max {j < i : x_j = x_i},    answer_i = x at hop(hop(... i)), p times

A chain breaks at a letter that has not occurred before; then the answer is "-". A document gives p and the first
letter, and after each letter its answer follows, in capitals, so that an answer is never taken for a part of the
sequence:

    p=2 a -> -   b -> -   a -> -   b -> B   c -> -   a -> A   b -> - ...

The answer before mostly belongs to another chain, so copying it does not help. But the answers given at hop(i),
hop(hop(i)), ... are the letters of the same chain that follow answer_i, and no letter of a chain equals the next. So a
model that does two hops guesses right more often (docs/data.md has the figures). `asked="ends"` gives no such answers.

After "Transformers, parallel computation, and logarithmic depth" (Sanford et al., arXiv 2402.09268) and "Reasoning with
latent thoughts" (Saunshi et al., arXiv 2502.17416).

No letter stands twice in a row. Where one does, a hop leads from the second of the two to itself, and the chain goes no
further. Among independent letters of an alphabet of 4 a quarter of all chains would stop so at each hop, and 16 hops
would be no harder than 8.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Int
from pydantic import Field
from pydantic.dataclasses import dataclass

from dreamer_jax.data.document import Document
from dreamer_jax.data.families.parts import PARTS, Part, part_of
from dreamer_jax.data.families.settings import STRICT, Range, Size

LETTERS = ("a", "b", "c", "d")
NONE = "-"
"""The answer where the chain breaks."""
ANSWERS = (*(letter.upper() for letter in LETTERS), NONE)
"""By the number of the letter, and by `BROKEN`."""
BROKEN = len(LETTERS)
MEAN_HOP = 3
"""Positions that a hop leads back on average: a letter comes again after 4 positions."""


@dataclass(frozen=True, config=STRICT)
class Settings:
    """How many hops, and how long the sequences are."""

    hops: Range = (1, 16)
    """p, in training and validation."""
    length: Range = (64, 128)
    """Letters of a sequence. With an answer after each, a document of n letters has 2 n + 3 tokens."""
    asked: Literal["all", "ends"] = "all"
    """Where answers are asked for: after each letter, or only where no later hop leads to. These are 3 in a sequence,
    each at the end of a chain of its own, and no answer tells anything of another's chain."""
    test_hops: Annotated[tuple[Size, ...], Field(max_length=100)] = (18, 20, 22, 24)
    """Further p to test with, beside all those of the training."""
    test_size: Size = 200
    """Documents of each test."""
    spelling: Literal["word", "marks"] = "word"
    """How p is given: as a word of its own ("p=3"), or as so many marks ("> > >"). Only by marks does a model know
    what a p means that it was not trained with."""

    def __post_init__(self) -> None:
        """Check what no single setting shows."""
        most = max(self.hops[1], *self.test_hops, 1)
        if self.length[1] < MEAN_HOP * most:
            raise ValueError(
                f"length = {self.length} is too short for {most} hops, which lead back {MEAN_HOP * most} letters on "
                f"average: the greatest length must be as long at least"
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
    return _documents(settings, settings.hops, count, seed, "train")


def validation(settings: Settings, count: int, seed: int) -> Iterator[Document]:
    """So many documents as those of the training, and none of them."""
    return _documents(settings, settings.hops, count, seed, "validation")


def tests(settings: Settings, seed: int) -> dict[str, list[Document]]:
    """Documents of each p by its name, such as p=16: those of the training, then `test_hops`."""
    return {f"p={p}": list(_documents(settings, (p, p), settings.test_size, seed, "tests")) for p in _tested(settings)}


def words(settings: Settings) -> tuple[str, ...]:
    """Every word of the documents, those of the tests included."""
    numbers = _tested(settings) if settings.spelling == "word" else [1]
    return (*(_number(p, settings) for p in numbers), *LETTERS, *ANSWERS)


def _tested(settings: Settings) -> list[int]:
    """Each p that there is a test of."""
    return list(dict.fromkeys([*range(settings.hops[0], settings.hops[1] + 1), *settings.test_hops]))


def _documents(settings: Settings, hops: tuple[int, int], count: int, seed: int, part: Part) -> Iterator[Document]:
    """Documents of a part of all sequences. Each has an answer that is asked for: others are drawn again."""
    draw = np.random.default_rng([seed, PARTS.index(part), *hops])
    while count:
        p, length = (int(draw.integers(low, high + 1)) for low, high in (hops, settings.length))
        letters = _sequence(draw, length)
        if part_of("".join([LETTERS[letter] for letter in letters.tolist()])) != part:
            continue
        found, places = answers(letters, p), _places(letters, settings)
        if (found[places] != BROKEN).any():
            count -= 1
            yield _document(_number(p, settings), letters, places, found[places])


def _sequence(draw: np.random.Generator, length: int) -> Int[np.ndarray, "N"]:
    """Letters by number; each is one of the three that are not the letter before, with equal chances."""
    steps = draw.integers(1, len(LETTERS), size=length)
    steps[0] = draw.integers(len(LETTERS))
    return np.cumsum(steps) % len(LETTERS)


def _places(letters: Int[np.ndarray, "N"], settings: Settings) -> Int[np.ndarray, "A"]:
    """The positions after which an answer is asked for; the last is always one of them."""
    is_asked = np.ones(len(letters) + 1, bool)
    if settings.asked == "ends":
        is_asked[hop(letters)] = False
        is_asked[0] = False  # no hop leads to the first letter, nor from it
    return np.flatnonzero(is_asked[:-1])


def _number(p: int, settings: Settings) -> str:
    return f"p={p}" if settings.spelling == "word" else " ".join(">" * p)


def _document(
    number: str, letters: Int[np.ndarray, "N"], places: Int[np.ndarray, "A"], found: Int[np.ndarray, "A"]
) -> Document:
    """The letters up to each place are given, and its answer follows."""
    texts = [LETTERS[letter] for letter in letters.tolist()]
    ends = [place + 1 for place in places.tolist()]
    given = [" ".join(texts[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
    answered = [ANSWERS[answer] for answer in found.tolist()]
    return Document(f"{number} {given[0]}", answered[0], tuple(zip(given[1:], answered[1:], strict=True)))
