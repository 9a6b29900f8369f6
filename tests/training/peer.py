"""A process that joins others, if there are any, and then does what it is told: `python -m tests.training.peer WHAT`.

It notes in the file of descriptor PEER_NOTES how far it is, whatever becomes of its output.
"""

import ctypes
import os
import signal
import sys
import time

from dreamer_jax.training.preemption import all_is_saved, early_signals, preemption

if __name__ == "__main__":
    early_signals()

from dreamer_jax.config import DistributedConfig
from dreamer_jax.distributed import joined


def note(text: str) -> None:
    os.write(int(os.environ["PEER_NOTES"]), f"{text}\n".encode())


def main() -> None:
    what = sys.argv[1]
    note("started")
    with joined(DistributedConfig()):
        note("joined")
        match what:
            case "print":
                while True:
                    print("x" * 10000, flush=True)
                    time.sleep(0.01)
            case "fail":
                time.sleep(1)
                raise ValueError("the disk is on fire")
            case "native":
                ctypes.CDLL(None).sleep(1000)  # as long as it lasts, Python runs no handlers
            case "step":
                with preemption() as asked:
                    asked.busy()
                    note("stepping")
                    while not asked.signal_name:
                        time.sleep(0.01)
                    note(asked.signal_name)
            case "fork":
                child = os.fork()
                if not child:
                    time.sleep(1000)
                time.sleep(0.2)
                os.kill(child, signal.SIGTERM)
                note(f"child ended with {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}")
    all_is_saved(3)
    note("over")
    time.sleep(1000)


if __name__ == "__main__":
    main()
