"""SA: causal grouped-query attention over the sequence, documents of a packed row apart (3.3)."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dreamer_jax.config import ModelConfig
from dreamer_jax.model.grouped_matmul import Backend
from dreamer_jax.model.norm import rms_norm
from dreamer_jax.model.parameters import Stack, norm
from dreamer_jax.model.projections import Heads, Projections
from dreamer_jax.model.rope import Rotation
from dreamer_jax.model.router import Routing

Attend = Callable[[Array, Array, Array], tuple[Array, Any]]
"""(q [B T N H], k [B T K H], v [B T K H]) -> (output [B T N H], what the caller keeps, such as a cache)."""


class SequenceAttention(nnx.Module):
    """Pre-norm, projections, per-head norm of queries and keys, RoPE; the attention itself is handed in."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stack: Stack, *, merged: bool):
        """Stacked over layers in LA."""
        self.config = config
        heads = Heads(config.query_heads, config.kv_heads, config.head_size)
        self.norm = norm(stack, config.width)
        self.projections = Projections(config, heads, rngs, stack, merged=merged)

    @jax.named_scope("sa")
    def __call__(
        self,
        x: Float[Array, "B T D"],
        l: Int[Array, ""],
        rotation: Rotation,
        counted: Bool[Array, "B T"],
        attend: Attend,
        backend: Backend,
    ) -> tuple[Float[Array, "B T D"], Any, Routing | None]:
        """The residual update, what `attend` keeps, and the routing (None with dense projections)."""
        projections = self.projections
        x = rms_norm(x, self.norm[...], self.config.norm_epsilon)
        selection = projections.select(x.reshape(-1, x.shape[-1]), l, counted.reshape(-1), backend)
        q, k, v = projections.qkv(x, rotation, selection, backend)
        with jax.named_scope("scores"):
            o, kept = attend(q, k, v)
        return projections.out(o, selection, backend), kept, selection.routing if selection else None
