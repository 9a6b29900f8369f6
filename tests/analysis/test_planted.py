"""A planted model gives exactly its figures."""

import numpy as np
import pytest

from dreamer_jax.analysis import experts
from dreamer_jax.analysis.analysis import means
from dreamer_jax.analysis.measure import measure
from dreamer_jax.analysis.removals import removals
from dreamer_jax.data.batch import Batch
from dreamer_jax.inference.decoder import make_decoder
from dreamer_jax.kernels.compute import Compute
from tests.analysis import planted
from tests.models import packed_batch

L = planted.L


@pytest.fixture(scope="module")
def decoder():
    return make_decoder(planted.model(values=3.0), Compute(kernels="plain"))


@pytest.fixture(scope="module")
def batch():
    tokens, positions, segment_ids = packed_batch(planted.V, rows=2, length=24)
    return Batch(tokens, positions, segment_ids, np.ones_like(tokens, bool))


@pytest.fixture(scope="module")
def captures(decoder, batch):
    return means(measure(decoder, batch, False), decoder.config, decoder.depth)


def test_each_depth_uses_its_two_experts(captures, batch):
    counted = batch.segment_ids > 0
    expected = np.zeros((L, 2 * L), int)
    for l in range(L):
        for c in (0, 1):
            expected[l, 2 * l + c] = np.sum(counted & (planted.classes(batch.tokens) == c))
    np.testing.assert_array_equal(captures["experts/ea/counts"], expected)
    np.testing.assert_array_equal(experts.depth_given_expert(expected), np.repeat(np.eye(L), 2, axis=1))
    np.testing.assert_array_equal(experts.top_depths(captures["experts/ea/counts"]), np.ones(2 * L))


def test_attention_experts_follow_the_depth(captures):
    for kind in ("sa", "da"):
        np.testing.assert_array_equal(captures[f"experts/{kind}/counts"], np.eye(L, dtype=int) * captures["tokens"])


def test_margins_are_the_known_distances_of_logits(captures):
    scale = planted.R / np.sqrt(planted.R)
    near = scale * (1 - np.cos(2 * planted.APART))
    np.testing.assert_allclose(captures["experts/ea/margin"], near, rtol=1e-4)
    at = np.arange(L)
    others = np.where(at[:, None] == at, -np.inf, np.cos(at[:, None] - at)).max(axis=1)
    np.testing.assert_allclose(captures["experts/sa/margin"], scale * (1 - others), rtol=1e-4)


def test_the_map_of_depth_attention_is_the_known_one(captures):
    np.testing.assert_allclose(captures["attention/da/weight"][:, 0], planted.attention(), atol=1e-6)
    moved = planted.attention() * 3 * planted.score()
    np.testing.assert_allclose(captures["attention/da/weighted_norm"][:, 0], moved, rtol=1e-4)
    np.testing.assert_array_equal(captures["attention/da/visible"], np.tri(L, dtype=bool))


def test_depths_that_add_nothing_change_nothing(captures):
    np.testing.assert_allclose(captures["lens/change"], np.tile([0, 1, 0], (L, 1)), atol=1e-7)
    np.testing.assert_allclose(captures["lens/settled"], np.eye(L)[0], atol=1e-7)
    np.testing.assert_array_equal(captures["residual/step"], np.zeros(L))
    np.testing.assert_allclose(captures["exit/latent/depth"][captures["exit/latent/threshold"] < 0.5], 2)


def test_what_adds_nothing_is_not_missed(decoder, batch):
    visible = {"da": np.tri(L, dtype=bool)}
    found = removals(decoder, [batch], False, visible)
    for name, values in found.items():
        known = values[np.isfinite(values)]
        np.testing.assert_allclose(known, found["removal/loss"], rtol=1e-5, err_msg=name)
    assert np.isfinite(found["removal/entry/da"]).sum() == L * (L - 1) / 2
