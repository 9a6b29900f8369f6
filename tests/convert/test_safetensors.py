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


def tampered(tmp_path, change):
    """The error of an export whose arrays were changed after it was written, checksums and all."""
    config, arrays = example()
    convert.save_safetensors(tmp_path, config, arrays)
    save_file({**arrays, **change(arrays)}, tmp_path / "model.safetensors")
    with pytest.raises(convert.WeightError) as raised:
        convert.load_safetensors(tmp_path)
    return str(raised.value)


@pytest.mark.parametrize("dtype", [np.int32, np.bool_, np.uint8])
def test_weights_that_are_no_floating_point_numbers_are_refused(tmp_path, dtype):
    message = tampered(tmp_path, lambda arrays: {"embed": arrays["embed"].astype(dtype)})
    assert f"embed holds {np.dtype(dtype)}; weights are floating-point numbers" in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_in_both_directions(tmp_path, value):
    def poison(arrays):
        embed = arrays["embed"].copy()
        embed[3, 4] = value
        return {"embed": embed}

    assert "embed has numbers that are not finite" in tampered(tmp_path, poison)
    config, arrays = example()
    with pytest.raises(convert.WeightError, match="embed has numbers that are not finite"):
        convert.save_safetensors(tmp_path / "other", config, {**arrays, **poison(arrays)})


def test_a_flipped_bit_of_an_export_is_noticed_and_named(tmp_path):
    config, arrays = example()
    convert.save_safetensors(tmp_path, config, arrays)
    path = tmp_path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(convert.WeightError, match=r"is damaged: \S+ is not what was written; export it again"):
        convert.load_safetensors(tmp_path)


CONFIGS = {
    "a list": (b"[]", "has no section 'model'"),
    "no section": (b'{"merged": false}', "has no section 'model'"),
    "not JSON": (b"{", "is not JSON"),
    "not UTF-8": (b"\xff\xfe{}", "is not JSON"),
    "nested deep": (b"[" * 100_000, "is not JSON"),
    "merged is text": (b'{"model": {}, "merged": "no"}', "'merged' must be true or false"),
    "a wrong key": (b'{"model": {"widht": 3}, "merged": false}', "did you mean 'model.width'"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_cannot_be_meant_is_explained(tmp_path, case):
    config, arrays = example()
    convert.save_safetensors(tmp_path, config, arrays)
    content, message = CONFIGS[case]
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(convert.WeightError, match=r"config\.json'") as raised:
        convert.load_safetensors(tmp_path)
    assert message in str(raised.value)


def test_a_byte_order_mark_before_the_config_is_ignored(tmp_path):
    config, arrays = example()
    convert.save_safetensors(tmp_path, config, arrays)
    path = tmp_path / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert convert.load_safetensors(tmp_path)[0] == config
