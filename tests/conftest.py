"""Strict settings for every test: 8 simulated CPU devices, no silent promotion of dtypes or ranks, shapes checked.

DREAMER_TESTS_ON=cuda runs them on a GPU instead: for tests/test_on_gpu.py.
"""

import gc
import os
import tempfile
from importlib.metadata import version

os.environ["JAX_PLATFORMS"] = os.environ.get("DREAMER_TESTS_ON", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Tests compile far more than they compute: no optimisation of machine code, and one cache for all test processes.
    os.environ["XLA_FLAGS"] = " ".join(
        [
            os.environ.get("XLA_FLAGS", ""),
            "--xla_force_host_platform_device_count=8",
            "--xla_backend_optimization_level=0",
            "--xla_llvm_disable_expensive_passes=true",
        ]
    )
    # XLA's older way to write fused loops compiles in half the time; jaxlib 0.12 has only the newer one.
    if version("jaxlib").startswith("0.10."):
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="dreamer-jax-tests-"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

from jaxtyping import install_import_hook

install_import_hook("dreamer_jax", "beartype.beartype")

import jax  # noqa: E402  (the environment and the import hook come first)
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """One worker runs a whole file, where its tests are in no other group: what they share is computed once."""
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def pytest_collection_finish():
    """What has been imported by now stays: no search for garbage need go through it again."""
    gc.freeze()
