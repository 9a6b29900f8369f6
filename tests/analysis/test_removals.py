"""Leaving a part out is the same as a model that never had it."""

import jax.numpy as jnp
import numpy as np
import pytest

from dreamer_jax import convert
from dreamer_jax.analysis.removals import count, removals
from dreamer_jax.data.batch import Batch
from dreamer_jax.inference.decoder import make_decoder
from dreamer_jax.kernels.compute import Compute
from dreamer_jax.model.depth_attention import FadingCache, attend_faded_rows
from tests import oracle
from tests.models import changed, packed_batch, sizes_of, small

PLAIN = Compute(kernels="plain")
DEPTH = 3


@pytest.fixture(scope="module")
def weights():
    return oracle.random_weights(sizes_of(small("DR+DA")), seed=5, scale=0.4)


@pytest.fixture(scope="module")
def batch():
    return Batch(*packed_batch(61, rows=2, length=16), np.ones((2, 16), bool))


@pytest.fixture(scope="module")
def found(weights, batch):
    decoder, ticks = make_decoder(convert.build(small("DR+DA"), weights), PLAIN), []
    visible = {"da": np.tri(DEPTH, dtype=bool)}
    arrays = removals(decoder, [batch], False, visible, lambda: ticks.append(0))
    assert len(ticks) == count(decoder, visible) == 1 + DEPTH + 3 * (DEPTH + 1) + DEPTH * (DEPTH - 1) // 2
    return arrays


def loss_of(config, weights, batch):
    """The float64 oracle's."""
    kept = {name: array for name, array in weights.items() if name in convert.expected_shapes(config)}
    return oracle.loss(kept, sizes_of(config), batch.tokens, batch.positions, batch.segment_ids)


def test_nothing_left_out_is_the_loss(found, weights, batch):
    np.testing.assert_allclose(found["removal/loss"], loss_of(small("DR+DA"), weights, batch), rtol=1e-5)


def test_a_model_without_depth_attention_is_dr(found, weights, batch):
    np.testing.assert_allclose(found["removal/dimension/da"], loss_of(small("DR"), weights, batch), rtol=1e-5)


@pytest.mark.parametrize(("name", "mixture"), [("ea", ("da+sa", "ea[1:]")), ("sa", ("da+sa[1:]", "ea"))])
def test_a_dimension_that_is_left_out_at_the_first_depth_runs_at_the_others(found, weights, batch, name, mixture):
    config = small("DR+DA", mixture)
    np.testing.assert_allclose(found[f"removal/update/{name}"][0], loss_of(config, weights, batch), rtol=1e-5)


def test_a_removed_depth_is_one_at_which_nothing_runs(found, weights, batch):
    config = small("DR+DA", ("da[:2]+sa[:2]", "ea[:2]"))
    np.testing.assert_allclose(found["removal/depth"][2], loss_of(config, weights, batch), rtol=1e-5)


def test_a_depth_of_distinct_layers_is_passed_by(batch):
    config = small("LA")
    weights = oracle.random_weights(sizes_of(config), seed=5, scale=0.4)
    found = removals(make_decoder(convert.build(config, weights), PLAIN), [batch], False, {})
    without = small("LA", ("sa[:2]", "ea[:2]"))
    np.testing.assert_allclose(found["removal/depth"][2], loss_of(without, weights, batch), rtol=1e-5)


def test_an_entry_that_linear_attention_does_not_read_lets_others_fade():
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.standard_normal((1, 1, 1, 4)), jnp.float32) for _ in range(3))
    past = jnp.asarray(random.standard_normal((2, 3, 1, 1, 1, 4)), jnp.float32)
    fade = jnp.log(jnp.full((3, 1), 0.5))
    own, cache = FadingCache(k, v, fade[0]), FadingCache(past[0], past[1], fade)
    earlier = jnp.array([True, True, False])
    whole = attend_faded_rows(q, own, cache, earlier)
    without = attend_faded_rows(q, own, cache, earlier, jnp.array([True, False, True]))
    # Depth 1 of two earlier ones: the token's own depth alone came after it.
    read = 0.5 * np.sum(q * past[0, 1]) / 2 * past[1, 1]
    np.testing.assert_allclose(whole - without, read, rtol=1e-4)


def test_a_removed_entry_is_a_shorter_window(found, weights, batch):
    """Without depth 0 for depth 2, all that is left is what a window of two depths shows."""
    config = changed(small("DR+DA"), da={"window": 2})
    np.testing.assert_allclose(found["removal/entry/da"][2, 0], loss_of(config, weights, batch), rtol=1e-5)
    assert np.isnan(found["removal/entry/da"][0]).all()
