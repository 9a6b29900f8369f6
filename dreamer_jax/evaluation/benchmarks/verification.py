"""Comparing answers with math-verify, in processes that are killed when a comparison takes too long.

SymPy may compute for hours, use up the memory, or end its process, over an answer that a model made up. Time limits
within the process do not hold: they are signals, which threads never get and which C code puts off. So the comparisons
are made by other processes, and watched from here.
"""

import contextlib
import importlib.util
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple

from dreamer_jax.evaluation.requests import EvaluationError

SECONDS = 5.0
"""Wall-clock time of one comparison. Of answers such as those of MATH, none takes a second."""
MEMORY = 2 << 30
"""Bytes of address space of one worker."""
STARTING_SECONDS = 120.0
"""Wall-clock time in which a worker has to be ready; a second or two on an idle machine."""
WORKER = Path(__file__).with_name("verification_worker.py")


class Comparison(NamedTuple):
    """Whether an answer is the right one."""

    equal: bool
    fault: Literal["", "killed", "failed"] = ""
    """`killed`: it took too long. `failed`: its process ended, or was short of memory. Neither is equal."""


def compare(pairs: Sequence[tuple[str, str]], *, seconds: float = SECONDS) -> list[Comparison]:
    """Compare pairs of LaTeX, the right answer first, with as many workers as `Workers` starts by itself.

    Raises:
        EvaluationError: math-verify is not installed, or its processes do not start.
    """
    if not pairs:
        return []
    with Workers(min(default_workers(), len(pairs)), seconds=seconds) as workers:
        return workers.compare(pairs)


def check_installed() -> None:
    """Raise EvaluationError if math-verify is not there."""
    if importlib.util.find_spec("math_verify") is None:
        raise EvaluationError("math-verify is not installed; install it with: pip install 'dreamer-jax[eval]'")


def default_workers() -> int:
    """A few, and no more than there are cores."""
    return min(4, os.cpu_count() or 1)


class Workers:
    """Processes that compare. As a context manager it leaves none behind, however it is left."""

    def __init__(
        self, count: int | None = None, *, seconds: float = SECONDS, memory: int = MEMORY, program: Path = WORKER
    ):
        """Start them.

        Args:
            count: how many; None for `default_workers`.
            seconds: wall-clock time of one comparison.
            memory: bytes of address space of one worker; has no effect where the platform cannot limit it.
            program: what they run; it speaks as `verification_worker.py` says.

        Raises:
            EvaluationError: math-verify is not installed.
        """
        check_installed()
        self._seconds = seconds
        self._command = [sys.executable, "-P", str(program), str(memory)]
        self._workers: list[_Worker] = []
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            self._workers += (_Worker(self._command) for _ in range(default_workers() if count is None else count))
            stack.pop_all()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all processes, whatever they do."""
        while self._workers:
            self._workers[-1].end()
            self._workers.pop()

    def compare(self, pairs: Sequence[tuple[str, str]]) -> list[Comparison]:
        """A comparison for each pair of LaTeX, the right answer first, in order.

        Raises:
            EvaluationError: a worker does not start.
        """
        done: dict[int, Comparison] = {}
        waiting = iter(range(len(pairs)))
        try:
            while len(done) < len(pairs):
                for worker in self._workers:
                    self._give(worker, waiting, pairs)
                for worker in self._ready():
                    done.update(self._take(worker))
        except BaseException:
            self.close()  # replies to come would be taken for those of another call
            raise
        return [done[number] for number in range(len(pairs))]

    def _give(self, worker: "_Worker", waiting: Iterator[int], pairs: Sequence[tuple[str, str]]) -> None:
        """Work for an idle worker, if there is some."""
        if not worker.starting and worker.task is None and (task := next(waiting, None)) is not None:
            worker.give(task, [*pairs[task], self._seconds], self._seconds)

    def _ready(self) -> "list[_Worker]":
        """The workers that have said something, have ended or are late; waits for the first."""
        now = time.monotonic()
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                selector.register(worker.replies, selectors.EVENT_READ, worker)
            events = selector.select(max(0.0, min(worker.deadline for worker in self._workers) - now))
        spoken = [key.data for key, _ in events]
        now = time.monotonic()
        return [worker for worker in self._workers if worker in spoken or worker.deadline <= now]

    def _take(self, worker: "_Worker") -> dict[int, Comparison]:
        """What a worker has found, by the number of its pair; one that has ended or is late is replaced."""
        task, reply = worker.task, worker.reply()
        if reply in ("equal", "different", "failed") and task is not None:
            worker.rest()
            return {task: Comparison(reply == "equal", "failed" if reply == "failed" else "")}
        if reply == "ready" and worker.starting:
            worker.rest()
            return {}
        if reply is None and worker.deadline > time.monotonic():
            return {}
        worker.end()
        if worker.starting:
            raise EvaluationError(f"a process of math-verify does not start; see: {' '.join(self._command)}")
        self._workers[self._workers.index(worker)] = _Worker(self._command)
        return {} if task is None else {task: Comparison(False, "killed" if reply is None else "failed")}


class _Worker:
    """One process."""

    def __init__(self, command: Sequence[str]):
        # SymPy's results may depend on the order of sets, which hashes decide.
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self.replies = self._process.stdin, self._process.stdout
        self.starting, self._line = True, b""
        self.task: int | None = None
        self.deadline = time.monotonic() + STARTING_SECONDS

    def give(self, task: int, request: object, seconds: float) -> None:
        """Let it work on a request for some seconds."""
        self.task, self.deadline = task, time.monotonic() + seconds
        with contextlib.suppress(BrokenPipeError):  # it has ended: its replies will say so
            self._requests.write(json.dumps(request).encode() + b"\n")
            self._requests.flush()

    def rest(self) -> None:
        """It has nothing to do."""
        self.starting, self.task, self.deadline = False, None, float("inf")

    def reply(self) -> str | None:
        """The line that it has written, empty if it has ended; None if there is none, or not all of it."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.replies, selectors.EVENT_READ)
            if not selector.select(0):
                return None
        piece = os.read(self.replies.fileno(), 64)
        self._line += piece
        if piece and not piece.endswith(b"\n"):
            return None
        line, self._line = self._line, b""
        return line.decode(errors="replace").strip() if piece else ""

    def end(self) -> None:
        """Kill it, and wait until it is gone."""
        self._process.kill()
        with contextlib.suppress(BrokenPipeError):  # of what it has not read
            self._requests.close()
        self.replies.close()
        self._process.wait()
