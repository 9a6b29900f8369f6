"""What is drawn at random is drawn by a hash of the row: the same rows in every run, by every worker, in any order."""

from enum import IntEnum
from typing import TypeVar

import numpy as np

Number = TypeVar("Number", int, np.ndarray)
_MASK = 2**64 - 1


class Draw(IntEnum):
    """What is drawn. Draws of different kinds have nothing to do with each other."""

    READ = 1
    """Rows of a source that are read."""
    CAP = 2
    """Rows of a source that are left."""
    HELD_OUT = 3
    """Questions that are held out."""
    SAMPLE = 4
    """Rows that a tokenizer is trained on."""


def drawn(number: Number, draw: Draw) -> Number:
    """64 bits that look random, of a number from 0 to 2^64 - 1, or of an array of uint64 (SplitMix64's finish)."""
    value = number ^ (int(draw) * 0x9E3779B97F4A7C15 & _MASK)
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31


def threshold(part: float) -> int:
    """Numbers below it are drawn with this probability, from 0 to 1."""
    return round(part * 2**64)
