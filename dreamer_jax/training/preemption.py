"""SIGTERM and Ctrl-C: finish the step, save, leave."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class Preemption:
    """Whether the run has been asked to stop, and by what."""

    signal_name: str | None = None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        # A second signal ends the process at once: the user means it.
        signal.signal(number, signal.SIG_DFL)
        self.signal_name = signal.Signals(number).name


@contextlib.contextmanager
def preemption() -> Iterator[Preemption]:
    """Turn the first SIGTERM or SIGINT into a request to stop after the step in progress."""
    asked = Preemption()
    previous = {number: signal.signal(number, asked._ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
