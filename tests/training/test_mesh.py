"""Every mesh trains like one device: losses, gradients, router counts and biases."""

import functools

import jax
import numpy as np
import pytest

from dreamer_jax.config import MeshConfig
from dreamer_jax.kernels.compute import Compute
from dreamer_jax.sharding import make_mesh
from dreamer_jax.training.step import abstract_state, init_state, make_train_step
from tests.training.test_step import batch_of, config_of

STEPS = 5
MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (4, 2, 1), (2, 1, 4), (1, 4, 2), (2, 2, 2)]
"""Meshes (data, fsdp, expert) of eight devices: all sets of axes, and each axis of 1, 2, 4 and 8 devices."""
ALWAYS = [(2, 2, 2), (8, 1, 1), (1, 8, 1), (1, 1, 8)]
"""All axes together, and each by itself; the rest is for `make exhaustive`."""
RUNS = [
    pytest.param(
        variant,
        sizes,
        id="{} data {} fsdp {} expert {}".format(variant, *sizes),
        marks=[] if sizes in ALWAYS and (variant == "DR+DA" or sizes == (2, 2, 2)) else [pytest.mark.exhaustive],
    )
    for variant in ("LA", "DR", "DR+DA")
    for sizes in MESHES
    if variant == "DR+DA" or sizes == (2, 2, 2) or (variant, sizes) == ("LA", (1, 1, 8))
]
"""DR+DA has all that the others have; they have layers, or nothing kept of earlier depths, to split."""


def run(variant, folder, sizes, **train):
    """(state on the mesh, what the steps reported) after a few steps on a mesh (data, fsdp, expert)."""
    config = config_of(variant, folder, **train)
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: sizes[0] * sizes[1] * sizes[2]])
    graph, shapes = abstract_state(config, mesh)
    state = jax.device_put(initial(variant, folder), jax.tree.map(lambda array: array.sharding, shapes))
    step = make_train_step(config, Compute.of(config, mesh), mesh, graph)
    results = []
    for i in range(STEPS):
        state, result = step(state, batch_of(config, seed=i))
        results.append(result)
    return state, results


@functools.cache
def on_all_axes(folder):
    return run("DR+DA", folder, (2, 2, 2))


@functools.cache
def initial(variant, folder):
    """The state before the first step; that meshes initialise it alike is for test_step.py."""
    _, state = init_state(config_of(variant, folder), make_mesh(MeshConfig(), jax.devices()[:1]))
    return jax.device_get(state)


@functools.cache
def one_device(variant, folder):
    return jax.device_get(run(variant, folder, (1, 1, 1)))


def assert_same_training(actual, expected):
    """Equal up to the order in which float32 sums are taken: 1e-6 relative for a sum of thousands, a few times that
    after five updates. Counts and biases are integers and signs of integers: equal to the bit.

    The first moments are the gradients' running means: they compare gradients array by array. Parameters are compared
    on the scale of an update, because Adam turns the rounding of a zero gradient into up to a learning rate.
    """
    (state, results), (expected_state, expected_results) = jax.device_get(actual), expected
    for result, wanted in zip(results, expected_results, strict=True):
        np.testing.assert_allclose(result.loss, wanted.loss, rtol=5e-6)
        np.testing.assert_allclose(result.gradient_norm, wanted.gradient_norm, rtol=5e-5)
        for kind, figures in wanted.figures.routers.items():
            np.testing.assert_array_equal(result.figures.routers[kind].counts, figures.counts)
    jax.tree.map(np.testing.assert_array_equal, state.biases, expected_state.biases)
    gradients, wanted = (jax.tree.leaves(s.optimizer[1][0].mu) for s in (state, expected_state))
    for a, b in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * max(np.abs(b).max(), 1e-9))
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected_state.params), strict=True):
        assert np.mean(np.abs(a - b)) < 2e-5 * np.mean(np.abs(b)) + 1e-7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("toy")


@pytest.mark.parametrize(("variant", "sizes"), RUNS)
def test_every_mesh_trains_like_one_device(variant, sizes, folder):
    all_axes = (variant, sizes) == ("DR+DA", (2, 2, 2))
    actual = on_all_axes(folder) if all_axes else run(variant, folder, sizes)
    assert_same_training(actual, one_device(variant, folder))


def test_microbatches_and_remat_do_not_change_training_on_a_mesh(folder):
    divided = run("DR+DA", folder, (1, 1, 4), microbatches=2, remat="selective")
    assert_same_training(divided, one_device("DR+DA", folder))


def test_parameters_and_moments_lie_split_between_steps(folder):
    state, _ = on_all_axes(folder)
    for tree in (state.params, state.optimizer[1][0].mu):
        w = tree["layer"]["ea"]["w_down"][...]
        assert w.addressable_shards[0].data.shape == (*w.shape[:-1], w.shape[-1] // 4)
    norm = state.params["residual_norm"][...]
    assert norm.addressable_shards[0].data.shape == norm.shape
