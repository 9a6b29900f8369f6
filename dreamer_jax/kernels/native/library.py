"""Compile the C++ kernels of this folder on first use, load them, and tell XLA of them.

The compiler's product is kept in the user's cache, one for each combination of sources, compiler and processor. A
machine without g++ 12, clang 11 or newer has no native kernels; `missing()` says why, and the plain JAX forms stand in.
"""

import concurrent.futures
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jaxlib

SOURCES = ("grouped.cc", "attention.cc", "depth.cc", "heads.cc", "router.cc")
HEADERS = ("ffi.h", "matmul.h", "work.h")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-pthread")
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
        library = ctypes.CDLL(str(_compiled()))
        for name in FUNCTIONS:
            jax.ffi.register_ffi_target(f"dreamer_{name}", jax.ffi.pycapsule(library[name]), platform="cpu")
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: a user without a home
        output = getattr(error, "stderr", None) or ""
        reason = f"the C++ kernels for CPUs could not be built: {error}\n{output}".strip()
        print(f"{reason}\nplain JAX stands in, more slowly", file=sys.stderr, flush=True)
        return reason
    return None


def _compiled() -> Path:
    """The shared library, compiled unless it is in the cache."""
    found = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    compiler = shlex.split(found or "")
    if not compiler:
        raise OSError("no C++ compiler (c++, g++ or clang++) on the PATH, and none named by CXX")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dreamer_jax" / "native"
    library = folder / f"{_fingerprint(compiler)}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        print("compiling the C++ kernels for this CPU, once", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # processes may compile at the same time
            _compile(compiler, Path(scratch)).replace(library)
    return library


def _compile(compiler: list[str], folder: Path) -> Path:
    """All sources, at the same time, and then the library of them."""

    def run(*arguments: str) -> None:
        command = [*compiler, *FLAGS, *arguments]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300, cwd=folder)

    def compile_one(source: str) -> None:
        run("-isystem", jax.ffi.include_dir(), "-c", str(Path(__file__).parent / source))

    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(compile_one, SOURCES))
    run("-shared", "-o", "kernels.so", *(str(Path(source).with_suffix(".o")) for source in SOURCES))
    return folder / "kernels.so"


def _fingerprint(compiler: list[str]) -> str:
    """Changes with all that the machine code depends on."""
    here = Path(__file__).parent
    version = subprocess.run([*compiler, "--version"], check=True, capture_output=True, text=True, timeout=60).stdout
    cpuinfo = Path("/proc/cpuinfo")
    instructions = cpuinfo.read_text() if cpuinfo.exists() else ""
    features = sorted(
        {line for line in instructions.splitlines() if line.startswith(("flags", "Features", "model name", "CPU"))}
    )
    parts = [version, *compiler, jaxlib.__version__, platform.machine(), platform.processor(), *FLAGS, *features]
    parts += [(here / name).read_text() for name in (*HEADERS, *SOURCES)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
