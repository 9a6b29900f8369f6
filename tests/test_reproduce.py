"""Two seeds, then the better one: derived from the run folders, whatever cut the work off."""

import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from dreamer_jax import config as configuration
from dreamer_jax import train
from dreamer_jax.sharding import make_mesh
from dreamer_jax.training import loop
from dreamer_jax.training.checkpoint import Checkpoints
from dreamer_jax.training.step import abstract_state
from tests.training.worker import once

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "launch" / "reproduce.py"
FIRST, LAST = 4, 6
CONFIG = """
import dataclasses
from pathlib import Path
from dreamer_jax.config import CheckpointConfig
from tests.training.toy import REFERENCE, toy_config, with_model

def get_config():
    config = toy_config(Path({folder!r}), steps={last}, remat="none")
    config = with_model(config, depth=1, depth_recurrent=False, mixture=("sa", "ea"))
    return dataclasses.replace(config, kernels=REFERENCE, checkpoint=CheckpointConfig(every=1, keep=2))
"""


@pytest.fixture
def reproduce(monkeypatch):
    """The script as a module, with trainings in this process, which compile once; `runs` lists them."""
    script = SimpleNamespace(**runpy.run_path(str(SCRIPT)))
    script.runs = []

    def run_here(command):
        arguments = command[command.index("--config") :]
        script.runs.append(arguments[arguments.index("--name") + 1])
        return train.main(arguments)

    monkeypatch.setitem(script.main.__globals__, "run", run_here)
    monkeypatch.setattr(train, "sample", lambda summary: "")
    monkeypatch.setattr(loop.sharding, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    monkeypatch.setattr(loop, "make_train_step", once(loop.make_train_step))
    monkeypatch.setattr(loop, "make_evaluation", once(loop.make_evaluation))
    return script


def write_config(folder):
    path = folder / "toy.py"
    path.write_text(CONFIG.format(folder=str(folder), last=LAST))
    return path


def options(path):
    tokens = FIRST * configuration.load(path).tokens_per_step
    return ["--models", str(path), "--first-leg-tokens", str(tokens - 1)]


def one_device():
    return " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)


def start(path):
    """The script as a command, with its training, in a session of its own."""
    command = [sys.executable, str(SCRIPT), *options(path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": one_device()}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_for(process, path):
    deadline = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert path.exists(), process.communicate()[0]


def final_arrays(path, name):
    config = configuration.load(path, ["--name", name])
    _, like = abstract_state(config, make_mesh(config.mesh, jax.devices()[:1]))
    with Checkpoints(config.run_dir) as checkpoints:
        assert checkpoints.latest == LAST
        return jax.device_get(checkpoints.restore(like, LAST))


def test_a_killed_reproduction_goes_on_with_the_better_seed(tmp_path, reproduce, capfd):
    path, runs = write_config(tmp_path), tmp_path / "runs"
    process = start(path)
    wait_for(process, runs / "toy_seed0" / "checkpoints" / "2")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()

    assert reproduce.main(options(path)) == 0
    output = capfd.readouterr().out
    assert "resuming from step" in output
    plan = reproduce.plan(str(path), (0, 1), FIRST * configuration.load(path).tokens_per_step, [])
    losses = [reproduce.validation_loss(leg) for leg in plan.first]
    assert losses[0] != losses[1]
    better = f"toy_seed{int(np.argmin(losses))}"
    assert reproduce.runs == ["toy_seed0", "toy_seed1", better]
    steps = {name: max(int(p.name) for p in (runs / name / "checkpoints").glob("[0-9]*")) for name in reproduce.runs}
    assert steps == {better: LAST, **{name: FIRST for name in set(reproduce.runs) - {better}}}

    seed = better[-1]
    train.main(["--config", str(path), "--name", "straight", "--train.seed", seed])
    jax.tree.map(np.testing.assert_array_equal, final_arrays(path, better), final_arrays(path, "straight"))

    reproduce.runs.clear()
    capfd.readouterr()
    assert reproduce.main([*options(path), "--winners"]) == 0
    assert capfd.readouterr().out == f"toy {runs / better}\n"
    assert reproduce.main(options(path)) == 0
    assert reproduce.runs == []


def records(folder, name, **losses):
    run = folder / "runs" / name
    run.mkdir(parents=True)
    lines = [json.dumps({"step": int(step[1:]), "validation/loss": loss}) for step, loss in losses.items()]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 3, "valid']))


@pytest.mark.parametrize(("first", "second", "better"), [(2.0, 1.0, 1), (1.0, 2.0, 0), (None, 2.0, 1), (1.0, 1.0, 0)])
def test_the_lower_validation_loss_wins(tmp_path, reproduce, first, second, better):
    path = write_config(tmp_path)
    records(tmp_path, "toy_seed0", s2=0.1, s4=first)
    records(tmp_path, "toy_seed1", s2=0.2, s4=second)
    plan = reproduce.plan(str(path), (0, 1), FIRST * configuration.load(path).tokens_per_step, [])
    leg = reproduce.second_leg(plan)
    assert (leg.seed, leg.steps) == (better, LAST)
    assert not reproduce.finished(plan)


def test_a_dry_run_trains_nothing(tmp_path, reproduce, capfd):
    path = write_config(tmp_path)
    assert reproduce.main([*options(path), "--dry-run", "--launcher", "srun train", "--", "--data.prefetch", "2"]) == 0
    assert reproduce.runs == []
    shown = capfd.readouterr().out
    wanted = f"srun train --config {path} --data.prefetch 2 --name toy_seed1 --train.seed 1 --train.steps {FIRST}"
    assert wanted in shown
    assert f"to step {LAST}" in shown


def test_an_interrupted_training_interrupts_the_reproduction(tmp_path, capfd):
    path = write_config(tmp_path)
    script = SimpleNamespace(**runpy.run_path(str(SCRIPT)))
    for code, message in ((75, "toy_seed0 was interrupted"), (3, "toy_seed0 ended with code 3")):
        launcher = shlex.join(["bash", "-c", f"exit {code}"])
        assert script.main([*options(path), "--launcher", launcher]) == code
        assert message in capfd.readouterr().err
    assert script.main([*options(path), "--launcher", "true"]) == 1
    assert "no validation loss of step 4" in capfd.readouterr().err


@pytest.fixture
def unheard():
    """SIGTERMs that nobody else takes: they would end this process."""
    taken = []
    previous = signal.signal(signal.SIGTERM, lambda number, _: taken.append(number))
    yield taken
    signal.signal(signal.SIGTERM, previous)


def test_sigterm_reaches_the_training(tmp_path, unheard):
    script = SimpleNamespace(**runpy.run_path(str(SCRIPT)))
    note = tmp_path / "note"
    child = f"trap 'echo $DREAMER_INTERRUPTED_CODE > {note}; exit 75' TERM; kill -TERM {os.getpid()}; sleep 20 & wait"
    assert script.run(["bash", "-c", child]) == 75
    assert note.read_text() == "75\n"
    assert unheard == []


def test_sigterm_reaches_a_training_that_is_only_being_started(monkeypatch, unheard):
    script = SimpleNamespace(**runpy.run_path(str(SCRIPT)))
    original = subprocess.Popen

    def interrupted_popen(*arguments, **options):
        signal.raise_signal(signal.SIGTERM)
        return original(*arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", interrupted_popen)
    assert script.run(["bash", "-c", "sleep 5; exit 3"]) == 75
    assert unheard == []


@pytest.mark.parametrize("name", ["HUP", "USR1"])
def test_other_requests_to_stop_reach_the_training(name):
    script = SimpleNamespace(**runpy.run_path(str(SCRIPT)))
    before = signal.getsignal(signal.Signals[f"SIG{name}"])
    assert script.run(["bash", "-c", f"trap 'exit 75' {name}; kill -{name} {os.getpid()}; sleep 20 & wait"]) == 75
    assert signal.getsignal(signal.Signals[f"SIG{name}"]) == before


def test_a_launcher_that_is_not_there_is_named(tmp_path):
    command = [sys.executable, str(SCRIPT), *options(write_config(tmp_path)), "--launcher", "/no/launcher"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: '/no/launcher': No such file or directory"), ended.stderr


def test_records_that_are_none_are_passed_over(tmp_path, reproduce):
    path = write_config(tmp_path)
    records(tmp_path, "toy_seed0", s4=1.5)
    lines = tmp_path / "runs" / "toy_seed0" / "metrics.jsonl"
    lines.write_bytes(b'4\n[]\n{"validation/loss": 2}\n\x00\xff\n' + lines.read_bytes())
    plan = reproduce.plan(str(path), (0,), FIRST * configuration.load(path).tokens_per_step, [])
    assert reproduce.validation_loss(plan.first[0]) == 1.5
