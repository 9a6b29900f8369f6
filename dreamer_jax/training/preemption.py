"""Signals: finish the step, save, leave; many processes agree on which step that is.

SIGTERM, Ctrl-C, SIGHUP (the terminal is gone) and SIGUSR1 (SLURM's warning) ask for the same. Before the first step
there is nothing to save, and a process ends at once, whatever it does: it imports, prepares data, waits for others,
compiles. Python runs a handler only between two of its instructions, which may be minutes apart then; so a thread acts,
too.

To be imported first of all, this module imports nothing that takes time.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from dreamer_jax.errors import DreamerError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
INTERRUPTED_CODE = "DREAMER_INTERRUPTED_CODE"
"""Environment: exit code of a run that a signal ended before its last step (0 without it). Launchers set it, to tell
such a run from a finished one."""


class PreemptionError(DreamerError, ValueError):
    """A code that no process can end with."""


def interrupted_code() -> int:
    """The exit code of a run that a signal ended.

    Raises:
        PreemptionError: the environment's is none.
    """
    text = os.environ.get(INTERRUPTED_CODE) or "0"
    if not (text.isascii() and text.isdecimal() and int(text) < 256):
        raise PreemptionError(f"{INTERRUPTED_CODE} = '{text}': give a whole number from 0 to 255")
    return int(text)


def _code_or_failure() -> int:
    try:
        return interrupted_code()
    except PreemptionError:
        return 1  # the run will say why


class Preemption:
    """Whether the run has been asked to stop, and by what."""

    signal_name: str | None = None
    stopped = False
    """Whether the run has stopped for it."""

    def __init__(self) -> None:
        """A signal is noted, for the run to stop after the step in progress."""
        self._lock = threading.RLock()  # the handler may come while its thread, the main one, holds it
        self._idle: tuple[str, int] | None = None

    def idle(self, state: str, code: int) -> None:
        """From now on a signal ends the process at once: nothing is lost."""
        with self._lock:
            self._idle = (state, code)

    def busy(self) -> None:
        """From now on a signal is noted."""
        with self._lock:
            self._idle = None

    def note(self, number: int) -> None:
        """A signal has come; only the first counts."""
        with self._lock:
            self.signal_name = self.signal_name or signal.Signals(number).name
            self.end_if_idle()

    def end_if_idle(self) -> None:
        """End the process if a signal has come, and nothing is lost."""
        with self._lock:
            if self._idle and self.signal_name:
                state, code = self._idle
                _end(f"{self.signal_name} {state}", code)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            # A second Ctrl-C ends the process at once: the user means it.
            signal.signal(number, signal.SIG_DFL)
        # SIGTERM may come again while the state is being saved: schedulers send it when a grace period begins and when
        # it ends, to a process and through its launcher. What they mean to kill they send SIGKILL.
        self.note(number)

    def _listen(self, descriptor: int) -> None:
        while numbers := os.read(descriptor, 64):
            for number in numbers:
                if number in SIGNALS:
                    self.note(number)


def _end(words: str, code: int) -> None:
    """End this process, and the others of the run."""
    with contextlib.suppress(Exception):  # absent or half imported at the very start, when there are no others yet
        sys.modules["dreamer_jax.distributed"].end(words, code)
    with contextlib.suppress(Exception):  # no stderr
        os.write(sys.stderr.fileno(), f"{words}\n".encode())
    os._exit(code)


_of_process: Preemption | None = None
"""Where signals go since `early_signals`."""


def early_signals() -> None:
    """Take signals from now to the end of this process. Its main thread calls it, before anything that takes time.

    Call it before `restart_with_huge_pages`, too: that one holds signals back, for this one to take them.
    """
    global _of_process
    asked = _of_process = Preemption()
    asked.idle("before the first step: nothing to save", _code_or_failure())
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    threading.Thread(target=asked._listen, args=(reading,), name="signals", daemon=True).start()
    previous = _handle(asked)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def forget() -> None:
        signal.set_wakeup_fd(-1)  # else a signal to this child would be its parent's, too
        _restore(previous)

    os.register_at_fork(after_in_child=forget)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # blocked while the process restarted itself


def all_is_saved(code: int) -> None:
    """The run is over: from now on a signal ends the process at once, with this code."""
    if _of_process:
        _of_process.idle("after the end: all is saved", code)
        if not _of_process.stopped:  # one that came too late for a step: nothing of what follows is worth a delay
            _of_process.end_if_idle()


@contextlib.contextmanager
def preemption() -> Iterator[Preemption]:
    """Turn the first signal into a request to stop after the step in progress."""
    if _of_process:
        with _or_error(_of_process):
            yield _of_process
        return
    asked = Preemption()
    previous = _handle(asked) if threading.current_thread() is threading.main_thread() else {}
    try:
        yield asked
    finally:
        _restore(previous)


@contextlib.contextmanager
def _or_error(asked: Preemption) -> Iterator[None]:
    try:
        yield
    except BaseException:
        asked.idle("after an error", 1)
        raise


def _handle(asked: Preemption) -> dict[int, Any]:
    """Let `asked` handle the signals; returns the handlers before it. What nohup has let ignored stays so."""
    numbers = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    return {number: signal.signal(number, asked._ask) for number in numbers}


def _restore(previous: dict[int, Any]) -> None:
    for number, handler in previous.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


class Agreement:
    """Whether to stop, the same in all processes although a signal may reach only one, and at its own time.

    Each step is followed by a sum over devices of who was asked. It is read a step later, when it has long been
    computed: every process sees the same sum after the same step, and none waits for it.
    """

    def __init__(self, asked: Preemption, mesh: Any):
        """Compiles on first use."""
        import jax
        import jax.numpy as jnp
        import numpy as np
        from jax.sharding import NamedSharding, PartitionSpec

        from dreamer_jax.sharding import replicated

        self._asked, self._alone = asked, jax.process_count() == 1
        place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._no, self._yes = (
            jax.make_array_from_process_local_data(place, np.full(mesh.local_mesh.size, vote, np.int32), (mesh.size,))
            for vote in (0, 1)
        )
        self._sum = jax.jit(jnp.sum, out_shardings=replicated(mesh))
        self._pending: Any = None

    def stop(self) -> bool:
        """Whether the step just dispatched is the last; to be asked once a step, by all processes."""
        self._asked.busy()  # from the first step on, there is something to save
        self._asked.stopped = self._asked.signal_name is not None if self._alone else self._voted()
        return self._asked.stopped

    def _voted(self) -> bool:
        before, self._pending = self._pending, self._sum(self._yes if self._asked.signal_name else self._no)
        return before is not None and int(before) > 0
