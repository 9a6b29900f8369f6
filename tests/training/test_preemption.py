"""A signal ends a process whenever it comes, and loses nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dreamer_jax.training.preemption import PreemptionError, interrupted_code, preemption
from tests.training.peers import ROOT, Peer

SIGNALS = ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"]
FURTHER = [pytest.param(name, marks=pytest.mark.exhaustive) for name in SIGNALS[2:]]
"""That each has the handler is seen before the first step; what it does later is the same code."""


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_before_the_first_step_ends_a_process_at_once_whatever_it_does(name):
    peer = Peer("native")
    peer.noted("started")
    peer.noted("joined")
    peer.signal(signal.Signals[name])
    assert peer.ended(10) == (75, f"{name} before the first step: nothing to save\n")


@pytest.mark.parametrize("name", SIGNALS[:2] + FURTHER)
def test_a_signal_during_a_step_is_noted_and_one_after_the_last_ends(name):
    peer = Peer("step")
    for note in ("started", "joined", "stepping"):
        peer.noted(note)
    peer.signal(signal.Signals[name])
    peer.noted(name)
    assert peer.ended(10) == (3, f"{name} after the end: all is saved\n")


def test_what_nohup_lets_ignored_stays_ignored():
    peer = Peer("native", shell='trap "" HUP; exec "$@"')
    peer.noted("started")
    peer.noted("joined")
    peer.signal(signal.SIGHUP)
    time.sleep(0.3)
    peer.signal(signal.SIGTERM)
    assert peer.ended(10) == (75, "SIGTERM before the first step: nothing to save\n")


def test_a_signal_to_a_child_is_the_childs():
    peer = Peer("fork")
    for note in ("started", "joined", "child ended with -15", "over"):
        peer.noted(note)
    peer.signal(signal.SIGTERM)
    assert peer.ended(10)[0] == 3


def handles_sigterm(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    caught = status.partition("SigCgt:")[2].split()
    return bool(caught) and int(caught[0], 16) >> (signal.SIGTERM - 1) & 1


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the handlers of a process")
@pytest.mark.parametrize("later", [0.0, 1.0, *(pytest.param(t, marks=pytest.mark.exhaustive) for t in (0.05, 0.5))])
def test_training_has_a_code_for_a_signal_from_its_first_moments_on(tmp_path, later):
    config = tmp_path / "toy.py"
    config.write_text(
        f"from tests.training.toy import *\ndef get_config():\n    return toy_config(Path({str(tmp_path)!r}))\n"
    )
    command = [sys.executable, "-m", "dreamer_jax.train", "--config", str(config)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DREAMER_INTERRUPTED_CODE": "75"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    while process.poll() is None and not handles_sigterm(process.pid):
        time.sleep(0.001)
    time.sleep(later)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    assert output.endswith("SIGTERM before the first step: nothing to save\n")
    assert "Traceback" not in output


def test_sigterm_may_come_twice_and_a_second_ctrl_c_ends():
    with preemption() as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.signal_name == "SIGTERM"
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL


@pytest.mark.parametrize("code", ["abc", "256", "-1", "1.5", "²"])
def test_a_code_that_no_process_can_end_with_is_an_error(monkeypatch, code):
    monkeypatch.setenv("DREAMER_INTERRUPTED_CODE", code)
    with pytest.raises(PreemptionError, match=f"DREAMER_INTERRUPTED_CODE = '{code}': give a whole number"):
        interrupted_code()
