"""Attention of each token over its own depths, in plain JAX (Algorithm 1).

Queries of one token are grouped by key/value head: q, out [B, T, K, G, H]; scores and probabilities p [L, B, T, K, G].
`past` [L] says which rows of the cache take part; all of them lie before `l`.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array


def attend_depths(
    q: Array, k: Array, v: Array, cached_k: Array, cached_v: Array, l: Array, visible: Array | None = None
) -> tuple[Array, Array, tuple[Array, Array, Array, Array]]:
    """`Kernels.attend_depths`. The cache is neither updated nor cast here."""
    B, T, N, H = q.shape
    past = jnp.arange(cached_k.shape[0]) < l
    if visible is not None:
        past = past & visible
    out, probabilities = _attend(q.reshape(B, T, k.shape[2], -1, H), k, v, cached_k, cached_v, l, past)
    p = jnp.moveaxis(probabilities, 0, -1).reshape(B, T, N, probabilities.shape[0])
    return out.reshape(B, T, N, H), p, (k, v, cached_k, cached_v)


@jax.custom_vjp
def _attend(q, k, v, cached_k, cached_v, l, past):
    scores = _score(q, k, cached_k, l, past) / math.sqrt(q.shape[-1])
    reached = past | (jnp.arange(past.size) == l)
    p = jax.nn.softmax(scores, axis=0, where=_along(reached, scores))
    return _mix(p, v, cached_v, l, past).astype(q.dtype), p


def _attend_forward(q, k, v, cached_k, cached_v, l, past):
    out, p = _attend(q, k, v, cached_k, cached_v, l, past)
    return (out, p), (q, k, v, cached_k, cached_v, l, past, p)


def _attend_backward(residuals, cotangents):
    q, k, v, cached_k, cached_v, l, past, p = residuals
    d_out, d_p = cotangents
    d_p = d_p + _score(d_out, v, cached_v, l, past)
    d_scores = p * (d_p - (p * d_p).sum(axis=0, keepdims=True)) / math.sqrt(q.shape[-1])
    d_q = _mix(d_scores, k, cached_k, l, past)
    d_k, d_v = _spread(d_scores[l], q), _spread(p[l], d_out)
    d_cached_k, d_cached_v = _spread(_only(past, d_scores), q[None]), _spread(_only(past, p), d_out[None])
    gradients = d_q, d_k, d_v, d_cached_k, d_cached_v
    return *(d_x.astype(x.dtype) for d_x, x in zip(gradients, residuals, strict=False)), None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _along(mask, x):
    """The mask [L] in the shape that selects along the first axis of x."""
    return mask.reshape(-1, *[1] * (x.ndim - 1))


def _only(past, x):
    return jnp.where(_along(past, x), x, 0)


def _score(q, k, cached_k, l, past):
    """Products of the token's q with the key of each depth, zero where none takes part: [L, B, T, K, G]."""
    cached = jnp.einsum("btkgh,lbtkh->lbtkg", q, cached_k, preferred_element_type=jnp.float32)
    own = jnp.einsum("btkgh,btkh->btkg", q, k, preferred_element_type=jnp.float32)
    at_l = jnp.arange(past.size) == l
    return jnp.where(_along(past, cached), cached, jnp.where(_along(at_l, cached), own[None], 0))


def _mix(weights, v, cached_v, l, past):
    """Sum over depths of weights [L, B, T, K, G] times values: [B, T, K, G, H] in float32."""
    weights = weights.astype(v.dtype)
    mixed = jnp.einsum("lbtkg,lbtkh->btkgh", _only(past, weights), cached_v, preferred_element_type=jnp.float32)
    return mixed + weights[l][..., None].astype(jnp.float32) * v[..., None, :].astype(jnp.float32)


def _spread(weights, x):
    """Sum over a group of weights [..., K, G] times x [..., K, G, H]: [..., K, H] in float32.

    An elementwise product (G is 1 or small), so that it fuses with the addition to the cache's accumulated gradient.
    """
    return (weights[..., None] * x.astype(jnp.float32)).sum(axis=-2)
