"""Attention by the C++ kernels, with its derivatives."""

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from dreamer_jax.kernels.documents import document_start
from dreamer_jax.kernels.native import calls
from dreamer_jax.kernels.plain import attention, depths


def attend_sequence(q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
    """`Kernels.attend_sequence`."""
    return _attend(q, k, v, document_start(segment_ids))


@jax.custom_vjp
def _attend(q, k, v, start):
    return calls.attend(q, k, v, start)[0]


def _attend_forward(q, k, v, start):
    # What selective remat keeps: with it, the backward pass does not attend a second time.
    out, lse = checkpoint_name(calls.attend(q, k, v, start), "attention")
    return out, (q, k, v, start, out, lse)


def _attend_backward(residuals, d_out):
    q, k, v, start, out, lse = residuals
    return *calls.attend_gradients(q, k, v, start, out, lse, d_out), None


_attend.defvjp(_attend_forward, _attend_backward)


def attend_newest(q: Array, k: Array, v: Array, l: Array, lengths: Array) -> Array:
    """`Kernels.attend_newest`, without derivative; in plain JAX for more than one token."""
    if q.shape[1] > 1:
        return attention.attend_newest(q, k, v, l, lengths)
    return calls.attend_cache(q, k, v, l, lengths)


def attend_depths(
    q: Array, k: Array, v: Array, cached_k: Array, cached_v: Array, l: Array, visible: Array | None = None
) -> tuple[Array, Array, tuple[Array, Array, Array, Array]]:
    """`Kernels.attend_depths`; in plain JAX where `visible` is given.

    The gradients of k, v and the cache are added in place to those of later uses of what is handed on.
    """
    if visible is not None:
        return depths.attend_depths(q, k, v, cached_k, cached_v, l, visible)
    out, p, *handed_on = _attend_depths(q, k, v, cached_k, cached_v, l)
    return out, p, tuple(handed_on)


@jax.custom_vjp
def _attend_depths(q, k, v, cached_k, cached_v, l):
    return *calls.attend_depths(q, k, v, cached_k, cached_v, l), cached_k, cached_v


def _attend_depths_forward(*arrays):
    out, *others = _attend_depths(*arrays)
    # The backward pass makes the probabilities again: kept, they would grow with the square of the depth.
    return (checkpoint_name(out, "attention"), *others), arrays


def _attend_depths_backward(arrays, cotangents):
    return *calls.attend_depths_gradients(*arrays, *cotangents), None


_attend_depths.defvjp(_attend_depths_forward, _attend_depths_backward)
