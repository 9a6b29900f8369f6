"""The C++ kernels for CPUs: built when first needed, called with what fits, and a clear error otherwise."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from dreamer_jax.kernels.compute import choose
from dreamer_jax.kernels.native import calls, library
from dreamer_jax.kernels.native.huge_pages import with_huge_pages
from tests.kernels.backends import needs_compiler
from tests.kernels.checks import kernels
from tests.kernels.examples import experts


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
    assert choose("auto", "cpu", "float32") == "plain"
    with pytest.raises(ValueError, match=r"kernels.implementation = 'native'.*no C\+\+ compiler.*\n.*'plain'"):
        choose("native", "cpu", "float32")
    x, scores, w_gate_up, w_down, _, sizes = experts([3])
    with pytest.raises(ImportError, match=r"no C\+\+ compiler.*\n.*'plain'"):
        kernels("native").sorted_swiglu(x, scores, w_gate_up, w_down, sizes)


def test_what_the_compiler_says_is_in_the_reason(monkeypatch, elsewhere):
    compiler = elsewhere / "broken"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "error: no vectors here" >&2; exit 1; }\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert "no vectors here" in library.missing()
    assert choose("auto", "cpu", "float32") == "plain"


@needs_compiler
def test_the_library_is_built_once_for_all_processes(tmp_path):
    script = "from dreamer_jax.kernels.native import library; assert library.missing() is None"
    built = []
    for _ in range(2):
        command = [sys.executable, "-c", script]
        subprocess.run(command, check=True, timeout=120, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)})
        built += [[(p.name, p.stat().st_mtime_ns) for p in (tmp_path / "dreamer_jax" / "native").iterdir()]]
    assert len(built[0]) == 2  # and its digest
    assert built[0] == built[1]


FLOAT, INT = jnp.float32, jnp.int32
T, ROWS, E, D, F, IN, OUT = 6, 12, 3, 8, 5, 7, 9
Q, KV, CACHE = (2, 6, 4, 8), (2, 6, 2, 8), (3, 2, 6, 2, 8)

CALLS = {
    "product": ([(ROWS, D), (E, D, F), (E, INT)], [None], {(0, 0), (1, 2)}),
    "product of tokens": ([(T, D), (E, D, F), (E, INT), (ROWS, INT)], [], {(0, 0), (1, 2), (3, 0)}),
    "linear": ([(T, IN), (T,), (E, IN, OUT), (E, INT), (T, INT)], [], {(2, 2)}),
    "linear_gradients": (
        [(T, IN), (T,), (E, IN, OUT), (T, OUT), (E, IN, OUT), (E, INT), (T, INT)],
        [],
        set(),
    ),
    "swiglu": ([(ROWS, D), (ROWS, 1), (E, D, 2 * F), (E, F, D), (E, INT)], [None], set()),
    "swiglu of tokens": ([(T, D), (ROWS, 1), (E, D, 2 * F), (E, F, D), (E, INT), (ROWS, INT)], [], {(0, 0)}),
    "gated": ([(ROWS, 2 * F), (ROWS, 1), (E, F, D), (E, INT)], [], {(2, 2)}),
    "swiglu_gradients": (
        [
            *((ROWS, D), (ROWS, 1), (ROWS, 2 * F), (E, D, 2 * F), (E, F, D)),
            *((ROWS, D), (E, D, 2 * F), (E, F, D), (E, INT)),
        ],
        [None],
        set(),
    ),
    "collect": ([(ROWS, D), (ROWS, INT)], [2], {(0, 1)}),
    "route": ([(T, D), (E, D), (E,), (T, INT)], [2], set()),
    "route_gradients": ([(T, D), (E, D), (T, 2, INT), (T, 2), (T, 2)], [], {(1, 0)}),
    "order": ([(T, 2, INT)], [E], {(0, 0), (0, 1)}),
    "attend": ([Q, KV, KV, (2, 6, INT)], [], set()),
    "attend_gradients": ([Q, KV, KV, (2, 6, INT), Q, (2, 4, 6), Q], [], set()),
    "attend_cache": ([(2, 1, 4, 8), (3, 2, 2, 6, 8), (3, 2, 2, 6, 8), (INT,), (2, INT)], [], set()),
    "attend_depths": ([Q, KV, KV, CACHE, CACHE, (INT,)], [], set()),
    "attend_depths_gradients": ([Q, KV, KV, CACHE, CACHE, (INT,), Q, (2, 6, 4, 3), KV, KV, CACHE, CACHE], [], set()),
    "norm_and_rotate": ([(T, 3, 8), (8,), (T, 4), (T, 4)], [1e-6], {(0, 1)}),
    "norm_and_rotate_gradients": ([(T, 3, 8), (8,), (1, 4), (1, 4), (T, 3, 8)], [1e-6], set()),
    "fused_heads": ([(T, 5, 8), (8,), (8,), (T, 4), (T, 4)], [1, 1e-6], {(0, 1)}),
    "fused_heads_gradients": (
        [(T, 5, 8), (8,), (8,), (1, 4), (1, 4), (T, 3, 8), (T, 1, 8), (T, 1, 8)],
        [1e-6],
        set(),
    ),
}
"""Calls: shapes of arrays that fit, other arguments, and the (array, axis) pairs that may have any size."""


@needs_compiler
@pytest.mark.parametrize("call", CALLS)
def test_a_kernel_is_called_only_with_shapes_that_fit(call):
    shapes, others, free = CALLS[call]
    function = getattr(calls, call.split()[0])
    fitting = [
        jax.ShapeDtypeStruct(shape[:-1], INT) if shape[-1] is INT else jax.ShapeDtypeStruct(shape, FLOAT)
        for shape in shapes
    ]

    def run(arrays):
        return jax.eval_shape(lambda *arrays: function(*arrays, *others), *arrays)

    run(fitting)
    for number, array in enumerate(fitting):
        for axis in range(array.ndim):
            for size in (array.shape[axis] + 1, array.shape[axis] - 1):
                shape = (*array.shape[:axis], size, *array.shape[axis + 1 :])
                changed = [*fitting[:number], jax.ShapeDtypeStruct(shape, array.dtype), *fitting[number + 1 :]]
                if (number, axis) in free:
                    run(changed)
                    continue
                with pytest.raises(ValueError, match=r"native kernel '\w+': \w+ has shape .* expected "):
                    run(changed)
        deeper = jax.ShapeDtypeStruct((1, *array.shape), array.dtype)
        with pytest.raises(ValueError, match=r"native kernel '\w+'"):
            run([*fitting[:number], deeper, *fitting[number + 1 :]])


@needs_compiler
def test_the_error_names_the_kernel_the_array_its_shape_and_what_was_expected():
    x, scores, w, sizes = jnp.ones((6, 7)), jnp.ones(6), jnp.ones((3, 8, 9)), jnp.array([1, 2, 3], INT)
    expected = r"'grouped_linear': w has shape \(3, 8, 9\), expected w\[E I O\] with t = 6, I = 7, E = 3$"
    with pytest.raises(ValueError, match=expected):
        calls.linear(x, scores, w, sizes, jnp.arange(6, dtype=INT))


@needs_compiler
@pytest.mark.parametrize("active", [0, 4])
def test_more_experts_than_there_are_cannot_be_selected(active):
    with pytest.raises(ValueError, match=f"cannot select {active} of 3"):
        calls.route(jnp.ones((T, D)), jnp.ones((E, D)), jnp.ones(E), jnp.ones(T, INT), active)


@needs_compiler
def test_fused_heads_hold_queries_keys_and_values():
    x, weight, angles = jnp.ones((T, 4, 8)), jnp.ones(8), jnp.ones((1, 4))
    with pytest.raises(ValueError, match="4 heads hold no 2 of keys"):
        calls.fused_heads(x, weight, weight, angles, angles, 2, 1e-6)


@needs_compiler
def test_arrays_of_another_type_are_an_error_that_names_the_kernels_to_use():
    x, scores, w_gate_up, w_down, _, sizes = experts([3])
    with pytest.raises(TypeError, match=r"'grouped_swiglu': x must be float32, not bfloat16.*'plain'"):
        kernels("native").sorted_swiglu(x.astype(jnp.bfloat16), scores, w_gate_up, w_down, sizes)


def test_a_process_starts_again_in_its_place_with_huge_pages_once(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys; from dreamer_jax.kernels.native.huge_pages import restart_with_huge_pages\n"
        "assert 'jax' not in sys.modules\n"
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
