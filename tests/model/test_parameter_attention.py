"""From scores to weights in parameter attention; test_variants.py holds the whole to the oracle."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer_jax.model.parameter_attention import normalised_gelu


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_weights_do_not_depend_on_the_length_of_the_scores(scale):
    scores = jax.random.normal(jax.random.key(0), (2, 3, 64))
    chex.assert_trees_all_close(normalised_gelu(scores * scale), normalised_gelu(scores), rtol=1e-4, atol=1e-6)


def test_scores_of_root_mean_square_one_go_through_gelu_as_they_are():
    scores = jnp.array([[[1.0, -1.0]]])
    np.testing.assert_allclose(normalised_gelu(scores), [[[0.841345, -0.158655]]], rtol=1e-5)


def test_scores_of_zero_weigh_nothing_and_have_a_finite_gradient():
    gradient = jax.grad(lambda scores: normalised_gelu(scores).sum())(jnp.zeros((1, 1, 4)))
    assert jnp.isfinite(gradient).all()
