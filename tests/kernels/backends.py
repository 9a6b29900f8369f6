"""Implementations to test on CPUs: the native kernels only where there is a C++ compiler."""

import pytest

from dreamer_jax.kernels.native import library

needs_compiler = pytest.mark.skipif(library.missing() is not None, reason="no C++ compiler: no native kernels")
BACKENDS = ["plain", pytest.param("native", marks=needs_compiler)]
