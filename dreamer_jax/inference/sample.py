"""The next token from logits: the likeliest, or drawn by temperature from the nucleus (Holtzman et al., 2020)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

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


def sequence_keys(seed: int, batch: int) -> Key[Array, "B"]:
    """A random key for each row of a batch.

    It depends on the seed and the row's index alone, so a row draws the same whatever stands in the other rows, and
    equal prompts in different rows are answered differently.
    """
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.arange(batch))


def choose(
    logits: Float[Array, "B V"], keys: Key[Array, "B"], positions: Int[Array, "B"], sampling: Sampling
) -> Int[Array, "B"]:
    """The token of each row; `positions`, where it will stand, make its draw differ from the row's other draws."""
    if sampling.temperature < 1e-6:  # below what float32 logits can tell apart
        return jnp.argmax(logits, axis=-1)
    return jax.vmap(lambda row, key, t: _draw(row, jax.random.fold_in(key, t), sampling))(logits, keys, positions)


def _draw(logits: Float[Array, "V"], key: Key[Array, ""], sampling: Sampling) -> Int[Array, ""]:
    logits = logits / sampling.temperature
    if sampling.top_p == 1:
        return jax.random.categorical(key, logits)
    order = jnp.argsort(-logits)
    ranked = logits[order]
    p = jax.nn.softmax(ranked)
    before = jnp.cumsum(p) - p
    return order[jax.random.categorical(key, jnp.where(before < sampling.top_p, ranked, -jnp.inf))]
