"""The exchange format on disk, in original and merged form."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dreamer_jax import convert
from tests import oracle
from tests.models import VARIANTS, sizes_of, small


def example(variant="DR+DA", merged=False):
    """(config, arrays by name) of a small model."""
    config = small(variant)
    weights = oracle.random_weights(sizes_of(config), seed=2, scale=0.3)
    weights = oracle.merge(weights, sizes_of(config)) if merged else weights
    return config, {name: array.astype(np.float32) for name, array in weights.items()}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_was_saved_is_loaded(variant, merged, tmp_path):
    merged = merged and "DR" in variant
    config, arrays = example(variant, merged)
    convert.save_safetensors(tmp_path / "export", config, arrays, merged)
    loaded_config, loaded, loaded_merged = convert.load_safetensors(tmp_path / "export")
    assert (loaded_config, loaded_merged) == (config, merged)
    assert len({path.stat().st_mode for path in (tmp_path / "export").iterdir()}) == 1
    assert loaded.keys() == arrays.keys() == oracle.names_and_shapes(sizes_of(config), merged).keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array, err_msg=name)


@pytest.mark.parametrize("merged", [False, True])
def test_a_model_survives_the_way_through_the_file(merged, tmp_path):
    config, arrays = example(merged=merged)
    convert.save_safetensors(
        tmp_path, config, convert.named_arrays(convert.build(config, arrays, merged=merged)), merged
    )
    config, loaded, merged = convert.load_safetensors(tmp_path)
    rebuilt = convert.named_arrays(convert.build(config, loaded, merged=merged))
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array, err_msg=name)
        np.testing.assert_array_equal(rebuilt[name], array, err_msg=name)


def test_arrays_that_are_no_rows_in_memory_are_saved_by_value(tmp_path):
    config, arrays = example()
    turned = {name: np.asfortranarray(array) for name, array in arrays.items()}
    convert.save_safetensors(tmp_path, config, turned)
    np.testing.assert_array_equal(load_file(tmp_path / "model.safetensors")["embed"], arrays["embed"])


def test_merging_equals_the_oracles():
    config, arrays = example()
    merged = convert.named_arrays(convert.build(config, arrays).merged())
    expected = oracle.merge(arrays, sizes_of(config))
    assert merged.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(merged[name], array, rtol=1e-6, atol=1e-6, err_msg=name)


def test_merged_weights_in_original_form_merge_to_what_they_were():
    config, arrays = example(merged=True)
    original = convert.build(config, convert.unmerged(config, arrays))
    assert convert.named_arrays(original).keys() == oracle.names_and_shapes(sizes_of(config)).keys()
    merged = convert.named_arrays(original.merged())
    for name, array in arrays.items():
        np.testing.assert_array_equal(merged[name], array, err_msg=name)


@pytest.mark.parametrize("act", ["save", "build", "load"])
def test_arrays_that_do_not_fit_are_named(act, tmp_path):
    config, arrays = example()
    convert.save_safetensors(tmp_path, config, arrays)
    del arrays["layer.ea.w_up"]
    arrays["layer.da.extra"] = np.zeros((2, 3), np.float32)
    arrays["embed"] = arrays["embed"].T.copy()
    save_file(arrays, tmp_path / "model.safetensors")
    acts = {
        "save": lambda: convert.save_safetensors(tmp_path / "other", config, arrays),
        "build": lambda: convert.build(config, arrays),
        "load": lambda: convert.load_safetensors(tmp_path),
    }
    with pytest.raises(convert.WeightError) as raised:
        acts[act]()
    message = str(raised.value)
    assert "3 weights" in message
    assert "missing: layer.ea.w_up (7, 32, 12)" in message
    assert "not in this model: layer.da.extra (2, 3)" in message
    assert "misshapen: embed is (32, 61), the config asks for (61, 32)" in message
    assert not (tmp_path / "other").exists()


def test_an_interrupted_export_is_not_taken_for_a_whole_one(tmp_path, monkeypatch):
    config, arrays = example()
    convert.save_safetensors(tmp_path, config, arrays)
    monkeypatch.setattr("dreamer_jax.convert.safetensors.save_file", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        convert.save_safetensors(tmp_path, config, arrays)
    with pytest.raises(convert.WeightError, match=r"has no config\.json"):
        convert.load_safetensors(tmp_path)


def test_unreadable_exports_are_explained(tmp_path):
    with pytest.raises(convert.WeightError, match=r"nowhere' has no config\.json"):
        convert.load_safetensors(tmp_path / "nowhere")
    config, arrays = example()
    convert.save_safetensors(tmp_path, config, arrays)
    fields = json.loads((tmp_path / "config.json").read_text())

    def rejected(text):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(convert.WeightError) as raised:
            convert.load_safetensors(tmp_path)
        return str(raised.value)

    assert "JSONDecodeError" in rejected("{")
    assert "'merged'" in rejected(json.dumps({"model": fields["model"]}))
    fields["model"]["widht"] = 3
    assert "did you mean 'model.width'" in rejected(json.dumps(fields))
    del fields["model"]["widht"]
    (tmp_path / "model.safetensors").write_bytes(b"not one")
    assert "SafetensorError" in rejected(json.dumps(fields))
