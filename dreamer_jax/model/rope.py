"""Rotary position encodings over sequence positions and, half of them reversed, over depths (3.3 to 3.5)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def frequencies(size: int, base: float) -> Float[Array, "half"]:
    """Radians per position of the size/2 pairs: base^(-2j/size)."""
    return jnp.asarray(base, jnp.float32) ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)


def sequence_angles(positions: Int[Array, "B T"], size: int, base: float) -> Float[Array, "B T half"]:
    """Rotation angles of every token, in radians."""
    return positions.astype(jnp.float32)[..., None] * frequencies(size, base)[None, None, :]


def depth_angles(l: Int[Array, ""], depth: int, size: int, base: float) -> Float[Array, "half"]:
    """Rotation angles at depth `l` of `depth`: the lower half of the frequencies turn by l, the upper by depth-1-l.

    The reversed half tells the model how many depths are still to come (3.4).
    """
    forward, reversed_ = jnp.split(frequencies(size, base), 2)
    return jnp.concatenate([forward * l.astype(jnp.float32), reversed_ * (depth - 1 - l).astype(jnp.float32)])


def rotate(x: Float[Array, "*batch H"], angles: Float[Array, "*batch half"]) -> Float[Array, "*batch H"]:
    """Rotate the pairs (j, j + H/2) of x by `angles`: computed in float32, returned in x's dtype."""
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
