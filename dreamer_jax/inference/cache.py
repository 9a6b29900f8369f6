"""The two memories of generation: SA's, per depth and growing with the sequence, and DA's, of one token's depths."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dreamer_jax.config import ModelConfig
from dreamer_jax.model.depth_attention import DepthCache
from dreamer_jax.model.dreamer import depth_entry


class SequenceCache(NamedTuple):
    """Keys and values of SA at every depth. Row s of a sequence is its token at position s: prompts are padded at the
    end, and each generated token overwrites the padding at its own position.
    """

    k: Float[Array, "L B K S H"]
    v: Float[Array, "L B K S H"]


def empty_cache(config: ModelConfig, batch: int, rows: int, dtype: DTypeLike) -> SequenceCache:
    """A cache for `batch` sequences of at most `rows` tokens."""
    shape = (config.depth, batch, config.kv_heads, rows, config.head_size)
    return SequenceCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def rows_for(tokens: int) -> int:
    """`tokens` rounded up to one of four sizes per octave: few shapes to compile, little to spare."""
    size = max(16, (1 << (tokens - 1).bit_length()) // 8)
    return -(-tokens // size) * size


def write_prompts(
    cache: SequenceCache, l: Int[Array, ""], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]
) -> SequenceCache:
    """The cache with the first T rows of depth `l` replaced."""
    start = (l, *[jnp.zeros_like(l)] * 4)
    heads_first = (a.swapaxes(1, 2)[None] for a in (k, v))
    return SequenceCache(*(lax.dynamic_update_slice(c, new, start) for c, new in zip(cache, heads_first, strict=True)))


def write_tokens(
    cache: SequenceCache,
    l: Int[Array, ""],
    positions: Int[Array, "B"],
    k: Float[Array, "B 1 K H"],
    v: Float[Array, "B 1 K H"],
) -> SequenceCache:
    """The cache with one row of depth `l` replaced in each sequence: the one at its position."""
    sequences = jnp.arange(positions.shape[0])
    return SequenceCache(
        *(c.at[l, sequences, :, positions].set(new[:, 0]) for c, new in zip(cache, (k, v), strict=True))
    )


def empty_depth_cache(config: ModelConfig, x: Float[Array, "B T D"]) -> DepthCache | None:
    """DA's cache of the tokens of x, before their first depth; None without DA.

    Every forward pass begins with an empty one: DA's memory is L entries per token at hand, however long the sequence.
    """
    return jax.tree.map(lambda entry: jnp.zeros((config.depth, *entry.shape), entry.dtype), depth_entry(config, x))


def write_depth(cache: DepthCache | None, l: Int[Array, ""], entry: DepthCache | None) -> DepthCache | None:
    """DA's cache with the entry of depth `l`."""
    return jax.tree.map(lambda c, e: lax.dynamic_update_index_in_dim(c, e, l, 0), cache, entry)
