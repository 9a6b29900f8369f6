"""What the settings of all families have in common: values are checked when they are made."""

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

STRICT = ConfigDict(strict=True, extra="forbid")
"""Nothing is guessed: True is no number, and "6" neither."""


def _is_rising(ends: tuple[int, int]) -> tuple[int, int]:
    if ends[0] > ends[1]:
        raise ValueError(f"the first of {ends} must not be greater than the second")
    return ends


def _tuple_of_list(given: Any) -> Any:
    return tuple(given) if isinstance(given, list) else given


LISTED = BeforeValidator(_tuple_of_list)
"""Of a tuple: a list is one as well."""
Size = Annotated[int, Field(ge=1, le=10_000)]
"""How many of something there are."""
Range = Annotated[tuple[Size, Size], AfterValidator(_is_rising), LISTED]
"""The least and the greatest of something, both of them included."""
