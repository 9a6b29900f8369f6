"""Norm and rotation of queries and keys: the CPU's kernel equals the two functions, in values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer_jax.model.norm import rms_norm
from dreamer_jax.model.rope import (
    Rotation,
    depth_rotation,
    norm_and_rotate,
    queries_keys_values,
    rotate,
    sequence_rotation,
)
from tests.native import needs_compiler


def example(H: int, heads: int = 3) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(H)
    x, d_y = (jnp.asarray(rng.normal(size=(2, 75, heads, H)) * 3, jnp.float32) for _ in range(2))
    return x, jnp.asarray(rng.uniform(0.5, 2, size=H), jnp.float32), d_y


@needs_compiler
@pytest.mark.parametrize("H", [2, 20, 32])
@pytest.mark.parametrize("over", ["sequence", "depth"])
def test_the_kernel_normalises_and_rotates_with_the_gradients_of_the_plain_functions(H, over):
    x, weight, d_y = example(H)
    positions = jnp.arange(150, dtype=jnp.int32).reshape(2, 75)
    # Depth RoPE splits the frequencies in two halves, so that it needs two at least.
    rotation = (
        sequence_rotation(positions, H, 1e4)
        if over == "sequence" or H == 2
        else depth_rotation(jnp.int32(3), 7, H, 500.0)
    )

    def run(native):
        y, vjp = jax.vjp(lambda x, w: norm_and_rotate(x, w, 1e-6, rotation, native=native), x, weight)
        return y, *vjp(d_y)

    for got, wanted in zip(jax.jit(run, static_argnums=0)(True), jax.jit(run, static_argnums=0)(False), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=3e-6 * float(jnp.abs(wanted).max()))


@needs_compiler
@pytest.mark.parametrize(("N", "K", "H"), [(1, 1, 20), (4, 2, 32)])
def test_the_kernel_takes_fused_heads_apart_with_the_gradients_of_the_plain_functions(N, K, H):
    fused, q_weight, _ = example(H, N + 2 * K)
    k_weight, positions = q_weight[::-1], jnp.arange(150, dtype=jnp.int32).reshape(2, 75)
    rotation = sequence_rotation(positions, H, 1e4)
    cotangents = [example(H, heads)[2] for heads in (N, K, K)]

    def run(native):
        def parts(*x):
            return queries_keys_values(*x, 1e-6, rotation, K, native=native)

        found, vjp = jax.vjp(parts, fused, q_weight, k_weight)
        return *found, *vjp(tuple(cotangents))

    for got, wanted in zip(jax.jit(run, static_argnums=0)(True), jax.jit(run, static_argnums=0)(False), strict=True):
        assert got.shape == wanted.shape
        np.testing.assert_allclose(got, wanted, rtol=0, atol=3e-6 * float(jnp.abs(wanted).max()))


def test_the_gradient_of_a_rotation_is_that_of_its_formula():
    x, _, d_y = example(8)
    rotation = sequence_rotation(jnp.arange(150, dtype=jnp.int32).reshape(2, 75), 8, 1e4)

    def formula(x):
        turned = jax.lax.complex(x[..., :4], x[..., 4:]) * jax.lax.complex(*rotation)
        return jnp.concatenate([turned.real, turned.imag], axis=-1)

    with jax.numpy_rank_promotion("allow"):
        (y, vjp), (wanted, wanted_vjp) = jax.vjp(lambda x: rotate(x, rotation), x), jax.vjp(formula, x)
    np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-5)
    np.testing.assert_allclose(vjp(d_y)[0], wanted_vjp(d_y)[0], rtol=0, atol=1e-5)


def test_a_rotation_by_nothing_leaves_the_norm_alone():
    x, weight, _ = example(8)
    still = Rotation(jnp.ones((1, 1, 1, 4)), jnp.zeros((1, 1, 1, 4)))
    np.testing.assert_array_equal(norm_and_rotate(x, weight, 1e-6, still, native=False), rms_norm(x, weight, 1e-6))
