"""A checkpoint's arrays, read one after another."""

from collections import Counter

import numpy as np
import pytest

from dreamer_jax import convert
from dreamer_jax.config import Config
from dreamer_jax.convert.stored import StoredArrays
from dreamer_jax.training import checkpoint
from dreamer_jax.training.checkpoint import CheckpointError, Checkpoints, Saved, save_model, saved
from tests import oracle
from tests.convert.hf.exports import float32, odd_model
from tests.models import sizes_of, small


@pytest.fixture(scope="module", params=["LA", "DR+DA"])
def run(request, tmp_path_factory):
    """A run folder and its model."""
    model = small(request.param) if request.param == "LA" else odd_model(request.param)
    config = Config(name="run", out=str(tmp_path_factory.mktemp("run")), model=model)
    built = convert.build(model, float32(oracle.random_weights(sizes_of(model), seed=2)))
    save_model(config.run_dir, config, built, None)
    return config.run_dir, built


@pytest.mark.parametrize("merged", [False, True])
def test_they_are_the_models_and_each_is_read_once(merged, run, monkeypatch):
    folder, model = run
    read = Counter()
    leaf = Saved.leaf
    monkeypatch.setattr(Saved, "leaf", lambda self, name: (read.update([name]), leaf(self, name))[1])
    expected = convert.named_arrays(model.merged() if merged else model)
    with saved(folder) as found:
        arrays = StoredArrays(found, merged=merged)
        assert not read
        assert arrays.merged == (merged and model.config.depth_recurrent)
        assert set(arrays) == set(expected)
        for name in arrays:
            assert (arrays[name].shape, arrays[name].size) == (expected[name].shape, expected[name].size)
            np.testing.assert_array_equal(arrays[name], expected[name], err_msg=name)
    assert set(read.values()) == {1}


def test_a_damaged_array_is_named_when_it_is_read(run, monkeypatch):
    folder, _ = run
    monkeypatch.setattr(Checkpoints, "_checksums", lambda self, step: {"params.lm_head": "0"})
    message = r"the array params\.lm_head is not what was saved\nbefore it"
    with pytest.raises(CheckpointError, match=message), saved(folder) as found:  # noqa: PT012 (what is read, and when)
        arrays = StoredArrays(found, merged=False)
        np.asarray(arrays["embed"])
        np.asarray(arrays["lm_head"])


def test_an_array_in_chunks_along_any_axis_is_read_whole_from_a_folder_with_an_odd_name(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 300)
    config = Config(name="50%25 #x", out=str(tmp_path / "a b"), model=small("LA"))
    built = convert.build(config.model, float32(oracle.random_weights(sizes_of(config.model), seed=2)))
    save_model(config.run_dir, config, built, None)
    with saved(config.run_dir) as found:
        arrays = StoredArrays(found, merged=False)
        for name, expected in convert.named_arrays(built).items():
            np.testing.assert_array_equal(arrays[name], expected, err_msg=name)
