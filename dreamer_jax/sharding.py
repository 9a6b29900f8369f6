"""The device mesh, and the one table that says along which of its axes each axis of an array is split.

The training step is one program per device (`jax.shard_map`): the model sees local arrays, and whatever crosses
devices is written out in `training/step.py`. This table decides how arrays lie between steps.
"""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dreamer_jax.config import ConfigError, MeshConfig

AXES = ("data",)
"""Mesh axes. data: copies of the model, each with its rows of the batch."""

RULES: Mapping[str, str | None] = {"batch": "data"}
"""Logical axis of an array -> mesh axis that splits it. What has no row is whole on every device; parameters are."""


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices.

    Raises:
        ConfigError: the axis sizes do not multiply to the number of devices.
    """
    devices = list(devices or jax.devices())
    data = len(devices) if config.data == -1 else config.data
    if data != len(devices):
        raise ConfigError(f"mesh.data = {data} does not use the {len(devices)} devices present; set it to -1 for all")
    return Mesh(np.array(devices).reshape(data), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec_of(axes: Sequence[str]) -> PartitionSpec:
    """The partition of an array with these logical axes.

    Raises:
        ConfigError: the table maps two of them to one mesh axis.
    """
    mapped = [RULES.get(axis) for axis in axes]
    used = [axis for axis in mapped if axis]
    if len(set(used)) < len(used):
        raise ConfigError(f"logical axes {tuple(axes)} map to {tuple(mapped)}: a mesh axis can split only one of them")
    return PartitionSpec(*mapped)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over devices."""
    return NamedSharding(mesh, spec_of(("batch",)))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(rows: int, microbatches: int, mesh: Mesh) -> None:
    """Every device must get the same whole number of rows in every microbatch.

    Raises:
        ConfigError: it does not.
    """
    parts = mesh.shape["data"] * microbatches
    if rows % parts:
        fix = max(parts, round(rows / parts) * parts)
        raise ConfigError(
            f"train.batch = {rows} rows do not divide into {mesh.shape['data']} devices (mesh axis 'data') x "
            f"{microbatches} microbatches; use a multiple of {parts}, such as --train.batch {fix}"
        )
