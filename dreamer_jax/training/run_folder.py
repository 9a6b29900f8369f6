"""One run, one folder: claimed by process 0 for as long as the run lasts, and seen by all of its processes."""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from dreamer_jax.distributed import Group, becomes_visible
from dreamer_jax.errors import DreamerError
from dreamer_jax.files import open_without_links


class RunFolderError(DreamerError, RuntimeError):
    """A folder that another run uses, or that is not the same for all processes."""


@contextlib.contextmanager
def claimed(run_dir: Path, group: Group) -> Iterator[None]:
    """Keep other runs out of the folder; the lock goes with the process, however that ends.

    Raises:
        RunFolderError: another run holds the folder, or a process sees another folder under this name.
    """
    path = run_dir / "lock"
    if group.index:
        _check_shared(path, group.told("owner of the run folder"))
        yield
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    with os.fdopen(open_without_links(path, os.O_RDWR | os.O_APPEND), "a+") as file:
        _lock(file.fileno(), path)
        owner = f"pid {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        file.truncate(0)
        file.write(owner)
        file.flush()
        group.told("owner of the run folder", owner)
        yield


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS):
            return  # a file system without locks: better unguarded than unusable
        raise RunFolderError(
            f"'{path.parent}' is in use by another run ({path.read_text() or 'just started'}); wait for it, stop it, "
            f"or give this run another --name"
        ) from error


def _check_shared(path: Path, owner: str) -> None:
    if not becomes_visible(lambda: path.is_file() and path.read_text() == owner):
        raise RunFolderError(
            f"'{path.parent}' is not the folder that process 0 ({owner}) writes to; set out to a folder on a file "
            f"system that all processes share"
        )
