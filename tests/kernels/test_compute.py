"""Which implementation a config gets."""

import dataclasses
import subprocess
import sys

import jax.numpy as jnp
import pytest

from dreamer_jax.config import Config, ConfigError, KernelConfig, MeshConfig, TrainConfig
from dreamer_jax.kernels.compute import Compute, choose, implementation
from dreamer_jax.kernels.exchange import Exchange
from dreamer_jax.kernels.native import library
from dreamer_jax.sharding import make_mesh


def config(dtype="float32", **kernels):
    return Config(name="any", train=TrainConfig(dtype=dtype, remat="products"), kernels=KernelConfig(**kernels))


def test_auto_goes_by_platform_and_compute_type():
    platforms = ("cpu", "gpu", "cuda", "tpu")
    assert [choose("auto", platform, "bfloat16") for platform in platforms] == ["plain", "gpu", "gpu", "tpu"]
    assert choose("auto", "cpu", "float32") == ("plain" if library.missing() else "native")
    with pytest.raises(ValueError, match="abacus"):
        choose("auto", "abacus", "float32")


@pytest.mark.parametrize("name", ["plain", "reference", "gpu", "tpu"])
def test_every_other_choice_is_kept(name):
    compute = Compute.of(config("bfloat16", implementation=name))
    assert compute == Compute(dtype=jnp.dtype("bfloat16"), remat="products", kernels=name)
    assert compute.implementation.name == name
    assert len({compute, dataclasses.replace(compute)}) == 1


def test_native_kernels_are_refused_where_they_cannot_compute():
    with pytest.raises(ConfigError, match=r"kernels.implementation = 'native'.*float32, not in bfloat16.*train.dtype"):
        Compute.of(config("bfloat16", implementation="native"))
    with pytest.raises(ConfigError, match=r"'native'.*for CPUs, not for 'tpu'"):
        choose("native", "tpu", "float32")


def test_experts_are_exchanged_where_a_mesh_shares_them_out():
    whole, shared = (make_mesh(MeshConfig(data=-1, expert=experts)) for experts in (1, 4))
    assert Compute.of(config(), whole).exchange is None
    assert Compute.of(config()).exchange is None
    assert Compute.of(config(), shared).exchange == Exchange("expert", 4, "all_to_all", 1.5)
    ragged = config(expert_exchange="ragged_all_to_all")
    assert Compute.of(ragged, shared).exchange == Exchange("expert", 4, "ragged_all_to_all", 2.0)


def test_every_implementation_has_a_name_and_a_tile():
    tiles = {name: implementation(name).expert_tile for name in ("plain", "reference", "native", "gpu", "tpu")}
    assert tiles == {"plain": 1, "reference": 1, "native": 1, "gpu": 128, "tpu": 128}


def test_kernels_of_accelerators_are_not_imported_before_they_are_chosen():
    """In a process of its own."""
    code = (
        "import sys; from dreamer_jax.kernels.compute import implementation; implementation('plain'); "
        "print([name for name in sys.modules if 'kernels.tpu' in name or 'kernels.gpu' in name or 'splash' in name])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
