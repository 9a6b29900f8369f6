"""Linear experts: one for each token, weighted, with the gradient of Eq. 7."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from tests.kernels.backends import BACKENDS, needs_compiler
from tests.kernels.checks import assert_near, cotangents, gradients, kernels, widened

pytestmark = pytest.mark.usefixtures("tokamax")

EXPERTS = 5
WIDTHS = [
    ("plain", 24, 40),
    ("plain", 40, 24),
    pytest.param("native", 24, 40, marks=needs_compiler),
    pytest.param("native", 40, 24, marks=needs_compiler),
    ("gpu", 24, 40),
    ("tpu", 128, 256),
    ("reference", 24, 40),
]


def example(into=24, out=40, tokens=250, dtype=jnp.float32):
    """x, scores, routed experts, shared expert; and the tokens' experts, all but the last."""
    rng = np.random.default_rng(0)
    shapes, scales = [(tokens, into), (EXPERTS, into, out), (into, out)], (1, into**-0.5, into**-0.5)
    x, w, shared = (jnp.asarray(rng.normal(size=s) * c, dtype) for s, c in zip(shapes, scales, strict=True))
    ids = jnp.asarray(rng.integers(0, EXPERTS - 1, tokens), jnp.int32)
    return x, jnp.asarray(rng.uniform(0.1, 1, tokens), jnp.float32), w, shared, ids


def literal(x, scores, w, shared, ids):
    """Eq. 7 and 8 token by token: the merged expert times the score, whose gradient leaves the shared part out."""
    with jax.default_matmul_precision("highest"):
        own, common = jnp.einsum("ti,tio->to", x, w[ids]), x @ shared
    return scores[:, None] * own + lax.stop_gradient(scores)[:, None] * common


def merged(name, x, scores, w, shared, ids):
    """Eq. 8 outside of the operation, where the gradient of the shared expert comes from."""
    run = kernels(name)
    order = run.order(ids[:, None], EXPERTS)
    return run.linear(x, scores, w + shared[None], lax.stop_gradient(shared), order)


@pytest.mark.parametrize(("name", "into", "out"), WIDTHS)
def test_values_and_gradients_are_those_of_equation_7(name, into, out):
    *inputs, ids = example(into, out)
    assert_near(gradients(partial(merged, name, ids=ids), *inputs), gradients(partial(literal, ids=ids), *inputs))


@pytest.mark.parametrize(("name", "into", "out"), WIDTHS)
def test_without_a_shared_expert_the_score_gets_its_whole_gradient(name, into, out):
    x, scores, w, _, ids = example(into, out)

    def ours(x, scores, w):
        run = kernels(name)
        return run.linear(x, scores, w, None, run.order(ids[:, None], EXPERTS))

    def plain(x, scores, w):
        return scores[:, None] * jnp.einsum("ti,tio->to", x, w[ids], precision="highest")

    assert_near(gradients(ours, x, scores, w), gradients(plain, x, scores, w))


@pytest.mark.parametrize("name", BACKENDS)
def test_merged_weights_alone_give_the_same_values(name):
    x, scores, w, shared, ids = example()
    run = kernels(name)
    got = run.linear(x, scores, w + shared[None], None, run.order(ids[:, None], EXPERTS))
    assert_near(got, literal(x, scores, w, shared, ids))


def test_bfloat16_equals_the_reference_in_float32():
    *inputs, ids = example(dtype=jnp.bfloat16)
    got = gradients(partial(merged, "plain", ids=ids), *inputs)
    assert got[0].dtype == jnp.bfloat16
    assert_near(got, gradients(partial(merged, "reference", ids=ids), *widened(inputs)), 2e-2)


@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
def test_weights_that_are_handed_on_bring_the_gradient_of_later_uses(name):
    *inputs, ids = example(24, 24, tokens=60)

    def twice(name, follow, x, scores, w, shared):
        run = kernels(name)
        order = run.order(ids[:, None], EXPERTS)
        y = run.linear(x, scores, w, shared, order)
        return y + run.linear(y, scores, run.handed_on.latest(w) if follow else w, shared, order)

    assert_near(gradients(partial(twice, name, True), *inputs), gradients(partial(twice, "reference", False), *inputs))


@pytest.mark.parametrize("name", [*BACKENDS, "gpu"])
def test_weights_and_tokens_that_vary_over_different_mesh_axes_meet(name):
    *inputs, ids = example(tokens=60)
    mesh = jax.make_mesh((2, 2), ("data", "expert"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = P("data"), P("data"), P(None, None, "expert"), P(None, "expert"), P("data")

    def local(d_y, *arrays):
        *arrays, ids = arrays
        y, pull_back = jax.vjp(partial(merged, name, ids=ids), *arrays)
        return y, pull_back(d_y)

    y_spec = P("data", "expert")
    run = jax.shard_map(local, mesh=mesh, in_specs=(y_spec, *specs), out_specs=(y_spec, specs[:-1]))
    wanted = gradients(partial(merged, "reference", ids=ids), *inputs)
    assert_near(jax.jit(run)(cotangents(wanted[0]), *inputs, ids), wanted)
