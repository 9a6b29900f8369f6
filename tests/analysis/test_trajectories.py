"""Principal components and paths of tokens, and how much routers of two checkpoints agree."""

import jax
import numpy as np
import pytest
from flax import nnx

from dreamer_jax import convert
from dreamer_jax.analysis.measure import measure
from dreamer_jax.analysis.saturation import saturation
from dreamer_jax.analysis.trajectories import evenly, plane, trajectories
from dreamer_jax.data.batch import Batch
from dreamer_jax.inference.decoder import make_decoder
from dreamer_jax.kernels.compute import Compute
from dreamer_jax.model.dreamer import Dreamer
from tests import oracle
from tests.models import packed_batch, sizes_of, small

PLAIN = Compute(kernels="plain")
CONFIG = small("DR+DA")


def model_of(seed):
    return convert.build(CONFIG, oracle.random_weights(sizes_of(CONFIG), seed=seed, scale=0.4))


@pytest.fixture(scope="module")
def batch():
    return Batch(*packed_batch(61, rows=2, length=16), np.ones((2, 16), bool))


@pytest.fixture(scope="module")
def model():
    return model_of(1)


@pytest.fixture(scope="module")
def hidden(model, batch):
    """x_0 .. x_L of the float64 oracle."""
    weights = jax.device_get(convert.named_arrays(model))
    return oracle.forward(weights, sizes_of(CONFIG), *batch[:3]).hidden


def test_components_are_those_of_all_streams(model, batch, hidden):
    found = plane(measure(make_decoder(model, PLAIN), batch, False), CONFIG.depth + 1)
    rows = hidden[:, batch.segment_ids > 0].reshape(-1, CONFIG.width)
    _, singular, directions = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(found.mean, rows.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(found.explained, singular[:2] ** 2 / np.sum(singular**2), rtol=1e-3)
    along = np.abs(np.sum(found.components * directions[:2].T, axis=0))
    np.testing.assert_allclose(along, 1, rtol=1e-3)


def test_paths_are_the_projected_streams(model, batch, hidden):
    decoder = make_decoder(model, PLAIN)
    found = plane(measure(decoder, batch, False), CONFIG.depth + 1)
    length = int(np.sum(batch.segment_ids[0] == 1))
    points = trajectories(decoder, found, batch.tokens[0, :length].tolist(), [0, length - 1])
    assert points.shape == (2, CONFIG.depth + 1, 2)
    expected = (hidden[:, 0, length - 1] - found.mean) @ found.components
    np.testing.assert_allclose(points[1], expected, atol=1e-3)


def test_a_few_of_many_are_evenly_spaced():
    assert evenly(5, 8) == [0, 1, 2, 3, 4]
    assert evenly(101, 5) == [0, 25, 50, 75, 100]
    assert evenly(1, 8) == [0]


def test_a_router_agrees_with_itself_and_by_chance_with_another(model, batch):
    ours, other = make_decoder(model, PLAIN), make_decoder(model_of(2), PLAIN)
    same = saturation(ours, ours, [batch])
    assert set(same) == {"sa", "da", "ea"}
    for name, shares in same.items():
        np.testing.assert_allclose(shares, 1, rtol=1e-6, err_msg=name)
    sliced = make_decoder(Dreamer(small("DR+DA", ("da+sa[1:]", "ea")), nnx.Rngs(0)), PLAIN)
    shares = saturation(sliced, sliced, [batch])["sa"]
    np.testing.assert_allclose(shares, [np.nan, 1, 1], rtol=1e-6)
    found = saturation(ours, other, [batch])["ea"]
    expected = np.zeros(CONFIG.depth)
    ids = []
    for one in (model, model_of(2)):
        weights = jax.device_get(convert.named_arrays(one))
        ids.append(oracle.forward(weights, sizes_of(CONFIG), *batch[:3]).ea_ids)
    for l in range(CONFIG.depth):
        for b, t in zip(*np.nonzero(batch.segment_ids > 0), strict=True):
            expected[l] += len(set(ids[0][l, b, t]) & set(ids[1][l, b, t])) / ids[0].shape[-1]
    np.testing.assert_allclose(found, expected / np.sum(batch.segment_ids > 0), rtol=1e-5)
