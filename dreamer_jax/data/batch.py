"""What a step is given."""

from typing import Any, NamedTuple


class Batch(NamedTuple):
    """Packed rows, [B, T] each: on the host, or on devices."""

    tokens: Any
    """int32."""
    positions: Any
    """int32, from 0 in each document."""
    segment_ids: Any
    """int32: 1, 2, ... by document, 0 where a row is empty."""
    response_mask: Any
    """bool: True on response tokens and the token that ends them."""
