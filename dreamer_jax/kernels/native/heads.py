"""Norm and rotation of queries and keys by the C++ kernels, one pass for all heads, with their derivatives."""

from functools import partial

import jax
from jaxtyping import Array

from dreamer_jax.kernels.interface import Rotation
from dreamer_jax.kernels.native import calls
from dreamer_jax.sharding import vary_together


def norm_and_rotate(x: Array, weight: Array, epsilon: float, rotation: Rotation) -> Array:
    """`Kernels.norm_and_rotate`."""
    x_rows = x.reshape(-1, *x.shape[2:])
    return _norm_and_rotate(epsilon, *vary_together(x_rows, weight, *_rows(rotation))).reshape(x.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm_and_rotate(epsilon, x, weight, cos, sin):
    return calls.norm_and_rotate(x, weight, cos, sin, epsilon)


def _norm_and_rotate_forward(epsilon, *arrays):
    return _norm_and_rotate(epsilon, *arrays), arrays


def _norm_and_rotate_backward(epsilon, arrays, d_y):
    x, weight, cos, sin = arrays
    return *calls.norm_and_rotate_gradients(x, weight, cos, sin, d_y, epsilon), None, None


_norm_and_rotate.defvjp(_norm_and_rotate_forward, _norm_and_rotate_backward)


def fused_heads(
    fused: Array, q_weight: Array, k_weight: Array, epsilon: float, rotation: Rotation, kv_heads: int
) -> tuple[Array, Array, Array]:
    """`Kernels.fused_heads`."""
    heads = fused.reshape(-1, *fused.shape[2:])
    parts = _fused_heads(epsilon, kv_heads, *vary_together(heads, q_weight, k_weight, *_rows(rotation)))
    q, k, v = (part.reshape(*fused.shape[:2], *part.shape[1:]) for part in parts)
    return q, k, v


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused_heads(epsilon, kv_heads, fused, q_weight, k_weight, cos, sin):
    return tuple(calls.fused_heads(fused, q_weight, k_weight, cos, sin, kv_heads, epsilon))


def _fused_heads_forward(epsilon, kv_heads, *arrays):
    return _fused_heads(epsilon, kv_heads, *arrays), arrays


def _fused_heads_backward(epsilon, kv_heads, arrays, cotangents):
    fused, q_weight, k_weight, cos, sin = arrays
    d_q, d_k, d_v = cotangents
    gradients = calls.fused_heads_gradients(fused, q_weight, k_weight, cos, sin, d_q, d_k, d_v, epsilon)
    return *gradients, None, None


_fused_heads.defvjp(_fused_heads_forward, _fused_heads_backward)


def _rows(rotation: Rotation) -> list[Array]:
    return [angles.reshape(-1, angles.shape[-1]) for angles in rotation]
