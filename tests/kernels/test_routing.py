"""Routing: what is selected, its scores and their gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal

from dreamer_jax.kernels.plain.routing import best_by_passes, best_by_sorting
from tests.kernels.backends import BACKENDS
from tests.kernels.checks import assert_near, kernels

SIZE = 20
SHAPES = [(37, 8, 1), (130, 45, 4), (5, 3, 3), (1, 33, 8)]
"""Tokens, experts, active: full and broken tiles and vectors, all experts, one token."""
NAMES = pytest.mark.parametrize("name", [*BACKENDS, "gpu"])


def example(tokens, experts):
    """Queries, keys, biases that decide a part of the choices, and the tokens that count."""
    rng = np.random.default_rng(tokens)
    query, keys, bias = (
        jnp.asarray(scale * rng.normal(size=shape), jnp.float32)
        for scale, shape in ((1.0, (tokens, SIZE)), (1.0, (experts, SIZE)), (0.3, experts))
    )
    return query, keys, bias, jnp.asarray(rng.random(tokens) < 0.7)


@NAMES
@pytest.mark.parametrize(("tokens", "experts", "active"), SHAPES)
def test_selection_scores_and_gradients_equal_the_reference(name, tokens, experts, active):
    query, keys, bias, counted = example(tokens, experts)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(tokens, active)), jnp.float32)

    @partial(jax.jit, static_argnums=0)
    def run(name, query, keys, bias):
        def loss(*arrays):
            routed = kernels(name).route(*arrays, counted, active)
            return jnp.sum(weight * routed.scores), routed

        (_, routed), d = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(query, keys, bias)
        return routed, d

    (got, d_got), (wanted, d_wanted) = (run(each, query, keys, bias) for each in (name, "reference"))
    assert_trees_all_equal((got.ids, got.counts), (wanted.ids, wanted.counts))
    assert_trees_all_close((got.scores, got.entropy), (wanted.scores, wanted.entropy), rtol=2e-6)
    assert_near(d_got, d_wanted)
    assert not d_got[2].any()


@NAMES
def test_ties_go_to_the_lower_index_and_what_is_not_a_number_selects_valid_experts(name):
    _, keys, _, _ = example(2, 11)
    bias = jnp.zeros(11).at[jnp.array([3, 9])].set(1.0)
    query = jnp.zeros((2, SIZE)).at[1].set(jnp.nan)
    routed = kernels(name).route(query, keys, bias, jnp.ones(2, bool), 4)
    assert routed.ids[0].tolist() == [3, 9, 0, 1]
    assert 0 <= int(routed.ids[1].min()) <= int(routed.ids[1].max()) < 11
    assert np.isnan(routed.scores[1]).all()
    assert np.isnan(routed.entropy[1])
    if name != "gpu":
        assert len(set(routed.ids[1].tolist())) == 4


@pytest.mark.parametrize("name", BACKENDS)
def test_entropy_holds_at_logits_of_any_size(name):
    query, keys, bias, counted = example(16, 9)
    for size in (1e-3, 1.0, 30.0, 1e3):
        got, wanted = (kernels(each).route(query, size * keys, bias, counted, 2) for each in (name, "reference"))
        np.testing.assert_allclose(got.entropy, wanted.entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
def test_no_remat_policy_decides_a_second_time(name):
    query, keys, bias, counted = example(40, 9)
    policy = jax.checkpoint_policies.save_only_these_names("routing")
    run = jax.checkpoint(lambda *x: kernels(name).route(*x, bias, counted, 3).scores, policy=policy)
    jaxpr = str(jax.make_jaxpr(jax.grad(lambda *x: jnp.sum(run(*x) ** 2), argnums=(0, 1)))(query, keys))
    decisions = {"plain": "top_k[", "native": "target_name=dreamer_route\n", "reference": "= sort["}
    assert jaxpr.count(decisions[name]) == 1, jaxpr


@pytest.mark.parametrize("active", [1, 4, 33])
def test_passes_find_what_sorting_finds_ties_included(active):
    values = np.random.default_rng(active).normal(size=(50, 33)).round(1).astype(np.float32) + 0.0  # no -0
    values[0] = 0
    assert_trees_all_equal(best_by_passes(jnp.asarray(values), active), best_by_sorting(jnp.asarray(values), active))
