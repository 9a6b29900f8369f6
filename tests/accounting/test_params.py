"""Parameter counts, against Table 1 (exact, and rounded as printed) and against the instantiated model."""

import dataclasses
import random
from pathlib import Path

import jax
import pytest
from flax import nnx

from dreamer_jax.accounting.params import active_parameters, parameters
from dreamer_jax.config import ModelConfig, load
from dreamer_jax.model.dreamer import Dreamer

CONFIGS = Path(__file__).parents[2] / "configs"
EXACT = {
    "la_1b": 1_170_842_624,
    "dr_1b": 1_170_422_144,
    "dr_da_1b": 1_170_846_080,
    "la_2b": 2_079_015_936,
    "dr_2b": 2_079_360_640,
    "dr_da_2b": 2_078_767_488,
}
TABLE_1_BILLIONS = {
    "la_1b": "1.1708",
    "dr_1b": "1.1704",
    "dr_da_1b": "1.1708",
    "la_2b": "2.0790",
    "dr_2b": "2.0794",
    "dr_da_2b": "2.0788",
}


def paper_model(name: str) -> ModelConfig:
    return load(CONFIGS / f"{name}.py").model


@pytest.mark.parametrize("name", EXACT)
def test_paper_configs_have_the_papers_parameters(name: str) -> None:
    total = parameters(paper_model(name)).total
    assert total == EXACT[name]
    assert f"{total / 1e9:.4f}" == TABLE_1_BILLIONS[name]


def random_model(seed: int) -> ModelConfig:
    """A small model of any variant, with sizes that differ from each other so that none can stand in for another."""
    draw = random.Random(seed)
    kv_heads, da_kv_heads, experts = draw.randint(1, 3), draw.randint(1, 2), draw.randint(3, 9)
    return ModelConfig(
        depth_recurrent=bool(seed & 1),
        depth_attention=bool(seed & 2),
        mixture=draw.choice(["sequential", "attention_parallel", "parallel"]),
        depth=draw.randint(1, 5),
        width=draw.randrange(10, 40),
        vocab=draw.randrange(50, 99),
        query_heads=kv_heads * draw.randint(1, 3),
        kv_heads=kv_heads,
        head_size=2 * draw.randint(1, 6),
        da_heads=da_kv_heads * draw.randint(1, 3),
        da_kv_heads=da_kv_heads,
        da_head_size=4 * draw.randint(1, 4),
        router_size=4 * draw.randint(1, 4),
        experts=experts,
        active_experts=draw.randint(1, experts),
        expert_width=draw.randint(1, 20),
        attention_experts=draw.randint(0, 6),
    )


def instantiated(config: ModelConfig) -> dict[str, int]:
    """Sizes of the model's trained weights by path."""
    model = nnx.eval_shape(lambda: Dreamer(config, nnx.Rngs(0)))
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(model, nnx.Param))
    return {jax.tree_util.keystr(path): leaf.size for path, leaf in leaves}


@pytest.mark.parametrize("seed", range(12))
def test_counts_equal_the_instantiated_model(seed: int) -> None:
    config = random_model(seed)
    sizes = instantiated(config)

    def having(*words: str) -> int:
        return sum(size for path, size in sizes.items() if all(word in path for word in words))

    count = parameters(config)
    assert count.total == sum(sizes.values())
    assert count.norms == having("norm")
    assert count.shared_experts == having("_shared")
    assert count.embeddings == having("embed") + having("lm_head")
    assert count.ea_router == having("'ea'", "'w_q'") + having("'ea'", "'keys'")
    assert count.attention_routers == having("projections", "'w_q'") + having("projections", "'keys'")
    assert count.da_projections + having("'da'", "_shared") == having("'da'", "'w_qkv") + having("'da'", "'w_o")


def test_components_add_up_to_the_total() -> None:
    count = parameters(paper_model("dr_da_1b"))
    components = count.by_component()
    assert sum(components.values()) == count.total
    assert list(components)[:2] == ["embedding", "lm_head"]
    assert count.embeddings == 2 * 128_256 * 1024


def test_every_weight_of_a_dense_classic_model_is_active() -> None:
    config = random_model(2)
    dense = dataclasses.replace(config, active_experts=config.experts)
    stored, active = parameters(dense).by_component(), active_parameters(dense).by_component()
    assert stored.pop("embedding") == dense.vocab * dense.width
    assert active.pop("embedding") == dense.width
    assert active == stored


def test_of_the_experts_only_the_selected_are_active() -> None:
    config = dataclasses.replace(random_model(3), depth=4, experts=9, active_experts=2)
    assert active_parameters(config).ea_experts == 4 * 2 * 3 * config.width * config.expert_width


def test_active_weights_of_recurrence_count_once_for_each_depth() -> None:
    model = dataclasses.replace(random_model(3), attention_experts=5)
    one, four = (active_parameters(dataclasses.replace(model, depth=depth)) for depth in (1, 4))
    for component, size in one.by_component().items():
        times = 1 if component in ("embedding", "lm_head") else 4
        assert four.by_component()[component] == times * size, component
    assert four.shared_experts == 0
