"""Rotary position encodings over sequence positions and, half of them reversed, over depths (3.3 to 3.5)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dreamer_jax.kernels.interface import Rotation
from dreamer_jax.model_config import ModelConfig


def frequencies(size: int, base: float) -> Float[Array, "half"]:
    """Radians per position of the size/2 pairs: base^(-2j/size)."""
    return jnp.asarray(base, jnp.float32) ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)


def sequence_rotation(positions: Int[Array, "B T"], size: int, base: float) -> Rotation:
    """The rotation of every token, [B, T, 1, half]; the same at all depths."""
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies(size, base)[None, None, None, :]
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def depth_rotation(config: ModelConfig, l: Int[Array, ""], depth: int, size: int) -> Rotation:
    """The rotation at depth `l` of `depth`, [half]: the lower frequencies turn by l, the upper half by depth-1-l.

    The reversed half tells the model how many depths are still to come (3.4); without `depth_rope_reversed` it turns by
    l as well. With `depth_rope_scaling`, both count in steps of the trained depth over the depth that runs.
    """
    lower, upper = jnp.split(frequencies(size, config.depth_rope_base), 2)
    step = config.depth / depth if config.depth_rope_scaling else 1.0
    past, to_come = l.astype(jnp.float32) * step, (depth - 1 - l).astype(jnp.float32) * step
    angles = jnp.concatenate([lower * past, upper * (to_come if config.depth_rope_reversed else past)])
    return Rotation(jnp.cos(angles), jnp.sin(angles))
