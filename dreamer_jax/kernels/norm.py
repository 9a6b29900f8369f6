"""RMSNorm (Zhang & Sennrich, 2019)."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*batch D"], weight: Float[Array, "D"], epsilon: float) -> Float[Array, "*batch D"]:
    """Compute x / sqrt(mean(x^2) + epsilon) * weight over the last axis: computed in float32, returned in x's dtype."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + epsilon)
    return (y * jnp.broadcast_to(weight, y.shape)).astype(x.dtype)
