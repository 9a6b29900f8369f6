"""Start N processes of a training run on this machine, as a cluster would.

    python launch/local.py --processes 2 --devices 2 -- --config configs/tiny.py [--section.key value ...]

Each line of output begins with the number of its process. SIGTERM and Ctrl-C go to all processes. Ends with the code of
the process that failed first, or 0.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from types import FrameType

GRACE_SECONDS = 60.0
"""How long the others may take to notice a failure, before they are ended from here."""


def main() -> int:
    """Start, pass on output and signals, collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="number of processes")
    parser.add_argument("--devices", type=int, default=1, help="devices of each process")
    parser.add_argument("--gpu", action="store_true", help="share out this machine's GPUs; default: simulated devices")
    parser.add_argument("train", nargs="+", help="arguments of python -m dreamer_jax.train, after --")
    asked = parser.parse_args()
    coordinator = f"localhost:{free_port()}"
    processes: list[subprocess.Popen[str]] = []
    heard: list[int] = []

    def pass_on(number: int, _: FrameType | None = None) -> None:
        heard.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    for i in range(asked.processes):
        processes.append(start(asked, coordinator, i))
    for number in set(heard):  # some may have begun later
        pass_on(number)
    readers = [threading.Thread(target=show, args=(i, process)) for i, process in enumerate(processes)]
    for reader in readers:
        reader.start()
    code = first_failure(processes)
    for reader in readers:
        reader.join()
    return code


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


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
    command = [sys.executable, "-u", "-m", "dreamer_jax.train", *asked.train]
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def show(index: int, process: subprocess.Popen[str]) -> None:
    """Pass on the output."""
    assert process.stdout is not None
    for line in process.stdout:
        print(f"[{index}] {line}", end="", flush=True)


def first_failure(processes: list[subprocess.Popen[str]]) -> int:
    """Wait for all; the code of the first that failed (128 + the signal, if one killed it), else 0."""
    code, deadline = 0, float("inf")
    while any(process.poll() is None for process in processes):
        failed = [process.returncode for process in processes if process.returncode]
        if failed and not code:
            code = failed[0] if failed[0] > 0 else 128 - failed[0]
            deadline = time.monotonic() + GRACE_SECONDS
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.1)
    failed = [process.returncode for process in processes if process.returncode]
    return code or (0 if not failed else failed[0] if failed[0] > 0 else 128 - failed[0])


if __name__ == "__main__":
    sys.exit(main())
