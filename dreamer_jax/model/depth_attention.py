"""DA: attention of each token over its own earlier depths (3.4, Algorithm 1).

Variants (section 5): a window and a dilation over depths, and a linear form without softmax.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dreamer_jax.kernels.norm import rms_norm
from dreamer_jax.model.dimension import Context, Dimension, Update
from dreamer_jax.model.parameters import table_of
from dreamer_jax.model.projections import Projections
from dreamer_jax.model.rope import depth_rotation
from dreamer_jax.model_config import ModelConfig


class DepthCache(NamedTuple):
    """Keys and values of earlier depths, leading axis L; or those of one depth, without it.

    It holds the tokens at hand only: in generation each new token starts with an empty one.
    """

    k: Float[Array, "..."]
    v: Float[Array, "..."]


class FadingCache(NamedTuple):
    """The same for the linear form: each depth lets all that was before it fade by factors of its own."""

    k: Float[Array, "..."]
    v: Float[Array, "..."]
    log_fade: Float[Array, "*depths K"]


class DepthAttention(Dimension):
    """Pre-norm, projections, per-head norm of queries and keys, depth RoPE, attention over the depth cache."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, *, merged: bool):
        """Stacked over layers in LA."""
        self.config = config
        table = table_of(config, "da", rngs, merged=merged)
        self.norm = table.make("norm")
        self.projections = Projections(config, config.da, table)
        self.decay: Any = table.make("decay") if "decay" in table else None

    @jax.named_scope("da")
    def __call__(self, x: Float[Array, "B T D"], context: Context) -> Update:
        """The residual update, and this depth's row of the cache; in the linear form, in generation, the state.

        Cache rows from `context.l` on are ignored: this depth's own row is computed here.
        """
        config, projections, kernels = self.config, self.projections, context.kernels
        x = rms_norm(x, self.norm[...], config.norm_epsilon)
        selection = projections.select(x, context)
        rotation = depth_rotation(config, context.l, context.depth, config.da.head_size)
        q, k, v = projections.qkv(x, rotation, selection, kernels)
        attention = norms = None
        if config.da.form == "softmax":
            cache, visible = context.memory, self._visible(context)
            o, attention = kernels.attend_depths(q, k, v, cache.k, cache.v, context.l, visible)
            kept: Any = DepthCache(k, v)
            norms = value_norms(v, cache.v, context.l, config.da.query_heads) if context.inspecting else None
        else:
            o, kept = self._linear(q, k, v, context)
        routing = selection.routing if selection else None
        return Update(projections.out(o, selection, kernels), kept, routing, attention, norms)

    def make_ready(self, kernels: object) -> None:
        """Eq. 8, for the gradient of Eq. 7."""
        self.projections.add_shared()

    def merge(self) -> None:
        """Eq. 8, for good."""
        self.projections.merge()

    def row(self, x: Float[Array, "B T D"], depth: int) -> DepthCache | FadingCache:
        """An empty row of the cache."""
        heads = self.config.da.kv_heads
        shape = (*x.shape[:2], heads, self.config.da.head_size)
        # Made from x, so that it varies over the same mesh axes.
        zeros = jnp.broadcast_to(jnp.zeros_like(x[..., :1])[..., None], shape)
        if self.config.da.form == "softmax":
            return DepthCache(zeros, zeros)
        return FadingCache(zeros, zeros, jnp.broadcast_to(jnp.zeros_like(x[0, 0, :1], jnp.float32), (heads,)))

    def state(self, x: Float[Array, "B T D"], depth: int) -> Float[Array, "B T K H H"] | None:
        """In the linear form, the faded sum of the outer products of keys and values, float32."""
        if self.config.da.form == "softmax":
            return None
        size = self.config.da.head_size
        return jnp.zeros((*x.shape[:2], self.config.da.kv_heads, size, size), jnp.float32)

    def _visible(self, context: Context) -> Bool[Array, "L"] | None:
        """The earlier depths that this one attends to; None for all."""
        da, L, depths = self.config.da, context.depth, self.config.depths_of("da", context.depth)
        left = _entries_left(context)
        if len(depths) == L and da.window == 0 and da.dilation == 1:
            return left
        reached = jnp.asarray(da.visible(self.config, L))
        visible = lax.dynamic_index_in_dim(reached, context.l, 0, keepdims=False)
        return visible if left is None else visible & left

    def _linear(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], context: Context
    ) -> tuple[Float[Array, "B T N H"], Any]:
        own = FadingCache(k, v, jax.nn.log_sigmoid(2 * self.decay[...]))  # factors are 0.88 at first
        if isinstance(context.memory, FadingCache):
            runs = jnp.isin(jnp.arange(context.depth), jnp.asarray(self.config.depths_of("da", context.depth)))
            earlier = runs & (jnp.arange(context.depth) < context.l)
            o = attend_faded_rows(q, own, context.memory, earlier, _entries_left(context))
            return o.astype(q.dtype), own
        o, state = attend_state(q, own, context.memory)
        return o.astype(q.dtype), state


def _entries_left(context: Context) -> Bool[Array, "L"] | None:
    """The depths that are not left out at this one; None for all."""
    if context.ablation is None or context.ablation.entries is None:
        return None
    return context.ablation.entries[context.l]


def value_norms(
    v: Float[Array, "B T K H"], cached: Float[Array, "L B T K H"], l: Int[Array, ""], query_heads: int
) -> Float[Array, "B T N L"]:
    """The norm of the value that each query head finds at each depth up to `l`, float32; of later ones 0."""

    def norms(values: Array) -> Array:
        return jnp.linalg.norm(values.astype(jnp.float32), axis=-1)

    depths = jnp.arange(cached.shape[0])
    past = jnp.where(depths < l, jnp.moveaxis(norms(cached), 0, -1), 0)
    found = jnp.where(depths == l, norms(v)[..., None], past)
    return jnp.repeat(found, query_heads // v.shape[2], axis=2)


def attend_faded_rows(
    q: Float[Array, "B T N H"],
    own: FadingCache,
    cache: FadingCache,
    earlier: Bool[Array, "L"],
    left: Bool[Array, "L"] | None = None,
) -> Float[Array, "B T N H"]:
    """Sum over the token's depths of (q . k) / sqrt(H) * v, float32: quadratic in depth.

    An earlier one counts for the product of the factors of the depths that came after it, the token's own included.
    `earlier` says which rows of the cache take part, all of them before the token's own depth. Rows that are not `left`
    are not read, but let others fade as before.
    """
    B, T, N, H = q.shape
    groups, logs = q.reshape(B, T, own.k.shape[2], -1, H), jnp.where(earlier[:, None], cache.log_fade, 0)
    since = (own.log_fade + jnp.sum(logs, axis=0))[None] - jnp.cumsum(logs, axis=0)
    read = earlier if left is None else earlier & left
    weight = jnp.where(read[:, None], jnp.exp(since), 0) / math.sqrt(H)
    past = jnp.einsum("btkgh,lbtkh->lbtkg", groups, cache.k, preferred_element_type=jnp.float32)
    past = (past * weight[:, None, None, :, None]).astype(q.dtype)
    now = jnp.einsum("btkgh,btkh->btkg", groups, own.k, preferred_element_type=jnp.float32) / math.sqrt(H)
    sums = jnp.einsum("lbtkg,lbtkh->btkgh", past, cache.v, preferred_element_type=jnp.float32)
    return (sums + now[..., None] * own.v[..., None, :].astype(jnp.float32)).reshape(B, T, N, H)


def attend_state(
    q: Float[Array, "B T N H"], own: FadingCache, state: Float[Array, "B T K H H"]
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H H"]]:
    """The same from the faded sum of outer products in place of rows: constant in depth. Also returns the new sum."""
    B, T, N, H = q.shape
    groups = q.reshape(B, T, own.k.shape[2], -1, H).astype(jnp.float32)
    added = jnp.einsum("btki,btkj->btkij", own.k, own.v, preferred_element_type=jnp.float32)
    state = jnp.exp(own.log_fade)[None, None, :, None, None] * state + added
    o = jnp.einsum("btkgi,btkij->btkgj", groups, state) / math.sqrt(H)
    return o.reshape(B, T, N, H), state
