"""The streamed captures equal slow ones, whatever the batches and the mesh; planted models give their known maps."""

import jax
import numpy as np
import pytest
from flax import nnx

from dreamer_jax import convert
from dreamer_jax.analysis.analysis import means
from dreamer_jax.analysis.measure import added, measure
from dreamer_jax.config import Config, KernelConfig, MeshConfig, TrainConfig
from dreamer_jax.data.batch import Batch
from dreamer_jax.inference.decoder import make_decoder
from dreamer_jax.kernels.compute import Compute
from dreamer_jax.sharding import make_mesh
from tests import oracle
from tests.analysis import slow
from tests.models import changed, packed_batch, sizes_of, small

PLAIN = Compute(kernels="plain")
MIXTURES = {
    "LA": small("LA"),
    "DR+DA": small("DR+DA"),
    "DR+DA, sliced": changed(
        small("DR+DA", ("da[1:]+sa", "latent[::2]+parameter", "ea[:2]")),
        da={"window": 2, "query_heads": 4, "kv_heads": 2},
    ),
}


def model_of(config):
    return convert.build(config, oracle.random_weights(sizes_of(config), seed=3, scale=0.4))


def batch_of(rows=2, seed=0):
    tokens, positions, segment_ids = packed_batch(61, rows=rows, length=16, seed=seed)
    mask = np.random.default_rng(seed).random(tokens.shape) < 0.5
    return Batch(tokens, positions, segment_ids, mask)


def streamed(decoder, batches, response_only=False):
    sums = None
    for batch in batches:
        sums = added(sums, measure(decoder, batch, response_only))
    return means(sums, decoder.config, decoder.depth)


def everything(model, batch, depth):
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, tokens, positions, segment_ids):
        return nnx.merge(graph, state)(tokens, positions, segment_ids, PLAIN, depth=depth, capture=True).capture

    return jax.device_get(run(state, batch.tokens, batch.positions, batch.segment_ids))


@pytest.fixture(scope="module", params=["LA", "DR+DA, sliced"])
def both(request):
    """(streamed, slow) captures of one model."""
    model, batch = model_of(MIXTURES[request.param]), batch_of()
    depth = 3 if request.param == "LA" else 4
    expected = slow.captures(model, everything(model, batch, depth), batch.tokens, batch.segment_ids, depth)
    return streamed(make_decoder(model, PLAIN, depth=depth), [batch]), expected


def test_streamed_captures_equal_slow_ones(both):
    found, expected = both
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        np.testing.assert_allclose(found[name], value, rtol=2e-4, atol=2e-5, err_msg=name)


def test_batches_add_up():
    decoder = make_decoder(model_of(MIXTURES["DR+DA"]), PLAIN)
    whole = batch_of(rows=4)
    halves = [Batch(*(a[i : i + 2] for a in whole)) for i in (0, 2)]
    together, apart = streamed(decoder, [whole], True), streamed(decoder, halves, True)
    for name, value in together.items():
        np.testing.assert_allclose(apart[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_loss_looks_at_responses_alone_where_training_does():
    decoder, batch = make_decoder(model_of(MIXTURES["DR+DA"]), PLAIN), batch_of()
    judged = batch.response_mask[:, 1:] & (batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1])
    found = streamed(decoder, [batch], True)
    assert found["positions"] == np.sum(judged & (batch.segment_ids[:, 1:] > 0))
    assert found["positions"] < streamed(decoder, [batch])["positions"]


def test_a_mesh_gives_the_same_captures():
    model, batch = model_of(MIXTURES["DR+DA"]), batch_of(rows=8)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2))
    config = Config(name="toy", model=model.config, train=TrainConfig(dtype="float32"), kernels=KernelConfig("plain"))
    found = streamed(make_decoder(model, Compute.of(config, mesh), mesh=mesh), [batch])
    for name, value in streamed(make_decoder(model, PLAIN), [batch]).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
