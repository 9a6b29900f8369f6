"""Many processes, one run: who takes part, and how all of them end when one of them fails.

Every process runs the same program on its own devices (JAX's multi-controller); JAX's coordination service, which lives
in process 0, brings them together. A run ends early in one of four ways, and none leaves a process waiting for ever:

    a process is killed       the service misses its heartbeats for `distributed.heartbeat_s`
    process 0 is killed       the connection to the service breaks, at once
    a process raises          it leaves its last words in the service's key-value store, where all listen
    no step is finished       the watchdog of every process, after `distributed.hang_s`, shows what its threads do

Nothing here imports JAX before `joined` is called, so that `--help` need not wait for it.
"""

import contextlib
import faulthandler
import math
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dreamer_jax.config import DistributedConfig
from dreamer_jax.errors import DreamerError

COORDINATOR, PROCESSES, PROCESS = "DREAMER_COORDINATOR", "DREAMER_PROCESSES", "DREAMER_PROCESS"
"""Environment: host:port of process 0, the number of processes, this one's number. They differ from process to process
and from start to start, so they are no part of a run's config."""

START_SECONDS = 300
"""How long processes wait for each other at the start."""
LEAVE_SECONDS = 600
"""How long a process that is done waits for the others."""
SLOW = 10
"""Allowance of what compiles or writes much (the first step, a validation, a checkpoint), in units of hang_s."""
LINGER_SECONDS = 2.0
"""How long process 0 outlives a failure: the others hear of it through the service that it hosts."""
VISIBLE_SECONDS = 60.0
"""How long a network file system may take to show one machine what another has written."""
HUNG = "no step finished for"
END = "dreamer/end"
DAY_MS = 24 * 3600 * 1000


class DistributedError(DreamerError, RuntimeError):
    """Processes that cannot come together; the message names the cause and the fix."""


def becomes_visible(there: Callable[[], bool]) -> bool:
    """Wait until `there()`, which looks at a file that another process has written; False if it does not come."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not there():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


class Group:
    """This process among those of the run; by itself, the only one."""

    def __init__(self, settings: DistributedConfig | None = None, client: Any = None, index: int = 0, count: int = 1):
        """Nothing is started; `client` is that of JAX's coordination service."""
        self._settings, self._client = settings or DistributedConfig(), client
        self.index, self.count = index, count
        self.names = [f"process {i}" for i in range(count)]
        self._topics = 0
        self._leaving, self._left = threading.Event(), threading.Event()
        self._doing = ("the start", math.inf, math.inf)  # preparing data may take hours

    def beat(self, doing: str, *, slow: bool = False) -> None:
        """Something is done, and `doing` comes next; if it is not done in time, the watchdog ends the process."""
        seconds = self._settings.hang_s * (SLOW if slow else 1)
        self._doing = (doing, seconds, time.monotonic() + seconds)

    def told(self, topic: str, value: str = "") -> str:
        """What process 0 has to say; the others wait for it. All must ask for the same topics in the same order."""
        self._topics += 1
        key = f"dreamer/told/{self._topics}/{topic}"
        if self.index:
            return self._client.blocking_key_value_get(key, DAY_MS)
        if self.count > 1:
            self._client.key_value_set(key, value)
        return value

    def meet(self, topic: str) -> None:
        """Wait until all processes are here; all must meet at the same topics in the same order."""
        self._topics += 1
        if self.count > 1:
            self._client.wait_at_barrier(f"dreamer/meet/{self._topics}/{topic}", DAY_MS)

    def watch(self) -> None:
        """Introduce the processes to each other, and start the threads that look for failures."""
        if self.count > 1:
            own = f"process {self.index} ({socket.gethostname()}, pid {os.getpid()})"
            self._client.key_value_set(f"dreamer/name/{self.index}", own)
            self._client.wait_at_barrier("dreamer/named", START_SECONDS * 1000)
            for key, name in self._client.key_value_dir_get("dreamer/name/"):
                self.names[int(key.rpartition("/")[2])] = name
            threading.Thread(target=self._count_peers, name="peers", daemon=True).start()
        threading.Thread(target=self._listen, name="watchdog", daemon=True).start()

    def leave(self) -> None:
        """Wait until all are done, then part: what follows may take as long as it likes."""
        self.beat("the end of the run", slow=True)
        self._leaving.set()
        if self.count > 1:
            import jax

            self._client.wait_at_barrier("dreamer/leave", LEAVE_SECONDS * 1000)
            self._left.set()
            jax.distributed.shutdown()
        self._left.set()

    def abandon(self, error: BaseException) -> None:
        """Show the error, tell the other processes and end this one; returns only where there are no others."""
        if self.count == 1:
            self._left.set()
            return
        own = type(error).__module__.startswith("dreamer_jax.")  # written for users; others are bugs and show where
        print(f"error: {error}" if own else "".join(traceback.format_exception(error)), file=sys.stderr, flush=True)
        if _may_be_an_echo(error):
            # A peer's death breaks a collective at once, but only missing heartbeats tell whose it was.
            print("looking for a process that failed first ...", file=sys.stderr, flush=True)
            time.sleep(self._settings.heartbeat_s + 5)
        words = str(error).strip().partition("\n")[0]
        self._announce(f"{self.names[self.index]} stopped: {type(error).__name__}: {words}")
        self._exit()

    def _announce(self, words: str) -> None:
        """Leave last words, unless another process was faster or the service is gone."""
        self._left.set()
        if self._client is not None:
            with contextlib.suppress(Exception):
                self._client.key_value_set(END, words)

    def _exit(self) -> None:
        """End the process at once: an orderly exit would wait for the others."""
        sys.stdout.flush()
        sys.stderr.flush()
        if self.index == 0 and self.count > 1:
            time.sleep(LINGER_SECONDS)
        os._exit(1)

    def _end(self, words: str) -> None:
        """Say why the run ends, and end it."""
        if self._left.is_set():
            return
        doing, _, _ = self._doing
        print(f"\nerror: {words}\n{self.names[self.index]} ends; it was in {doing}", file=sys.stderr, flush=True)
        if HUNG in words:
            faulthandler.dump_traceback(all_threads=True)
        self._exit()

    def _listen(self) -> None:
        """Thread: hear the last words of others, and notice when this process gets nowhere."""
        while not self._left.is_set():
            if words := self._last_words():
                self._end(words)
            doing, seconds, deadline = self._doing
            if self._settings.hang_s and time.monotonic() > deadline and not self._left.is_set():
                words = f"{self.names[self.index]}: {HUNG} {seconds:g} s, in {doing}"
                if self._client is not None:
                    with contextlib.suppress(Exception):
                        self._client.key_value_set(END, words)
                self._end(words)

    def _last_words(self) -> str | None:
        """Wait a second for another process's last words."""
        if self._client is None:
            self._left.wait(1.0)
            return None
        try:
            return self._client.blocking_key_value_get(END, 1000)
        except Exception as error:
            return None if "DEADLINE_EXCEEDED" in str(error) else f"{self.names[0]} died: it no longer answers"

    def _count_peers(self) -> None:
        """Thread: ask again and again who is alive; all processes take part, so none is missed or blamed wrongly."""
        while not self._leaving.wait(1.0):
            try:
                alive = self._client.get_live_nodes(list(range(self.count)))
            except Exception:
                return  # the service is gone, which `_listen` finds, too
            dead = [name for i, name in enumerate(self.names) if i not in alive]
            if dead and not self._leaving.is_set():
                self._end(f"{', '.join(dead)} died: no heartbeat for {self._settings.heartbeat_s} s")


@contextlib.contextmanager
def joined(settings: DistributedConfig) -> Iterator[Group]:
    """This process's place in the run. To be entered before JAX is used; an exception inside ends all processes.

    Raises:
        DistributedError: wrong or incomplete settings, or processes that do not come together.
    """
    group = _join(settings)
    try:
        yield group
    except BaseException as error:
        group.abandon(error)
        raise
    group.leave()


def _join(settings: DistributedConfig) -> Group:
    place = explicit_place(os.environ) or detected_place()
    if place is None:
        group = Group(settings)
        group.watch()
        return group
    import jax
    from jax._src.distributed import global_state  # the key-value store has no public door

    # SIGTERM stays ours: training/preemption.py lets the processes agree on a step.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **place,
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=settings.heartbeat_s,
            shutdown_timeout_seconds=LEAVE_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            f"the processes did not come together within {START_SECONDS} s ({error}); start all of them, each with its "
            f"own number, and let them reach process 0 at {place.get('coordinator_address', 'its address')}"
        ) from error
    group = Group(settings, global_state.client, jax.process_index(), jax.process_count())
    group.watch()
    return group


def explicit_place(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """The arguments of `jax.distributed.initialize` that the environment gives; None for one process or no settings.

    Raises:
        DistributedError: some of the three variables are missing, or do not fit.
    """
    given = {name: environment[name] for name in (COORDINATOR, PROCESSES, PROCESS) if environment.get(name)}
    if not given:
        return None
    missing = [name for name in (COORDINATOR, PROCESSES, PROCESS) if name not in given]
    if missing:
        raise DistributedError(
            f"{', '.join(given)} without {', '.join(missing)}: set all three (host:port of process 0, number of "
            f"processes, number of this process from 0), or none for one process or a detected cluster"
        )
    address, port = given[COORDINATOR].rpartition(":")[::2]
    if not address or not port.isdigit():
        raise DistributedError(f"{COORDINATOR} = '{given[COORDINATOR]}': give host:port, such as 10.0.0.1:8476")
    count, index = (_number(name, given[name]) for name in (PROCESSES, PROCESS))
    if not index < count:
        raise DistributedError(f"{PROCESS} = {index} with {PROCESSES} = {count}: give 0 to {max(count - 1, 0)}")
    if count == 1:
        return None
    place = {"coordinator_address": given[COORDINATOR], "num_processes": count, "process_id": index}
    return place | {"cluster_detection_method": "deactivate"}


def _number(name: str, text: str) -> int:
    if not text.isdigit():
        raise DistributedError(f"{name} = '{text}': give a whole number")
    return int(text)


def detected_place() -> dict[str, Any] | None:
    """Arguments, mostly {}, if JAX recognises a cluster (SLURM, Open MPI, TPU pod, Kubernetes) with several processes.

    A single process is not initialised: a shell inside of a one-task job stays an ordinary shell.
    """
    from jax._src.clusters import ClusterEnv

    for cluster in ClusterEnv._cluster_types:
        if cluster.opt_in_only_method or not cluster.is_env_present():
            continue
        try:
            return slurm_devices(os.environ) if cluster.get_process_count() > 1 else None
        except Exception as error:  # each kind of cluster has its own
            print(
                f"warning: this looks like a cluster ({cluster.__name__}), but it does not say how many processes "
                f"there are ({error}); going on as one. Set {COORDINATOR}, {PROCESSES} and {PROCESS} for several.",
                file=sys.stderr,
            )
            return None
    return None


def slurm_devices(environment: Mapping[str, str]) -> dict[str, Any]:
    """All GPUs of the node for a task that has the node to itself; JAX would give it only the first."""
    one_a_node = re.fullmatch(r"1(\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    gpus = environment.get("SLURM_GPUS_ON_NODE", "")
    if not one_a_node or not gpus.isdigit() or int(gpus) < 2 or environment.get("JAX_LOCAL_DEVICE_IDS"):
        return {}
    return {"local_device_ids": list(range(int(gpus)))}


def _may_be_an_echo(error: BaseException | None) -> bool:
    """Whether it, or what led to it, may come from a broken collective or barrier, behind which a peer has died.

    JAX raises several types for them; what they share is the name of a status code in front.
    """
    while error is not None:
        if re.match(
            r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION)\b", str(error)
        ):
            return True
        error = error.__cause__ or error.__context__
    return False
