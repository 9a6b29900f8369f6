"""Latent pairs made of a file of embeddings: read when a model is initialised, and not needed any more after that."""

import chex
import numpy as np
import pytest
from flax import nnx

from dreamer_jax import convert
from dreamer_jax.config import ConfigError, MeshConfig
from dreamer_jax.model.dreamer import Dreamer
from dreamer_jax.sharding import make_mesh
from dreamer_jax.training.checkpoint import load_model, save_model
from dreamer_jax.training.loop import train
from dreamer_jax.training.step import init_state
from tests.models import changed, small
from tests.training.toy import REFERENCE, toy_config


def model_of(variant, file):
    mixture = ("sa+latent", "ea") if variant == "DR" else ("latent[1:]", "sa", "ea")
    return changed(small(variant, mixture), latent={"embeddings": str(file), "embedding_size": 9})


@pytest.mark.parametrize("variant", ["DR", "LA"])
def test_a_model_has_the_embeddings_of_the_file_in_every_layer_that_uses_them(variant, tmp_path):
    texts = np.random.default_rng(0).normal(size=(6, 9))
    np.save(tmp_path / "texts.npy", texts)
    named = convert.named_arrays(Dreamer(model_of(variant, tmp_path / "texts.npy"), nnx.Rngs(0)))
    layers = {name for name in named if name.endswith("embeddings")}
    prefixes = ["layer"] if variant == "DR" else ["layers.1", "layers.2"]
    assert layers == {f"{prefix}.latent.embeddings" for prefix in prefixes}
    for name in layers:
        np.testing.assert_array_equal(named[name], texts.astype(np.float32))


@pytest.mark.parametrize("shape", [None, (6, 8), (7, 9)])
def test_a_file_that_is_missing_or_of_another_shape_is_named(shape, tmp_path):
    if shape:
        np.save(tmp_path / "texts.npy", np.zeros(shape))
    message = r"texts.npy' has shape .* ask for \(6, 9\)" if shape else "there is no file '.*texts.npy'"
    config = changed(toy_config(tmp_path), model=model_of("DR", tmp_path / "texts.npy"))
    with pytest.raises(ConfigError, match=message):
        init_state(config, make_mesh(MeshConfig()))


def test_a_checkpoint_is_restored_without_the_file(tmp_path):
    file = tmp_path / "texts.npy"
    np.save(file, np.random.default_rng(0).normal(size=(6, 9)))
    config = changed(toy_config(tmp_path), model=model_of("LA", file))
    model = Dreamer(config.model, nnx.Rngs(0))
    (tmp_path / "tokenizer.model").write_text("none")
    save_model(config.run_dir, config, model, tmp_path / "tokenizer.model")
    file.unlink()
    restored = load_model(config.run_dir).model
    chex.assert_trees_all_equal(convert.named_arrays(restored), convert.named_arrays(model))


def test_a_run_resumes_without_the_file(tmp_path):
    file = tmp_path / "texts.npy"
    np.save(file, np.random.default_rng(0).normal(size=(6, 9)))
    config = changed(toy_config(tmp_path, steps=2), model=changed(model_of("DR", file), vocab=300), kernels=REFERENCE)
    train(config)
    file.unlink()
    assert train(changed(config, train={"steps": 3})).step == 3
