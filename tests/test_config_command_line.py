"""Overrides of the command line: every key by its name, values as they are written, and errors that name the fix."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dreamer_jax.config import Config, ConfigError, KernelConfig, ModelConfig, Source, from_json, load, to_json
from tests.models import SMALL, changed

SOURCES = (Source("sums", train=("a.jsonl",)), Source("tasks", tasks=("lcm",), documents_per_task=5))


def written(folder: Path, model: ModelConfig = SMALL) -> Path:
    """A config file of this model."""
    path = folder / "config.py"
    text = to_json(changed(Config(name="written", model=model), data={"sources": SOURCES}))
    path.write_text(f"from dreamer_jax.config import from_json\ndef get_config():\n    return from_json({text!r})\n")
    return path


def found(config: Config, key: str) -> object:
    """The value of a dotted key."""
    value = config
    for name in key.split("."):
        value = value[int(name)] if name.isdigit() else getattr(value, name)
    return value


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


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        ("--model.depth_recurrent False", "model.depth_recurrent", False),
        ("--model.depth_recurrent=false", "model.depth_recurrent", False),
        ("--model.depth-recurrent FALSE", "model.depth_recurrent", False),
        ("--model.no-depth-recurrent", "model.depth_recurrent", False),
        ("--model.no_depth_recurrent", "model.depth_recurrent", False),
        ("--model.depth-recurrent True", "model.depth_recurrent", True),
        ("--log.tensorboard True", "log.tensorboard", True),
        ("--log.tensorboard=False", "log.tensorboard", False),
        ("--log.no-tensorboard", "log.tensorboard", False),
        ("--log.wandb", "log.wandb", True),
        ("--log.wandb --train.steps 7", "log.wandb", True),
        ("--log.wandb --train.steps 7", "train.steps", 7),
        ("--log.wandb True --train.steps 7", "train.steps", 7),
        ("--train.steps 1e4", "train.steps", 10_000),
        ("--train.steps=1e4", "train.steps", 10_000),
        ("--train.steps 1.5e3", "train.steps", 1500),
        ("--train.steps 6.0", "train.steps", 6),
        ("--mesh.data -1", "mesh.data", -1),
        ("--mesh.data=-1", "mesh.data", -1),
        ("--optimizer.learning-rate 1", "optimizer.learning_rate", 1.0),
        ("--optimizer.learning_rate=3e-4", "optimizer.learning_rate", 3e-4),
        ("--log.sample-prompt=--log.wandb", "log.sample_prompt", "--log.wandb"),
        ("--log.sample-prompt a=b", "log.sample_prompt", "a=b"),
        ("--data.sources.1.documents-per-task 2e1", "data.sources.1.documents_per_task", 20),
        ("--data.sources.0.train x.jsonl y.jsonl", "data.sources.0.train", ("x.jsonl", "y.jsonl")),
        ("--data.sources.0.remove <<", "data.sources.0.remove", "<<"),
        ("--train.steps 3 --train.steps 4", "train.steps", 4),
        ("--log.wandb --log.no-wandb", "log.wandb", False),
        ("--log.wandb True --log.wandb False", "log.wandb", False),
        ("--kernels.implementation plain", "kernels.implementation", "plain"),
        ("--data.cache /fast", "data.prepared", "/fast"),
        ("--model.query_heads 8", "model.sa.query_heads", 8),
        ("--model.da-heads=4", "model.da.query_heads", 4),
    ],
)
def test_values_are_taken_as_they_are_written(overrides, key, value, tmp_path):
    got = found(load(written(tmp_path), overrides.split()), key)
    assert got == value
    assert type(got) is type(value)


def test_what_is_not_overridden_stays(tmp_path):
    before, after = (load(written(tmp_path), words) for words in ([], ["--kernels.implementation", "plain"]))
    assert after == changed(before, kernels=KernelConfig(implementation="plain"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("--train.steps 1.5e0", "train.steps = 1.5e0: must be a whole number from 1 to 2147483647"),
        ("--train.steps 1e-99999999", "train.steps = 1e-99999999: must be a whole number"),
        ("--train.steps 1e99", "train.steps = 1e99: must be a whole number"),
        ("--train.steps nan", "train.steps = nan: must be a whole number"),
        ("--train.steps=inf", "train.steps = inf: must be a whole number"),
        ("--train.steps 0", "train.steps = 0: must be a whole number from 1"),
        ("--train.batch 5 --train.microbatches 2", "train.batch = 5 is not a multiple of train.microbatches = 2"),
        ("--log.wandb=maybe", "log.wandb = 'maybe': must be True or False"),
        ("--optimizer.learning-rate nan", "optimizer.learning_rate = nan: must be a finite number above 0"),
        ("--optimizer.learning-rate -1", "optimizer.learning_rate = -1.0: must be a finite number above 0"),
        ("--model.depth 1000000000", "model.depth = 1000000000: must be a whole number from 1 to 4096"),
        ("--model.query_heads 0", "model.sa.query_heads = 0: must be"),
        ("--name a/b", "name = 'a/b': must be a folder name"),
        ("--data.sources.0.weight -2", "data.sources['sums'].weight = -2.0: must be"),
        ("--model.mixture da+saa ea", "model.mixture: unknown dimension 'saa'; did you mean 'sa'?"),
        ("--model.mixture da[9:]+sa ea", "model.mixture: da runs at none of the 3 depths"),
        ("--model.ea.active-experts 8", "model.ea.active_experts = 8 exceeds model.ea.experts = 7"),
    ],
)
def test_an_override_that_does_not_fit_is_a_line_that_names_the_key(overrides, message, tmp_path, capsys):
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path), overrides.split())
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ("--model.sa.query-haeds 8", "--model.sa.query-heads"),
        ("--train.stepz 3", "--train.steps"),
        ("--steps 3", "--train.steps"),
        ("--nonsense", "Unrecognized options: --nonsense"),
        ("stray", "Unrecognized options: stray"),
        ("--log.wandb maybe", "Unrecognized options: maybe"),
        ("--log.no-wandb True", "Unrecognized options: True"),
        ("--model.sa.query-heads many", "query-heads"),
        ("--model.sa.query-heads", "query-heads"),
        ("--kernels.implementation fastest", "native"),
    ],
)
def test_an_override_that_cannot_be_read_ends_with_what_would_be_right(overrides, wanted, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        load(written(tmp_path), overrides.split())
    assert ended.value.code == 2
    assert wanted in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_help_names_the_keys_of_all_sections(tmp_path, capsys):
    with pytest.raises(SystemExit):
        load(written(tmp_path), ["--help"])
    said = capsys.readouterr().out
    for key in ("sa.query-heads", "sa.rope-base", "da.head-size", "ea.experts", "router.size", "mixture"):
        assert f"--model.{key}" in said


def test_a_command_ends_with_the_line_and_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "dreamer_jax.plan", "--config", str(written(tmp_path)), "--train.steps", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(r"error: train\.steps = 0: must be a whole number .*\n", done.stderr)


def test_what_a_command_line_makes_survives_a_checkpoint(tmp_path):
    config = load(written(tmp_path), ["--optimizer.learning-rate", "1", "--train.steps", "1e3", "--name", "läuft"])
    assert from_json(to_json(config)) == config
    assert json.loads(to_json(config))["train"]["steps"] == 1000
