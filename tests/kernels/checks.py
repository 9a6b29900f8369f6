"""What tests of kernels share: named implementations, gradients, and comparison with what is wanted."""

import jax
import jax.numpy as jnp
import numpy as np
from chex import assert_trees_all_close, assert_trees_all_equal_shapes

from dreamer_jax.kernels.compute import implementation
from dreamer_jax.kernels.interface import Kernels


def kernels(name):
    """The operations of the implementation of this name, with nothing handed on yet."""
    return Kernels(implementation(name))


def eight_devices():
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def cotangents(tree):
    """Numbers that differ from entry to entry, for every array of a tree."""

    def of(a):
        return jnp.cos(jnp.arange(a.size, dtype=jnp.float32)).reshape(a.shape).astype(a.dtype)

    return jax.tree.map(of, tree)


def gradients(function, *x):
    """(out, gradients of x) for these cotangents of a tree of arrays."""

    @jax.jit
    def run(*x):
        out, pull_back = jax.vjp(function, *x)
        return out, pull_back(cotangents(out))

    return run(*x)


def widened(tree):
    return jax.tree.map(lambda a: a.astype(jnp.float32), tree)


def assert_near(got, wanted, tolerance=4e-6):
    """Array by array, relative to the largest number that is wanted of it, or to 0.1 where all are smaller."""
    assert_trees_all_equal_shapes(got, wanted)

    def scaled(a, wanted):
        return np.asarray(a, np.float64) / max(np.abs(np.asarray(wanted, np.float64)).max(), 0.1)

    got, wanted = (jax.tree.map(scaled, tree, wanted) for tree in (got, wanted))
    assert_trees_all_close(got, wanted, rtol=0, atol=tolerance)
