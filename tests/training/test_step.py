"""One optimizer step means the same in any number of microbatches and under any remat (test_mesh.py: on any mesh)."""

import dataclasses
import functools
import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dreamer_jax.config import KernelConfig, MeshConfig, OptimizerConfig, TrainConfig
from dreamer_jax.data.batch import Batch
from dreamer_jax.kernels.compute import Compute
from dreamer_jax.model.parameters import Matrix, Norm, RouterKeys
from dreamer_jax.sharding import make_mesh, replicated
from dreamer_jax.training.optimizer import adamw, decayed, learning_rate
from dreamer_jax.training.step import init_state, make_evaluation, make_train_step
from tests.models import packed_batch, variant_of
from tests.training.toy import REFERENCE, toy_config

STEPS = 3


def batch_of(config, seed=0):
    tokens, positions, segments = packed_batch(config.model.vocab, config.train.batch, config.data.context, seed)
    mask = np.random.default_rng(seed).random(tokens.shape) < 0.8
    return jax.tree.map(jnp.asarray, Batch(tokens, positions, segments, mask))


@functools.cache
def initialised(config):
    return init_state(config, make_mesh(MeshConfig(), jax.devices()[:1]))


def initial(config):
    """(graph, state before the first step) on one device, the same for all ways to train."""
    return initialised(dataclasses.replace(config, train=TrainConfig(seed=config.train.seed)))


@functools.cache
def made(config, compute=None):
    """(graph, state before the first step, the step) on one device; a step takes a copy of the state, and eats it."""
    graph, state = initial(config)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return graph, state, make_train_step(config, compute or Compute.of(config), mesh, graph)


def run(config, *, compute=None, steps=STEPS):
    """(state, what the steps reported) after a few steps on one device."""
    _, first, step = made(config, compute)
    state, results = jax.tree.map(jnp.copy, first), []
    for i in range(steps):
        state, result = step(state, batch_of(config, seed=i))
        results.append(result)
    return jax.device_get(state), jax.device_get(results)


@functools.cache
def reference(variant, folder):
    return run(config_of(variant, folder))


def config_of(variant, folder, **train):
    """With the reference kernels, which compile soonest; test_golden.py trains with the others."""
    config = toy_config(folder, **train)
    return dataclasses.replace(config, model=variant_of(config.model, variant), kernels=REFERENCE)


def counts_of(result):
    return {kind: figures.counts for kind, figures in result.figures.routers.items()}


def check_same_training(actual, expected):
    """Same losses, counts and biases, and parameters equal to float32 summation order.

    Adam divides by the root of the second moment: a gradient that is zero but for rounding moves by up to the learning
    rate, so parameters are compared on that scale.
    """
    (state, results), (expected_state, expected_results) = actual, expected
    for result, expected_result in zip(results, expected_results, strict=True):
        np.testing.assert_allclose(result.loss, expected_result.loss, rtol=2e-6)
        np.testing.assert_allclose(result.gradient_norm, expected_result.gradient_norm, rtol=2e-5)
        chex.assert_trees_all_equal(counts_of(result), counts_of(expected_result))
    chex.assert_trees_all_equal(state.biases, expected_state.biases)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected_state.params), strict=True):
        assert np.mean(np.abs(a - b)) < 1e-5 * np.mean(np.abs(b)) + 1e-7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("toy")


@pytest.mark.parametrize(
    ("microbatches", "remat"),
    [
        (4, "none"),
        (1, "selective"),
        pytest.param(4, "full", marks=pytest.mark.exhaustive),
        pytest.param(1, "none", marks=pytest.mark.exhaustive),
        pytest.param(1, "products", marks=pytest.mark.exhaustive),
    ],
)
def test_microbatches_and_remat_do_not_change_training(microbatches, remat, folder):
    """Nor do both at once: the pair of (4, none) takes one program for the two."""
    divided = config_of("DR+DA", folder, microbatches=microbatches, remat=remat)
    check_same_training(run(divided), reference("DR+DA", folder))


def test_biases_move_by_their_rates_and_sum_what_shares_them(folder):
    config = config_of("DR+DA", folder)
    state, results = run(config, steps=1)
    counts = results[0].figures.routers["ea"].counts.sum(axis=0)
    bias = state.biases["layer"]["ea"]["router"]["bias"][...]
    np.testing.assert_allclose(bias, 1e-3 * np.sign(np.median(counts) - counts), rtol=1e-6)
    attention_counts = results[0].figures.routers["sa"].counts.sum(axis=0)
    bias = state.biases["layer"]["sa"]["projections"]["router"]["bias"][...]
    np.testing.assert_allclose(bias, 1e-2 * np.sign(np.median(attention_counts) - attention_counts), rtol=1e-6)


def test_padding_is_not_counted(folder):
    config = config_of("DR+DA", folder)
    _, results = run(config, steps=1)
    tokens = int((batch_of(config).segment_ids > 0).sum())
    assert results[0].figures.tokens == tokens < config.tokens_per_step
    for kind, active in (("ea", config.model.ea.active_experts), ("sa", 1), ("da", 1)):
        np.testing.assert_array_equal(counts_of(results[0])[kind].sum(axis=-1), [tokens * active] * config.model.depth)


def spoiled(array):
    first = np.arange(array.shape[-1]) == 0
    return jax.device_put(np.where(first, np.float32(np.nan), array), array.sharding)


def test_a_non_finite_step_is_skipped_and_counted(folder):
    config = config_of("DR+DA", folder)
    _, state, step = made(config)
    poisoned = state._replace(params=jax.tree.map(spoiled, state.params))
    before = jax.device_get(poisoned)
    after, result = jax.device_get(step(poisoned, batch_of(config)))
    assert not np.isfinite(result.loss)
    assert (after.step, after.skipped, after.bad_in_a_row) == (1, 1, 1)
    kept = operator.attrgetter("params", "optimizer", "biases")
    chex.assert_trees_all_equal(kept(after), kept(before))


@pytest.mark.parametrize("kernels", [REFERENCE, pytest.param(KernelConfig(), marks=pytest.mark.exhaustive)])
def test_bfloat16_keeps_float32_parameters_and_nearly_the_loss(kernels, folder):
    config = dataclasses.replace(config_of("DR+DA", folder, dtype="bfloat16"), kernels=kernels)
    state, results = run(config, steps=1)
    _, expected = reference("DR+DA", folder)
    np.testing.assert_allclose(results[0].loss, expected[0].loss, rtol=5e-3)
    assert {a.dtype for a in jax.tree.leaves((state.params, state.biases))} == {np.dtype("float32")}


def test_training_lowers_the_loss_of_a_repeated_batch(folder):
    config = config_of("DR+DA", folder)
    _, first, step = made(config)
    state, losses = jax.tree.map(jnp.copy, first), []
    for _ in range(12):
        state, result = step(state, batch_of(config))
        losses.append(float(result.loss))
    assert losses[-1] < 0.8 * losses[0]


def test_evaluation_gives_the_training_loss(folder):
    config = config_of("DR+DA", folder, microbatches=2)
    mesh = make_mesh(MeshConfig(), jax.devices()[:4])
    graph, state, _ = made(config)
    state = jax.device_put(state, replicated(mesh))
    total, count = make_evaluation(config, Compute.of(config), mesh, graph)(
        state.params, state.biases, batch_of(config)
    )
    _, expected = reference("DR+DA", folder)
    np.testing.assert_allclose(total / count, expected[0].loss, rtol=2e-6)


def test_initialisation_depends_on_the_seed_alone(folder):
    config = config_of("DR+DA", folder)
    _, one = initial(config)
    _, eight = init_state(config, make_mesh(MeshConfig(2, 2, 2)))
    _, other = initial(config_of("DR+DA", folder, seed=1))
    chex.assert_trees_all_equal(jax.device_get(one), jax.device_get(eight))
    w = eight.params["layer"]["ea"]["w_down"][...]
    assert w.addressable_shards[0].data.shape == (*w.shape[:-1], w.shape[-1] // 4)
    assert not np.array_equal(one.params["embed"][...], other.params["embed"][...])


def test_weight_decay_spares_norms_alone(folder):
    _, state = initial(config_of("DR+DA", folder))
    variables = jax.tree.leaves(decayed(state.params), is_leaf=lambda v: isinstance(v, nnx.Variable))
    decides = {type(v): v.get_value() for v in variables}
    assert decides == {Matrix: True, RouterKeys: True, Norm: False}


def test_weight_decay_and_clipping_follow_their_formulas():
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=1, weight_decay=0.01, gradient_clip=0.5, epsilon=1e-8)
    params = nnx.State({"w": Matrix(jnp.full((2, 2), 3.0)), "n": Norm(jnp.full(2, 3.0))})
    gradient = jax.tree.map(lambda a: jnp.full_like(a, 100.0), params)
    transform = adamw(config)
    with jax.numpy_dtype_promotion("standard"):
        updates, state = jax.jit(transform.update)(gradient, transform.init(params), params)
    np.testing.assert_allclose(updates["w"][...], -0.1 * (1 + 0.01 * 3.0), rtol=1e-5)
    np.testing.assert_allclose(updates["n"][...], -0.1, rtol=1e-5)
    clipped = 100.0 * 0.5 / np.sqrt(6 * 100.0**2)
    np.testing.assert_allclose(jax.tree.leaves(state[1][0].mu)[0], 0.1 * clipped, rtol=1e-5)


def test_the_learning_rate_rises_linearly_then_stays():
    config = OptimizerConfig(learning_rate=0.4, warmup_steps=4)
    rates = [float(learning_rate(config, jnp.asarray(step))) for step in range(6)]
    np.testing.assert_allclose(rates, [0.1, 0.2, 0.3, 0.4, 0.4, 0.4], rtol=1e-6)


def test_a_cooldown_lets_the_learning_rate_fall_to_zero():
    config = OptimizerConfig(learning_rate=0.4, warmup_steps=2, cooldown_start=3, cooldown_steps=4)
    rates = [float(learning_rate(config, jnp.asarray(step))) for step in range(8)]
    np.testing.assert_allclose(rates, [0.2, 0.4, 0.4, 0.4, 0.3, 0.2, 0.1, 0.0], rtol=1e-6)
