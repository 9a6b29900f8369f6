"""The next token from logits: the likeliest, or drawn by temperature from the nucleus (Holtzman et al., 2020)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt

from dreamer_jax.errors import DreamerError


class GenerationError(DreamerError, ValueError):
    """A request that cannot be served; the message says which value and why."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    temperature: float = 0.0
    """Logits are divided by it; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Draw from the smallest set of likeliest tokens that together have at least this probability."""

    def __post_init__(self) -> None:
        """Raise GenerationError for a value outside its range."""
        if not 0 <= self.temperature < float("inf"):
            raise GenerationError(
                f"temperature = {self.temperature}: must be 0 (the likeliest token) or more, and finite"
            )
        if not 0 < self.top_p <= 1:
            raise GenerationError(f"top-p = {self.top_p}: must lie in (0, 1]")


class Draws(NamedTuple):
    """How the rows of a batch are sampled, each by its own request; or how these arrays are split."""

    number: Any
    """int32 [B]: of the request. With the seed and the position it decides what is drawn."""
    temperature: Any
    """float32 [B]."""
    top_p: Any
    """float32 [B]."""

    @staticmethod
    def of(numbers: Sequence[int], samplings: Sequence[Sampling]) -> "Draws":
        """On the host."""
        temperature = np.array([sampling.temperature for sampling in samplings], np.float32)
        top_p = np.array([sampling.top_p for sampling in samplings], np.float32)
        return Draws(np.array(numbers, np.int32), temperature, top_p)


def choose(
    logits: Float[Array, "B V"], draws: Draws, positions: Int[Array, "B"], seed: UInt[Array, ""]
) -> Int[Array, "B"]:
    """The token of each row, which will stand at its position.

    What is drawn depends on the seed, the request's number and the position alone: a request is answered the same
    whatever stands in the other rows, and equal prompts of different requests differently.
    """
    likeliest = jnp.argmax(logits, axis=-1)
    drawn = draws.temperature >= 1e-6  # below that, float32 logits cannot be told apart

    def draw() -> Int[Array, "B"]:
        key = jax.random.key(seed)
        keys = jax.vmap(lambda n, t: jax.random.fold_in(jax.random.fold_in(key, n), t))(draws.number, positions)
        scaled = logits / jnp.where(drawn, draws.temperature, 1.0)[:, None]
        cut = lax.cond(jnp.any(draws.top_p < 1), lambda: _nucleus(scaled, draws.top_p), lambda: scaled)
        return jnp.where(drawn, jax.vmap(jax.random.categorical)(keys, cut), likeliest)

    return lax.cond(jnp.any(drawn), draw, lambda: likeliest)


def _nucleus(logits: Float[Array, "B V"], top_p: Float[Array, "B"]) -> Float[Array, "B V"]:
    """The logits with -inf where a token is not in the smallest set of likeliest tokens that have probability `top_p`.

    Of equal tokens, the earlier ones are in it first.
    """
    order = jnp.argsort(-logits, axis=-1)
    p = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1))
    before = jnp.cumsum(p, axis=-1) - p
    kept = jnp.put_along_axis(jnp.zeros_like(logits, bool), order, before < top_p[:, None], axis=-1, inplace=False)
    return jnp.where(kept | (top_p == 1)[:, None], logits, -jnp.inf)
