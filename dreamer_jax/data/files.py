"""Files that users name: where they are, whether they can be read, and what they are if not what is wanted."""

import contextlib
import os
import re
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path

from dreamer_jax.errors import DreamerError

BOM = b"\xef\xbb\xbf"
"""The byte order mark of UTF-8, as Windows tools put it in front of a text."""
SIGNATURES = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch it with `git lfs pull`"),
    (b"\x1f\x8b", "compressed by gzip", "unpack it with gunzip"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it with unzstd"),
    (b"BZh", "compressed by bzip2", "unpack it with bunzip2"),
    (b"\xfd7zXZ", "compressed by xz", "unpack it with unxz"),
    (b"PK\x03\x04", "a zip archive", "unpack it with unzip, and name the file inside"),
    (b"PAR1", "a Parquet file", "write its rows as JSON lines, and give that file"),
    (b"ARROW1", "an Arrow file", "write its rows as JSON lines, and give that file"),
    (b"\xff\xfe", "text in UTF-16", "convert it with iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "text in UTF-16", "convert it with iconv -f UTF-16 -t UTF-8"),
)
"""First bytes, what a file is that begins so, and what to do about it."""
HEAD = 1 << 16
"""Bytes that suffice to tell what a file is."""


class DataError(DreamerError, ValueError):
    """Data that cannot be used; the message names the file, the line, the cause and the fix."""


def expanded(text: str, key: str) -> Path:
    """A path as the config has it, with `~` and environment variables replaced.

    Raises:
        DataError: no path, an unset variable or an unknown user.
    """
    path = os.path.expanduser(os.path.expandvars(text))
    if not path:
        raise DataError(f"{key} = '{text}' is empty; give a path as --{key}")
    if re.search(r"\$\w|\$\{", path) and not os.path.exists(path):
        raise DataError(f"{key} = '{text}': the environment variable is not set; export it or give --{key}")
    if path.startswith("~"):
        raise DataError(f"{key} = '{text}': there is no such user or home folder; give the whole path as --{key}")
    return Path(path)


@contextlib.contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Name the file where the system refuses to read it or it cannot be unpacked; `what` says what it is to the user.

    Raises:
        DataError: no right to read, a name that is too long, a failing disk; packed data that are cut off or damaged.
    """
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        said = getattr(error, "strerror", None)  # only the system's own errors have it
        remedy = "change its rights, or give another" if said else "it is cut off or damaged: fetch it again"
        raise DataError(f"{what}: '{path}' cannot be read ({said or error}); {remedy}") from error


def check_file(path: Path, what: str) -> None:
    """Make sure that a path is a file with something in it.

    Raises:
        DataError: it is absent, a folder, no regular file, empty, or not to be read.
    """
    with reading(path, what):
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(f"{what}: '{path}' does not exist; correct the path") from None
        if stat.S_ISDIR(status.st_mode):
            raise DataError(f"{what}: '{path}' is a folder; give a file{_inside(path)}")
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{what}: '{path}' is a pipe or a device; write what it yields to a file, and give that")
        if status.st_size == 0:
            raise DataError(f"{what}: '{path}' is empty; fetch it again")
        path.open("rb").close()  # whether it may be read


def _inside(folder: Path) -> str:
    """Some files of a folder, for an error."""
    with contextlib.suppress(OSError):
        names = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
        return f", such as {', '.join(names[:3])} in it" if names else ""
    return ""


def foreign(head: bytes) -> str | None:
    """What a file is whose first bytes no text of ours has, and what to do about it; None if they are no such bytes."""
    for signature, what, remedy in SIGNATURES:
        if head.startswith(signature):
            return f"{what}; {remedy}"
    if head and not head.strip(b"\0"):
        return "nothing but NUL bytes, as a crash leaves behind; fetch it again"
    if _is_wide(head):
        return "text in UTF-16 or UTF-32; convert it with iconv -t UTF-8"
    if re.match(rb"<(!doctype|html|head|\?xml)", head.removeprefix(BOM).lstrip()[:16].lower()):
        return "a web page, as a failed download leaves behind; fetch the file itself"
    return None


def _is_wide(head: bytes) -> bool:
    """Whether the beginning looks like text of two or four bytes a character: every other byte is NUL."""
    start = head[:64]
    return len(start) >= 8 and any(not start[first::2].strip(b"\0") for first in (0, 1))
