"""What mixtures may be made of beyond the paper's, against the float64 oracle: in training, on meshes, in generation.

Windows, dilation and the linear form of DA; latent and parameter attention; members that run at some depths only.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dreamer_jax import convert
from dreamer_jax.accounting.flops import forward_flops
from dreamer_jax.accounting.params import parameters
from dreamer_jax.config import MeshConfig
from dreamer_jax.convert.names import expected_shapes
from dreamer_jax.inference.decoder import make_decoder
from dreamer_jax.kernels.compute import Compute
from dreamer_jax.sharding import make_mesh
from dreamer_jax.training.step import init_state, make_train_step
from tests import oracle
from tests.inference.test_engine import STEPS, decoded_logits
from tests.kernels.backends import needs_compiler
from tests.models import SMALL, changed, packed_batch, relative_error, sizes_of
from tests.training.test_mesh import assert_same_training
from tests.training.test_step import batch_of
from tests.training.toy import REFERENCE, toy_config

REACH = {"window": 2, "dilation": 2}
LINEAR = {"form": "linear", "query_heads": 4, "kv_heads": 2}
GIVEN = {"embeddings": "texts.npy", "embedding_size": 9}
EVERYTHING = ("da[::2]+sa[-3:]", "latent[:4]+parameter[1:]", "ea")


def model_of(variant, *mixture, **sections):
    return changed(SMALL, depth_recurrent=variant == "DR", depth=5, mixture=mixture, **sections)


DR_EVERYTHING = model_of("DR", *EVERYTHING, da=LINEAR, latent=GIVEN)
LA_EVERYTHING = model_of("LA", *EVERYTHING, da=LINEAR, latent=GIVEN)
MODELS = {
    "DR window and dilation": (model_of("DR", "da+sa", "ea", da=REACH), 5, 26),
    "LA window and dilation": (model_of("LA", "da", "sa[::2]", "ea[:2]", da=REACH), 5, 0),
    "DR window, deeper": (model_of("DR", "da[-5:]+sa[::3]", "ea", da={"window": 3}), 7, 19),
    "DR linear": (model_of("DR", "da+sa", "ea", da=LINEAR), 5, 26),
    "LA linear": (model_of("LA", "da", "sa", "ea[-2:]", da=LINEAR), 5, 12),
    "DR latent": (model_of("DR", "sa", "latent", "ea"), 5, 16),
    "LA latent": (model_of("LA", "latent[:2]+sa", "ea"), 5, 1),
    "DR parameter, shallower": (model_of("DR", "sa+parameter[::2]", "ea"), 3, 16),
    "LA parameter, nothing routed": (model_of("LA", "sa", "parameter"), 5, 1),
    "DR everything, deeper": (DR_EVERYTHING, 7, 24),
    "LA everything": (LA_EVERYTHING, 5, 1),
}
"""Model, the depth that runs, and a seed of weights that magnify no rounding of float32, least of all by the choice of
an expert."""
POLICIES = ("none", "full", "selective", "products")
FURTHER = ("DR everything, deeper native none", "DR everything, deeper plain selective")
TOLERANCE = 2e-5
"""Of values relative to the largest; gradients have five times as much."""
every_model = pytest.mark.parametrize("name", MODELS)


def computed():
    """Each model with some policy, and one of everything with all of them; native kernels compile sooner."""
    for i, name in enumerate(MODELS):
        for remat in POLICIES if name == "DR everything, deeper" else [POLICIES[i % 4]]:
            kernels = "plain" if name.startswith("DR") and remat == "selective" else "native"
            compute, label = Compute(remat=remat, kernels=kernels), f"{name} {kernels} {remat}"
            marks = [pytest.mark.xdist_group(label)] + ([] if kernels == "plain" else [needs_compiler])
            # The other models have these policies by turns, and test_memory.py has what each policy keeps of each.
            marks += [pytest.mark.exhaustive] if label.startswith(FURTHER) else []
            yield pytest.param((name, compute), marks=marks, id=label)


def weights_of(name):
    config, _, seed = MODELS[name]
    return oracle.random_weights(sizes_of(config), seed=seed, scale=0.3)


@functools.cache
def expectation(name):
    """What the oracle computes, and the batch that it computes it on."""
    config, depth, _ = MODELS[name]
    sizes, weights = sizes_of(config), weights_of(name)
    batch = packed_batch(config.vocab)
    mask = np.random.default_rng(5).random(batch[0].shape) < 0.7
    outputs = oracle.forward(weights, sizes, *batch, depth)
    loss = oracle.loss(weights, sizes, *batch, mask, depth)
    return (*batch, mask), outputs, loss, oracle.gradients(weights, sizes, *batch, mask, depth)


@pytest.fixture(params=computed(), scope="module")
def compared(request):
    name, compute = request.param
    config, depth, _ = MODELS[name]
    batch, *expected = expectation(name)
    model = convert.build(config, weights_of(name))
    actual = convert.inspect(model, *map(jnp.asarray, batch), compute=compute, depth=depth)
    return config, jax.device_get(actual), *expected


def test_what_every_depth_computes_and_looks_at_equals_the_oracles(compared):
    _, actual, expected, loss, _ = compared
    maps = {"da": expected.da_attention, "latent": expected.latent_attention}
    maps = {name: of_tokens for name, of_tokens in maps.items() if of_tokens is not None}
    assert set(actual.capture.attention) == set(maps)
    wanted = {"hidden": expected.hidden, "logits": expected.logits, "loss": np.array(loss), **maps}
    found = {"hidden": actual.capture.hidden, "logits": actual.logits, "loss": actual.loss, **actual.capture.attention}
    assert max(relative_error(found[name], value) for name, value in wanted.items()) < TOLERANCE


def test_every_gradient_equals_the_oracles_and_vanishes_only_where_there_is_nothing_to_choose_or_to_fade(compared):
    config, actual, *_, gradients = compared
    assert set(actual.gradients) == set(gradients)
    for name, gradient in gradients.items():
        scale = np.abs(gradient).max() or 1.0
        assert np.abs(actual.gradients[name] - gradient).max() < 5 * TOLERANCE * scale, name

    vanishing = set()
    if config.depth_attention and not config.depth_recurrent:  # there, with a dilation of two
        softmax = {"layers.0.da.q_norm", "layers.1.da.q_norm"}
        vanishing = {"layers.0.da.decay"} if config.da.form == "linear" else softmax
    assert {name for name, gradient in actual.gradients.items() if not gradient.any()} == vanishing


@pytest.mark.parametrize("name", [name for name in MODELS if "latent" not in name and "parameter" not in name])
def test_decoding_a_token_at_a_time_equals_the_oracles_full_pass(name):
    config, depth, _ = MODELS[name]
    weights = weights_of(name)
    lengths, texts = np.array([5, 1, 8], np.int32), np.random.default_rng(0).integers(0, config.vocab, (3, 16))
    positions = np.broadcast_to(np.arange(16), texts.shape)
    full = oracle.forward(weights, sizes_of(config), texts, positions, np.ones_like(texts), depth).logits
    expected = np.stack([row[n - 1 : n - 1 + STEPS] for row, n in zip(full, lengths, strict=True)])
    decoder = make_decoder(convert.build(config, weights), Compute(), depth=depth)
    actual = decoded_logits(decoder, jnp.asarray(texts, jnp.int32), jnp.asarray(lengths))
    assert relative_error(actual, expected) < TOLERANCE


@every_model
def test_weights_go_out_and_come_back_by_the_names_of_the_exchange_format(name):
    config, weights = MODELS[name][0], weights_of(name)
    sizes = sizes_of(config)
    assert expected_shapes(config) == oracle.names_and_shapes(sizes)
    assert expected_shapes(config, merged=True) == oracle.names_and_shapes(sizes, merged=True)
    model = convert.build(config, weights)
    chex.assert_trees_all_equal(convert.named_arrays(model), jax.tree.map(np.float32, weights))
    merged = {name: np.float32(array) for name, array in oracle.merge(weights, sizes).items()}
    chex.assert_trees_all_close(convert.named_arrays(model.merged()), merged, atol=1e-6)
    again = convert.build(config, merged, merged=True)
    chex.assert_trees_all_equal_shapes_and_dtypes(nnx.state(again), nnx.state(model.merged()))


def multiplied(config, context):
    """Numbers multiplied for one token by the new dimensions, written out."""
    D, depths, runs = config.width, range(config.depth), config.depths_of
    H, N, K = config.da.head_size, config.da.query_heads, config.da.kv_heads
    reached = {(l, j) for l in runs("da") for j in runs("da") if j in (l, l - 2)}  # window 2, dilation 2
    linear = config.da.form == "linear"
    latent, P = config.latent, config.parameter.pairs
    return {
        "da_projections": len(runs("da")) * (D * (N + 2 * K) * H + N * H * D),
        "da_attention": len(runs("da")) * (K * H * H + N * H * H) if linear else len(reached) * 2 * N * H,
        "latent_projections": 4 * 2 * D * latent.query_heads * latent.head_size,
        "latent_attention": 4 * 2 * latent.query_heads * latent.latents * latent.head_size,
        "parameter_pairs": 4 * 2 * D * P,
        "sa_attention": len(depths[-3:]) * 2 * config.sa.query_heads * config.sa.head_size * context,
    }


@pytest.mark.parametrize(
    "config", [DR_EVERYTHING, LA_EVERYTHING, changed(LA_EVERYTHING, da=REACH | {"form": "softmax"})]
)
def test_costs_equal_a_count_by_hand(config):
    flops = forward_flops(config, 9.0).by_component()
    hand = multiplied(config, 9)
    assert {name: flops[name] for name in hand} == {name: 2 * numbers for name, numbers in hand.items()}
    trained = [shape for name, shape in oracle.names_and_shapes(sizes_of(config)).items() if oracle.trained(name)]
    assert parameters(config).total == sum(np.prod(shape) for shape in trained)
    layers, latent = (1 if config.depth_recurrent else 4), config.latent
    pairs = (latent.embedding_size or latent.latents) * 2 * latent.kv_heads * latent.head_size
    assert parameters(config).by_component()["latent_pairs"] == layers * pairs
    assert parameters(config).by_component()["parameter_pairs"] == layers * 2 * config.width * config.parameter.pairs


def trained(config, *sizes):
    """(state before, after two steps, what they reported) on a mesh."""
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: np.prod(sizes)])
    graph, state = init_state(config, mesh)
    initial, results = jax.device_get(state), []
    step = make_train_step(config, Compute.of(config, mesh), mesh, graph)
    for i in range(2):
        state, result = step(state, batch_of(config, seed=i))
        results.append(result)
    return initial, *jax.device_get((state, results))


def test_a_mesh_of_all_axes_trains_everything_like_one_device_and_moves_every_parameter_and_no_constant(tmp_path):
    texts = np.random.default_rng(0).normal(size=(6, 9))
    np.save(tmp_path / "texts.npy", texts)
    model = changed(DR_EVERYTHING, latent={"embeddings": str(tmp_path / "texts.npy")})
    config = changed(toy_config(tmp_path, batch=8, remat="full"), model=model, kernels=REFERENCE)
    initial, *expected = trained(config, 1, 1, 1)
    same_initial, *actual = trained(config, 2, 2, 2)
    chex.assert_trees_all_equal(same_initial, initial)
    assert_same_training(actual, expected)
    after, _ = actual
    moved = jax.tree.map(lambda a, b: (a != b).any(), initial.params, after.params)
    assert all(jax.tree.leaves(moved)), moved
    np.testing.assert_array_equal(after.biases["layer"]["latent"]["embeddings"][...], texts.astype(np.float32))
