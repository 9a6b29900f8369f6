"""A process that trains one model and takes steps when asked: what the speed benchmarks compare.

The parent starts one such process for each implementation and lets them run in turns, so that a machine that is slow
for a while is slow for all. They talk in lines of JSON: the child says what it is when it is warm, and then answers
every number n on its standard input with the seconds of n steps.
"""

import ctypes
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Contestant:
    """The parent's end."""

    def __init__(self, command: list[str], spec: dict[str, Any], environment: dict[str, str] | None = None):
        """Start it; `spec` is its last argument."""
        self._name = " ".join(command)
        self._process = subprocess.Popen(
            [*command, json.dumps(spec)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.seconds: list[float] = []
        self.about = self._answer()

    def run(self, steps: int) -> None:
        """Take some steps, and note their seconds."""
        self.about |= self._ask(str(steps))
        self.seconds += self.about.pop("seconds")

    def end(self) -> None:
        """Let it go, with its memory."""
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait()

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        """Its next message."""
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise RuntimeError(f"{self._name} ended with code {self._process.wait()}")


def serve(about: dict[str, Any], step: Callable[[], None], peak_bytes: Callable[[], int]) -> None:
    """The child's end: `step` must return when its work is done."""
    say(about)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            started = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - started)
        say({"seconds": seconds, "peak_bytes": peak_bytes()})


def say(message: dict[str, Any]) -> None:
    """A line to the parent."""
    print(json.dumps(message), flush=True)


class HostMemory:
    """Peak memory of this process beyond what it had at the start, for models that live in host memory."""

    def __init__(self) -> None:
        """Counts from here."""
        self._base = _status("VmRSS")

    def reset(self) -> None:
        """Forget peaks so far, such as the compiler's."""
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """Bytes since the last reset."""
        return _status("VmHWM") - self._base


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))
