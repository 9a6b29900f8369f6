"""Queries and keys, head by head: RMSNorm, then rotation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dreamer_jax.kernels.interface import Rotation
from dreamer_jax.kernels.norm import rms_norm


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


def norm_and_rotate(x: Array, weight: Array, epsilon: float, rotation: Rotation) -> Array:
    """`Kernels.norm_and_rotate`."""
    return rotate(rms_norm(x, weight, epsilon), rotation)


def fused_heads(
    fused: Array, q_weight: Array, k_weight: Array, epsilon: float, rotation: Rotation, kv_heads: int
) -> tuple[Array, Array, Array]:
    """`Kernels.fused_heads`."""
    query = fused.shape[2] - 2 * kv_heads
    q, k, v = jnp.split(fused, [query, query + kv_heads], axis=2)
    return norm_and_rotate(q, q_weight, epsilon, rotation), norm_and_rotate(k, k_weight, epsilon, rotation), v
