"""Comparisons by other processes: in order, in time, and with nothing left behind, whatever the processes do."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dreamer_jax.evaluation.benchmarks.verification import WORKER, Comparison, Workers, compare
from dreamer_jax.evaluation.requests import EvaluationError

EQUAL, DIFFERENT = Comparison(True), Comparison(False)
KILLED, FAILED = Comparison(False, "killed"), Comparison(False, "failed")
ALL_SIGNALS = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, range(1, signal.NSIG))"
PROGRAM = """
import json, os, sys, time
with open(os.path.join(os.path.dirname(__file__), "pids"), "a") as file:
    print(os.getpid(), file=file)
print("ready", flush=True)
for line in sys.stdin:
    gold, answer, seconds = json.loads(line)
    exec(answer if gold == "run" else "")
    if gold == "in pieces":
        os.write(1, b"equ")
        time.sleep(0.1)
        os.write(1, b"al\\n")
        continue
    print("equal" if gold == answer else "different", flush=True)
"""
"""A worker that runs what it is told to."""
DRIVER = f"""
import sys
sys.path.insert(0, {str(WORKER.parent)!r})
import verification_worker as worker

def read(text):
    print("equal")
    while "hang" in text:
        pass
    return [bytes(1 << 30 if "large" in text else 1), text]

worker._math_verify = lambda: (read, lambda gold, answer: gold == answer)
worker.main(int(sys.argv[1]))
"""
"""The real worker, with something else instead of math-verify."""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


@pytest.fixture
def driver(tmp_path: Path) -> Path:
    path = tmp_path / "driver.py"
    path.write_text(DRIVER)
    return path


def pids(program: Path) -> list[int]:
    return [int(pid) for pid in program.with_name("pids").read_text().split()]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def soon(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def test_the_right_answers_are_equal_to_themselves_and_not_to_others() -> None:
    pairs = [(r"\frac{1}{2}", "0.5"), ("x+1", "1+x"), ("x+1", "x-1"), (r"\frac{2469}{20,\!000}", "0.12345"), ("5", "")]
    assert compare(pairs) == [EQUAL, EQUAL, DIFFERENT, EQUAL, DIFFERENT]


def test_nothing_to_compare_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    assert compare([]) == []


def test_comparisons_come_back_in_order_although_the_first_takes_longest(program: Path) -> None:
    pairs = [("run", "time.sleep(0.5)"), *((str(n), str(n % 3)) for n in range(20))]
    with Workers(3, program=program) as workers:
        assert workers.compare(pairs) == [DIFFERENT, *(Comparison(n < 3) for n in range(20))]
        assert workers.compare([("1", "1")]) == [EQUAL]
    assert len(pids(program)) == 3


@pytest.mark.parametrize("hang", ["time.sleep(600)", f"{ALL_SIGNALS}\nwhile True: pass"])
def test_a_comparison_that_takes_too_long_is_killed_and_the_next_is_made(program: Path, hang: str) -> None:
    start = time.monotonic()
    with Workers(1, seconds=1.0, program=program) as workers:
        assert workers.compare([("run", hang), ("1", "1"), ("1", "2")]) == [KILLED, EQUAL, DIFFERENT]
    assert 1.0 <= time.monotonic() - start < 60


def test_a_reply_that_comes_in_pieces_is_one_reply(program: Path) -> None:
    with Workers(1, program=program) as workers:
        assert workers.compare([("in pieces", ""), ("1", "2"), ("in pieces", "")]) == [EQUAL, DIFFERENT, EQUAL]


def test_one_that_hangs_does_not_keep_the_others_waiting(program: Path) -> None:
    with Workers(2, seconds=2.0, program=program) as workers:
        assert workers.compare([("run", "time.sleep(600)"), *[("1", "1")] * 50]) == [KILLED, *[EQUAL] * 50]


@pytest.mark.parametrize(
    "death",
    [
        "os._exit(0)",
        "os.kill(os.getpid(), 11)",
        "raise MemoryError",
        "raise SystemExit",
        "print('nonsense', flush=True)",
        "os.close(1)\nos.close(2)\ntime.sleep(600)",
    ],
)
def test_a_comparison_whose_process_dies_has_failed_and_the_next_is_made(program: Path, death: str) -> None:
    with Workers(1, program=program) as workers:
        assert workers.compare([("1", "1"), ("run", death), ("2", "2")]) == [EQUAL, FAILED, EQUAL]
    assert len(pids(program)) == 2


def test_a_process_that_died_between_two_calls_is_replaced(program: Path) -> None:
    with Workers(1, program=program) as workers:
        assert workers.compare([("1", "1")]) == [EQUAL]
        os.kill(pids(program)[0], signal.SIGKILL)
        assert workers.compare([("1", "1")] * 3)[1:] == [EQUAL] * 2


def test_more_memory_than_is_allowed_is_a_failure_and_what_is_printed_is_no_reply(driver: Path) -> None:
    with Workers(1, memory=1 << 29, program=driver) as workers:
        assert workers.compare([("1", "1"), ("1", "large"), ("1", "2")]) == [EQUAL, FAILED, EQUAL]


def test_a_signal_ends_a_comparison_that_nobody_watches_any_more(driver: Path) -> None:
    request = json.dumps(["1", "hang", -4.0])  # the signal comes five seconds after the time is up
    worker = subprocess.run([sys.executable, driver, str(1 << 30)], input=request, text=True, stdout=subprocess.PIPE)
    assert worker.returncode == -signal.SIGALRM


def test_no_process_is_left_behind(program: Path) -> None:
    with Workers(2, program=program) as workers:
        assert workers.compare([("1", "1")]) == [EQUAL]
        assert soon(lambda: len(pids(program)) == 2)
        assert all(map(alive, pids(program)))
    assert not any(map(alive, pids(program)))


def test_an_interrupt_from_the_keyboard_leaves_no_process_behind(program: Path) -> None:
    script = f"""
import signal
from pathlib import Path
from dreamer_jax.evaluation.benchmarks.verification import Workers
signal.signal(signal.SIGINT, signal.default_int_handler)  # which jobs in the background ignore
with Workers(2, program=Path({str(program)!r})) as workers:
    workers.compare([("run", "time.sleep(600)")] * 4)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert soon(lambda: program.with_name("pids").exists() and len(pids(program)) == 2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to the workers too
    assert "KeyboardInterrupt" in process.communicate(timeout=20)[1]
    assert soon(lambda: not any(map(alive, pids(program))))


def test_a_process_that_does_not_start_is_an_error_that_says_how_to_see_why(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise ImportError")
    with (
        Workers(1, program=tmp_path / "broken.py") as workers,
        pytest.raises(EvaluationError, match=r"math-verify does not start; see: .*broken\.py"),
    ):
        workers.compare([("1", "1")])


def test_without_math_verify_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EvaluationError, match=r"pip install 'dreamer-jax\[eval\]'"):
        compare([("1", "1")])


def test_a_worker_loads_neither_jax_nor_this_package() -> None:
    command = [sys.executable, "-X", "importtime", "-P", str(WORKER), str(2 << 30)]
    worker = subprocess.run(command, input='["1", "1", 5.0]\n', text=True, capture_output=True, check=True)
    modules = {line.split("|")[-1].strip().split(".")[0] for line in worker.stderr.splitlines()}
    assert worker.stdout == "ready\nequal\n"
    assert "math_verify" in modules
    assert not modules & {"jax", "jaxlib", "flax", "dreamer_jax"}
