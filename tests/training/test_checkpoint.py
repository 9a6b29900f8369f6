"""Checkpoints: whole or absent, strict in what they restore, and a resumed run equals an uninterrupted one."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer_jax import convert
from dreamer_jax.config import CheckpointConfig, ConfigError, MeshConfig, to_json
from dreamer_jax.sharding import make_mesh
from dreamer_jax.training import checkpoint, loop
from dreamer_jax.training.checkpoint import (
    CheckpointError,
    Checkpoints,
    Position,
    changed_keys,
    load_model,
    save_model,
)
from dreamer_jax.training.loop import TrainingDiverged
from dreamer_jax.training.step import abstract_state
from tests.models import changed
from tests.training import shared
from tests.training.shared import train
from tests.training.toy import REFERENCE, toy_config, with_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def config_of(folder, **train):
    return dataclasses.replace(toy_config(folder, **train), kernels=REFERENCE)


def named(config, name):
    return dataclasses.replace(config, name=name)


def final_arrays(config):
    """Everything in the newest checkpoint of a run."""
    _, like = abstract_state(config, make_mesh(MeshConfig()))
    with Checkpoints(config.run_dir) as checkpoints:
        return jax.device_get(checkpoints.restore(like, checkpoints.latest))


def records(config):
    """The metrics of a run, less those of speed."""
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("speed/")} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(folder):
    config = named(config_of(folder), "uninterrupted")
    summary = train(config)
    return config, summary


def test_a_run_keeps_the_newest_checkpoints_and_needs_nothing_else(uninterrupted):
    config, summary = uninterrupted
    with Checkpoints(config.run_dir) as checkpoints:
        assert checkpoints.steps == [4, 6]
    loaded = load_model(config.run_dir)
    assert (loaded.config, loaded.step) == (config, 6)
    assert loaded.tokenizer_path.read_bytes() == summary.prepared.tokenizer.read_bytes()
    arrays, expected = convert.named_arrays(loaded.model), convert.named_arrays(summary.model)
    assert set(arrays) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)


def test_an_earlier_checkpoint_can_be_named(uninterrupted):
    config, _ = uninterrupted
    assert load_model(config.run_dir / "checkpoints" / "4").step == 4
    with pytest.raises(CheckpointError, match=r"no whole checkpoint 5 \(found: 4, 6\)"):
        load_model(config.run_dir, step=5)


def test_resumed_equals_uninterrupted_bit_for_bit(folder, uninterrupted):
    config, _ = uninterrupted
    halves = named(config_of(folder, steps=3), "halves")
    train(halves)
    resumed = named(config_of(folder), "halves")
    train(resumed)
    jax.tree.map(np.testing.assert_array_equal, final_arrays(resumed), final_arrays(config))
    ours = {r["step"]: r for r in records(resumed) if "train/loss" in r}
    assert ours == {r["step"]: r for r in records(config) if "train/loss" in r}
    assert sorted(ours) == [1, 2, 3, 4, 5, 6]


def launch(config, tmp_path):
    """The train door in a process of its own."""
    script = tmp_path / "config.py"
    script.write_text(
        "import json\nfrom dreamer_jax.config import Config, from_json\n"
        f"def get_config() -> Config:\n    return from_json({to_json(config)!r})\n"
    )
    command = [sys.executable, "-u", "-m", "dreamer_jax.train", "--config", str(script)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=dict(os.environ))


def wait_for_checkpoint(process, run_dir, after):
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        steps = [int(p.name) for p in (run_dir / "checkpoints").glob("*") if p.name.isdigit()]
        if max(steps, default=0) > after:
            return
        time.sleep(0.02)
    raise AssertionError(f"no checkpoint after step {after}: {process.communicate()[0]}")


def test_a_killed_and_a_terminated_run_resume_to_the_same_end(folder, tmp_path):
    config = config_of(folder, steps=12)
    straight = named(config, "straight")
    killed = dataclasses.replace(config, name="killed", checkpoint=CheckpointConfig(every=1, keep=2))
    process = launch(killed, tmp_path)
    wait_for_checkpoint(process, killed.run_dir, after=2)
    process.kill()
    process.communicate()

    process = launch(killed, tmp_path)
    wait_for_checkpoint(process, killed.run_dir, after=6)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert "resuming from step" in output
    assert "SIGTERM: saved step" in output

    train(killed)
    train(straight)
    jax.tree.map(np.testing.assert_array_equal, final_arrays(killed), final_arrays(straight))


def test_a_save_in_progress_does_not_see_later_steps(folder):
    config = named(config_of(folder), "async")
    _, state = shared.init_state(config, make_mesh(MeshConfig()))
    expected = jax.device_get(jax.tree.map(jnp.copy, state))
    overwrite = jax.jit(lambda s: jax.tree.map(lambda a: a * 0 - 1, s), donate_argnums=0)
    with Checkpoints(config.run_dir, config.checkpoint) as checkpoints:
        checkpoints.save(config, state, 1, Position(rows=8, data=None))
        for _ in range(3):
            state = overwrite(state)
        checkpoints.wait()
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(checkpoints.restore(state, 1)), expected)


def test_a_run_does_not_go_on_in_another_layout_of_documents(folder):
    config = config_of(folder)
    keys = {"prompt_template": "Q: {text}", "response_template": "\n{text}", "special_tokens": ("<s>",)}
    other = changed(config, data={**keys, "response_only": True})
    assert sorted(loop.of_the_model(changed_keys(config, other))) == sorted(f"data.{key}" for key in keys)


def test_a_checkpoint_of_another_model_is_refused_by_name(folder, uninterrupted):
    config, _ = uninterrupted
    wider = named(with_model(config_of(folder), ea={"expert_width": 16}), "uninterrupted")
    before = (config.run_dir / "config.json").read_bytes()
    with pytest.raises(ConfigError, match=r"model\.ea\.expert_width.*--name"):
        train(wider)
    assert (config.run_dir / "config.json").read_bytes() == before
    _, like = abstract_state(wider, make_mesh(MeshConfig()))
    with (
        Checkpoints(config.run_dir) as checkpoints,
        pytest.raises(CheckpointError, match=r"misshapen: params\.layer\.ea\.w_down"),
    ):
        checkpoints.restore(like, checkpoints.latest)
    without_da = with_model(config, mixture=("sa", "ea"))
    _, like = abstract_state(without_da, make_mesh(MeshConfig()))
    with (
        Checkpoints(config.run_dir) as checkpoints,
        pytest.raises(CheckpointError, match=r"not in this model: params\.layer\.da"),
    ):
        checkpoints.restore(like, checkpoints.latest)


@pytest.mark.parametrize("steps", [6, 7])
def test_a_run_does_not_go_on_from_arrays_that_are_not_what_was_saved(uninterrupted, tmp_path, steps):
    config, _ = uninterrupted
    shutil.copytree(config.run_dir, tmp_path / config.name)
    damaged = changed(dataclasses.replace(config, out=str(tmp_path)), train={"steps": steps})
    meta = damaged.run_dir / "checkpoints" / "6" / "meta" / "metadata"
    content = json.loads(meta.read_text())
    content["checksums"]["params.embed"] = "0" * 16
    meta.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"(?s)params\.embed.* is not what was saved.*go on from step 4"):
        train(damaged)
    assert records(damaged) == records(config)


def test_a_run_does_not_go_on_with_another_tokenizer(uninterrupted, tmp_path):
    config, summary = uninterrupted
    save_model(tmp_path / "run", config, summary.model, summary.prepared.tokenizer)
    other = tmp_path / "tokenizer.model"
    other.write_bytes(b"another")
    checkpoint.check_tokenizer(tmp_path / "run", summary.prepared.tokenizer)
    with pytest.raises(CheckpointError, match=r"another tokenizer; give --data\.tokenizer"):
        checkpoint.check_tokenizer(tmp_path / "run", other)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="not a run folder"):
        load_model(tmp_path)


def test_a_saved_model_loads_and_is_not_overwritten(uninterrupted, tmp_path):
    config, summary = uninterrupted
    save_model(tmp_path / "run", config, summary.model, summary.prepared.tokenizer)
    loaded = load_model(tmp_path / "run")
    assert loaded.step == 0
    np.testing.assert_array_equal(loaded.model.embed[...], summary.model.embed[...])
    with pytest.raises(CheckpointError, match="has checkpoints already"):
        save_model(tmp_path / "run", config, summary.model, summary.prepared.tokenizer)


def test_a_diverging_run_stops_with_a_message(folder, monkeypatch):
    config = dataclasses.replace(named(config_of(folder, steps=20, max_bad_steps=3), "diverging"))
    original = loop.init_state

    def poisoned(config, mesh):
        graph, state = original(config, mesh)
        return graph, state._replace(params=jax.tree.map(lambda a: a * jnp.nan, state.params))

    monkeypatch.setattr(loop, "init_state", poisoned)
    with pytest.raises(TrainingDiverged, match="steps 1 to 3 had a non-finite loss"):
        loop.train(config)
