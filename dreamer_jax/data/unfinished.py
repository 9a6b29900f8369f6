"""Folders that are being filled: each belongs to a process, and goes when that process does."""

import contextlib
import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

PARTIAL = ".partial-"
OWNER = "owner"
"""In such a folder: the process that fills it, and that holds a lock on this file as long as it lives."""


@contextlib.contextmanager
def unfinished(final: Path) -> Iterator[Path]:
    """An empty folder beside `final`, of this process alone, that is gone afterwards; those of dead processes go too.

    Raises:
        OSError: it cannot be made.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    _prune(final.parent)
    folder = Path(tempfile.mkdtemp(prefix=f"{final.name}{PARTIAL}", dir=final.parent))
    try:
        with (folder / f"{OWNER}.new").open("w") as file:
            with contextlib.suppress(OSError):  # a file system without locks: then nothing there is ever pruned
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.write(_owner())
            file.flush()
            os.rename(file.name, folder / OWNER)  # locked from the first moment under the name that others look at
            inside = folder / "inside"
            inside.mkdir()
            yield inside
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _owner() -> str:
    return f"pid {os.getpid()} on {socket.gethostname()}"


def _prune(parent: Path) -> None:
    """Delete the folders whose processes on this machine are dead; of other machines one cannot be sure."""
    for owner in parent.glob(f"*{PARTIAL}*/{OWNER}"):
        with contextlib.suppress(OSError), owner.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if file.read().endswith(f" on {socket.gethostname()}"):
                shutil.rmtree(owner.parent, ignore_errors=True)
