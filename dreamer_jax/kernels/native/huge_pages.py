"""Huge pages for what the C library allocates.

XLA allocates a program's temporaries anew for each call. In pages of 4 KiB the faults of writing hundreds of MiB for
the first time, at every step, took a tenth of the processor time of training on a CPU (docs/log.md).
"""

import contextlib
import os
import signal
import sys
from collections.abc import Mapping

VARIABLE, SETTING = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""They wait while a process starts again, which has no handlers at first."""


def with_huge_pages(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process whose C library (glibc 2.35 or newer) asks for huge pages.

    The system may not lend any. An environment that already says whether to ask stays as it is.
    """
    given = environment.get(VARIABLE, "")
    if SETTING in given:
        return dict(environment)
    return {**environment, VARIABLE: ":".join(filter(None, [given, f"{SETTING}=1"]))}


def restart_with_huge_pages() -> None:
    """Run this process's command again in its place, the process id included: the C library asks only at a start.

    Nothing happens where the process has them already, or cannot be started again. Call it first of all; only
    handlers of signals come before it, for those that came meanwhile.
    """
    environment = with_huge_pages(os.environ)
    if sys.platform == "linux" and sys.executable and environment != os.environ:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        with contextlib.suppress(OSError):
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
