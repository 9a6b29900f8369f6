"""Configs: sections of the model, the mixture as an expression, older files, JSON and the command line."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from dreamer_jax.config import (
    Config,
    ConfigError,
    DepthAttentionConfig,
    ExpertAttentionConfig,
    KernelConfig,
    ModelConfig,
    RouterConfig,
    SequenceAttentionConfig,
    from_dict,
    from_json,
    load,
    to_json,
)
from tests.models import SMALL, VARIANTS, changed, small

FLAT = {
    "depth_recurrent": False, "depth_attention": True, "mixture": "attention_parallel", "depth": 6, "width": 48,
    "vocab": 99, "query_heads": 6, "kv_heads": 3, "head_size": 10, "rope_base": 5e3, "da_heads": 4, "da_kv_heads": 2,
    "da_head_size": 12, "depth_rope_base": 300.0, "router_size": 20, "experts": 9, "active_experts": 3,
    "expert_width": 24, "attention_experts": 7, "norm_epsilon": 1e-5,
}  # fmt: skip
"""All keys that a model of version 0.1 had, none at its default."""
NESTED = ModelConfig(
    depth_recurrent=False,
    mixture=("da+sa", "ea"),
    depth=6,
    width=48,
    vocab=99,
    depth_rope_base=300.0,
    norm_epsilon=1e-5,
    sa=SequenceAttentionConfig(query_heads=6, kv_heads=3, head_size=10, rope_base=5e3),
    da=DepthAttentionConfig(query_heads=4, kv_heads=2, head_size=12),
    ea=ExpertAttentionConfig(experts=9, active_experts=3, expert_width=24),
    router=RouterConfig(size=20, attention_experts=7),
)
OLD_MIXTURES = {
    ("sequential", True): ("da", "sa", "ea"),
    ("attention_parallel", True): ("da+sa", "ea"),
    ("parallel", True): ("da+sa+ea",),
    ("sequential", False): ("sa", "ea"),
    ("attention_parallel", False): ("sa", "ea"),
    ("parallel", False): ("sa+ea",),
}


def written(folder: Path, model: ModelConfig = SMALL) -> Path:
    """A config file of this model."""
    path = folder / "config.py"
    text = to_json(Config(name="written", model=model))
    path.write_text(f"from dreamer_jax.config import from_json\ndef get_config():\n    return from_json({text!r})\n")
    return path


# Older files


def test_the_flat_keys_of_older_files_become_sections():
    assert from_dict(ModelConfig, FLAT) == NESTED
    assert from_json(json.dumps({"name": "old", "model": FLAT})).model == NESTED


@pytest.mark.parametrize(("old", "depth_attention"), OLD_MIXTURES)
def test_the_named_mixtures_of_older_files_become_expressions(old, depth_attention):
    model = from_dict(ModelConfig, FLAT | {"mixture": old, "depth_attention": depth_attention})
    assert model == changed(NESTED, mixture=OLD_MIXTURES[old, depth_attention])
    assert model.depth_attention == depth_attention


def test_keys_that_older_files_leave_out_have_their_defaults():
    assert from_dict(ModelConfig, {}) == from_dict(ModelConfig, {"depth_attention": True}) == ModelConfig()
    assert from_dict(ModelConfig, {"depth_attention": False}) == ModelConfig(mixture=("sa", "ea"))
    assert from_dict(ModelConfig, {"head_size": 32}) == ModelConfig(sa=SequenceAttentionConfig(head_size=32))


def test_the_two_choices_of_kernels_of_older_files_are_left_to_the_platform():
    old = {"name": "old", "kernels": {"attention": "splash", "grouped_matmul": "blocks", "expert_exchange": "auto"}}
    assert from_dict(Config, old).kernels == KernelConfig()


def test_a_mixture_that_there_never_was_is_refused():
    with pytest.raises(ConfigError, match=r"'serial': with model\.depth_attention, one of sequential"):
        from_dict(ModelConfig, FLAT | {"mixture": "serial"})


# The mixture


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_named_after_its_mixture(variant):
    model = small(variant)
    assert model.variant == variant
    assert model.depth_attention == ("DA" in variant)
    assert list(model.dimensions) == (["sa", "da", "ea"] if "DA" in variant else ["sa", "ea"])
    assert model.attention_dims == len(model.dimensions)


def test_dimensions_run_at_the_depths_of_their_slices():
    model = changed(SMALL, depth=6, mixture=("da[::2]+sa[:4]", "ea[-2:]"))
    assert [[name for name, _ in group] for group in model.groups] == [["da", "sa"], ["ea"]]
    assert [model.depths_of(name) for name in ("da", "sa", "ea")] == [(0, 2, 4), (0, 1, 2, 3), (4, 5)]
    assert [model.depths_of(name, 3) for name in ("da", "sa", "ea")] == [(0, 2), (0, 1, 2), (1, 2)]


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        (("daa+sa", "ea"), "unknown dimension 'daa'; did you mean 'da'"),
        (("xyz",), "unknown dimension 'xyz'; there are sa, da, ea"),
        (("da+sa", "sa+ea"), "has sa more than once"),
        ((), "is empty"),
        (("",), "'' is no dimension"),
        (("da+", "ea"), "'' is no dimension"),
        (
            ("da[2]", "ea"),
            r"'da\[2\]' is no dimension: give a name, or a name with a slice of depths, such as da\[::2\]",
        ),
        (("da[a:b]", "ea"), r"'da\[a:b\]' is no dimension"),
        (("da[::-1]", "ea"), r"'da\[::-1\]' is no dimension"),
        (("da[::0]", "ea"), "step of 0"),
        (("da[3:]", "ea"), "da runs at none of the 3 depths"),
        (("da[2:1]", "ea"), "da runs at none of the 3 depths"),
    ],
)
def test_a_mixture_that_means_nothing_is_refused_with_the_mend(mixture, message):
    with pytest.raises(ConfigError, match=rf"model\.mixture.*{message}"):
        changed(SMALL, mixture=mixture)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sa": {"query_heads": 5}}, r"model\.sa\.query_heads = 5 is not a multiple of model\.sa\.kv_heads = 2"),
        ({"sa": {"head_size": 7}}, r"model\.sa\.head_size = 7: RoPE needs an even size"),
        ({"da": {"head_size": 6}}, r"model\.da\.head_size = 6: .* use a multiple of 4"),
        ({"da": {"kv_heads": 0}}, r"model\.da\.kv_heads = 0: must be at least 1"),
        ({"router": {"size": 6}}, r"model\.router\.size = 6: .* use a multiple of 4"),
        ({"router": {"attention_experts": -1}}, r"model\.router\.attention_experts = -1"),
        ({"ea": {"active_experts": 8}}, r"model\.ea\.active_experts = 8 exceeds model\.ea\.experts = 7"),
        ({"ea": {"expert_width": 0}}, r"model\.ea\.expert_width = 0: must be at least 1"),
        ({"depth": 0}, r"model\.depth = 0: must be at least 1"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_its_section(keys, message):
    with pytest.raises(ConfigError, match=message):
        changed(SMALL, **keys)


# JSON


@pytest.mark.parametrize("model", [NESTED, changed(SMALL, mixture=("sa", "da[::2]", "ea[-1:]"))])
def test_a_config_survives_the_way_through_json(model):
    config = Config(name="same", model=model, kernels=KernelConfig(implementation="reference"))
    assert from_json(to_json(config)) == config
    assert from_dict(ModelConfig, asdict(model)) == model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"sa": {"query_haeds": 8}}, r"unknown key 'model\.sa\.query_haeds'; did you mean 'model\.sa\.query_heads'"),
        ({"routers": {}}, r"unknown key 'model\.routers'; did you mean 'model\.router'"),
        ({"router": 64}, r"model\.router: expected a section, found 64"),
        ({"sa": {"query_heads": "8"}}, r"model\.sa\.query_heads = '8': expected int, found str"),
        ({"mixture": [["da", "sa"], "ea"]}, r"model\.mixture\[0\] = .*: expected str, found list"),
    ],
)
def test_wrong_json_is_named_by_its_key(model, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(Config, {"name": "wrong", "model": model})


# The command line


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        ("--model.sa.query-heads 8", {"sa": {"query_heads": 8}}),
        ("--model.ea.experts 12 --model.ea.active-experts 3", {"ea": {"experts": 12, "active_experts": 3}}),
        ("--model.router.size 16 --model.depth 5", {"router": {"size": 16}, "depth": 5}),
        ("--model.mixture da sa ea", {"mixture": ("da", "sa", "ea")}),
        ("--model.mixture da[::2]+sa ea", {"mixture": ("da[::2]+sa", "ea")}),
        ("--model.mixture da+sa[:-1] ea[-2:] --model.depth 5", {"mixture": ("da+sa[:-1]", "ea[-2:]"), "depth": 5}),
        ("--model.sa.query-heads 6 --model.sa.kv-heads 3", {"sa": {"query_heads": 6, "kv_heads": 3}}),
        (
            "--model.no-depth-recurrent --model.depth-rope-scaling",
            {"depth_recurrent": False, "depth_rope_scaling": True},
        ),
    ],
)
def test_the_command_line_overrides_single_keys_of_sections(overrides, keys, tmp_path):
    assert load(written(tmp_path), overrides.split()).model == changed(SMALL, **keys)


def test_the_command_line_chooses_kernels(tmp_path):
    config = load(written(tmp_path), ["--kernels.implementation", "plain"])
    assert config.kernels == KernelConfig(implementation="plain")


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ("--model.sa.query-haeds 8", "--model.sa.query-heads"),
        ("--model.sa.query-heads many", "query-heads"),
        ("--model.mixture da+saa ea", "unknown dimension 'saa'; did you mean 'sa'"),
        ("--model.mixture da[9:]+sa ea", "da runs at none of the 3 depths"),
        ("--model.ea.active-experts 8", "model.ea.active_experts = 8 exceeds model.ea.experts = 7"),
        ("--kernels.implementation fastest", "native"),
    ],
)
def test_a_wrong_override_ends_with_what_would_be_right(overrides, wanted, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        load(written(tmp_path), overrides.split())
    assert ended.value.code != 0
    assert wanted in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_help_names_the_keys_of_all_sections(tmp_path, capsys):
    with pytest.raises(SystemExit):
        load(written(tmp_path), ["--help"])
    said = capsys.readouterr().out
    for key in ("sa.query-heads", "sa.rope-base", "da.head-size", "ea.experts", "router.size", "mixture"):
        assert f"--model.{key}" in said
