"""The mesh and the table of what is split along it."""

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from dreamer_jax import sharding
from dreamer_jax.config import ConfigError, MeshConfig
from dreamer_jax.kernels.cores import cpu_devices
from dreamer_jax.sharding import at_work, check_batch, make_mesh, mesh_shape, spec_of, tree_shardings


def test_one_axis_may_take_all_devices_that_are_left():
    assert mesh_shape(MeshConfig(), 8) == {"data": 8, "fsdp": 1, "expert": 1}
    assert mesh_shape(MeshConfig(data=2, fsdp=-1, expert=2), 8) == {"data": 2, "fsdp": 2, "expert": 2}


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(data=3), r"mesh\.data = 3 x .* does not use the 8 devices present; set one of them to -1"),
        (MeshConfig(data=-1, fsdp=3), r"mesh\.fsdp = 3 .* 8 devices present; choose sizes that divide"),
    ],
)
def test_a_mesh_that_does_not_use_all_devices_is_refused_with_the_mend(mesh, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(mesh)


@pytest.mark.parametrize(("sizes", "message"), [((-1, -1, 1), "only one"), ((2, 0, 1), r"mesh\.fsdp = 0")])
def test_impossible_meshes_are_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        MeshConfig(*sizes)


@pytest.mark.parametrize(
    ("mesh", "rows", "cores", "devices"),
    [
        (MeshConfig(), 4, 2, 2),
        (MeshConfig(), 4, 3, 2),
        (MeshConfig(), 5, 4, 1),
        (MeshConfig(), 64, 64, 8),
        (MeshConfig(expert=2), 8, 5, 4),
        (MeshConfig(data=1), 8, 4, 1),
        (MeshConfig(data=2, fsdp=2, expert=2), 8, 2, 8),
        (MeshConfig(expert=4), 8, 2, 4),
    ],
)
def test_a_cpu_has_a_device_for_each_part_that_the_batch_can_use(mesh, rows, cores, devices):
    assert cpu_devices(mesh, rows, cores) == devices


def test_the_door_makes_the_devices_unless_the_user_has():
    """In processes of their own: JAX counts its devices once."""
    code = (
        "import os, jax; from dreamer_jax.config import *; from dreamer_jax.kernels.cores import use_cores; "
        "use_cores(Config(name='any', mesh=MeshConfig(data=3), train=TrainConfig(batch=6))); print(len(jax.devices()))"
    )
    alone = os.environ | {"XLA_FLAGS": ""}
    forced = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=5"}
    found = [subprocess.check_output([sys.executable, "-c", code], env=e, text=True) for e in (alone, forced)]
    assert found == ["3\n", "5\n"]


def test_matrices_are_split_along_the_width_and_norms_are_whole():
    assert spec_of(("expert", "embed", "mlp")) == P(None, ("fsdp", "expert"), None)
    assert spec_of(("depth", "norm")) == P(None, None)


@pytest.mark.parametrize("axes", [("batch", "batch"), ("batch", "embed")])
def test_two_axes_cannot_share_a_mesh_axis(axes):
    with pytest.raises(ConfigError, match="can split only one"):
        spec_of(axes)


def test_an_axis_without_a_rule_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"'widht' has no row in sharding\.RULES; known: batch, embed"):
        spec_of(("widht",))


def test_a_width_that_does_not_divide_is_refused_with_its_name_and_the_mend():
    weight = nnx.Param(jnp.zeros((3, 12)), axes=("heads", "embed"))
    with pytest.raises(ConfigError, match=r"axis 1 of .*w.* size 12, .* 8 devices \(mesh.fsdp = 4 x mesh.expert = 2\)"):
        tree_shardings(make_mesh(MeshConfig(data=1, fsdp=4, expert=2)), {"w": weight})


def test_a_batch_that_does_not_divide_is_refused_with_the_mend():
    with pytest.raises(ConfigError, match=r"train.batch = 12 .* 8 devices .* multiple of 16"):
        check_batch(12, 2, make_mesh(MeshConfig()))


@pytest.mark.parametrize("mesh", [MeshConfig(8, 1, 1), MeshConfig(1, 8, 1), MeshConfig(1, 2, 4), MeshConfig(2, 2, 2)])
@pytest.mark.parametrize("experts", [8, 5])
def test_at_work_every_device_has_its_experts_whole_and_gradients_come_back_summed(mesh, experts):
    mesh, axes = make_mesh(mesh), ("expert", "embed", "mlp")
    w = jnp.asarray(np.random.default_rng(0).normal(size=(experts, 16, 3)), jnp.float32)
    spec, shared = spec_of(axes), mesh.shape["expert"]
    local = -(-experts // shared)

    @partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=(P(sharding.AXES), spec))
    def gathered_and_gradient(part):
        whole, pullback = jax.vjp(lambda x: at_work(x, axes), part)
        return whole[None], pullback(whole)[0]

    whole, gradient = jax.jit(gathered_and_gradient)(w)
    padded = np.pad(w, ((0, shared * local - experts), (0, 0), (0, 0))).reshape(shared, local, 16, 3)
    for device, part in enumerate(whole):
        np.testing.assert_array_equal(part, padded[device % shared])
    # Every copy of an expert sends back its own value: as many as there are devices on the other axes.
    np.testing.assert_allclose(gradient, w * (8 // shared), rtol=1e-6)
