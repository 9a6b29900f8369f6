"""Files that appear whole or not at all, and that never follow a link that a stranger has put in their place."""

import contextlib
import os
import tempfile
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Make `path` a file with this content, at once; nothing is written if it is one already.

    A link of this name is replaced, and not followed. The file is on the disk when this returns.
    """
    data = content.encode() if isinstance(content, str) else content
    if not path.is_symlink() and path.is_file() and path.read_bytes() == data:
        return
    descriptor, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(descriptor, 0o666 & ~umask())
            os.fsync(descriptor)
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise


def open_without_links(path: Path, flags: int) -> int:
    """A descriptor of `path`, with the flags of os.open; created if need be, with the usual rights.

    Raises:
        OSError: it is a link (ELOOP), or cannot be opened.
    """
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_CREAT, 0o666)


def umask() -> int:
    """The rights that new files of this process lack."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
