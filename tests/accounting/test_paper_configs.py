"""The six paper configs: Table 3's recipe, and nothing but the architecture between matched ones."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from dreamer_jax.config import Config, from_json, load, to_json

CONFIGS = Path(__file__).parents[2] / "configs"
ARCHITECTURE = {
    # depth_recurrent, mixture, depth, F, E
    "la_1b": (False, ("sa", "ea"), 16, 512, 32),
    "dr_1b": (True, ("sa", "ea"), 16, 504, 517),
    "dr_da_1b": (True, ("da+sa", "ea"), 16, 480, 537),
    "la_2b": (False, ("sa", "ea"), 32, 512, 32),
    "dr_2b": (True, ("sa", "ea"), 32, 504, 1039),
    "dr_da_2b": (True, ("da+sa", "ea"), 32, 472, 1097),
}
KEYS = ("depth_recurrent", "mixture", "depth", "ea.expert_width", "ea.experts")


def paper_config(name: str) -> Config:
    return load(CONFIGS / f"{name}.py")


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


@pytest.mark.parametrize("name", ARCHITECTURE)
def test_architectures_are_those_of_table_3(name: str) -> None:
    config = paper_config(name)
    assert config.name == name
    found = flat(dataclasses.asdict(config.model))
    assert tuple(found[key] for key in KEYS) == ARCHITECTURE[name]


@pytest.mark.parametrize("name", ARCHITECTURE)
def test_matched_configs_differ_only_in_architecture(name: str) -> None:
    ours, baseline = (flat(dataclasses.asdict(paper_config(n))) for n in (name, "la_1b"))
    differing = {key for key in ours if ours[key] != baseline[key]}
    assert differing <= {"name", *(f"model.{key}" for key in KEYS)}


def test_the_recipe_is_that_of_table_3() -> None:
    config = paper_config("la_1b")
    expected = {
        "model.width": 1024,
        "model.vocab": 128_256,
        "model.sa.query_heads": 16,
        "model.sa.kv_heads": 8,
        "model.sa.head_size": 128,
        "model.sa.rope_base": 10_000,
        "model.da.query_heads": 1,
        "model.da.kv_heads": 1,
        "model.da.head_size": 128,
        "model.depth_rope_base": 500,
        "model.router.size": 128,
        "model.ea.active_experts": 8,
        "model.router.attention_experts": 0,
        "data.context": 4096,
        "optimizer.learning_rate": 4e-4,
        "optimizer.warmup_steps": 500,
        "optimizer.beta1": 0.9,
        "optimizer.beta2": 0.999,
        "optimizer.epsilon": 1e-8,
        "optimizer.weight_decay": 1e-3,
        "optimizer.gradient_clip": 0.5,
        "optimizer.expert_bias_rate": 1e-3,
        "optimizer.attention_bias_rate": 1e-2,
        "train.dtype": "bfloat16",
    }
    found = flat(dataclasses.asdict(config))
    assert {key: found[key] for key in expected} == expected
    assert config.tokens_per_step == 2**20
    # The first whole number of steps that reaches 100B tokens.
    assert (config.train.steps - 1) * 2**20 < 100e9 <= config.train.steps * 2**20


@pytest.mark.parametrize("name", ARCHITECTURE)
def test_configs_survive_their_json(name: str) -> None:
    assert from_json(to_json(paper_config(name))) == paper_config(name)
