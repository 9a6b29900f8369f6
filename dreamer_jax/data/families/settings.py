"""What the settings of all families have in common: values are checked when they are made."""

from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field

STRICT = ConfigDict(strict=True, extra="forbid")
"""Nothing is guessed: True is no number, and "6" neither."""


def _is_rising(ends: tuple[int, int]) -> tuple[int, int]:
    if ends[0] > ends[1]:
        raise ValueError(f"the first of {ends} must not be greater than the second")
    return ends


Size = Annotated[int, Field(ge=1, le=10_000)]
"""How many of something there are."""
Range = Annotated[tuple[Size, Size], AfterValidator(_is_rising)]
"""The least and the greatest of something, both of them included."""
