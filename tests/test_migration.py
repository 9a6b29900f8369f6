"""Runs and exports of version 0.1, whose config had the model's keys on one level, load and go on.

assets/run_0_1.tar.xz was written by that version: two steps of tests/training/toy.py's run with the mixture
"sequential", its exports (original and merged), and every tenth logit of the model for the ids below.
"""

import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import chex
import numpy as np
import pytest

import dreamer_jax as dj
from dreamer_jax.config import CALCULATOR_MARKS, Config, from_json
from dreamer_jax.training.loop import train
from tests.training.toy import toy_config, with_model

ARCHIVE = Path(__file__).parent / "assets" / "run_0_1.tar.xz"
IDS = np.arange(1, 17, dtype=np.int32)[None] * 7 % 300


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.xdist_group("migration")
@pytest.mark.parametrize("source", ["run", "export", "export_merged"])
def test_an_earlier_model_computes_what_it_did(old: Path, source: str) -> None:
    lm = dj.load(old / source)
    assert lm.config.mixture == ("da", "sa", "ea")
    chex.assert_trees_all_close(lm.logits(IDS)[0, :, ::10], np.load(old / "logits.npy"), rtol=1e-5, atol=1e-5)


@pytest.mark.xdist_group("migration")
def test_an_earlier_run_goes_on(old: Path, tmp_path: Path) -> None:
    config = with_model(toy_config(tmp_path, steps=3), mixture=("da", "sa", "ea"))
    kept = from_json((old / "run" / "config.json").read_text())
    assert isinstance(kept, Config)
    assert kept.model == config.model
    assert [source.remove for source in kept.data.sources] == [CALCULATOR_MARKS]
    shutil.copytree(old / "run", config.run_dir)
    summary = train(replace(config, train=replace(config.train, batch=8)))
    assert summary.step == 3
    assert summary.train_loss is not None
    assert summary.train_loss < 5.5  # the run's loss at step 2 was 5.49; a new model's is 5.8


@pytest.mark.xdist_group("migration")
def test_an_earlier_run_with_another_model_is_refused(old: Path, tmp_path: Path) -> None:
    config = toy_config(tmp_path, steps=3)  # another mixture
    shutil.copytree(old / "run", config.run_dir)
    with pytest.raises(ValueError, match=r"checkpoints of another model \(differs in model.mixture\)"):
        train(config)
