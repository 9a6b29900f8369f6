"""Which random documents are trained on, validated with and tested with.

A hash of what makes a document the one it is decides. So no document is in two parts, whatever the seeds and the
numbers of documents are.
"""

import zlib
from typing import Literal

Part = Literal["train", "validation", "tests"]

PARTS: tuple[Part, ...] = ("train", "validation", "tests")
"""In this order their numbers seed what is drawn."""
SHARES = 8
"""One in so many documents is for validation, and one for tests."""


def part_of(text: str) -> Part:
    """The part that a document belongs to, by the text of what it asks."""
    share = zlib.crc32(text.encode()) % SHARES
    return "validation" if share == 0 else "tests" if share == 1 else "train"
