"""Parameter counts, against Table 1 (exact, and rounded as printed) and against the instantiated model."""

import random
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from flax import nnx

from dreamer_jax.accounting.params import active_parameters, parameters
from dreamer_jax.config import (
    DepthAttentionConfig,
    ExpertAttentionConfig,
    LatentAttentionConfig,
    ModelConfig,
    ParameterAttentionConfig,
    RouterConfig,
    SequenceAttentionConfig,
    load,
)
from dreamer_jax.model.dreamer import Dreamer
from tests.models import changed

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
    mixture = draw.choice([("da", "sa", "ea"), ("da+sa", "ea"), ("da+sa+ea",), ("ea", "sa+da[::2]")])
    return ModelConfig(
        depth_recurrent=bool(seed & 1),
        mixture=mixture if seed & 2 else ("sa", "ea[-2:]"),
        depth=draw.randint(1, 5),
        width=draw.randrange(10, 40),
        vocab=draw.randrange(50, 99),
        sa=SequenceAttentionConfig(
            query_heads=kv_heads * draw.randint(1, 3), kv_heads=kv_heads, head_size=2 * draw.randint(1, 6)
        ),
        da=DepthAttentionConfig(
            query_heads=da_kv_heads * draw.randint(1, 3), kv_heads=da_kv_heads, head_size=4 * draw.randint(1, 4)
        ),
        router=RouterConfig(size=4 * draw.randint(1, 4), attention_experts=draw.randint(0, 6)),
        ea=ExpertAttentionConfig(
            experts=experts, active_experts=draw.randint(1, experts), expert_width=draw.randint(1, 20)
        ),
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
    expected = {
        "embedding": having("embed"),
        "lm_head": having("lm_head"),
        "norms": having("norm"),
        "shared_experts": having("_shared"),
        "ea_experts": having("'ea'", "w_gate") + having("'ea'", "w_down"),
        "ea_router": having("'ea'", "'w_q'") + having("'ea'", "'keys'"),
        "attention_routers": having("projections", "'w_q'") + having("projections", "'keys'"),
    }
    for name in ("sa", "da"):
        projections = having(f"'{name}'", "'w_qkv") + having(f"'{name}'", "'w_o")
        expected[f"{name}_projections"] = projections - having(f"'{name}'", "_shared")
    assert count.by_component() == {name: size for name, size in expected.items() if size}
    assert count.total == sum(sizes.values())


EVERYTHING = changed(
    random_model(3),
    mixture=("latent+sa", "da+parameter[1:]", "ea"),
    depth=4,
    latent=LatentAttentionConfig(latents=9, query_heads=4, kv_heads=2, head_size=12),
    parameter=ParameterAttentionConfig(pairs=21),
)


@pytest.mark.parametrize("recurrent", [False, True])
def test_other_dimensions_are_counted_too(recurrent: bool) -> None:
    config = changed(EVERYTHING, depth_recurrent=recurrent)
    count = parameters(config).by_component()
    assert sum(count.values()) == sum(instantiated(config).values())
    assert count["parameter_pairs"] == (1 if recurrent else 3) * 2 * 21 * config.width


# D 6, depth 4, vocab 10; SA: 2 query heads, 1 key/value head of size 4; EA: 5 experts of width 3, 2 of them active;
# routers of size 4. EA runs at depths 0 and 2.
COUNTED = ModelConfig(
    mixture=("sa", "ea[::2]"),
    depth=4,
    width=6,
    vocab=10,
    sa=SequenceAttentionConfig(query_heads=2, kv_heads=1, head_size=4),
    ea=ExpertAttentionConfig(experts=5, active_experts=2, expert_width=3),
    router=RouterConfig(size=4, attention_experts=3),
)
QKV_AND_OUT, EXPERT, EA_ROUTER, SA_ROUTER = 6 * 16 + 8 * 6, 3 * 6 * 3, 6 * 4 + 5 * 4, 6 * 4 + 3 * 4
SA_NORMS, EA_NORMS, ROUTER_NORMS = 6 + 2 * 4, 6 + 2 * 4, 2 * 4


def test_layers_store_only_the_dimensions_that_run_there() -> None:
    """Counted by hand: SA in four layers, EA in two."""
    assert parameters(changed(COUNTED, depth_recurrent=False)).by_component() == {
        "embedding": 60,
        "lm_head": 60,
        "sa_projections": 4 * QKV_AND_OUT,
        "ea_router": 2 * EA_ROUTER,
        "ea_experts": 2 * 5 * EXPERT,
        "norms": 6 + 4 * SA_NORMS + 2 * EA_NORMS,
    }


def test_recurrence_stores_one_layer_wherever_its_dimensions_run() -> None:
    """Counted by hand."""
    assert parameters(COUNTED).by_component() == {
        "embedding": 60,
        "lm_head": 60,
        "sa_projections": 3 * QKV_AND_OUT,
        "attention_routers": SA_ROUTER,
        "shared_experts": QKV_AND_OUT,
        "ea_router": EA_ROUTER,
        "ea_experts": 5 * EXPERT,
        "norms": 6 + SA_NORMS + ROUTER_NORMS + EA_NORMS,
    }


def test_active_weights_are_counted_at_the_depths_that_use_them() -> None:
    """Counted by hand: the token's row of the embedding, one of three attention experts, two of five of EA's."""
    assert active_parameters(COUNTED).by_component() == {
        "embedding": 6,
        "lm_head": 60,
        "sa_projections": 4 * QKV_AND_OUT,
        "attention_routers": 4 * SA_ROUTER,
        "shared_experts": 0,
        "ea_router": 2 * EA_ROUTER,
        "ea_experts": 2 * 2 * EXPERT,
        "norms": 4 * 6 + 4 * (SA_NORMS + ROUTER_NORMS) + 2 * EA_NORMS,
    }


def test_components_add_up_to_the_total() -> None:
    count = parameters(paper_model("dr_da_1b"))
    components = count.by_component()
    assert sum(components.values()) == count.total
    assert list(components)[:2] == ["embedding", "lm_head"]
    assert components["embedding"] == components["lm_head"] == 128_256 * 1024


def test_every_weight_of_a_dense_classic_model_is_active() -> None:
    config = random_model(2)
    dense = changed(config, ea={"active_experts": config.ea.experts})
    stored, active = parameters(dense).by_component(), active_parameters(dense).by_component()
    assert stored.pop("embedding") == dense.vocab * dense.width
    assert active.pop("embedding") == dense.width
    assert active == stored


def test_of_the_experts_only_the_selected_are_active() -> None:
    config = changed(random_model(3), mixture=("da+sa", "ea"), depth=4, ea={"experts": 9, "active_experts": 2})
    active = active_parameters(config).by_component()
    assert active["ea_experts"] == 4 * 2 * 3 * config.width * config.ea.expert_width


def test_active_weights_of_recurrence_count_once_for_each_depth() -> None:
    model = changed(random_model(3), mixture=("da+sa", "ea"), router={"attention_experts": 5})
    one, four = (active_parameters(changed(model, depth=depth)).by_component() for depth in (1, 4))
    for component, size in one.items():
        times = 1 if component in ("embedding", "lm_head") else 4
        assert four[component] == times * size, component
    assert four["shared_experts"] == 0


def test_counting_starts_no_jax() -> None:
    """A machine without accelerators' libraries can plan, and at once."""
    modules = ", ".join(f"dreamer_jax.accounting.{name}" for name in ("params", "flops", "memory", "match", "report"))
    code = f"import sys, {modules}, dreamer_jax.plan; print('jax' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
