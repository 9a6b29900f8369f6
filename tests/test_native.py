"""The C++ kernels for CPUs: built when first needed, and a clear error where they cannot be."""

import os
import subprocess
import sys

import jax.numpy as jnp
import pytest

from dreamer_jax.model import attend, grouped_matmul
from dreamer_jax.native import kernels, library
from dreamer_jax.native.memory import with_huge_pages
from tests.native import needs_compiler


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """A machine on which nothing is built yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.missing.cache_clear()
    yield tmp_path
    library.missing.cache_clear()


def test_without_a_compiler_plain_jax_stands_in_and_asking_for_the_kernels_is_an_error(monkeypatch, elsewhere):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(elsewhere))
    assert grouped_matmul.default_backend("cpu", "float32") == "blocks"
    assert attend.default_backend("cpu", "float32") == "blocks"
    x, w, sizes = jnp.ones((3, 4)), jnp.ones((1, 4, 5)), jnp.array([3], jnp.int32)
    with pytest.raises(ImportError, match=r"no C\+\+ compiler.*\n.*'blocks'"):
        grouped_matmul.grouped_matmul(x, w, sizes, backend="native")


def test_what_the_compiler_says_is_in_the_reason(monkeypatch, elsewhere):
    compiler = elsewhere / "broken"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "error: no vectors here" >&2; exit 1; }\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert "no vectors here" in library.missing()
    assert grouped_matmul.default_backend("cpu", "float32") == "blocks"


@needs_compiler
def test_the_library_is_built_once_for_all_processes(tmp_path):
    script = "from dreamer_jax.native import library; assert library.missing() is None"
    built = []
    for _ in range(2):
        command = [sys.executable, "-c", script]
        subprocess.run(command, check=True, timeout=120, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)})
        built += [[(p.name, p.stat().st_mtime_ns) for p in (tmp_path / "dreamer_jax" / "native").iterdir()]]
    assert len(built[0]) == 1
    assert built[0] == built[1]


def test_other_compute_types_than_float32_keep_to_plain_jax():
    assert grouped_matmul.default_backend("cpu", "bfloat16") == "blocks"
    assert attend.default_backend("cpu", "bfloat16") == "blocks"


@needs_compiler
def test_arrays_of_another_type_are_an_error_that_names_the_backend_to_use():
    with pytest.raises(TypeError, match=r"bfloat16.*'blocks'"):
        kernels.grouped_product(
            "forward", jnp.ones((3, 4), jnp.bfloat16), jnp.ones((1, 4, 5)), jnp.array([3], jnp.int32)
        )


def test_a_process_starts_again_in_its_place_with_huge_pages_once(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys; from dreamer_jax.native.memory import restart_with_huge_pages\n"
        "print('begun', flush=True); restart_with_huge_pages()\n"
        "print(os.getpid(), os.environ['GLIBC_TUNABLES'], sys.argv[1:], sys.flags.optimize)\n"
    )
    environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.perturb=0"}
    command = [sys.executable, "-O", str(script), "--name", "a run"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    output = process.communicate(timeout=60)[0].splitlines()
    tunables = "glibc.malloc.perturb=0:glibc.malloc.hugetlb=1"
    assert output == ["begun", "begun", f"{process.pid} {tunables} ['--name', 'a run'] 1"]


def test_who_has_decided_about_huge_pages_is_left_alone():
    assert with_huge_pages({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}) == {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}
    assert with_huge_pages({"PATH": "/bin"}) == {"PATH": "/bin", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
