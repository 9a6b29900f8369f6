"""Bytes: Table 1's, the exact ones between steps, and the estimate of a step's against XLA's."""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dreamer_jax.accounting.memory import SINGLE, saved_bytes, table_1_memory, training_memory, weights_at_work
from dreamer_jax.config import Config, MeshConfig, ModelConfig, TrainConfig, load
from dreamer_jax.model import dreamer, recurrence
from dreamer_jax.model.dreamer import Compute, Dreamer, depth_entry, depth_weights, prepared
from dreamer_jax.model.rope import sequence_rotation
from dreamer_jax.sharding import make_mesh
from dreamer_jax.training.ahead_of_time import abstract_batch
from dreamer_jax.training.step import abstract_state, make_train_step
from tests.native import needs_compiler

CONFIGS = Path(__file__).parents[2] / "configs"
TABLE_1_GB = {
    "la_1b": 4.7827,
    "dr_1b": 4.7822,
    "dr_da_1b": 4.7839,
    "la_2b": 6.6337,
    "dr_2b": 6.6343,
    "dr_da_2b": 6.6349,
}
POLICIES = ("full", "selective", "products", "none")  # in the order of what they keep
VARIANTS = {"LA": (False, False), "LA+DA": (False, True), "DR": (True, False), "DR+DA": (True, True)}
# Sizes that differ from each other, so that none can stand in for another.
ODD = ModelConfig(
    depth=6, width=96, vocab=200, query_heads=3, kv_heads=1, head_size=40, da_heads=1, da_kv_heads=1, da_head_size=28,
    router_size=20, experts=23, active_experts=5, expert_width=56, attention_experts=7,
)  # fmt: skip


@pytest.mark.parametrize("name", TABLE_1_GB)
def test_a_generation_holds_the_bytes_of_table_1(name: str) -> None:
    assert table_1_memory(load(CONFIGS / f"{name}.py").model) / 1e9 == pytest.approx(TABLE_1_GB[name], rel=1e-3)


def config_of(variant: str, remat: str = "full") -> Config:
    recurrent, depth_attention = VARIANTS[variant]
    tiny = load(CONFIGS / "tiny.py")
    return dataclasses.replace(
        tiny,
        model=dataclasses.replace(tiny.model, depth_recurrent=recurrent, depth_attention=depth_attention),
        train=dataclasses.replace(tiny.train, remat=remat),
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 2, 4), (2, 4, 1)])
def test_what_lies_there_between_steps_is_exact(variant: str, sizes: tuple[int, int, int]) -> None:
    config = config_of(variant)
    mesh = make_mesh(MeshConfig(*sizes))
    _, state = abstract_state(config, mesh)

    def bytes_on_one_device(tree: object) -> int:
        return sum(4 * math.prod(a.sharding.shard_shape(a.shape)) for a in jax.tree.leaves(tree) if a.ndim)

    memory = training_memory(config, dict(mesh.shape), "cpu")
    assert memory.parameters == bytes_on_one_device(state.params)
    assert memory.optimizer == bytes_on_one_device(state.optimizer)


def residual_bytes(model: ModelConfig, compute: Compute) -> int:
    """Bytes that JAX keeps of one depth, beside weights and cache."""
    tokens = jnp.zeros((4, 256), jnp.int32)

    def vjp_of_one_depth() -> object:
        ready = prepared(Dreamer(model, nnx.Rngs(0)), compute)
        x = ready.embedded(tokens, compute)
        graph, shared, stacked, biases = depth_weights(ready)
        own = jax.tree.map(lambda a: a[0], stacked)
        body = recurrence._remat(functools.partial(dreamer._depth_step, model, graph, compute, False), compute.remat)
        cache = jax.tree.map(lambda e: jnp.stack([e] * model.depth), depth_entry(model, x))

        def at_depth(*args: object) -> object:
            x, entry, aux, passed_on = body(*args, jnp.int32(1))
            return (x, entry, passed_on), aux

        constants = biases, sequence_rotation(tokens, model.head_size, model.rope_base), tokens + 1
        _, vjp, _ = jax.vjp(at_depth, shared, own, constants, x, cache, has_aux=True)
        return recurrence._without_common_arguments(vjp)

    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(jax.eval_shape(vjp_of_one_depth)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("remat", POLICIES)
def test_saved_activations_are_those_that_jax_keeps(variant: str, dtype: str, remat: str) -> None:
    recurrent, depth_attention = VARIANTS[variant]
    model = dataclasses.replace(ODD, depth_recurrent=recurrent, depth_attention=depth_attention)
    matmul = "dense" if remat == "products" else "blocks"  # blocks hides what it multiplies inside
    kept = residual_bytes(model, Compute(dtype=jnp.dtype(dtype), remat=remat, matmul=matmul))
    assert 4 * 256 * saved_bytes(model, jnp.dtype(dtype).itemsize, remat) == pytest.approx(kept, rel=0.05)


@needs_compiler
@pytest.mark.parametrize("variant", ["LA", "DR", "DR+DA"])
@pytest.mark.parametrize("remat", POLICIES)
def test_saved_activations_with_native_kernels_are_those_that_jax_keeps(variant: str, remat: str) -> None:
    recurrent, depth_attention = VARIANTS[variant]
    model = dataclasses.replace(ODD, depth_recurrent=recurrent, depth_attention=depth_attention)
    kept = residual_bytes(model, Compute(remat=remat, matmul="native", attention="native"))
    assert 4 * 256 * saved_bytes(model, 4, remat, native=True) == pytest.approx(kept, rel=0.05)


@needs_compiler
@pytest.mark.parametrize("remat", ["full", "products"])
@pytest.mark.parametrize("variant", ["LA", "DR", "DR+DA"])
def test_the_estimate_of_a_step_is_near_what_xla_reserves(variant: str, remat: str) -> None:
    config = config_of(variant, remat)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    graph, state = abstract_state(config, mesh)
    step = make_train_step(config, Compute.of(config, mesh), mesh, graph)
    found = jax.jit(step, donate_argnums=0).lower(state, abstract_batch(config, mesh)).compile().memory_analysis()
    memory = training_memory(config, SINGLE, "cpu")
    assert memory.at_rest == pytest.approx(found.argument_size_in_bytes, rel=0.005)
    assert memory.temporary == pytest.approx(found.temp_size_in_bytes, rel=0.15)


def test_categories_add_up_and_meshes_share_out_what_they_should() -> None:
    config = load(CONFIGS / "dr_da_2b.py")
    one, many = (training_memory(config, mesh) for mesh in (SINGLE, {"data": 1, "fsdp": 2, "expert": 4}))
    assert one.total == sum(one.by_component().values()) == one.at_rest + one.temporary
    assert many.parameters == pytest.approx(one.parameters / 8, rel=1e-3)
    assert one.exchange == 0 < many.exchange


def test_experts_that_do_not_divide_are_filled_up_and_kernels_widen_them() -> None:
    model = load(CONFIGS / "dr_da_2b.py").model
    eight = {"data": 1, "fsdp": 1, "expert": 8}
    by_platform = [weights_at_work(model, eight, platform) for platform in ("cpu", "tpu")]
    assert by_platform[1] - by_platform[0] == 138 * 3 * 1024 * (512 - 472)


def test_more_microbatches_need_less_and_recomputation_saves() -> None:
    config = load(CONFIGS / "dr_da_1b.py")

    def total(**train: object) -> int:
        return training_memory(dataclasses.replace(config, train=TrainConfig(**{**vars(config.train), **train}))).total

    assert total(microbatches=16) < total(microbatches=8)
    totals = [total(remat=remat) for remat in POLICIES]
    assert totals == sorted(set(totals))
