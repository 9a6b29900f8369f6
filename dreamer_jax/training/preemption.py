"""SIGTERM and Ctrl-C: finish the step, save, leave; many processes agree on which step that is."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dreamer_jax.sharding import replicated


class Preemption:
    """Whether the run has been asked to stop, and by what."""

    signal_name: str | None = None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            # A second Ctrl-C ends the process at once: the user means it.
            signal.signal(number, signal.SIG_DFL)
        # SIGTERM may come again while the state is being saved: schedulers send it when a grace period begins and when
        # it ends, to a process and through its launcher. What they mean to kill they send SIGKILL.
        self.signal_name = self.signal_name or signal.Signals(number).name


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


class Agreement:
    """Whether to stop, the same in all processes although a signal may reach only one, and at its own time.

    Each step is followed by a sum over devices of who was asked. It is read a step later, when it has long been
    computed: every process sees the same sum after the same step, and none waits for it.
    """

    def __init__(self, asked: Preemption, mesh: Mesh):
        """Compiles on first use."""
        self._asked, self._alone = asked, jax.process_count() == 1
        place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._no, self._yes = (
            jax.make_array_from_process_local_data(place, np.full(mesh.local_mesh.size, vote, np.int32), (mesh.size,))
            for vote in (0, 1)
        )
        self._sum = jax.jit(jnp.sum, out_shardings=replicated(mesh))
        self._pending: jax.Array | None = None

    def stop(self) -> bool:
        """Whether the step just dispatched is the last; to be asked once a step, by all processes."""
        if self._alone:
            return self._asked.signal_name is not None
        before, self._pending = self._pending, self._sum(self._yes if self._asked.signal_name else self._no)
        return before is not None and int(before) > 0
