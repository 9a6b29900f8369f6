"""Start N processes of a training run on this machine, as a cluster would.

    python launch/local.py --processes 2 --devices 2 -- --config configs/tiny.py [--section.key value ...]

Each line of output begins with the number of its process. SIGTERM, Ctrl-C, SIGHUP and SIGUSR1 go to all processes, and
these save and leave; so they do when this command itself is killed (on Linux). Ends with the code of the process that
failed first, or 0.
"""

import argparse
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
NOTICE_SECONDS = 5.0
"""How long the others may take to end by themselves after a failure, before they get SIGTERM."""
GRACE_SECONDS = 60.0
"""And before they are killed."""
PR_SET_PDEATHSIG = 1
"""Of prctl: the signal for a process whose parent dies."""


def main() -> int:
    """Start, pass on output and signals, collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=positive, default=2, help="number of processes")
    parser.add_argument("--devices", type=positive, default=1, help="devices of each process")
    parser.add_argument("--gpu", action="store_true", help="share out this machine's GPUs; default: simulated devices")
    parser.add_argument("train", nargs="+", help="arguments of python -m dreamer_jax.train, after --")
    asked = parser.parse_args()
    processes: list[subprocess.Popen[str]] = []
    heard: list[int] = []

    def pass_on(number: int, _: FrameType | None = None) -> None:
        heard.append(number)
        send(processes, number)

    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup is to stay in force
            signal.signal(number, pass_on)
    with held_port() as port:
        try:
            for i in range(asked.processes):
                processes.append(start(asked, f"localhost:{port}", i))
        except OSError as error:
            print(f"error: process {len(processes)} cannot be started: {error}", file=sys.stderr)
            send(processes, signal.SIGKILL)
            return 1
        for number in set(heard):  # some may have begun later
            send(processes, number)
        readers = [threading.Thread(target=show, args=(i, p), daemon=True) for i, p in enumerate(processes)]
        for reader in readers:
            reader.start()
        code = first_failure(processes)
        for reader in readers:
            reader.join(NOTICE_SECONDS)  # what a process has started may keep its output open
    drop_what_cannot_be_written()
    return code


def positive(text: str) -> int:
    """A number of processes or devices."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}': give a whole number from 1")
    return int(text)


@contextlib.contextmanager
def held_port():
    """A port that no other program gets for as long as the run lasts, unless it asks for this one."""
    with socket.socket() as holder:
        # Process 0 may listen there nevertheless, for it sets this, too.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("localhost", 0))
        yield holder.getsockname()[1]


def start(asked: argparse.Namespace, coordinator: str, index: int) -> subprocess.Popen[str]:
    """One process; a session of its own keeps the terminal's Ctrl-C from reaching it twice."""
    place = {"COORDINATOR": coordinator, "PROCESSES": str(asked.processes), "PROCESS": str(index)}
    environment = os.environ | {f"DREAMER_{name}": value for name, value in place.items()}
    if asked.gpu:
        own = range(index * asked.devices, (index + 1) * asked.devices)
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, own))
    else:
        simulated = f"--xla_force_host_platform_device_count={asked.devices}"
        environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {simulated}"}
    command = [sys.executable or "python3", "-u", "-m", "dreamer_jax.train", *asked.train]
    launcher = os.getpid()
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def follow_the_launcher() -> None:
        if libc:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != launcher:  # dead already
                os._exit(1)

    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=follow_the_launcher,  # safe: there are no threads yet
    )


def send(processes: list[subprocess.Popen[str]], number: int) -> None:
    """Send a signal to those that live."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def show(index: int, process: subprocess.Popen[str]) -> None:
    """Pass on the output; a process must not wait for a reader that is gone."""
    assert process.stdout is not None
    for line in process.stdout:
        with contextlib.suppress(OSError, ValueError):
            print(f"[{index}] {line}", end="", flush=True)


def first_failure(processes: list[subprocess.Popen[str]]) -> int:
    """Wait for all; the code of the first that failed (128 + the signal, if one killed it), else 0."""
    code, failed_at, told = 0, float("inf"), False
    while any(process.poll() is None for process in processes):
        code = code or failure(processes)
        if code and failed_at == float("inf"):
            failed_at = time.monotonic()
        if not told and time.monotonic() > failed_at + NOTICE_SECONDS:
            told = True
            send(processes, signal.SIGTERM)
        if time.monotonic() > failed_at + GRACE_SECONDS:
            send(processes, signal.SIGKILL)
        time.sleep(0.1)
    return code or failure(processes)


def failure(processes: list[subprocess.Popen[str]]) -> int:
    """The code of a process that has failed, else 0; the failure is shown if a signal is behind it."""
    for i, process in enumerate(processes):
        if code := process.poll():
            if code < 0:
                with contextlib.suppress(OSError, ValueError):
                    print(f"process {i} was killed by {signal.Signals(-code).name}", file=sys.stderr, flush=True)
            return code if code > 0 else 128 - code
    return 0


def drop_what_cannot_be_written() -> None:
    """Python would try again at its end, and end with another code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    sys.exit(main())
