"""Which random documents are trained on, validated with and tested with.

A hash of what makes a document the one it is decides. So no document is in two parts, whatever the seeds and the
numbers of documents are.
"""

import zlib
from collections.abc import Callable, Iterator
from typing import Literal

from dreamer_jax.data.document import Document

Part = Literal["train", "validation", "tests"]

PARTS: tuple[Part, ...] = ("train", "validation", "tests")
"""In this order their numbers seed what is drawn."""
SHARES = 8
"""One in so many documents is for validation, and one for tests."""
PATIENCE = 300
"""So many repeats in a row say that there is nothing new to draw."""


def part_of(text: str) -> Part:
    """The part that a document belongs to, by the text of what it asks."""
    share = zlib.crc32(text.encode()) % SHARES
    return "validation" if share == 0 else "tests" if share == 1 else "train"


def distinct(drawn: Iterator[Document], count: int, same: Callable[[Document], str]) -> list[Document]:
    """The first `count` of endless documents that differ by the key `same`; fewer where there are too few."""
    found: dict[str, Document] = {}
    repeats = 0
    while len(found) < count and repeats < PATIENCE:
        document = next(drawn)
        key = same(document)
        repeats = repeats + 1 if key in found else 0
        found.setdefault(key, document)
    return list(found.values())
