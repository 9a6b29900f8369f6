"""A run goes on with other processes, devices and meshes: the same tokens to the bit, the same figures."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dreamer_jax.sharding import make_mesh
from dreamer_jax.training import loop
from tests.training.elastic import BATCH, config_of, train_leg
from tests.training.test_processes import environment

# One worker of pytest makes the runs that all tests here look at.
pytestmark = pytest.mark.xdist_group("elastic")

LEGS = [(1, (2, 2, 2), 2), (1, (1, 1, 2), 4), (2, (1, 2, 2), 6), (1, (8, 1, 1), 8)]
"""Processes, mesh, and the step that each ends at: 1 x 8 -> 1 x 2 -> 2 x 2 -> 1 x 8 devices."""


def train_here(folder, name, mesh, steps):
    devices = int(np.prod(mesh))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.sharding, "make_mesh", lambda config: make_mesh(config, jax.devices()[:devices]))
        train_leg(folder, name, mesh, steps)


def train_in_processes(folder, name, mesh, steps, processes):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        place = {"DREAMER_COORDINATOR": f"localhost:{probe.getsockname()[1]}", "DREAMER_PROCESSES": str(processes)}
    command = [sys.executable, "-m", "tests.training.elastic", str(folder), name, *map(str, (*mesh, steps))]
    started = [
        subprocess.Popen(
            command,
            env=environment(int(np.prod(mesh)) // processes, DREAMER_PROCESS=str(i), **place),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(processes)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0] * processes, "\n".join(outputs)


def records(folder: Path, name: str):
    lines = (config_of(folder, name, (1, 1, 1), 1).run_dir / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record for record in map(json.loads, lines) if "train/loss" in record}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(records, rows read) of a run on one device and of one that moves at every second step."""
    folder = tmp_path_factory.mktemp("elastic")
    train_here(folder, "still", (1, 1, 1), 8)
    for processes, mesh, steps in LEGS:
        if processes == 1:
            train_here(folder, "moving", mesh, steps)
        else:
            train_in_processes(folder, "moving", mesh, steps, processes)
    return {
        name: (records(folder, name), set((folder / f"{name}.rows").read_text().split("\n")) - {""})
        for name in ("still", "moving")
    }


def test_every_row_of_every_batch_is_the_same_to_the_bit(runs):
    still, moving = (rows for _, rows in runs.values())
    assert len(still) == 8 * BATCH
    assert moving == still


def test_losses_counts_and_biases_continue_as_on_one_device(runs):
    """Losses to 5e-6, the rounding of sums in another order (test_mesh.py); what counts experts, exactly."""
    still, moving = (found for found, _ in runs.values())
    assert sorted(moving) == sorted(still) == list(range(1, 9))
    for step, record in still.items():
        np.testing.assert_allclose(moving[step]["train/loss"], record["train/loss"], rtol=5e-6)
        for key, value in record.items():
            if key.startswith("router/") and "entropy" not in key:
                assert moving[step][key] == value, (step, key)
