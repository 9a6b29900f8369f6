"""All runs of a comparison, several at a time, each in a process of its own."""

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from benchmarks.evidence.accuracy import check_tests
from benchmarks.evidence.findings import CONFIG, finding, is_done
from benchmarks.evidence.setup import Run, Setup, config_of, steps_of
from dreamer_jax.config import Config, from_json
from dreamer_jax.data.builder import prepare
from dreamer_jax.kernels.native.huge_pages import with_huge_pages
from dreamer_jax.training.checkpoint import changed_keys
from dreamer_jax.values import require

ROOT = Path(__file__).resolve().parents[2]
"""The folder of the project, in which benchmarks is found."""
MAY_CHANGE = {"out", "data.prepared", "train.steps", "optimizer.cooldown_start", "optimizer.cooldown_steps"}
"""Keys that may differ from those that a run was begun with: where it lies, how far it goes, and how it ends."""


class Process(Protocol):
    """What is needed of the process of a run; subprocess.Popen is one."""

    def poll(self) -> int | None:
        """The exit code; None while it runs."""

    def terminate(self) -> None:
        """Ask it to end."""

    def wait(self) -> int:
        """Wait for its end; the exit code."""


Start = Callable[[Run, int], Process]
"""Starts a run in one of the places that there are, which are counted from 0."""


def carried_out(
    setup: Setup, runs: Sequence[Run], out: Path, start: Start, *, jobs: int, minutes: float = math.inf
) -> list[Run]:
    """Carry out the runs that are not done, in their order; returns those that failed.

    Args:
        setup: of the family.
        runs: all runs that are wanted.
        out: folder of the family's runs.
        start: starts one of them.
        jobs: runs at a time.
        minutes: no run is started later than that.

    Raises:
        DataError: a test asks for what is trained on.
    """
    waiting = [run for run in runs if not is_done(finding(run, out), steps_of(setup, run))]
    if not waiting:
        return []
    check_tests(setup)
    prepare(config_of(setup, waiting[0], out))  # before several runs do it at the same time
    deadline = time.monotonic() + 60 * minutes
    return worked_off(waiting, start, jobs, may_start=lambda: time.monotonic() < deadline)


def check_folders(config: Callable[[Run], Config], runs: Sequence[Run], out: Path) -> None:
    """Make sure that what is there of the runs was trained as it would be now.

    Args:
        config: of a run.
        runs: all runs that are wanted.
        out: their folder.

    Raises:
        ConfigError: a run was trained with another one.
    """
    for run in runs:
        path = out / run.name / CONFIG
        changed = changed_setting(path.read_text(), config(run)) if path.is_file() else ""
        require(
            not changed,
            f"'{path.parent}' was trained with another setup ({changed}); give another --out, or delete the folder",
        )


def changed_setting(theirs: str, ours: Config) -> str:
    """In words, what a run was trained with that is otherwise now; empty if nothing is.

    Args:
        theirs: its config as JSON.
        ours: the config that it would have now.
    """
    changed = set(changed_keys(from_json(theirs), ours)) - MAY_CHANGE
    return f"it differs in {', '.join(sorted(changed))}" if changed else ""


def command_of(run: Run, out: Path, small: bool) -> list[str]:
    """The arguments of Python that carry out a run."""
    given = ["--family", run.family, "--variant", run.variant, "--width", str(run.width), "--seed", str(run.seed)]
    given += [] if run.rate is None else ["--rate", str(run.rate)]
    return ["-m", "benchmarks.evidence.worker", *given, "--out", str(out.absolute()), *(["--small"] if small else [])]


def in_processes(out: Path, command: Callable[[Run], Sequence[str]], jobs: int) -> Start:
    """What starts a run in a process of its own; where several run at a time, each has a core of its own.

    What it prints goes to log.txt in the folder of the run.

    Args:
        out: folder of the runs.
        command: the arguments of Python that carry a run out; it takes a core with --core.
        jobs: runs at a time.
    """
    cores = sorted(os.sched_getaffinity(0)) if jobs > 1 else []

    def start(run: Run, place: int) -> subprocess.Popen[bytes]:
        core = ["--core", str(cores[place % len(cores)])] if cores else []
        folder = out / run.name
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *command(run), *core],
                cwd=ROOT,
                env=with_huge_pages(os.environ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    return start


def worked_off(
    runs: Sequence[Run],
    start: Start,
    jobs: int,
    may_start: Callable[[], bool] = lambda: True,
    pause: float = 0.5,
) -> list[Run]:
    """Carry out runs in their order, `jobs` at a time; returns those that failed.

    When an error or Ctrl-C ends this, the runs that still go on are asked to end, and save what they have.
    """
    waiting, failed = list(reversed(runs)), list[Run]()
    running: dict[int, tuple[Run, Process]] = {}
    try:
        while running or (waiting and may_start()):
            free = (place for place in range(jobs) if place not in running)
            for place in free:
                if waiting and may_start():
                    run = waiting.pop()
                    running[place] = run, start(run, place)
                    print(f"{run.name}: started, {len(waiting)} more wait", flush=True)
            time.sleep(pause)
            for place, run, code in list(_ended(running)):
                del running[place]
                print(f"{run.name}: {'done' if code == 0 else f'ended with {code}, see its log.txt'}", flush=True)
                failed += [run] if code else []
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()
    return failed


def _ended(running: dict[int, tuple[Run, Process]]) -> Iterator[tuple[int, Run, int]]:
    for place, (run, process) in running.items():
        if (code := process.poll()) is not None:
            yield place, run, code
