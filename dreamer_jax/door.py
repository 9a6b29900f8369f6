"""What every command does with errors: one line for those that a user can fix, a traceback for bugs.

The kinds: our own errors; what the file system, the disk or a pipe refuses; a module that is not installed; a platform
that JAX cannot find or that has no memory left; Ctrl-C.
"""

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from dreamer_jax.errors import DreamerError

CLOSED_PIPE = 141
"""Exit code of a command whose reader left, as a shell gives it: 128 + SIGPIPE."""
INTERRUPTED = 130
"""128 + SIGINT."""
HINTS = {
    errno.ENOSPC: "the disk is full: free some space, or write elsewhere",
    errno.EDQUOT: "the quota is used up: free some space, or write elsewhere",
    errno.EACCES: "no permission: change the rights, or give another path",
    errno.EPERM: "no permission: change the rights, or give another path",
    errno.EROFS: "the file system is read-only: give another path",
    errno.ENAMETOOLONG: "the name is too long: give a shorter one",
    errno.ELOOP: "it is a link, which is not followed: remove it, or give another path",
    errno.ENOTDIR: "a part of the path is a file, not a folder: give another path",
    errno.EISDIR: "it is a folder, and a file is needed: give another path",
    errno.EEXIST: "it is there already, as a file: give another path",
    errno.EMFILE: "too many open files: raise the limit (ulimit -n)",
}
BACKENDS = "jax/_src/xla_bridge.py"
"""Where JAX looks for platforms; what it raises there, an AssertionError among others, may have no text."""
EXTRAS = {
    "wandb": "wandb",
    "tokamax": "gpu",
    "lm_eval": "eval",
    "math_verify": "eval",
    **dict.fromkeys(("daft", "ftfy", "scipy", "datasets"), "prepare"),
}
"""Modules that an extra brings."""


def guarded(run: Callable[[], int], *, doing: str) -> int:
    """The exit code of `run()`, whose errors for users are printed as a line on stderr.

    Args:
        run: the command.
        doing: its key or argument that names what it writes, for errors without a path.
    """
    steady_environment()
    try:
        code = run()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):  # so that Python does not stumble over it at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        line = explained(error, doing)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 1


def explained(error: BaseException, doing: str) -> str | None:
    """What to tell a user of this error; None for a bug."""
    text = str(error).strip()
    if isinstance(error, DreamerError):
        return text
    if isinstance(error, OSError):
        return _of_files(error, doing)
    if isinstance(error, ModuleNotFoundError):
        return _of_module(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "Out of memory" in text:
        first = text.partition("\n")[0][:200]
        return f"no memory left ({first or 'in Python'}): use a smaller batch, context or model; plan shows what fits"
    if any(frame.filename.endswith(BACKENDS) for frame in traceback.extract_tb(error.__traceback__)[-3:]):
        said = f" ({text.splitlines()[0][:200]})" if text else ""
        asked = f"JAX_PLATFORMS = '{os.environ.get('JAX_PLATFORMS', '')}'"
        return f"{asked}: JAX finds no such devices{said}; unset it, or install JAX for that platform"
    return None


def _of_files(error: OSError, doing: str) -> str | None:
    """Of an error of the file system; None where its number says nothing of files."""
    if error.errno is None:
        return None
    where = " -> ".join(f"'{name}'" for name in (error.filename, error.filename2) if name is not None)
    hint = HINTS.get(error.errno, "see the path, or give another")
    return f"{where or doing}: {error.strerror or error}; {hint}"


def _of_module(error: ModuleNotFoundError) -> str | None:
    name = (error.name or "").partition(".")[0]
    if not name or name == "dreamer_jax":
        return None
    extra = f"[{EXTRAS[name]}]" if name in EXTRAS else ""
    return f"the module '{name}' is not installed: pip install 'dreamer-jax{extra}' or the module itself"


def steady_environment() -> None:
    """Make the process independent of settings that would change or end it: x64 in JAX, closed or narrow output."""
    if os.environ.get("JAX_ENABLE_X64", "").lower() not in ("", "0", "false"):
        print("note: JAX_ENABLE_X64 is set, and left out here: models compute in float32 or bfloat16", file=sys.stderr)
        os.environ["JAX_ENABLE_X64"] = "0"
        if "jax" in sys.modules:
            sys.modules["jax"].config.update("jax_enable_x64", False)
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  (for the rest of the process)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal without all of Unicode


class Unbreakable:
    """A stream whose reader may leave, or whose disk may fill: then the rest is dropped, and nothing is raised."""

    def __init__(self, stream: Any):
        """Stands for `stream`."""
        self._stream, self.broken = stream, False

    def write(self, text: str) -> int:
        """Write, or drop."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush, or drop."""
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, act: Callable[[], Any]) -> None:
        if self.broken:
            return
        try:
            act()
        except (OSError, ValueError):
            self.broken = True
            with contextlib.suppress(OSError, ValueError):  # what is buffered would be tried again at the end
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextlib.contextmanager
def unbreakable_output() -> Any:
    """Within it, printing never raises: a run is worth more than its output."""
    steady_environment()
    kept = sys.stdout, sys.stderr
    # What print and the progress bar use of a text stream, which is not all that its type has.
    sys.stdout, sys.stderr = Unbreakable(kept[0]), Unbreakable(kept[1])  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = kept
