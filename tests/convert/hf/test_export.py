"""The exported folder: what is in it, and when there is none. Needs no PyTorch."""

import json

import numpy as np
import pytest
from safetensors import safe_open

from dreamer_jax import convert
from dreamer_jax.config import Config, DataConfig, Source
from dreamer_jax.convert.hf import ExportError, export_hf
from dreamer_jax.convert.hf.card import model_card
from dreamer_jax.convert.hf.export import config_fields
from dreamer_jax.data.tokenizer import train_sentencepiece
from tests import oracle
from tests.convert.hf.exports import exported, float32
from tests.models import VARIANTS, changed, sizes_of, small


def example(variant="DR+DA"):
    """A config and arrays by exchange names."""
    config = Config(name="example", model=small(variant), data=DataConfig(context=77))
    return config, float32(oracle.random_weights(sizes_of(config.model), seed=1))


def tensors_in(file):
    """The tensors of a safetensors file, as its own library reads them."""
    with safe_open(file, "numpy") as opened:
        return {name: opened.get_tensor(name) for name in list(opened.keys())}


def expected_tensors(arrays):
    """A few of the tensors, turned by hand."""
    gate_up = np.concatenate([arrays["layer.ea.w_gate"], arrays["layer.ea.w_up"]], -1).swapaxes(1, 2)
    return {
        "model.embed_tokens.weight": arrays["embed"],
        "lm_head.weight": arrays["lm_head"].T,
        "model.norm.weight": arrays["residual_norm"],
        "model.layers.0.sa.qkv_proj.weight": arrays["layer.sa.w_qkv"].swapaxes(1, 2),
        "model.layers.0.da.o_proj.shared": arrays["layer.da.w_o_shared"].T,
        "model.layers.0.ea.router.keys": arrays["layer.ea.router.keys"],
        "model.layers.0.ea.router.w_q": arrays["layer.ea.router.w_q"].T,
        "model.layers.0.ea.experts.gate_up_proj": gate_up,
        "model.layers.0.ea.experts.down_proj": arrays["layer.ea.w_down"].swapaxes(1, 2),
    }


def test_the_tensors_are_the_arrays_in_transformers_layout(tmp_path):
    config, arrays = example()
    said = []
    numbers = export_hf(config, arrays, None, tmp_path / "out", merged=False, wrote=said.append)
    found = tensors_in(tmp_path / "out" / "model.safetensors")
    for name, expected in expected_tensors(arrays).items():
        np.testing.assert_array_equal(found[name], expected, err_msg=name)
    assert numbers == sum(array.size for array in found.values()) == sum(array.size for array in arrays.values())
    assert sum(said) == 4 * numbers


def test_large_weights_are_split_into_files_with_an_index(tmp_path):
    config, arrays = example()
    export_hf(config, arrays, None, tmp_path / "one", merged=False)
    export_hf(config, arrays, None, tmp_path / "many", merged=False, shard=20_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    whole = tensors_in(tmp_path / "one" / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in whole.values())
    parts = {file: tensors_in(tmp_path / "many" / file) for file in files}
    assert {name: file for file in files for name in parts[file]} == index["weight_map"]
    for name, array in whole.items():
        np.testing.assert_array_equal(parts[index["weight_map"][name]][name], array)
    assert all(len(part) == 1 or sum(array.nbytes for array in part.values()) <= 20_000 for part in parts.values())


def test_in_bfloat16_the_biases_are_float32(tmp_path):
    config, arrays = example()
    export_hf(config, arrays, None, tmp_path / "out", merged=False, dtype="bfloat16")
    with safe_open(tmp_path / "out" / "model.safetensors", "numpy") as opened:
        kinds = {name: opened.get_slice(name).get_dtype() for name in list(opened.keys())}
    assert {name for name, kind in kinds.items() if kind == "F32"} == {n for n in kinds if n.endswith("router.bias")}
    assert set(kinds.values()) == {"F32", "BF16"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_weights_have_no_shared_experts(variant):
    export = exported(variant, merged="DR" in variant)
    assert json.loads((export.folder / "config.json").read_text())["merged"] == ("DR" in variant)
    assert not any(name.endswith("shared") for name in tensors_in(export.folder / "model.safetensors"))


def test_the_folder_holds_what_transformers_looks_for(tmp_path):
    config, arrays = example()
    (tmp_path / "spm.model").write_bytes(train_sentencepiece(["What is 12 plus 30? It is 42."] * 4, 300))
    out = tmp_path / "deep" / "out"
    export_hf(config, arrays, tmp_path / "spm.model", out, merged=False, step=12)
    assert sorted(file.name for file in out.iterdir()) == [
        "README.md",
        "config.json",
        "configuration_dreamer.py",
        "generation_config.json",
        "model.safetensors",
        "modeling_dreamer.py",
        "run.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [folder.name for folder in out.parent.iterdir()] == ["out"]
    assert not any("dreamer_jax" in file.read_text() for file in out.glob("*.py"))
    fields = json.loads((out / "config.json").read_text())
    assert fields["auto_map"]["AutoModelForCausalLM"] == "modeling_dreamer.DreamerForCausalLM"
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert {name: fields[name] for name in ends} == ends
    assert json.loads((out / "generation_config.json").read_text()) == {"do_sample": False, **ends}


def test_the_config_has_the_models_sizes():
    model = changed(small("LA+DA"), da={"window": 2}, ea={"experts": 9}, router={"attention_experts": 0})
    fields = config_fields(model, 77, merged=False)
    expected = {"num_hidden_layers": 3, "hidden_size": 32, "vocab_size": 61, "num_experts": 9, "depth_window": 2}
    expected |= {"head_dim": 8, "num_attention_experts": 3, "max_position_embeddings": 77, "depth_recurrent": False}
    assert {name: fields[name] for name in expected} == expected


REFUSED = {
    "latent": ({"mixture": ("sa", "latent", "ea")}, "not latent"),
    "parameter": ({"mixture": ("sa", "parameter")}, "not parameter"),
    "linear": ({"da": {"form": "linear"}}, "model.da.form = 'linear'"),
    "no sa": ({"mixture": ("da", "ea")}, "have sa in model.mixture"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_the_exported_code_does_not_know_is_refused(case, tmp_path):
    keys, message = REFUSED[case]
    config = Config(name="example", model=changed(small("DR+DA"), **keys))
    with pytest.raises(ExportError, match=message):
        export_hf(config, {}, None, tmp_path / "out", merged=False)
    assert not any(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    config, arrays = example()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for out, message in ((tmp_path / "full", "is not empty"), (tmp_path / "link", "a file or a link")):
        with pytest.raises(ExportError, match=message):
            export_hf(config, arrays, None, out, merged=False)
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["full", "link", "mine.txt"]
    (tmp_path / "empty").mkdir()
    export_hf(config, arrays, None, tmp_path / "empty", merged=False)
    assert (tmp_path / "empty" / "config.json").is_file()


def test_an_interrupted_export_leaves_nothing(tmp_path):
    config, arrays = example()
    arrays["layer.ea.w_down"][3, 1, 1] = np.nan
    with pytest.raises(convert.WeightError, match=r"layer\.ea\.w_down has numbers that are not finite"):
        export_hf(config, arrays, None, tmp_path / "out", merged=False)

    def interrupt(size):
        raise KeyboardInterrupt

    config, arrays = example()
    with pytest.raises(KeyboardInterrupt):
        export_hf(config, arrays, None, tmp_path / "out", merged=False, wrote=interrupt)
    assert not any(tmp_path.iterdir())


def test_arrays_that_do_not_fit_are_named(tmp_path):
    config, arrays = example()
    del arrays["layer.sa.router.bias"]
    with pytest.raises(convert.WeightError, match=r"missing: layer\.sa\.router\.bias"):
        export_hf(config, arrays, None, tmp_path / "out", merged=False)


def test_the_card_tells_how_the_model_was_trained():
    data = DataConfig(context=77, sources=(Source("gsm8k", weight=3.0), Source("math")))
    card = model_card(Config(name="example", model=small("DR+DA"), data=data), 12345, step=10, merged=True)
    for fact in ("| DR+DA |", "| da+sa, then ea |", "| 12,345 |", "merged", "gsm8k (3), math (1)", "| 77 |"):
        assert fact in card
    assert f"| {10 * 32 * 77:,} at most" in card
    assert "more or fewer iterations" in card
    assert "iterations" not in model_card(Config(name="example", model=small("LA")), 1, step=None, merged=False)
