"""FLOPs per token against Table 1, against a list of matrix products, and against XLA's count."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dreamer_jax.accounting.flops import forward_flops, generated_flops, score_gradient_flops, training_flops
from dreamer_jax.config import (
    DepthAttentionConfig,
    ExpertAttentionConfig,
    ModelConfig,
    RouterConfig,
    SequenceAttentionConfig,
    load,
)
from dreamer_jax.dimensions.base import mean_context
from dreamer_jax.kernels.compute import Compute
from dreamer_jax.kernels.interface import Kernels
from dreamer_jax.model.dreamer import Dreamer
from tests.models import changed

CONFIGS = Path(__file__).parents[2] / "configs"
# Matrix products of one token, and Table 1, which counts a little more.
GFLOPS = {
    "la_1b": ("0.9381", 0.9389),
    "dr_1b": ("0.9381", 0.9389),
    "dr_da_1b": ("0.9404", 0.9413),
    "la_2b": ("1.6136", 1.6150),
    "dr_2b": ("1.6179", 1.6199),
    "dr_da_2b": ("1.6106", 1.6130),
}
SMALL = ModelConfig(
    depth=3,
    width=10,
    vocab=50,
    sa=SequenceAttentionConfig(query_heads=6, kv_heads=2, head_size=4),
    da=DepthAttentionConfig(query_heads=3, kv_heads=1, head_size=8),
    router=RouterConfig(size=12, attention_experts=4),
    ea=ExpertAttentionConfig(experts=7, active_experts=2, expert_width=5),
)


def paper_model(name: str) -> ModelConfig:
    return load(CONFIGS / f"{name}.py").model


@pytest.mark.parametrize("name", GFLOPS)
def test_generated_tokens_cost_what_table_1_says(name: str) -> None:
    products, table = GFLOPS[name]
    total = generated_flops(paper_model(name)).total / 1e9
    assert f"{total:.4f}" == products
    assert total == pytest.approx(table, rel=0.002)


def products_of_one_token(config: ModelConfig, context: int) -> dict[str, int]:
    """The model's matrix products, one after the other, as (rows, inner, columns)."""
    width, router, found = config.width, config.router.size, {}

    def multiply(component: str, rows: int, inner: int, columns: int) -> None:
        found[component] = found.get(component, 0) + 2 * rows * inner * columns

    def route(component: str, experts: int) -> None:
        multiply(component, 1, width, router)
        multiply(component, 1, router, experts)

    def attend(name: str, keys: int) -> None:
        heads = getattr(config, name)
        if config.depth_recurrent:
            route("attention_routers", config.linear_experts)
        multiply(f"{name}_projections", 1, width, (heads.query_heads + 2 * heads.kv_heads) * heads.head_size)
        for _ in range(heads.query_heads):
            multiply(f"{name}_attention", 1, heads.head_size, keys)
            multiply(f"{name}_attention", 1, keys, heads.head_size)
        multiply(f"{name}_projections", 1, heads.query_heads * heads.head_size, width)

    depths = {name: config.depths_of(name) for name in config.dimensions}
    for depth in range(config.depth):
        if depth in depths["sa"]:
            attend("sa", context)
        if depth in depths.get("da", ()):
            attend("da", 1 + sum(earlier < depth for earlier in depths["da"]))
        if depth in depths["ea"]:
            route("ea_router", config.ea.experts)
            for _ in range(config.ea.active_experts):
                multiply("ea_experts", 1, width, 2 * config.ea.expert_width)
                multiply("ea_experts", 1, config.ea.expert_width, width)
    multiply("lm_head", 1, width, config.vocab)
    return found


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize(
    "mixture", [("sa", "ea"), ("da+sa", "ea"), ("da[::2]", "sa[1:]", "ea"), ("sa+da", "ea[-2:]"), ("ea[:1]+sa",)]
)
def test_components_equal_the_list_of_products(recurrent: bool, mixture: tuple[str, ...]) -> None:
    config = dataclasses.replace(SMALL, depth_recurrent=recurrent, mixture=mixture)
    count = forward_flops(config, 9.0)
    expected = products_of_one_token(config, 9)
    assert count.by_component() == expected
    assert count.total == sum(expected.values())


def test_a_window_limits_the_depths_that_are_attended_to() -> None:
    """Depths 0 .. 4 reach 1, 2, 2, 2, 2 depths with a window of two, and 1, 1, 2, 2, 3 with a dilation of two."""
    deep = changed(SMALL, depth=5)
    per_depth = 2 * 2 * 3 * 8
    for keys, reached in (({"window": 2}, 9), ({"dilation": 2}, 9), ({}, 15)):
        flops = forward_flops(changed(deep, da=keys), 1.0).by_component()
        assert flops["da_attention"] == per_depth * reached


def test_a_generation_averages_over_its_growing_context() -> None:
    assert mean_context(1024) == 512.5
    tokens = [forward_flops(SMALL, float(context)).total for context in range(1, 65)]
    assert generated_flops(SMALL, 64).total == pytest.approx(sum(tokens) / 64)


def test_training_costs_three_forward_passes_of_a_causal_row() -> None:
    row = sum(forward_flops(SMALL, float(context)).total for context in range(1, 513))
    assert training_flops(SMALL, 512).total == pytest.approx(3 * row / 512)


def test_only_routed_attention_has_a_score_gradient() -> None:
    forward = forward_flops(SMALL, 1.0)
    components = forward.by_component()
    assert score_gradient_flops(SMALL) == components["sa_projections"] + components["da_projections"]
    assert score_gradient_flops(dataclasses.replace(SMALL, depth_recurrent=False)) == 0
    half = dataclasses.replace(SMALL, mixture=("sa[:1]", "ea"))
    assert score_gradient_flops(half) == components["sa_projections"] / 3


def xla_flops(f, *arguments) -> float:
    return jax.jit(f).lower(*arguments).compile().cost_analysis()["flops"]


def test_dense_parts_cost_what_xla_counts() -> None:
    """A classic layer with all experts active: projections, attention, experts and LM head, each on its own."""
    config = ModelConfig(
        depth_recurrent=False,
        mixture=("sa", "ea"),
        depth=1,
        width=512,
        vocab=900,
        sa=SequenceAttentionConfig(query_heads=4, kv_heads=2, head_size=256),
        router=RouterConfig(size=256),
        ea=ExpertAttentionConfig(experts=3, active_experts=3, expert_width=384),
    )
    tokens, compute = 256, Compute(kernels="reference")
    kernels = Kernels(compute.implementation)
    model = Dreamer(config, nnx.Rngs(0))
    layer = nnx.merge(*jax.tree.map(lambda a: a[0], nnx.split(model.layer)))
    x, row = jnp.ones((1, tokens, 512)), jnp.ones((1, tokens), jnp.int32)
    rotation = layer.sa.before_depths(jnp.arange(tokens, dtype=jnp.int32)[None])

    def qkv(x):
        return layer.sa.projections.qkv(x, rotation, None, kernels)

    def router_logits(x):
        router = layer.ea.router(x[0], row[0] > 0, 3, jnp.int32(0), 1, kernels, with_logits=True)
        return router.logits

    def experts(x):
        weights = layer.ea.w_gate_up[...], layer.ea.w_down[...]
        return kernels.sorted_swiglu(x[0], jnp.ones((tokens, 1)), *weights, jnp.asarray([tokens, 0, 0], jnp.int32))

    q, k, v = qkv(x)
    found = {
        "sa_projections": xla_flops(qkv, x) + xla_flops(lambda o: layer.sa.projections.out(o, None, kernels), q),
        "sa_attention": xla_flops(lambda *heads: kernels.attend_sequence(*heads, row), q, k, v),
        # The reference form sends every row through every expert.
        "ea_experts": xla_flops(experts, x),
        "ea_router": xla_flops(router_logits, x),
        "lm_head": xla_flops(lambda x: model.logits(x, compute), x),
    }
    expected = forward_flops(config, float(tokens)).by_component()
    for name, flops in found.items():
        assert flops / tokens == pytest.approx(expected[name], rel=0.01), name
