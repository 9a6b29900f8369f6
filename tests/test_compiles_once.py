"""Training, decoding and inspection are compiled once for each shape, however often and with whatever numbers they run.

What JAX compiles again it traces again, and says nothing: a static argument that is not equal to itself, a Python
number that becomes a constant, an array whose type is weak at first.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dreamer_jax import convert
from dreamer_jax.config import MeshConfig
from dreamer_jax.convert import model as convert_model
from dreamer_jax.inference import engine
from dreamer_jax.inference.decoder import make_decoder
from dreamer_jax.inference.sample import Sampling
from dreamer_jax.kernels.compute import Compute
from dreamer_jax.model.dreamer import Dreamer
from dreamer_jax.sharding import make_mesh
from dreamer_jax.training import step as step_module
from tests.models import packed_batch, small
from tests.training.test_step import batch_of
from tests.training.toy import REFERENCE, toy_config

COMPUTE = Compute(kernels=REFERENCE.implementation)
"""It traces soonest."""


@pytest.fixture(autouse=True)
def _counts_from_zero():
    chex.clear_trace_counter()
    yield
    chex.clear_trace_counter()


def traced_once(monkeypatch, module, name, **options):
    """Compile a function of a module anew, with the options that it has there; a second trace raises."""
    function = getattr(module, name).__wrapped__
    monkeypatch.setattr(module, name, jax.jit(chex.assert_max_traces(function, n=1), **options))


def new_model(seed):
    return Dreamer(small("DR+DA"), nnx.Rngs(seed))


def test_a_train_step(tmp_path, monkeypatch):
    config = toy_config(tmp_path)
    monkeypatch.setattr(step_module, "_updated", chex.assert_max_traces(step_module._updated, n=1))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    graph, state = step_module.init_state(config, mesh)
    train_step = step_module.make_train_step(config, COMPUTE, mesh, graph)
    for i in range(3):
        state, _ = train_step(state, batch_of(config, seed=i))
    restored = jax.tree.map(lambda a: jax.device_put(np.asarray(a), a.sharding), state)  # as a checkpoint gives it back
    train_step(restored, batch_of(config, seed=3))
    with pytest.raises(AssertionError, match="traced > 1 times"):
        train_step(state, jax.tree.map(lambda a: a[:4], batch_of(config)))


def test_reading_prompts_and_decoding(monkeypatch):
    for name in ("_insert", "_step"):
        traced_once(monkeypatch, engine, name, static_argnums=1, donate_argnums=3)
    for seed, prompts in enumerate([[[1, 2, 3], [4]], [[5], [6, 7]], [[8, 9], [1, 2, 3, 4]]]):
        decoder = make_decoder(new_model(seed), COMPUTE)
        engine.complete(decoder, prompts, Sampling(seed / 2), max_tokens=4 + seed, seed=seed)
    with pytest.raises(AssertionError, match="traced > 1 times"):
        engine.complete(decoder, [[1], [2], [3]], Sampling(), max_tokens=2)


def test_inspecting_a_model(monkeypatch):
    traced_once(monkeypatch, convert_model, "_inspect", static_argnums=(0, 1, 2, 3))
    for seed in range(3):
        tokens, positions, segments = packed_batch(61, seed=seed)
        model = new_model(seed)
        if seed == 2:
            model = convert.build(model.config, convert.named_arrays(model))
        convert.inspect(model, tokens, positions, segments, compute=COMPUTE)
    convert.inspect(model, jnp.asarray(tokens), None, segments, compute=COMPUTE)
    with pytest.raises(AssertionError, match="traced > 1 times"):
        convert.inspect(model, tokens[:1], positions[:1], segments[:1], compute=COMPUTE)
