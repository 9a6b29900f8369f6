"""Configs: sections of the model, the mixture as an expression, older files, JSON."""

import json
import re
from dataclasses import asdict

import pytest

from dreamer_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    DepthAttentionConfig,
    ExpertAttentionConfig,
    KernelConfig,
    ModelConfig,
    RouterConfig,
    SequenceAttentionConfig,
    Source,
    from_json,
    model_from_dict,
    to_json,
)
from dreamer_jax.data.template import DEFAULT_TEMPLATE, Template
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


# Older files


def test_the_flat_keys_of_older_files_become_sections():
    assert model_from_dict(FLAT) == NESTED
    assert from_json(json.dumps({"name": "old", "model": FLAT})).model == NESTED
    assert ModelConfig(**FLAT) == NESTED


def test_flat_keys_of_older_python_files_change_the_sections_beside_them():
    model = ModelConfig(da=DepthAttentionConfig(window=3), da_heads=2, experts=9)
    assert model == ModelConfig(da=DepthAttentionConfig(window=3, query_heads=2), ea=ExpertAttentionConfig(experts=9))


@pytest.mark.parametrize(("old", "depth_attention"), OLD_MIXTURES)
def test_the_named_mixtures_of_older_files_become_expressions(old, depth_attention):
    keys = FLAT | {"mixture": old, "depth_attention": depth_attention}
    model = model_from_dict(keys)
    assert model == ModelConfig(**keys) == changed(NESTED, mixture=OLD_MIXTURES[old, depth_attention])
    assert model.depth_attention == depth_attention


def test_keys_that_older_files_leave_out_have_their_defaults():
    assert model_from_dict({}) == model_from_dict({"depth_attention": True}) == ModelConfig()
    assert model_from_dict({"depth_attention": False}) == ModelConfig(mixture=("sa", "ea"))
    assert model_from_dict({"head_size": 32}) == ModelConfig(sa=SequenceAttentionConfig(head_size=32))


def test_documents_of_older_configs_have_the_usual_layout():
    assert Template.of(from_json(json.dumps({"name": "old", "data": {}})).data) == DEFAULT_TEMPLATE


def test_the_two_choices_of_kernels_of_older_files_are_left_to_the_platform():
    old = {"name": "old", "kernels": {"attention": "splash", "grouped_matmul": "blocks", "expert_exchange": "auto"}}
    assert from_json(json.dumps(old)).kernels == KernelConfig() == KernelConfig(**old["kernels"])


def test_a_mixture_that_there_never_was_is_refused():
    with pytest.raises(ConfigError, match=r"'serial': with model\.depth_attention, one of sequential"):
        model_from_dict(FLAT | {"mixture": "serial"})
    with pytest.raises(ConfigError, match=r"model\.depth_attention = 1: must be True or False"):
        ModelConfig(depth_attention=1)


def test_the_cache_of_older_files_is_where_data_are_prepared():
    assert DataConfig(cache="/fast") == DataConfig(prepared="/fast")
    assert from_json('{"name": "old", "data": {"cache": "/fast"}}').data == DataConfig(prepared="/fast")


def sources_of(**data):
    """The sources' `remove` of a stored config with these keys of data."""
    config = from_json(json.dumps({"name": "old", "data": data}))
    return [source.remove for source in config.data.sources]


def test_older_configs_took_the_marks_of_a_calculator_out_of_all_files():
    files, tasks = {"name": "a", "train": ["a.jsonl"]}, {"name": "b", "tasks": ["lcm"], "documents_per_task": 2}
    assert sources_of(sources=[files, tasks]) == [r"<<[^<>]*>>", ""]
    assert sources_of(sources=[files, tasks], calculator_marks="drop") == [r"<<[^<>]*>>", ""]
    assert sources_of(sources=[files, tasks], calculator_marks="keep") == ["", ""]
    assert sources_of(sources=[files, tasks | {"remove": "x"}]) == ["", "x"]  # a config of today
    assert sources_of() == sources_of(calculator_marks="keep") == []
    with pytest.raises(ConfigError, match=r"data\.calculator_marks = 'burn': must be one of 'drop', 'keep'"):
        sources_of(calculator_marks="burn")


def test_older_python_files_say_so_if_marks_are_to_be_taken_out():
    source = Source("a", train=("a.jsonl",))
    assert DataConfig(sources=(source,)).sources == (source,)
    assert DataConfig(sources=(source,), calculator_marks="keep").sources == (source,)
    assert DataConfig(sources=(source,), calculator_marks="drop").sources[0].remove == r"<<[^<>]*>>"


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
        (("da[-:]", "ea"), r"'da\[-:\]' is no dimension"),
        ((f"da[{'9' * 5000}:]", "ea"), "is no dimension"),
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
        ({"sa": {"head_size": 7}}, r"model\.sa\.head_size = 7: .*, a multiple of 2"),
        ({"da": {"head_size": 6}}, r"model\.da\.head_size = 6: .*, a multiple of 4"),
        ({"da": {"kv_heads": 0}}, r"model\.da\.kv_heads = 0: must be a whole number from 1"),
        ({"latent": {"kv_heads": 3}}, r"model\.latent\.query_heads = 4 is no multiple of model\.latent\.kv_heads = 3"),
        ({"da": {"form": "linear", "window": 2}}, r"model\.da\.form = 'linear'"),
        ({"latent": {"embedding_size": 2}}, r"model\.latent\.embeddings .* go together"),
        ({"router": {"size": 6}}, r"model\.router\.size = 6: .*, a multiple of 4"),
        ({"router": {"attention_experts": -1}}, r"model\.router\.attention_experts = -1"),
        ({"ea": {"active_experts": 8}}, r"model\.ea\.active_experts = 8 exceeds model\.ea\.experts = 7"),
        ({"ea": {"expert_width": 0}}, r"model\.ea\.expert_width = 0: must be a whole number from 1"),
        ({"depth": 0}, r"model\.depth = 0: must be a whole number from 1 to 4096"),
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
    assert model_from_dict(asdict(model)) == model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"sa": {"query_haeds": 8}}, r"unknown key 'model\.sa\.query_haeds'; did you mean 'model\.sa\.query_heads'"),
        ({"routers": {}}, r"unknown key 'model\.routers'; did you mean 'model\.router'"),
        ({"router": 64}, r"model\.router = 64: must be a section"),
        ({"router": 64, "router_size": 8}, r"model\.router = 64: must be a section"),
        ({"sa": {"query_heads": "8"}}, r"model\.sa\.query_heads = '8': must be a whole number .* \(write 8\)"),
        ({"mixture": [["da", "sa"], "ea"]}, r"model\.mixture\[0\] = \['da', 'sa'\]: must be text"),
        ({"mixture": "da+sa"}, r"model\.mixture = 'da\+sa': must be a list.*\(write \('da\+sa',\)\)"),
    ],
)
def test_wrong_json_is_named_by_its_key(model, message):
    with pytest.raises(ConfigError, match=message):
        from_json(json.dumps({"name": "wrong", "model": model}))
    with pytest.raises(ConfigError, match=message):
        model_from_dict(model)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "config: not JSON: Expecting value: line 1"),
        ('{"name": ', "config: not JSON"),
        ("[]", "config = []: must be a section"),
        ("null", "config = None: must be a section"),
        ("{}", "missing key 'name': give a folder name"),
        ('{"name": "a", "name": "b"}', "config: key 'name' stands twice"),
        ('{"name": "a", "train": {"steps": 1, "steps": 2}}', "config: key 'steps' stands twice"),
        ('{"name": "a", "train": {"steps": NaN}}', "train.steps = nan: must be a whole number"),
        ('{"name": "a", "optimizer": {"beta1": -Infinity}}', "optimizer.beta1 = -inf: must be a finite number"),
        ('{"name": "a", "train": {"steps": 1e3}}', "train.steps = 1000.0: must be a whole number"),
        ('{"name": "a", "train": {"steps": %s}}' % ("9" * 5000), "config: not JSON"),
        ('{"name": "a\\ud800"}', "config: Invalid JSON"),
        ("[" * 100_000, "config: nests too deep"),
        ('{"name": %s}' % ("[" * 400 + "]" * 400), "recursion limit"),
        (b'{"name": "\xff"}', "config: not UTF-8 text (byte 10)"),
        (b"\x80\x04\x95", "config: not UTF-8 text (byte 0)"),
    ],
)
def test_text_that_is_no_config_is_refused_in_a_line(text, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        from_json(text)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_before_json_is_left_out():
    assert from_json(b'\xef\xbb\xbf{"name": "x"}') == from_json('\ufeff{"name": "x"}') == Config(name="x")


def test_all_faults_of_a_text_are_named_a_line_each():
    text = '{"name": "x", "train": {"steps": 0, "sead": 1}, "data": {"sources": [{"name": "a", "weight": -1}]}}'
    with pytest.raises(ConfigError) as caught:
        from_json(text)
    starts = (
        "data.sources[0].weight = -1:",
        "train.steps = 0:",
        "unknown key 'train.sead'; did you mean 'train.seed'?",
    )
    lines = str(caught.value).splitlines()
    assert len(lines) == len(starts)
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))
