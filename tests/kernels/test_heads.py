"""Norm and rotation of queries and keys."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer_jax.kernels.interface import Rotation
from dreamer_jax.kernels.norm import rms_norm
from dreamer_jax.kernels.plain.heads import rotate
from tests.kernels.backends import BACKENDS
from tests.kernels.checks import assert_near, gradients, kernels, widened


def example(H, heads=3):
    rng = np.random.default_rng(H)
    x = jnp.asarray(rng.normal(size=(2, 75, heads, H)) * 3, jnp.float32)
    return x, jnp.asarray(rng.uniform(0.5, 2, size=H), jnp.float32)


def rotation(H, over):
    """Angles of every token [B, T, 1, H/2], or of one depth [H/2]."""
    shape = (2, 75, 1, H // 2) if over == "sequence" else (H // 2,)
    angles = jnp.asarray(np.random.default_rng(1).uniform(0, 150, size=shape), jnp.float32)
    return Rotation(jnp.cos(angles), jnp.sin(angles))


@pytest.mark.parametrize("H", [2, 20, 32])
@pytest.mark.parametrize("over", ["sequence", "depth"])
@pytest.mark.parametrize("name", BACKENDS)
def test_every_head_is_normalised_and_rotated(name, H, over):
    def run(name, x, weight):
        return kernels(name).norm_and_rotate(x, weight, 1e-6, rotation(H, over))

    x = example(H)
    assert_near(gradients(partial(run, name), *x), gradients(partial(run, "reference"), *x))


@pytest.mark.parametrize(("N", "K", "H"), [(1, 1, 20), (4, 2, 32)])
@pytest.mark.parametrize("over", ["sequence", "depth"])
@pytest.mark.parametrize("name", BACKENDS)
def test_fused_heads_are_taken_apart(name, N, K, H, over):
    def run(name, fused, q_weight, k_weight):
        return kernels(name).fused_heads(fused, q_weight, k_weight, 1e-6, rotation(H, over), K)

    fused, weight = example(H, N + 2 * K)
    x = fused, weight, weight[::-1]
    assert_near(gradients(partial(run, name), *x), gradients(partial(run, "reference"), *x))


def test_bfloat16_is_rounded_by_norm_and_rotation_alone():
    x, weight = example(32, 4)
    x = x.astype(jnp.bfloat16)

    def run(name, x, weight):
        return kernels(name).fused_heads(x, weight, weight, 1e-6, rotation(32, "sequence"), 1)

    got = gradients(partial(run, "plain"), x, weight)
    assert all(part.dtype == jnp.bfloat16 for part in got[0])
    assert_near(got, gradients(partial(run, "reference"), *widened((x, weight))), 2e-2)


def test_the_gradient_of_a_rotation_is_that_of_its_formula():
    x, _ = example(8)
    turned = rotation(8, "sequence")

    def formula(x):
        pairs = jax.lax.complex(x[..., :4], x[..., 4:])
        pairs = pairs * jnp.broadcast_to(jax.lax.complex(*turned), pairs.shape)
        return jnp.concatenate([pairs.real, pairs.imag], axis=-1)

    assert_near(gradients(lambda x: rotate(x, turned), x), gradients(formula, x))


def test_a_rotation_by_nothing_leaves_the_norm_alone():
    x, weight = example(8)
    still = Rotation(jnp.ones((1, 1, 1, 4)), jnp.zeros((1, 1, 1, 4)))
    np.testing.assert_array_equal(kernels("plain").norm_and_rotate(x, weight, 1e-6, still), rms_norm(x, weight, 1e-6))
