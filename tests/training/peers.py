"""Starts processes of tests/training/peer.py."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


class Peer:
    """A process, whose notes can be waited for."""

    def __init__(self, what: str, *, shell: str = "", **variables: str):
        """`shell`: what to do with the command, as in 'exec "$@" 2>&-'."""
        reading, writing = os.pipe()
        self.variables = variables
        given = {"PYTHONPATH": str(ROOT), "PEER_NOTES": str(writing), "DREAMER_INTERRUPTED_CODE": "75"}
        command = [sys.executable, "-u", "-m", "tests.training.peer", what]
        self.process = subprocess.Popen(
            ["sh", "-c", shell, "sh", *command] if shell else command,
            env=os.environ | given | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            pass_fds=(writing,),
        )
        os.close(writing)
        self._notes = os.fdopen(reading)

    def noted(self, text: str) -> None:
        """Wait for a note; it must be the next."""
        line = self._notes.readline().strip()
        assert line == text, f"{line!r}, not {text!r}: {'' if line else self.process.communicate(timeout=60)[0]}"

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def ended(self, seconds: float = 60) -> tuple[int, str]:
        """The exit code and the output, after the process has ended by itself."""
        output = ""
        try:
            if self.process.stdout.closed:
                self.process.wait(seconds)
            else:
                output = self.process.communicate(timeout=seconds)[0]
        finally:
            self.process.kill()
            self.process.wait()
            self._notes.close()
        return self.process.returncode, output


def group(*what: str | None, count: int | None = None, **variables: str) -> list[Peer]:
    """Peers of one run, one for each that is told something; `count` of them are expected."""
    place = {"DREAMER_COORDINATOR": f"localhost:{free_port()}", "DREAMER_PROCESSES": str(count or len(what))}
    return [Peer(told, DREAMER_PROCESS=str(i), **place, **variables) for i, told in enumerate(what) if told]


def seconds_until(peers: list[Peer]) -> tuple[float, list[tuple[int, str]]]:
    """How long they take to end, and how they do."""
    began = time.monotonic()
    ends = [peer.ended() for peer in peers]
    return time.monotonic() - began, ends
