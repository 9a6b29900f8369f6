"""The order of rows by expert, and the ways into it and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_trees_all_equal

from dreamer_jax.kernels.rows import collect, dispatch, order, sort, unsort
from tests.kernels.backends import BACKENDS
from tests.kernels.checks import assert_near, kernels

D = 16


@pytest.mark.parametrize("shape", [(50, 1), (20, 5), (33, 3), (1, 4)], ids=["A = 1", "A = E", "A < E", "one token"])
@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
def test_the_plan_sorts_by_expert_and_keeps_the_order_of_tokens(name, shape):
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(5)[: shape[1]] for _ in range(shape[0])]).astype(np.int32)
    p = jax.jit(kernels(name).order, static_argnums=1)(jnp.asarray(ids), 7)
    flat = ids.reshape(-1)
    order = np.argsort(flat, kind="stable").astype(np.int32)
    inverse, sizes = np.argsort(order).astype(np.int32), np.bincount(flat, minlength=7).astype(np.int32)
    assert_trees_all_equal(tuple(p), (order, inverse, sizes))


@pytest.mark.parametrize(("tokens", "experts", "active"), [(37, 8, 1), (130, 45, 4), (5, 3, 3), (1, 33, 8)])
@pytest.mark.parametrize("name", BACKENDS)
def test_the_plan_takes_choices_that_repeat(name, tokens, experts, active):
    ids = jax.random.randint(jax.random.key(tokens), (tokens, active), 0, experts, jnp.int32)
    assert_trees_all_equal(kernels(name).order(ids, experts), kernels("reference").order(ids, experts))


def routed(tokens=33, active=3, n_experts=7):
    rng = np.random.default_rng(0)
    ids = jnp.asarray(np.stack([rng.permutation(n_experts)[:active] for _ in range(tokens)]), jnp.int32)
    x, g = (jnp.asarray(rng.normal(size=(tokens, D)), jnp.float32) for _ in range(2))
    y = jnp.asarray(rng.normal(size=(tokens * active, D)), jnp.float32)
    scores = jnp.asarray(rng.uniform(size=ids.shape), jnp.float32)
    return ids, jax.jit(order, static_argnums=1)(ids, n_experts), x, g, y, scores


def test_dispatch_gives_every_row_the_token_that_chose_its_expert():
    ids, p, x, *_ = routed()
    rows, at = [], 0
    for expert in range(7):
        rows += [x[token] for token in range(33) if expert in ids[token]]
        at += p.sizes[expert]
        assert len(rows) == at
    np.testing.assert_array_equal(dispatch(x, p, 3), np.stack(rows))


def test_dispatch_and_collect_are_each_others_transposes():
    _, p, x, _, y, _ = routed()
    np.testing.assert_allclose(jnp.vdot(dispatch(x, p, 3), y), jnp.vdot(x, collect(y, p, 3)), rtol=1e-5)
    np.testing.assert_allclose(jax.vjp(lambda x: dispatch(x, p, 3), x)[1](y)[0], collect(y, p, 3), rtol=1e-6)
    np.testing.assert_array_equal(jax.vjp(lambda y: collect(y, p, 3), y)[1](x)[0], dispatch(x, p, 3))


def test_collect_adds_up_the_choices_of_each_token():
    _, p, _, g, y, scores = routed()

    def one_hot(y):
        choices = jax.nn.one_hot(p.order, p.order.size, axis=0) @ y
        return choices.reshape(*scores.shape, D).sum(axis=1)

    out, vjp = jax.vjp(lambda y: collect(y, p, 3), y)
    expected, expected_vjp = jax.vjp(one_hot, y)
    assert_near((out, vjp(g)), (expected, expected_vjp(g)), 1e-6)


def test_sorting_gives_every_row_the_score_of_its_choice():
    _, p, *_, scores = routed()
    flat = scores.reshape(-1, 1)
    rows, vjp = jax.vjp(lambda s: sort(s, p), flat)
    np.testing.assert_array_equal(rows, flat[p.order])
    np.testing.assert_array_equal(vjp(rows)[0], flat)


def test_unsort_restores_token_order_and_its_gradient_sorts():
    _, p, x, g, *_ = routed(active=1)
    restored, vjp = jax.vjp(lambda y: unsort(y, p), dispatch(x, p, 1))
    np.testing.assert_array_equal(restored, x)
    np.testing.assert_array_equal(vjp(g)[0], dispatch(g, p, 1))


def test_combining_bfloat16_rows_sums_in_float32_and_returns_bfloat16():
    _, p, *_ = routed(tokens=4, active=5)
    y = jnp.where(jnp.arange(20)[:, None] < 1, 256.0, 1.0).repeat(D, 1).astype(jnp.bfloat16)[p.order]
    out, vjp = jax.vjp(lambda y: collect(y, p, 5), y)
    assert out.dtype == jnp.bfloat16
    assert out[0, 0] == 260  # 256 + 1 is 256 in bfloat16
    assert vjp(out)[0].dtype == jnp.bfloat16
    (d_x,) = jax.vjp(lambda x: dispatch(x, p, 5), out)[1](y)
    assert d_x.dtype == jnp.bfloat16
    assert d_x[0, 0] == 260
