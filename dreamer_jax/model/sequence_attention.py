"""SA: causal grouped-query attention over the sequence, documents of a packed row apart (3.3)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dreamer_jax.kernels.interface import Rotation
from dreamer_jax.kernels.norm import rms_norm
from dreamer_jax.model.dimension import Context, Dimension, Update
from dreamer_jax.model.parameters import table_of
from dreamer_jax.model.projections import Projections
from dreamer_jax.model.rope import sequence_rotation
from dreamer_jax.model_config import ModelConfig


class SequenceCache(NamedTuple):
    """Keys and values of SA at every depth. Row s of a sequence is its token at position s: prompts are padded at the
    end, and each generated token overwrites the padding at its own position.
    """

    k: Float[Array, "L B K S H"]
    v: Float[Array, "L B K S H"]


class SequenceAttention(Dimension):
    """Pre-norm, projections, per-head norm of queries and keys, RoPE, attention."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, *, merged: bool):
        """Stacked over layers in LA."""
        self.config = config
        table = table_of(config, "sa", rngs, merged=merged)
        self.norm = table.make("norm")
        self.projections = Projections(config, config.sa, table)

    @jax.named_scope("sa")
    def __call__(self, x: Float[Array, "B T D"], context: Context) -> Update:
        """Attention within the documents of packed rows; with a cache, of prompts or of the newest tokens."""
        projections, kernels = self.projections, context.kernels
        x = rms_norm(x, self.norm[...], self.config.norm_epsilon)
        selection = projections.select(x, context)
        q, k, v = projections.qkv(x, context.precomputed, selection, kernels)
        cache = context.memory
        with jax.named_scope("scores"):
            if cache is not None and context.continues:
                cache = write_tokens(cache, context.l, context.positions, k, v)
                o = kernels.attend_newest(q, *cache, context.l, context.positions[:, -1] + 1)
            else:
                o = kernels.attend_sequence(q, k, v, context.segment_ids)
                cache = cache if cache is None else write_prompts(cache, context.l, k, v)
        return Update(projections.out(o, selection, kernels), cache, selection.routing if selection else None)

    def make_ready(self, kernels: object) -> None:
        """Eq. 8, for the gradient of Eq. 7."""
        self.projections.add_shared()

    def merge(self) -> None:
        """Eq. 8, for good."""
        self.projections.merge()

    def before_depths(self, positions: Int[Array, "B T"]) -> Rotation:
        """The rotation of every token."""
        return sequence_rotation(positions, self.config.sa.head_size, self.config.sa.rope_base)

    def cache(self, depth: int, batch: int, rows: int, dtype: DTypeLike) -> SequenceCache:
        """Keys and values of at most `rows` tokens of each sequence."""
        shape = (depth, batch, self.config.sa.kv_heads, rows, self.config.sa.head_size)
        return SequenceCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


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
    positions: Int[Array, "B T"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
) -> SequenceCache:
    """The cache with some rows of depth `l` replaced in each sequence: those at its tokens' positions."""
    sequences = jnp.arange(positions.shape[0])[:, None]
    return SequenceCache(*(c.at[l, sequences, :, positions].set(new) for c, new in zip(cache, (k, v), strict=True)))
