"""DA: attention of each token over its own earlier depths (3.4, Algorithm 1)."""

from typing import NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dreamer_jax.config import ModelConfig
from dreamer_jax.model.attend import attend_depth
from dreamer_jax.model.grouped_matmul import Backend
from dreamer_jax.model.norm import rms_norm
from dreamer_jax.model.parameters import Stack, norm
from dreamer_jax.model.projections import Heads, Projections
from dreamer_jax.model.rope import depth_rotation
from dreamer_jax.model.router import Routing


class DepthCache(NamedTuple):
    """Keys and values of earlier depths, leading axis L; or those of one depth, without it.

    It holds the tokens at hand only: in generation each new token starts with an empty one.
    """

    k: Float[Array, "..."]
    v: Float[Array, "..."]


class DepthAttention(nnx.Module):
    """Pre-norm, projections, per-head norm of queries and keys, depth RoPE, attention over the depth cache."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stack: Stack, *, merged: bool):
        """Stacked over layers in LA."""
        self.config = config
        heads = Heads(config.da_heads, config.da_kv_heads, config.da_head_size)
        self.norm = norm(stack, config.width)
        self.projections = Projections(config, heads, rngs, stack, merged=merged)

    @jax.named_scope("da")
    def __call__(
        self,
        x: Float[Array, "B T D"],
        l: Int[Array, ""],
        counted: Bool[Array, "B T"],
        cache: DepthCache,
        backend: Backend,
    ) -> tuple[Float[Array, "B T D"], DepthCache, DepthCache, Float[Array, "B T N L"], Routing | None]:
        """The residual update, this depth's cache entry, the cache handed on, attention over depths, and the routing.

        Cache rows from `l` on are ignored: this depth's own entry is computed here.
        """
        config, projections = self.config, self.projections
        x = rms_norm(x, self.norm[...], config.norm_epsilon)
        selection = projections.select(x.reshape(-1, x.shape[-1]), l, counted.reshape(-1), backend)
        rotation = depth_rotation(l, config.depth, config.da_head_size, config.depth_rope_base)
        q, k, v = projections.qkv(x, rotation, selection, backend)
        native = backend == "native"
        o, attention, (k, v, *handed_on) = attend_depth(q, k, v, cache.k, cache.v, l, native_kernel=native)
        return (
            projections.out(o, selection, backend),
            DepthCache(k, v),
            DepthCache(*handed_on),
            attention,
            selection.routing if selection else None,
        )
