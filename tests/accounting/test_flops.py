"""FLOPs per token against Table 1, against a list of matrix products, and against XLA's count."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dreamer_jax.accounting.flops import (
    forward_flops,
    generated_flops,
    mean_context,
    score_gradient_flops,
    training_flops,
)
from dreamer_jax.config import ModelConfig, load
from dreamer_jax.model.attend import attend_sequence
from dreamer_jax.model.dreamer import Compute, Dreamer
from dreamer_jax.model.grouped_matmul import grouped_swiglu
from dreamer_jax.model.rope import sequence_rotation

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
    depth=3, width=10, vocab=50, query_heads=6, kv_heads=2, head_size=4, da_heads=3, da_kv_heads=1, da_head_size=8,
    router_size=12, experts=7, active_experts=2, expert_width=5, attention_experts=4,
)  # fmt: skip


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
    c, found = config, {}

    def multiply(component: str, rows: int, inner: int, columns: int) -> None:
        found[component] = found.get(component, 0) + 2 * rows * inner * columns

    for depth in range(1, c.depth + 1):
        kinds = {"sa": (c.query_heads, c.kv_heads, c.head_size, context)}
        if c.depth_attention:
            kinds["da"] = (c.da_heads, c.da_kv_heads, c.da_head_size, depth)
        for kind, (heads, kv_heads, size, keys) in kinds.items():
            if c.depth_recurrent:
                multiply("attention_routers", 1, c.width, c.router_size)
                multiply("attention_routers", 1, c.router_size, c.linear_experts)
            multiply(f"{kind}_projections", 1, c.width, (heads + 2 * kv_heads) * size)
            for _ in range(heads):
                multiply(f"{kind}_attention", 1, size, keys)
                multiply(f"{kind}_attention", 1, keys, size)
            multiply(f"{kind}_projections", 1, heads * size, c.width)
        multiply("ea_router", 1, c.width, c.router_size)
        multiply("ea_router", 1, c.router_size, c.experts)
        for _ in range(c.active_experts):
            multiply("ea_experts", 1, c.width, 2 * c.expert_width)
            multiply("ea_experts", 1, c.expert_width, c.width)
    multiply("lm_head", 1, c.width, c.vocab)
    return found


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("depth_attention", [False, True])
def test_components_equal_the_list_of_products(recurrent: bool, depth_attention: bool) -> None:
    config = dataclasses.replace(SMALL, depth_recurrent=recurrent, depth_attention=depth_attention)
    count = forward_flops(config, 9.0)
    expected = products_of_one_token(config, 9)
    assert {name: flops for name, flops in count.by_component().items() if flops} == expected
    assert count.total == sum(expected.values())


def test_a_generation_averages_over_its_growing_context() -> None:
    assert mean_context(1024) == 512.5
    tokens = [forward_flops(SMALL, float(context)).total for context in range(1, 65)]
    assert generated_flops(SMALL, 64).total == pytest.approx(sum(tokens) / 64)


def test_training_costs_three_forward_passes_of_a_causal_row() -> None:
    row = sum(forward_flops(SMALL, float(context)).total for context in range(1, 513))
    assert training_flops(SMALL, 512).total == pytest.approx(3 * row / 512)


def test_only_routed_attention_has_a_score_gradient() -> None:
    forward = forward_flops(SMALL, 1.0)
    assert score_gradient_flops(SMALL) == forward.sa_projections + forward.da_projections
    assert score_gradient_flops(dataclasses.replace(SMALL, depth_recurrent=False)) == 0


def xla_flops(f, *arguments) -> float:
    return jax.jit(f).lower(*arguments).compile().cost_analysis()["flops"]


def test_dense_parts_cost_what_xla_counts() -> None:
    """A classic layer with all experts active: projections, attention, experts and LM head, each on its own."""
    config = ModelConfig(
        depth_recurrent=False, depth_attention=False, depth=1, width=512, vocab=900, query_heads=4, kv_heads=2,
        head_size=256, router_size=256, experts=3, active_experts=3, expert_width=384,
    )  # fmt: skip
    tokens, compute = 256, Compute(matmul="dense", attention="dense")
    model = Dreamer(config, nnx.Rngs(0))
    layer = nnx.merge(*jax.tree.map(lambda a: a[0], nnx.split(model.layer)))
    x = jnp.ones((1, tokens, 512))
    rotation = sequence_rotation(jnp.arange(tokens, dtype=jnp.int32)[None], config.head_size, config.rope_base)

    def qkv(x):
        return layer.sa.projections.qkv(x, rotation, None, "dense")

    q, k, v = qkv(x)
    row = jnp.ones((1, tokens), jnp.int32)
    expected = forward_flops(config, float(tokens)).by_component()

    def attend(q, k, v):
        return attend_sequence(q, k, v, row, backend="dense")

    def experts(x):
        chosen = jnp.ones((tokens * 3, 512))
        sizes = jnp.full((3,), tokens, jnp.int32)
        weights = layer.ea.w_gate_up[...], layer.ea.w_down[...]
        return grouped_swiglu(chosen, jnp.ones((tokens * 3, 1)), *weights, sizes, backend="dense")

    found = {
        "sa_projections": xla_flops(qkv, x) + xla_flops(lambda o: layer.sa.projections.out(o, None, "dense"), q),
        "sa_attention": xla_flops(attend, q, k, v),
        # The reference form sends every row through every expert.
        "ea_experts": xla_flops(experts, x) / 3,
        "ea_router": xla_flops(lambda x: layer.ea.router.logits(x[0], jnp.int32(0)), x),
        "lm_head": xla_flops(lambda x: model.logits(x, compute), x),
    }
    for name, flops in found.items():
        assert flops / tokens == pytest.approx(expected[name], rel=0.01), name
