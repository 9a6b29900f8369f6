"""Many processes, one run: who takes part, and how all of them end when one of them fails.

Every process runs the same program on its own devices (JAX's multi-controller); JAX's coordination service, which lives
in process 0, brings them together. A run ends early in one of six ways, and none leaves a process waiting for ever:

    a process dies at the start   its line to process 0 breaks, at once (gathering.py)
    a process is killed           the service misses its heartbeats for `distributed.heartbeat_s`
    process 0 is killed           the connection to the service breaks, at once
    process 0 is stopped          it does not answer for a part of `distributed.heartbeat_s`
    a process raises, or is       it leaves its last words in the service's key-value store, where all listen, before
    told to end before it steps   it shows anything: output may be closed, full or stuck
    no step is finished           the watchdog of every process, after `distributed.hang_s`, shows what its threads do

Nothing here imports JAX before `joined` is called, so that `--help` need not wait for it.
"""

import contextlib
import math
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from dreamer_jax.config import DistributedConfig
from dreamer_jax.door import explained
from dreamer_jax.gathering import PATIENCE_SECONDS, DistributedError, Guest, Host, host_and_port, listed, show

COORDINATOR, PROCESSES, PROCESS = "DREAMER_COORDINATOR", "DREAMER_PROCESSES", "DREAMER_PROCESS"
"""Environment: host:port of process 0, the number of processes, this one's number. They differ from process to process
and from start to start, so they are no part of a run's config."""

START = "DREAMER_START_SECONDS"
"""Environment: how long processes wait for each other at the start."""
START_SECONDS = 300
LEAVE_SECONDS = 600
"""How long a process that is done waits for the others."""
SLOW = 10
"""Allowance of what compiles or writes much (the first step, a validation, a checkpoint), in units of hang_s."""
LINGER_SECONDS = 2.0
"""How long process 0 outlives a failure: the others hear of it through the service that it hosts."""
HEAR_SECONDS = 0.5
"""How often a process looks for the last words of others."""
VISIBLE_SECONDS = 60.0
"""How long a network file system may take to show one machine what another has written."""
SILENT = 0.3
"""Part of heartbeat_s after which process 0 is suspected if it does not answer; JAX ends the process after 0.5 to 1."""
NO_PROXY = ("no_grpc_proxy", "no_proxy")
"""Environment: hosts that gRPC reaches directly; if the first is given, the second does not count."""
HUNG = "no step finished for"
END = "dreamer/end"
DAY_MS = 24 * 3600 * 1000


_present: Any = None
"""Who tells the other processes that this one ends: a Host or Guest while they gather, then the Group."""


def end(words: str, code: int) -> NoReturn:
    """Tell the other processes why this one ends, say so, and end at once: an orderly exit would wait for them."""
    if _present is not None:
        _present.announce(code, f"{own_name(_present.index)}: {words}")
    show(words)
    _exit(code)


def own_name(index: int) -> str:
    """What others call this process."""
    return f"process {index} ({socket.gethostname()}, pid {os.getpid()})"


def _exit(code: int) -> NoReturn:
    """End the process, whatever its threads do."""
    if _present is not None and _present.index == 0 and _present.count > 1:
        time.sleep(LINGER_SECONDS)
    os._exit(code)


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
        self._asked: float | None = None
        """Since when an answer of process 0 is due."""
        self._threads: list[threading.Thread] = []

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
        """Start the threads that look for failures."""
        targets = [self._watch, self._hear, self._count_peers] if self.count > 1 else [self._watch]
        self._threads = [threading.Thread(target=target, name=target.__name__, daemon=True) for target in targets]
        for thread in self._threads:
            thread.start()

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
        for thread in self._threads:  # one that comes back from JAX while Python ends would abort the process
            thread.join(LINGER_SECONDS)

    def abandon(self, error: BaseException) -> None:
        """Tell the other processes of the error, show it and end this one; returns only where there are no others."""
        if self.count == 1:
            self._left.set()
            return
        line = explained(error, "out")  # None for bugs, which show where they are
        text = f"error: {line}" if line else "".join(traceback.format_exception(error))
        if _may_be_an_echo(error):
            # A peer's death breaks a collective at once, but only missing heartbeats tell whose it was.
            show(f"{text}\nlooking for a process that failed first ...")
            time.sleep(self._settings.heartbeat_s + 5)
            text = "found none"
        words = str(error).strip().partition("\n")[0]
        self.announce(1, f"{self.names[self.index]} stopped: {type(error).__name__}: {words}")
        show(text)
        _exit(1)

    def announce(self, code: int, words: str) -> None:
        """Leave last words, and end the threads that listen for those of others."""
        self._left.set()
        self._tell(code, words)

    def _tell(self, code: int, words: str) -> None:
        """Leave last words, unless another process was faster or the service is gone."""
        if self._client is not None:
            with contextlib.suppress(Exception):
                self._client.key_value_set(END, f"{code} {words}")

    def _end(self, words: str, code: int = 1) -> None:
        """Say why the run ends, and end it."""
        if self._left.is_set():
            return
        doing, _, _ = self._doing
        text = f"{words}\n{self.names[self.index]} ends; it was in {doing}"
        show(f"\nerror: {text}" if code == 1 else f"\n{text}")
        if HUNG in words:
            show(_stacks())
        _exit(code)

    def _watch(self) -> None:
        """Thread: notice when this process gets nowhere, or process 0 does not answer."""
        suspected = False
        while not self._left.wait(HEAR_SECONDS):
            silent = time.monotonic() - (self._asked or math.inf)
            if suspected != (silent > SILENT * self._settings.heartbeat_s):
                suspected = not suspected
                what = "died or is stopped: it no longer answers" if suspected else "answers again"
                show(f"\nwarning: {self.names[0]} {what}")
            if silent > self._settings.heartbeat_s:
                self._end(f"{self.names[0]} has not answered for {silent:.0f} s")
            doing, seconds, deadline = self._doing
            if self._settings.hang_s and time.monotonic() > deadline:
                words = f"{self.names[self.index]}: {HUNG} {seconds:g} s, in {doing}"
                self._tell(1, words)
                self._end(words)

    def _hear(self) -> None:
        """Thread: look for the last words of others, which process 0 keeps."""
        while not self._left.wait(HEAR_SECONDS):
            self._asked = time.monotonic()
            try:
                code, _, words = self._client.key_value_try_get(END).partition(" ")
                self._end(words, int(code))
            except Exception as error:
                if "NOT_FOUND" not in str(error):
                    self._end(f"{self.names[0]} died: it no longer answers")
            self._asked = None

    def _count_peers(self) -> None:
        """Thread: ask again and again who is alive; all processes take part, so none is missed or blamed wrongly."""
        while not self._leaving.wait(1.0):
            try:
                alive = self._client.get_live_nodes(list(range(self.count)))
            except Exception:
                return  # the service is gone, which `_hear` finds, too
            dead = [name for i, name in enumerate(self.names) if i not in alive]
            if dead and not self._leaving.is_set():
                self._end(f"{listed(dead)} died or is stopped: no heartbeat for {self._settings.heartbeat_s} s")


def _stacks() -> str:
    """What all threads do. Not by faulthandler: where output is stuck, it holds up all of them."""
    lines = []
    for thread, frame in sys._current_frames().items():
        lines.append(f"Thread 0x{thread:016x} (most recent call first):")
        at: Any = frame
        while at:
            lines.append(f'  File "{at.f_code.co_filename}", line {at.f_lineno} in {at.f_code.co_name}')
            at = at.f_back
    return "\n".join(lines)


@contextlib.contextmanager
def joined(settings: DistributedConfig) -> Iterator[Group]:
    """This process's place in the run. To be entered before JAX is used; an exception inside ends all processes.

    Raises:
        DistributedError: wrong or incomplete settings, or processes that do not come together.
    """
    global _present
    group = _join(settings)
    try:
        _present = group
        yield group
        group.leave()
    except BaseException as error:
        group.abandon(error)
        raise
    finally:
        _present = None


def _join(settings: DistributedConfig) -> Group:
    """The group, after all have come together."""
    global _present
    seconds = _number(START, os.environ.get(START) or str(START_SECONDS))
    place = explicit_place(os.environ) or detected_place(seconds)
    if place is None:
        group = Group(settings)
        group.watch()
        return group
    address, count, index = (place[name] for name in ("coordinator_address", "num_processes", "process_id"))
    _pass_proxies_by(host_and_port(address)[0])
    own = own_name(index)
    gathering = _present = (Guest if index else Host)(address, index, count, own, _end_gathering)
    try:
        names = gathering.wait(seconds)
        client = _initialize(place, settings, seconds)
    except BaseException as error:
        gathering.announce(1, f"{own}: {error}")
        raise
    gathering.inside()
    group = Group(settings, client, index, count)
    group.names = names
    group.watch()
    return group


def _initialize(place: dict[str, Any], settings: DistributedConfig, seconds: int) -> Any:
    """Join JAX's coordination service; returns its client."""
    import jax
    from jax._src.distributed import global_state  # the key-value store has no public door

    # SIGTERM stays ours: training/preemption.py lets the processes agree on a step.
    jax.config.update("jax_enable_preemption_service", False)
    with contextlib.suppress(AttributeError):
        jax.config.update("jax_check_proxy_envs", False)  # a warning of what cannot happen here
    try:
        jax.distributed.initialize(
            **place,
            initialization_timeout=seconds + 3 * PATIENCE_SECONDS,  # who is silent is named before JAX aborts
            heartbeat_timeout_seconds=settings.heartbeat_s,
            shutdown_timeout_seconds=LEAVE_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            f"JAX's coordination service does not start at {place['coordinator_address']} ({error}): let all processes "
            f"reach that address, or give them another"
        ) from error
    return global_state.client


def _end_gathering(code: int, words: str) -> None:
    """End this process, because one has failed before all were here."""
    text = f"{words}\n{own_name(_present.index)} ends; it was waiting for all to begin"
    show(f"error: {text}" if code == 1 else text)
    _exit(code)


def _pass_proxies_by(host: str) -> None:
    """Keep gRPC, by which JAX reaches the coordinator, from the environment's proxies (http_proxy and the like)."""
    kept = os.environ.get(NO_PROXY[0]) or os.environ.get(NO_PROXY[1]) or ""
    hosts = dict.fromkeys([*kept.split(","), host, "localhost", "127.0.0.1", "::1"])
    os.environ[NO_PROXY[0]] = ",".join(filter(None, hosts))


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
    try:
        host_and_port(given[COORDINATOR])
    except DistributedError as error:
        raise DistributedError(f"{COORDINATOR} = {error}") from error
    count, index = _number(PROCESSES, given[PROCESSES]), _number(PROCESS, given[PROCESS], least=0)
    if not index < count:
        raise DistributedError(f"{PROCESS} = {index} with {PROCESSES} = {count}: give 0 to {count - 1}")
    if count == 1:
        return None
    place = {"coordinator_address": given[COORDINATOR], "num_processes": count, "process_id": index}
    return place | {"cluster_detection_method": "deactivate"}


def _number(name: str, text: str, least: int = 1) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
        raise DistributedError(f"{name} = '{text}': give a whole number from {least}")
    return int(text)


def detected_place(seconds: int = START_SECONDS) -> dict[str, Any] | None:
    """The arguments, if JAX recognises a cluster (SLURM, Open MPI, TPU pod, Kubernetes) with several processes.

    A single process is not initialised: a shell inside of a one-task job stays an ordinary shell.

    Raises:
        DistributedError: the cluster does not say where process 0 is, or which one this is.
    """
    from jax._src.clusters import ClusterEnv

    for cluster in ClusterEnv._cluster_types:
        if cluster.opt_in_only_method or not cluster.is_env_present():
            continue
        try:
            count = cluster.get_process_count()
        except Exception as error:  # each kind of cluster has its own
            show(
                f"warning: this looks like a cluster ({cluster.__name__}), but it does not say how many processes "
                f"there are ({error}); going on as one. Set {COORDINATOR}, {PROCESSES} and {PROCESS} for several."
            )
            return None
        return _place_in(cluster, count, seconds) if count > 1 else None
    return None


def _place_in(cluster: Any, count: int, seconds: int) -> dict[str, Any]:
    """The arguments in a cluster; JAX finds the devices by itself."""
    try:
        address = os.environ.get("JAX_COORDINATOR_ADDRESS") or cluster.get_coordinator_address(
            timeout_secs=seconds, override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT")
        )
        index = cluster.get_process_id()
    except Exception as error:
        raise DistributedError(
            f"this is a cluster ({cluster.__name__}) of {count} processes, but it does not say where process 0 is, or "
            f"which one this is ({error}); set {COORDINATOR}, {PROCESSES} and {PROCESS}"
        ) from error
    place = {"coordinator_address": address, "num_processes": count, "process_id": index}
    return place | slurm_devices(os.environ)


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
