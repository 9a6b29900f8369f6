"""Routing: what the CPU's kernel and plain JAX select, score and differentiate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal
from flax import nnx

from dreamer_jax.config import ModelConfig
from dreamer_jax.model.grouped_matmul import plan
from dreamer_jax.model.router import Router, best_by_passes, best_by_sorting
from tests.native import needs_compiler

CONFIG = ModelConfig(depth_recurrent=True, depth=4, width=24, vocab=32, router_size=20)
SHAPES = [(37, 8, 1), (130, 45, 4), (5, 3, 3), (1, 33, 8)]
"""Tokens, experts, active: full and broken tiles and vectors, all experts, one token."""


def router(experts):
    """Learned norms and biases that decide a part of the choices."""
    made = Router(CONFIG, experts, nnx.Rngs(0), ())
    keys = jax.random.split(jax.random.key(experts), 3)
    for param, key in ((made.q_norm, keys[0]), (made.k_norm, keys[1])):
        param.set_value(1 + 0.3 * jax.random.normal(key, param.shape))
    made.bias.set_value(0.3 * jax.random.normal(keys[2], (experts,)))
    return made


def results(graph, state, x, counted, active, weight, backend):
    """The routing, and the gradients of weighted scores for parameters and tokens."""

    @jax.jit
    def loss(params, x, biases):
        routing = nnx.merge(graph, params, biases)(x, jnp.int32(2), counted, active, backend)
        return jnp.sum(weight * routing.scores), routing

    (_, routing), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(*state[:1], x, state[1])
    return routing, gradients


@needs_compiler
@pytest.mark.parametrize(("tokens", "experts", "active"), SHAPES)
def test_the_kernel_selects_scores_and_differentiates_as_plain_jax(tokens, experts, active):
    rng = np.random.default_rng(tokens)
    x = jnp.asarray(rng.normal(size=(tokens, CONFIG.width)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(tokens, active)), jnp.float32)
    counted = jnp.asarray(rng.random(tokens) < 0.7)
    graph, *state = nnx.split(router(experts), nnx.Param, ...)
    (plain, d_plain), (native, d_native) = (
        results(graph, state, x, counted, active, weight, backend) for backend in ("blocks", "native")
    )
    assert_trees_all_equal((native.ids, native.counts), (plain.ids, plain.counts))
    assert_trees_all_close((native.scores, native.entropy), (plain.scores, plain.entropy), rtol=2e-6)
    largest = max(float(jnp.abs(d).max()) for d in jax.tree.leaves(d_plain))
    assert_trees_all_close(d_native, d_plain, atol=1e-6 * largest, rtol=0)


@needs_compiler
def test_the_kernel_gives_ties_to_the_lower_index_and_keeps_to_valid_experts_without_numbers():
    made = router(11)
    made.bias.set_value(jnp.zeros(11).at[jnp.array([3, 9])].set(1.0))
    x = jnp.zeros((2, CONFIG.width)).at[1].set(jnp.nan)
    routing = made(x, jnp.int32(0), jnp.ones(2, bool), 4, "native")
    assert routing.ids[0].tolist() == [3, 9, 0, 1]
    assert len(set(routing.ids[1].tolist())) == 4
    assert 0 <= int(routing.ids[1].min()) <= int(routing.ids[1].max()) < 11
    assert np.isnan(routing.scores[1]).all()
    assert np.isnan(routing.entropy)


@needs_compiler
def test_the_kernel_s_entropy_holds_at_logits_of_any_size():
    made = router(9)
    x = jax.random.normal(jax.random.key(0), (16, CONFIG.width))
    for size in (1e-3, 1.0, 30.0, 1e3):
        made.k_norm.set_value(jnp.full(CONFIG.router_size, size))
        plain, native = (made(x, jnp.int32(1), jnp.ones(16, bool), 2, backend) for backend in ("blocks", "native"))
        np.testing.assert_allclose(native.entropy, plain.entropy, rtol=1e-5, atol=1e-5)


@needs_compiler
def test_the_kernel_orders_choices_as_plain_jax():
    for tokens, experts, active in SHAPES:
        ids = jax.random.randint(jax.random.key(tokens), (tokens, active), 0, experts, jnp.int32)
        assert_trees_all_equal(plan(ids, experts, native_kernel=True), plan(ids, experts))


@pytest.mark.parametrize("active", [1, 4, 33])
def test_passes_find_what_sorting_finds_ties_included(active):
    values = np.random.default_rng(active).normal(size=(50, 33)).round(1).astype(np.float32) + 0.0  # no -0
    values[0] = 0
    assert_trees_all_equal(best_by_passes(jnp.asarray(values), active), best_by_sorting(jnp.asarray(values), active))
