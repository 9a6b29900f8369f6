"""Every operation written out, as slow as need be: what tests compare the other implementations with.

Attention makes the whole matrix of scores, and every expert computes on every row: in float32, rounded at the end to
the type that came in. JAX differentiates all of it by itself.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from dreamer_jax.kernels.documents import causal_mask
from dreamer_jax.kernels.interface import ExpertOrder, Implementation, Rotation, Routed
from dreamer_jax.sharding import vary_together


def norm_and_rotate(x: Array, weight: Array, epsilon: float, rotation: Rotation) -> Array:
    """`Kernels.norm_and_rotate`: a pair (j, j + H/2) is a complex number, which is turned by a product."""
    y = x.astype(jnp.float32)
    y = y / jnp.sqrt(jnp.mean(y**2, axis=-1, keepdims=True) + epsilon) * jnp.broadcast_to(weight, y.shape)
    pairs = lax.complex(*jnp.split(y, 2, axis=-1))
    turned = pairs * jnp.broadcast_to(lax.complex(*rotation), pairs.shape)
    return jnp.concatenate([turned.real, turned.imag], axis=-1).astype(x.dtype)


def fused_heads(
    fused: Array, q_weight: Array, k_weight: Array, epsilon: float, rotation: Rotation, kv_heads: int
) -> tuple[Array, Array, Array]:
    """`Kernels.fused_heads`."""
    q, k, v = fused[:, :, : -2 * kv_heads], fused[:, :, -2 * kv_heads : -kv_heads], fused[:, :, -kv_heads:]
    return norm_and_rotate(q, q_weight, epsilon, rotation), norm_and_rotate(k, k_weight, epsilon, rotation), v


def route(query: Array, keys: Array, bias: Array, counted: Array, active: int) -> Routed:
    """`Kernels.route`, by a stable sort of all experts."""
    logits = jnp.matmul(query, keys.T, precision="highest") / math.sqrt(keys.shape[1])
    ranked = _argsort(-lax.stop_gradient(logits + bias[None, :]))
    ids = checkpoint_name(ranked[:, :active], "routing")
    chosen = jax.nn.one_hot(ids, keys.shape[0], dtype=jnp.int32)
    counts = jnp.einsum("tae,t->e", chosen, counted.astype(jnp.int32))
    scores = jax.nn.sigmoid(logits)
    p = lax.stop_gradient(scores / scores.sum(axis=1, keepdims=True))
    return Routed(ids, jnp.take_along_axis(scores, ids, axis=1), counts, jnp.sum(jax.scipy.special.entr(p), axis=1))


def order(ids: Array, experts: int) -> ExpertOrder:
    """`Kernels.order`."""
    flat = ids.reshape(-1)
    order = _argsort(flat)
    sizes = jax.nn.one_hot(flat, experts, dtype=jnp.int32).sum(axis=0)
    return ExpertOrder(order, _argsort(order), sizes)


def _argsort(values: Array) -> Array:
    """Stable, along the last axis; inside shard_map over the mesh axes of `values`, which JAX's own loses."""
    return vary_together(jnp.argsort(values, axis=-1, stable=True).astype(jnp.int32), values)[0]


def linear(x: Array, scores: Array, w: Array, shared: Array | None, order: ExpertOrder) -> tuple[Array, Array]:
    """`Kernels.linear`: Eq. 7, in which the score multiplies x W_e, and a copy without gradient x W_shared."""
    rows, matrices = x.astype(jnp.float32), w.astype(jnp.float32)
    common = jnp.zeros_like(matrices[0]) if shared is None else lax.stop_gradient(shared.astype(jnp.float32))
    chosen = _experts(order.sizes, x.shape[0])[order.inverse]
    own = _sum_of_chosen(chosen, jnp.einsum("ti,eio->teo", rows, matrices - common[None], precision="highest"))
    y = scores[:, None] * own + lax.stop_gradient(scores)[:, None] * jnp.matmul(rows, common, precision="highest")
    return y.astype(x.dtype), w


def swiglu(x: Array, scores: Array, w_gate_up: Array, w_down: Array, order: ExpertOrder) -> tuple[Array, Array, Array]:
    """`Kernels.swiglu`: the sum over a token's choices of each one's score times its expert's result."""
    chosen = _experts(order.sizes, scores.size)[order.inverse].reshape(*scores.shape, -1)
    weights = jnp.einsum("ta,tae->te", scores, chosen.astype(jnp.float32))
    y = jnp.einsum("te,ted->td", weights, _of_every_expert(x, w_gate_up, w_down), precision="highest")
    return y.astype(x.dtype), w_gate_up, w_down


def sorted_swiglu(x: Array, scores: Array, w_gate_up: Array, w_down: Array, sizes: Array) -> Array:
    """`Kernels.sorted_swiglu`."""
    owned = jnp.arange(x.shape[0])[:, None] < jnp.sum(sizes)
    each = _of_every_expert(jnp.where(owned, x, 0), w_gate_up, w_down)
    y = scores * _sum_of_chosen(_experts(sizes, x.shape[0]), each)
    return jnp.where(owned, y, 0).astype(x.dtype)


def _experts(sizes: Int[Array, "E"], rows: int) -> Bool[Array, "R E"]:
    """Which expert sorted row r belongs to; rows past the sum of `sizes` belong to none."""
    expert = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(rows), side="right")
    return jax.nn.one_hot(expert, sizes.shape[0], dtype=bool)


def _sum_of_chosen(chosen: Bool[Array, "R E"], values: Float[Array, "R E D"]) -> Float[Array, "R D"]:
    return jnp.sum(values, axis=1, where=chosen[:, :, None])


def _of_every_expert(
    x: Float[Array, "R D"], w_gate_up: Float[Array, "E D G"], w_down: Float[Array, "E F D"]
) -> Float[Array, "R E D"]:
    """silu(x W_gate) * (x W_up) W_down of every row and expert, float32."""
    x, w_gate_up, w_down = (a.astype(jnp.float32) for a in (x, w_gate_up, w_down))
    gate, up = jnp.split(jnp.einsum("rd,edg->reg", x, w_gate_up, precision="highest"), 2, axis=-1)
    return jnp.einsum("ref,efd->red", jax.nn.silu(gate) * up, w_down, precision="highest")


def attend_sequence(q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
    """`Kernels.attend_sequence`."""
    return _attend(q, k, v, causal_mask(segment_ids))[0]


def attend_newest(q: Array, k: Array, v: Array, l: Array, lengths: Array) -> Array:
    """`Kernels.attend_newest`."""
    rows = lengths[:, None] - jnp.arange(q.shape[1] - 1, -1, -1)[None, :]
    visible = jnp.arange(k.shape[3])[None, None, :] < rows[:, :, None]
    return _attend(q, k[l].swapaxes(1, 2), v[l].swapaxes(1, 2), visible)[0]


def attend_depths(
    q: Array, k: Array, v: Array, cached_k: Array, cached_v: Array, l: Array, visible: Array | None = None
) -> tuple[Array, Array, tuple[Array, Array, Array, Array]]:
    """`Kernels.attend_depths`: every token is a row of its own, whose sequence is its depths."""
    L, B, T = cached_k.shape[:3]
    depth = jnp.arange(L)
    past = depth < l
    seen = (past if visible is None else past & visible) | (depth == l)

    def of_token(own: Array, cache: Array) -> Array:
        at_depth = (depth == l).reshape(L, 1, 1, 1, 1)
        cache = jnp.where(seen.reshape(L, 1, 1, 1, 1), jnp.where(at_depth, own[None], cache), 0)
        return jnp.moveaxis(cache, 0, 2).reshape(B * T, L, *own.shape[2:])

    rows = q.reshape(B * T, 1, *q.shape[2:])
    mask = jnp.broadcast_to(seen, (B * T, 1, L))
    out, p = _attend(rows, of_token(k, cached_k), of_token(v, cached_v), mask)
    return out.reshape(q.shape), p.reshape(*q.shape[:3], L), (k, v, cached_k, cached_v)


def _attend(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], visible: Bool[Array, "B T S"]
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N S"]]:
    """Attention and its probabilities; nothing visible gives zeros."""
    group = q.shape[2] // k.shape[2]
    query, keys, values = q.astype(jnp.float32), *(jnp.repeat(x.astype(jnp.float32), group, axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->btns", query, keys, precision="highest") / math.sqrt(q.shape[-1])
    p = jax.nn.softmax(scores, axis=-1, where=visible[:, :, None, :])
    return jnp.einsum("btns,bsnh->btnh", p, values, precision="highest").astype(q.dtype), p


REFERENCE = Implementation(
    name="reference",
    norm_and_rotate=norm_and_rotate,
    fused_heads=fused_heads,
    route=route,
    order=order,
    linear=linear,
    swiglu=swiglu,
    sorted_swiglu=sorted_swiglu,
    attend_sequence=attend_sequence,
    attend_newest=attend_newest,
    attend_depths=attend_depths,
)
