"""Attention of a token over its own depths."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_trees_all_equal, assert_trees_all_equal_dtypes
from jax.sharding import PartitionSpec as P

from tests.kernels.backends import BACKENDS, needs_compiler
from tests.kernels.checks import assert_near, cotangents, eight_devices, gradients, kernels, widened
from tests.kernels.examples import heads

NAMES = pytest.mark.parametrize("name", [*BACKENDS, "reference"])
HAND_ON = (2.0, 3.0, 5.0, 7.0)


def example(L, N, K, dtype=jnp.float32, B=2, T=3, H=8):
    """q, k, v and the cache."""
    r = np.random.default_rng(1)
    return *heads(B, T, N, K, H, dtype), *(jnp.array(r.normal(size=(L, B, T, K, H)), dtype) for _ in "kv")


def attend(name, *x, l, visible=None):
    return kernels(name).attend_depths(*x, jnp.int32(l), visible)


@pytest.mark.parametrize(
    ("name", "N", "K", "l", "dtype", "H"),
    [
        ("plain", 1, 1, 0, jnp.float32, 8),
        ("plain", 1, 1, 4, jnp.float32, 8),
        ("plain", 4, 2, 3, jnp.float32, 8),
        ("plain", 2, 2, 2, jnp.bfloat16, 8),
        pytest.param("native", 1, 1, 0, jnp.float32, 37, marks=needs_compiler),  # 37: a rest after whole vectors
        pytest.param("native", 1, 1, 4, jnp.float32, 37, marks=needs_compiler),
        pytest.param("native", 4, 2, 3, jnp.float32, 37, marks=needs_compiler),
        pytest.param("native", 2, 2, 2, jnp.float32, 37, marks=needs_compiler),
    ],
)
def test_values_probabilities_and_gradients_equal_the_reference(name, N, K, l, dtype, H):
    x = example(5, N, K, dtype, H=H)
    (out, p), d_x = gradients(partial(attend, name, l=l), *x)
    assert_trees_all_equal_dtypes((out, d_x), (x[0], x))
    assert p.dtype == jnp.float32
    tolerance = 4e-6 if dtype == jnp.float32 else 1e-2
    assert_near(((out, p), d_x), gradients(partial(attend, "reference", l=l), *widened(x)), tolerance)


@NAMES
@pytest.mark.parametrize(("N", "K"), [(1, 1), (4, 2)])
def test_probabilities_are_those_of_the_softmax(N, K, name):
    L, l = 5, 3
    q, k, _, cached_k, cached_v = example(L, N, K)
    one_hot = np.broadcast_to(np.eye(L, 8, dtype=np.float32)[:, None, None, None], cached_v.shape)  # values name depths
    out, p = jax.jit(partial(attend, name, l=l))(q, k, jnp.array(one_hot[l]), cached_k, jnp.array(one_hot))
    assert p.shape == (*q.shape[:3], L)
    np.testing.assert_allclose(p, out[..., :L], atol=1e-6)
    np.testing.assert_allclose(np.sum(p, axis=-1), 1, atol=1e-6)
    assert (np.asarray(p[..., l + 1 :]) == 0).all()


@pytest.mark.parametrize("name", BACKENDS)
def test_gradients_flow_through_the_probabilities_alone(name):
    x = example(4, 2, 1)

    def weighted(name, *x):
        return jnp.einsum("btnl,l->btn", attend(name, *x, l=2)[1], jnp.cos(jnp.arange(4.0)))

    assert_near(gradients(partial(weighted, name), *x), gradients(partial(weighted, "reference"), *x))


@NAMES
def test_what_is_handed_on_brings_the_gradient_of_later_uses(name):
    x = example(5, 4, 2)

    def twice(*x):
        run = kernels(name)
        out, _ = run.attend_depths(*x, jnp.int32(3))
        later = run.handed_on.latest(x[1:])
        return out + sum(jnp.sum(scale * a) for scale, a in zip(HAND_ON, later, strict=True))

    def apart(*x):
        return attend("reference", *x, l=3)[0] + sum(
            jnp.sum(scale * a) for scale, a in zip(HAND_ON, x[1:], strict=True)
        )

    assert_near(gradients(twice, *x), gradients(apart, *x))


@NAMES
def test_rows_of_the_cache_from_l_on_are_ignored(name):
    q, k, v, cached_k, cached_v = example(5, 2, 1)
    l = 2
    later = (np.arange(5) >= l).reshape(5, 1, 1, 1, 1)
    garbage = (jnp.array(np.where(later, np.float32(1e9), c)) for c in (cached_k, cached_v))
    run = partial(gradients, partial(attend, name, l=l), q, k, v)
    clean = run(cached_k, cached_v)
    assert_trees_all_equal(run(*garbage), clean)
    for d_cache in map(np.asarray, clean[1][-2:]):
        np.testing.assert_array_equal((d_cache != 0).any(axis=(1, 2, 3, 4)), np.arange(5) < l)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("visible", [[1, 0, 1, 0, 1], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]])
def test_depths_that_are_not_visible_take_no_part(name, visible):
    q, k, v, cached_k, cached_v = example(5, 4, 2)
    l, visible = 3, jnp.array(visible, bool)
    hidden = ~np.asarray(visible).reshape(5, 1, 1, 1, 1)
    garbage = (jnp.array(np.where(hidden, np.float32(1e9), c)) for c in (cached_k, cached_v))
    got = gradients(partial(attend, name, l=l, visible=visible), q, k, v, *garbage)
    wanted = gradients(partial(attend, "reference", l=l, visible=visible), q, k, v, cached_k, cached_v)
    assert_near(got, wanted)
    takes_part = (np.asarray(visible) & (np.arange(5) < l)) | (np.arange(5) == l)
    np.testing.assert_array_equal((np.asarray(got[0][1]) != 0).any(axis=(0, 1, 2)), takes_part)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_mask_that_hides_nothing_changes_nothing(name):
    x = example(5, 4, 2)
    masked, unmasked = (
        gradients(partial(attend, name, l=3, visible=visible), *x) for visible in (jnp.ones(5, bool), None)
    )
    assert_near(masked, unmasked)


@pytest.mark.parametrize("visible", [None, jnp.array([True, False, True])], ids=["all", "some"])
@pytest.mark.parametrize("name", BACKENDS)
def test_it_runs_in_a_scan_on_eight_devices(name, visible):
    x = example(3, 2, 1, B=8)

    def over_depths(name, *x):
        def step(total, l):
            return total + kernels(name).attend_depths(*x, l, visible)[0], None

        return jax.lax.scan(step, jnp.zeros_like(x[0]), jnp.arange(3))[0]

    def local(d_out, *x):
        out, pull_back = jax.vjp(partial(over_depths, name), *x)
        return out, pull_back(d_out)

    specs = (P("data"),) * 3 + (P(None, "data"),) * 2
    sharded = jax.shard_map(local, mesh=eight_devices(), in_specs=(P("data"), *specs), out_specs=(P("data"), specs))
    got = jax.jit(sharded)(cotangents(x[0]), *x)
    assert_near(got, gradients(partial(over_depths, "reference"), *x))
