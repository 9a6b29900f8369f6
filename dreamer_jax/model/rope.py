"""Rotary position encodings over sequence positions and, half of them reversed, over depths (3.3 to 3.5)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dreamer_jax.model.norm import rms_norm
from dreamer_jax.native import kernels
from dreamer_jax.sharding import vary_together


def frequencies(size: int, base: float) -> Float[Array, "half"]:
    """Radians per position of the size/2 pairs: base^(-2j/size)."""
    return jnp.asarray(base, jnp.float32) ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)


class Rotation(NamedTuple):
    """Cosines and sines of the angles by which the H/2 pairs of numbers turn; broadcast over heads."""

    cos: Float[Array, "*batch half"]
    sin: Float[Array, "*batch half"]


def sequence_rotation(positions: Int[Array, "B T"], size: int, base: float) -> Rotation:
    """The rotation of every token, [B, T, 1, half]; the same at all depths."""
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies(size, base)[None, None, None, :]
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def depth_rotation(l: Int[Array, ""], depth: int, size: int, base: float) -> Rotation:
    """The rotation at depth `l` of `depth`, [half]: the lower frequencies turn by l, the upper half by depth-1-l.

    The reversed half tells the model how many depths are still to come (3.4).
    """
    forward, reversed_ = jnp.split(frequencies(size, base), 2)
    angles = jnp.concatenate([forward * l.astype(jnp.float32), reversed_ * (depth - 1 - l).astype(jnp.float32)])
    return Rotation(jnp.cos(angles), jnp.sin(angles))


@jax.custom_vjp
def rotate(x: Float[Array, "*batch H"], rotation: Rotation) -> Float[Array, "*batch H"]:
    """Rotate the pairs (j, j + H/2) of x: computed in float32, returned in x's dtype. Its gradient rotates back."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = (jnp.broadcast_to(a, first.shape) for a in rotation)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


rotate.defvjp(
    lambda x, rotation: (rotate(x, rotation), rotation),
    lambda rotation, d: (rotate(d, Rotation(rotation.cos, -rotation.sin)), None),
)


def norm_and_rotate(
    x: Float[Array, "B T heads H"], weight: Float[Array, "H"], epsilon: float, rotation: Rotation, *, native: bool
) -> Float[Array, "B T heads H"]:
    """RMSNorm of every head, then RoPE: what queries and keys go through. `native` takes the CPU's kernel."""
    if not native:
        return rotate(rms_norm(x, weight, epsilon), rotation)
    x_rows = x.reshape(-1, *x.shape[2:])
    rows = [a.reshape(-1, a.shape[-1]) for a in rotation]
    return _norm_and_rotate(epsilon, *vary_together(x_rows, weight, *rows)).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm_and_rotate(epsilon, x, weight, cos, sin):
    return kernels.norm_and_rotate(x, weight, cos, sin, epsilon)


def _norm_and_rotate_backward(epsilon, residuals, d_y):
    x, weight, cos, sin = residuals
    return *kernels.norm_and_rotate_gradients(x, weight, cos, sin, d_y, epsilon), None, None


_norm_and_rotate.defvjp(
    lambda epsilon, *arrays: (_norm_and_rotate(epsilon, *arrays), arrays), _norm_and_rotate_backward
)


def queries_keys_values(
    fused: Float[Array, "B T heads H"],
    q_weight: Float[Array, "H"],
    k_weight: Float[Array, "H"],
    epsilon: float,
    rotation: Rotation,
    kv_heads: int,
    *,
    native: bool,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Take fused heads [q | k | v] apart; RMSNorm of every query and key head, then RoPE.

    `native` takes the CPU's kernel, one pass for all three.
    """
    if native:
        rows = [a.reshape(-1, a.shape[-1]) for a in rotation]
        heads = fused.reshape(-1, *fused.shape[2:])
        parts = _queries_keys_values(epsilon, kv_heads, *vary_together(heads, q_weight, k_weight, *rows))
        q, k, v = (part.reshape(*fused.shape[:2], *part.shape[1:]) for part in parts)
        return q, k, v
    query = fused.shape[2] - 2 * kv_heads
    q, k, v = jnp.split(fused, [query, query + kv_heads], axis=2)
    return rotate(rms_norm(q, q_weight, epsilon), rotation), rotate(rms_norm(k, k_weight, epsilon), rotation), v


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _queries_keys_values(epsilon, kv_heads, fused, q_weight, k_weight, cos, sin):
    return tuple(kernels.fused_heads(fused, q_weight, k_weight, cos, sin, kv_heads, epsilon))


def _queries_keys_values_backward(epsilon, kv_heads, residuals, cotangents):
    fused, q_weight, k_weight, cos, sin = residuals
    d_q, d_k, d_v = cotangents
    return *kernels.fused_heads_gradients(fused, q_weight, k_weight, cos, sin, d_q, d_k, d_v, epsilon), None, None


_queries_keys_values.defvjp(
    lambda epsilon, kv_heads, *arrays: (_queries_keys_values(epsilon, kv_heads, *arrays), arrays),
    _queries_keys_values_backward,
)
