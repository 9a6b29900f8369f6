"""Bytes: Table 1, what is exact between steps, what JAX keeps of a depth, and a step's estimate against XLA."""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dreamer_jax.accounting.memory import (
    SINGLE,
    generation_memory,
    saved_arrays,
    saved_bytes,
    table_1_memory,
    training_memory,
    weights_at_work,
)
from dreamer_jax.config import (
    Config,
    DepthAttentionConfig,
    ExpertAttentionConfig,
    LatentAttentionConfig,
    MeshConfig,
    ModelConfig,
    ParameterAttentionConfig,
    RouterConfig,
    SequenceAttentionConfig,
    load,
)
from dreamer_jax.kernels import products
from dreamer_jax.kernels.compute import Compute
from dreamer_jax.kernels.plain.implementation import PLAIN
from dreamer_jax.model import recurrence
from dreamer_jax.model.dreamer import Dreamer, made_ready
from dreamer_jax.model.parameters import taken_apart
from dreamer_jax.sharding import make_mesh
from dreamer_jax.training.ahead_of_time import abstract_batch
from dreamer_jax.training.step import abstract_state, make_train_step
from tests.kernels.backends import needs_compiler
from tests.models import PARALLEL, SEQUENTIAL, VARIANTS, changed, variant_of

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
COMPUTED = [*(("bfloat16", remat) for remat in POLICIES), ("float32", "none")]
"""What a policy keeps hangs on names, not on the dtype; float32 has all policies with native kernels."""
TOKENS = 1024
# Sizes that differ from each other, so that none can stand in for another; the arrays without tokens are smaller.
ODD = ModelConfig(
    depth=6,
    width=96,
    vocab=200,
    sa=SequenceAttentionConfig(query_heads=3, kv_heads=1, head_size=40),
    da=DepthAttentionConfig(query_heads=1, kv_heads=1, head_size=28),
    router=RouterConfig(size=20, attention_experts=7),
    ea=ExpertAttentionConfig(experts=23, active_experts=5, expert_width=56),
    latent=LatentAttentionConfig(latents=17, query_heads=3, kv_heads=1, head_size=12),
    parameter=ParameterAttentionConfig(pairs=37),
)
MODELS = {
    "LA": variant_of(ODD, "LA"),
    "LA+DA": variant_of(ODD, "LA+DA"),
    "DR": variant_of(ODD, "DR"),
    "DR+DA": variant_of(ODD, "DR+DA"),
    "Eq. 4": variant_of(ODD, "DR+DA", SEQUENTIAL),
    "Eq. 6": variant_of(ODD, "LA+DA", PARALLEL),
    "experts first": changed(ODD, mixture=("ea", "da+sa")),
    "experts alone": changed(ODD, mixture=("ea",)),
    "window": changed(ODD, da={"window": 2}),
    "linear": changed(ODD, da={"form": "linear"}),
    "latent": changed(ODD, mixture=("latent+sa", "ea")),
    "parameter": changed(ODD, mixture=("parameter", "sa", "ea"), depth_recurrent=False),
    "parameter last": changed(ODD, mixture=("sa", "parameter")),
}


@pytest.mark.parametrize("name", TABLE_1_GB)
def test_a_generation_holds_the_bytes_of_table_1(name: str) -> None:
    assert table_1_memory(load(CONFIGS / f"{name}.py").model) / 1e9 == pytest.approx(TABLE_1_GB[name], rel=1e-3)


def config_of(variant: str, remat: str = "full", **model: object) -> Config:
    tiny = load(CONFIGS / "tiny.py")
    sized = changed(variant_of(tiny.model, variant), **model)
    return changed(dataclasses.replace(tiny, model=sized), train={"remat": remat})


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 2, 4), (2, 4, 1)])
def test_what_lies_there_between_steps_is_exact(variant: str, sizes: tuple[int, int, int]) -> None:
    check_at_rest(config_of(variant), sizes)


@pytest.mark.parametrize("variant", ["LA+DA", "DR+DA"])
def test_what_lies_there_of_dimensions_that_skip_depths_is_exact(variant: str) -> None:
    check_at_rest(config_of(variant, mixture=("da[::2]+sa[1:]", "ea[:3]")), (1, 2, 4))


def check_at_rest(config: Config, sizes: tuple[int, int, int]) -> None:
    mesh = make_mesh(MeshConfig(*sizes))
    _, state = abstract_state(config, mesh)

    def bytes_on_one_device(tree: object) -> int:
        return sum(4 * math.prod(a.sharding.shard_shape(a.shape)) for a in jax.tree.leaves(tree) if a.ndim)

    memory = training_memory(config, dict(mesh.shape), "cpu")
    assert memory.parameters == bytes_on_one_device(state.params)
    assert memory.optimizer == bytes_on_one_device(state.optimizer)


def kept_by_jax(monkeypatch: pytest.MonkeyPatch, model: ModelConfig, compute: Compute) -> Counter[str]:
    """Numbers of one token in the arrays that JAX keeps of one depth beside weights and cache, by dtype."""
    tokens, found = jnp.zeros((4, TOKENS // 4), jnp.int32), []
    without_common_arguments = recurrence._without_common_arguments

    def recorded(vjp: object) -> object:
        vjp = without_common_arguments(vjp)
        found.append([(a.dtype.name, a.size) for a in jax.tree.leaves(vjp)])
        return vjp

    def gradients() -> object:
        graph, params, biases = taken_apart(made_ready(Dreamer(model, nnx.Rngs(0)), compute))

        def hidden(params: object) -> object:
            return nnx.merge(graph, params, biases).forward(tokens, tokens, tokens + 1, compute).hidden

        return jax.vjp(hidden, params)[0]

    monkeypatch.setattr(recurrence, "_without_common_arguments", recorded)
    jax.eval_shape(gradients)
    [arrays] = found
    numbers: Counter[str] = Counter()
    for dtype, size in arrays:
        if size >= TOKENS:
            assert size % TOKENS == 0
            numbers[dtype] += size // TOKENS
    return numbers


def in_the_table(model: ModelConfig, compute: Compute, kernels: str) -> Counter[str]:
    """The same by the table of arrays."""
    dtype, numbers = jnp.dtype(compute.dtype), Counter[str]()
    for saved in saved_arrays(model, dtype.itemsize):
        if saved.kept(compute.remat, kernels):
            numbers[dtype.name if saved.dtype == "compute" else saved.dtype] += saved.numbers
    return numbers


WHOLE = ("LA", "DR+DA", "linear", "latent", "parameter")
"""Models that have every array of the table between them: by default these have all policies, the others one each."""


def pairs_of(models: Iterable[str], policies: Sequence[Any]) -> Iterator[Any]:
    """Every model with every policy; all but one of a model that is not whole is for `make exhaustive`."""
    for i, name in enumerate(models):
        for j, policy in enumerate(policies):
            always = name in WHOLE or i % len(policies) == j
            values = policy if isinstance(policy, tuple) else (policy,)
            yield pytest.param(name, *values, marks=[] if always else [pytest.mark.exhaustive])


@pytest.mark.parametrize(("name", "dtype", "remat"), pairs_of(MODELS, COMPUTED))
def test_the_table_lists_what_jax_keeps(monkeypatch, name: str, remat: str, dtype: str) -> None:
    compute = Compute(dtype=jnp.dtype(dtype), remat=remat)
    kept = kept_by_jax(monkeypatch, MODELS[name], compute)
    assert kept == in_the_table(MODELS[name], compute, "plain")
    size = jnp.dtype(dtype).itemsize
    assert saved_bytes(MODELS[name], size, remat) == sum(jnp.dtype(d).itemsize * n for d, n in kept.items())


@needs_compiler
@pytest.mark.parametrize(("name", "remat"), pairs_of(MODELS, POLICIES))
def test_the_table_lists_what_jax_keeps_with_native_kernels(monkeypatch, name: str, remat: str) -> None:
    compute = Compute(remat=remat, kernels="native")
    assert kept_by_jax(monkeypatch, MODELS[name], compute) == in_the_table(MODELS[name], compute, "native")


def shapes_only(product: products.Product, a: jax.Array, b: jax.Array, sizes: jax.Array) -> jax.Array:
    """A library of grouped products that computes nothing."""
    shapes = {"forward": (a.shape[0], b.shape[-1]), "d_x": (a.shape[0], b.shape[1])}
    return jnp.zeros(shapes.get(product, (sizes.shape[0], a.shape[1], b.shape[1])), a.dtype)


class OnDevice(Compute):
    """With the experts of accelerators, whose kernels stand on no CPU; the rest is plain."""

    @property
    def implementation(self):
        linear, swiglu = (functools.partial(f, shapes_only) for f in (products.linear, products.swiglu))
        return dataclasses.replace(PLAIN, linear=linear, swiglu=swiglu)


@pytest.mark.parametrize(("variant", "dtype", "remat"), pairs_of(VARIANTS, COMPUTED))
def test_the_table_lists_what_jax_keeps_with_kernels_of_accelerators(
    monkeypatch, variant: str, remat: str, dtype: str
) -> None:
    compute = OnDevice(dtype=jnp.dtype(dtype), remat=remat)
    assert kept_by_jax(monkeypatch, MODELS[variant], compute) == in_the_table(MODELS[variant], compute, "device")


SKIPPING = {"da skips": ("da[::2]+sa", "ea"), "ea skips": ("da+sa", "ea[::3]"), "sa skips": ("da+sa[:2]", "ea")}


@pytest.mark.parametrize(("name", "remat"), pairs_of(SKIPPING, ["full", "selective", "products"]))
def test_the_loop_keeps_as_much_of_depths_at_which_a_dimension_does_not_run(monkeypatch, name: str, remat: str) -> None:
    model, compute = changed(ODD, mixture=SKIPPING[name]), Compute(remat=remat)
    assert kept_by_jax(monkeypatch, model, compute) == in_the_table(model, compute, "plain")


def xla_memory(config: Config) -> Any:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    graph, state = abstract_state(config, mesh)
    step = make_train_step(config, Compute.of(config, mesh), mesh, graph)
    return jax.jit(step, donate_argnums=0).lower(state, abstract_batch(config, mesh)).compile().memory_analysis()


@needs_compiler
@pytest.mark.parametrize(
    ("variant", "remat"),
    [
        *(("LA", "full"), ("DR", "full"), ("DR+DA", "full"), ("DR+DA", "products")),
        *(pytest.param(variant, "products", marks=pytest.mark.exhaustive) for variant in ("LA", "DR")),
    ],
)
def test_the_estimate_of_a_step_is_near_what_xla_reserves(variant: str, remat: str) -> None:
    check_estimate(config_of(variant, remat))


@needs_compiler
def test_the_estimate_is_near_where_the_loss_needs_most() -> None:
    config = config_of("DR+DA", vocab=4096)
    assert training_memory(config, SINGLE, "cpu").logits > 0
    check_estimate(config)


@needs_compiler
@pytest.mark.parametrize("variant", ["LA+DA", "DR+DA"])
def test_the_estimate_is_near_where_dimensions_skip_depths(variant: str) -> None:
    # In DR a dimension that skips depths does not add its gradients in place, of which the estimate knows nothing.
    check_estimate(config_of(variant, mixture=("da[::2]+sa", "ea")), within=0.15)


def check_estimate(config: Config, within: float = 0.1) -> None:
    found, memory = xla_memory(config), training_memory(config, SINGLE, "cpu")
    assert memory.at_rest == pytest.approx(found.argument_size_in_bytes, rel=0.005)
    assert memory.temporary == pytest.approx(found.temp_size_in_bytes, rel=within)


# GiB of temporaries that XLA reserves on one H200 (benchmarks/results/gpu_aot_2026-11.md): full, selective, products.
ON_H200 = {"la_1b": (7.96, 9.77, 22.19), "dr_1b": (9.34, 10.77, 24.28), "dr_da_1b": (9.92, 11.48, 26.85)}


@pytest.mark.parametrize("name", ON_H200)
def test_the_estimate_is_near_what_was_compiled_for_an_h200(name: str) -> None:
    for remat, found in zip(POLICIES, ON_H200[name], strict=False):
        config = changed(load(CONFIGS / f"{name}.py"), train={"remat": remat, "batch": 8, "microbatches": 1})
        assert 0.98 < training_memory(config, SINGLE, "gpu").temporary / 2**30 / found < 1.13, remat


def test_categories_add_up_and_meshes_share_out_what_they_should() -> None:
    config = load(CONFIGS / "dr_da_2b.py")
    one, many = (training_memory(config, mesh) for mesh in (SINGLE, {"data": 1, "fsdp": 2, "expert": 4}))
    assert one.total == sum(one.by_component().values()) == one.at_rest + one.temporary
    assert many.parameters == pytest.approx(one.parameters / 8, rel=1e-3)
    assert one.exchange == 0 < many.exchange


def test_without_experts_nothing_is_exchanged() -> None:
    config = config_of("DR+DA", mixture=("da+sa",))
    assert training_memory(config, {"data": 1, "fsdp": 1, "expert": 4}).exchange == 0


def test_experts_that_do_not_divide_are_filled_up_and_kernels_widen_them() -> None:
    model = load(CONFIGS / "dr_da_2b.py").model
    eight = {"data": 1, "fsdp": 1, "expert": 8}
    by_platform = [weights_at_work(model, eight, platform) for platform in ("cpu", "tpu")]
    assert by_platform[1] - by_platform[0] == 138 * 3 * 1024 * (512 - 472)


def test_more_microbatches_need_less_and_recomputation_saves() -> None:
    config = load(CONFIGS / "dr_da_1b.py")

    def total(**train: object) -> int:
        return training_memory(changed(config, train=train)).total

    assert total(microbatches=16) < total(microbatches=8)
    totals = [total(remat=remat) for remat in POLICIES]
    assert totals == sorted(set(totals))


@pytest.mark.parametrize("name", ["DR+DA", "LA", "experts alone"])
def test_generation_holds_what_its_caches_hold(name: str) -> None:
    model, batch, length = MODELS[name], 3, 64
    caches = jax.eval_shape(lambda: Dreamer(model, nnx.Rngs(0)).empty_caches(model.depth, batch, length, jnp.bfloat16))
    sizes = [a.size * a.dtype.itemsize for a in jax.tree.leaves(caches)]
    assert generation_memory(model, batch=batch, length=length, size=2)["sequence_cache"] == sum(sizes)
