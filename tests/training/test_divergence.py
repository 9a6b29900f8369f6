"""A run that diverges keeps the last state that was good, says which it is, and goes on from there."""

import dataclasses

import numpy as np
import pytest

from dreamer_jax.config import CheckpointConfig
from dreamer_jax.training import loop
from dreamer_jax.training.checkpoint import Checkpoints
from dreamer_jax.training.loop import TrainingDiverged
from tests.models import changed
from tests.training.shared import train
from tests.training.toy import REFERENCE, toy_config, with_model

RATE = {"learning_rate": 1e20}


def config_of(folder, name, every, keep=1, **train):
    config = with_model(toy_config(folder, **train), depth=1, depth_recurrent=False, mixture=("sa", "ea"))
    checkpoint = CheckpointConfig(every=every, keep=keep)
    return dataclasses.replace(config, name=name, checkpoint=checkpoint, kernels=REFERENCE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def steps(config):
    with Checkpoints(config.run_dir) as checkpoints:
        return checkpoints.steps


@pytest.mark.xdist_group("divergence")
def test_bad_states_push_out_no_good_one_and_the_advice_works(folder):
    config = config_of(folder, "diverging", every=5, steps=4)
    train(config)
    assert steps(config) == [4]
    # Step 5 has a finite loss, but its update makes all weights useless: the checkpoint at step 5 has them, and at step
    # 10, which is bad, there is none.
    longer = changed(config, train={"steps": 20, "max_bad_steps": 6})
    with pytest.raises(TrainingDiverged, match=r"steps 6 to 11 had a non-finite.*the last good checkpoint is step 4\."):
        train(changed(longer, optimizer=RATE))
    assert steps(config) == [4]
    summary = train(changed(longer, train={"steps": 8}))
    assert (summary.step, steps(config)) == (8, [8])
    assert np.isfinite(summary.validation_loss)


@pytest.mark.xdist_group("divergence")
def test_a_run_whose_last_steps_are_bad_has_not_succeeded(folder):
    config = changed(config_of(folder, "bad_end", 2, steps=4, max_bad_steps=10), optimizer=RATE)
    with pytest.raises(TrainingDiverged, match=r"steps 2 to 4 had a non-finite.*no good checkpoint is there"):
        train(config)
    assert steps(config) == []


@pytest.mark.xdist_group("divergence")
def test_weights_that_only_the_held_out_loss_shows_to_be_useless_are_not_kept(folder):
    config = config_of(folder, "last", 2, steps=1, max_bad_steps=10)
    with pytest.raises(TrainingDiverged, match=r"the held-out loss after step 1 is not finite; no good checkpoint"):
        train(changed(config, optimizer=RATE))


@pytest.mark.xdist_group("divergence")
def test_a_run_goes_on_where_it_stopped_in_the_data_with_another_batch_size(folder, monkeypatch):
    config = config_of(folder, "other_batch", 3, steps=3)
    train(config)
    started, read = [], loop.batches

    def noted(*arguments, split, start_row=0, **keywords):
        if split == "train":
            started.append(start_row)
        return read(*arguments, split=split, start_row=start_row, **keywords)

    monkeypatch.setattr(loop, "batches", noted)
    doubled = changed(config, train={"batch": 2 * config.train.batch, "steps": 5})
    train(doubled)
    assert started == [3 * config.train.batch]
    with Checkpoints(config.run_dir) as checkpoints:
        assert checkpoints.position(5).rows == 7 * config.train.batch
