"""Arrays for tests of kernels."""

import jax.numpy as jnp
import numpy as np


def heads(B, T, N, K, H, dtype=jnp.float32, seed=0):
    """q, k and v."""
    r = np.random.default_rng(seed)
    return tuple(jnp.array(r.normal(size=(B, T, heads, H)), dtype) for heads in (N, K, K))


def documents(B, T, mean_length, padding, seed=0):
    """Segment ids of packed rows."""
    r = np.random.default_rng(seed)
    ids = 1 + np.cumsum(r.random((B, T)) < 1 / mean_length, axis=1)
    ids[:, T - padding :] = 0
    return jnp.array(ids, jnp.int32)


def experts(sizes, dtype=jnp.float32, d=16, f=8, rows=None):
    """Sorted rows, scores, weights and an upstream gradient, at the scale of a trained layer; and the sizes."""
    rng, rows = np.random.default_rng(len(sizes)), rows or sum(sizes)
    shapes = [(rows, d), (len(sizes), d, 2 * f), (len(sizes), f, d), (rows, d)]
    scales = [1, d**-0.5, f**-0.5, 1]
    x, *others = [jnp.asarray(rng.normal(size=s) * c, dtype) for s, c in zip(shapes, scales, strict=True)]
    scores = jnp.asarray(rng.uniform(0.1, 1, size=(rows, 1)), jnp.float32)
    return x, scores, *others, jnp.asarray(sizes, jnp.int32)
