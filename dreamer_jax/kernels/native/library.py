"""Compile the C++ kernels of this folder on first use, load them, and tell XLA of them.

The compiler's product is kept in the user's cache, one for each combination of sources, compiler and processor. A
machine without g++ 12, clang 11 or newer has no native kernels; `missing()` says why, and the plain JAX forms stand in.

What is loaded runs with all rights of the user. So a library of the cache must be whole (its SHA-256 stands beside it),
and it and its folders must be the user's or root's, and nobody else's to write to; links are not followed. Where the
cache cannot be trusted or written to, each process compiles into a temporary folder of its own.
"""

import concurrent.futures
import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jaxlib

SOURCES = ("grouped.cc", "attention.cc", "depth.cc", "heads.cc", "router.cc")
HEADERS = ("ffi.h", "matmul.h", "work.h")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-pthread")
DAY = 24 * 3600
UNUSED_DAYS = 30
"""After which a library of other sources or another compiler is deleted."""
FUNCTIONS = (
    "grouped_forward",
    "grouped_linear",
    "grouped_linear_gradients",
    "grouped_swiglu",
    "grouped_gated",
    "grouped_swiglu_gradients",
    "grouped_collect",
    "attend_forward",
    "attend_backward",
    "attend_cache",
    "depth_forward",
    "depth_backward",
    "heads_forward",
    "heads_backward",
    "fused_heads_forward",
    "fused_heads_backward",
    "route",
    "route_gradients",
    "route_plan",
)


@functools.cache
def missing() -> str | None:
    """Why there are no native kernels on this machine, or None: then they are ready to be called."""
    try:
        library = _loaded()
        for name in FUNCTIONS:
            jax.ffi.register_ffi_target(f"dreamer_{name}", jax.ffi.pycapsule(library[name]), platform="cpu")
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or ""
        reason = f"the C++ kernels for CPUs could not be built: {error}\n{output}".strip()
        _say(f"{reason}\nplain JAX stands in, more slowly")
        return reason
    return None


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def _loaded() -> ctypes.CDLL:
    """The library of the cache, or one that is compiled now."""
    compiler = _compiler()
    name = f"{_fingerprint(compiler)}.so"
    try:
        folder = _cache()
        _prune(folder, name)
        found = _of_cache(folder / name)
        return found or _built(compiler, folder, "compiling the C++ kernels for this CPU, once", name)
    except OSError as error:
        problem = str(error)
    except subprocess.CalledProcessError as error:
        if not _no_space(error):
            raise
        problem = f"no space left in '{folder}'"
    _say(f"warning: the cache of compiled kernels cannot be used: {problem}")
    folder = Path(tempfile.gettempdir())
    _prune(folder)
    return _built(compiler, folder, "compiling the C++ kernels for this process alone")


def _compiler() -> list[str]:
    """The command of a C++ compiler."""
    found = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    try:
        compiler = shlex.split(found or "")
    except ValueError as error:
        raise OSError(f"CXX = {found!r}: {error}") from error
    if not compiler:
        raise OSError("no C++ compiler (c++, g++ or clang++) on the PATH, and none named by CXX")
    return compiler


# The cache


def _cache() -> Path:
    """Its folder, made if need be.

    Raises:
        OSError: it is another's, or cannot be made.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    except RuntimeError as error:  # a user without a home
        raise OSError(str(error)) from error
    root.mkdir(parents=True, exist_ok=True)
    for folder in (root / "dreamer_jax", root / "dreamer_jax" / "native"):
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode):
            raise OSError(f"'{folder}' is a link or a file, not a folder")
        if status.st_uid == os.geteuid() and (status.st_mode & 0o022 or status.st_mode & 0o700 != 0o700):
            folder.chmod(0o700)  # as a umask or an older version has left it; its files are looked at by themselves
        elif not _ours(status):
            raise OSError(f"'{folder}' belongs to user {status.st_uid}, or others may write to it")
    return root / "dreamer_jax" / "native"


def _ours(status: os.stat_result) -> bool:
    """Whether only this user or root can have written to it."""
    return status.st_uid in (os.geteuid(), 0) and not status.st_mode & 0o022


def _of_cache(path: Path) -> ctypes.CDLL | None:
    """The library, if it is there, whole and ours."""
    library, digest = _opened(path), _opened(_digest(path))
    try:
        if library is None or digest is None:
            return None
        content = _read(library)
        if hashlib.sha256(content).hexdigest().encode() != _read(digest):
            return None
        if time.time() - os.fstat(library).st_mtime > DAY:
            with contextlib.suppress(OSError):  # root's
                os.utime(library)  # both are in use
                os.utime(digest)
        here = f"/proc/self/fd/{library}"  # what was read, whatever the name means by now
        loaded = ctypes.CDLL(here if os.path.exists(here) else str(path))
        library = None  # stays open: of a number that is used again, the loader would take the library of before
        return loaded
    finally:
        for descriptor in (library, digest):
            if descriptor is not None:
                os.close(descriptor)


def _digest(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _opened(path: Path) -> int | None:
    """A descriptor of a file of ours; None of what is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and _ours(status):
        return descriptor
    os.close(descriptor)
    return None


def _read(descriptor: int) -> bytes:
    with open(descriptor, "rb", closefd=False) as file:
        return file.read()


def _prune(folder: Path, name: str | None = None) -> None:
    """Delete what killed compilations have left and, beside the library `name`, those that have long not been used."""
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            status = path.lstat()
            if status.st_uid != os.geteuid():
                continue
            age = time.time() - status.st_mtime
            if stat.S_ISDIR(status.st_mode):
                if _abandoned(path.name, age, ours=name is not None):
                    shutil.rmtree(path)
            elif name and path.stem != Path(name).stem and age > UNUSED_DAYS * DAY:
                path.unlink()


def _abandoned(name: str, age: float, *, ours: bool) -> bool:
    """Whether a folder is that of a compilation that has ended. `ours`: there are no folders of other programs."""
    own, _, rest = name.partition(_scratch_prefix())
    process = rest.partition("+")[0]
    if own == "" and process.isdecimal():
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass
    return age > DAY and (ours or own == "")


def _scratch_prefix() -> str:
    """Of folders in which this machine compiles; the number of the process follows."""
    return f"dreamer_jax-build-{socket.gethostname()}+"


# The compiler


def _built(compiler: list[str], folder: Path, note: str, name: str | None = None) -> ctypes.CDLL:
    """A library compiled in `folder`, and kept there by this name."""
    _say(note)
    prefix = f"{_scratch_prefix()}{os.getpid()}+"
    # Processes may compile at the same time. What is loaded stays so when its file is gone.
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder, ignore_cleanup_errors=True) as scratch:
        os.chmod(scratch, 0o700)
        built = _compile(compiler, Path(scratch))
        library = ctypes.CDLL(str(built))
        if name:
            digest = _digest(built)
            digest.write_text(hashlib.sha256(built.read_bytes()).hexdigest())
            for file, kept in ((digest, _digest(folder / name)), (built, folder / name)):
                file.chmod(0o600)
                file.replace(kept)
    return library


def _no_space(error: subprocess.CalledProcessError) -> bool:
    return any(words in (error.stderr or "") for words in ("No space left", "quota exceeded", "Read-only file system"))


def _compile(compiler: list[str], folder: Path) -> Path:
    """All sources, at the same time, and then the library of them."""
    environment = os.environ | {"LC_ALL": "C", "TMPDIR": str(folder)}

    def run(*arguments: str) -> None:
        command = [*compiler, *FLAGS, *arguments]
        subprocess.run(
            command,
            check=True,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=300,
            cwd=folder,
            env=environment,
        )

    def compile_one(source: str) -> None:
        run("-isystem", jax.ffi.include_dir(), "-c", str(Path(__file__).parent / source))

    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(compile_one, SOURCES))
    run("-shared", "-o", "kernels.so", *(str(Path(source).with_suffix(".o")) for source in SOURCES))
    return folder / "kernels.so"


def _fingerprint(compiler: list[str]) -> str:
    """Changes with all that the machine code depends on."""
    here = Path(__file__).parent
    version = subprocess.run(
        [*compiler, "--version"], check=True, capture_output=True, text=True, errors="replace", timeout=60
    ).stdout
    cpuinfo = Path("/proc/cpuinfo")
    instructions = cpuinfo.read_text(errors="replace") if cpuinfo.exists() else ""
    features = sorted(
        {line for line in instructions.splitlines() if line.startswith(("flags", "Features", "model name", "CPU"))}
    )
    parts = [version, *compiler, jaxlib.__version__, platform.machine(), platform.processor(), *FLAGS, *features]
    parts += [(here / name).read_text(encoding="utf-8") for name in (*HEADERS, *SOURCES)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
