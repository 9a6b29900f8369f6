"""The device mesh, and the one table that says along which of its axes each axis of an array is split.

The training step is one program per device (`jax.shard_map`). Between steps arrays lie *at rest*: parameters and
optimizer state split as finely as the mesh allows. Once per step, before the depth loop, `at_work` brings the
parameters into the layout that the loop reads: whole but for the experts, of which each device along the axis "expert"
holds its part. Its transpose sums the gradients over devices and splits them again.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dreamer_jax.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "expert")
"""Mesh axes, slowest links first. All of them split the batch; fsdp and expert split parameters at rest, too."""


Layout = Literal["rest", "work"]


class Rule(NamedTuple):
    """Mesh axes that split one logical axis."""

    rest: tuple[str, ...]
    """Between steps, major to minor."""
    work: tuple[str, ...]
    """In the depth loop."""


WHOLE = Rule((), ())

RULES: Mapping[str, Rule] = {
    "batch": Rule(rest=AXES, work=AXES),
    "embed": Rule(rest=("fsdp", "expert"), work=()),
    "expert": Rule(rest=(), work=("expert",)),
    "attention_expert": WHOLE,
    "depth": WHOLE,
    "entry": WHOLE,
    "heads": WHOLE,
    "mlp": WHOLE,
    "norm": WHOLE,
    "router": WHOLE,
    "vocab": WHOLE,
}
"""Logical axis of an array -> mesh axes; every axis that a weight names has a row."""


def mesh_shape(config: MeshConfig, devices: int) -> dict[str, int]:
    """Devices along each axis.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    given = 1
    for size in sizes.values():
        given *= max(size, 1)
    free = [axis for axis, size in sizes.items() if size == -1]
    if free and devices % given == 0:
        return sizes | {free[0]: devices // given}
    if given != devices:
        asked = " x ".join(f"mesh.{axis} = {size}" for axis, size in sizes.items())
        fix = "set one of them to -1 to take all that are left" if not free else "choose sizes that divide them"
        raise ConfigError(f"{asked} does not use the {devices} devices present; {fix}")
    return sizes


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices, neighbours in the network along the last axes; slices apart along the first.

    Raises:
        ConfigError: the axis sizes do not multiply to the number of devices, or an axis but "data" spans slices.
    """
    devices = list(devices or jax.devices())
    shape = mesh_shape(config, len(devices))
    # Elsewhere JAX calls every process or node a slice, though parameters may well be shared out over them.
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if shape["data"] % slices:
        raise ConfigError(
            f"mesh.data = {shape['data']} must be a multiple of the {slices} slices, whose links are slow"
        )
    within = (shape["data"] // slices, shape["fsdp"], shape["expert"])
    placed = (
        mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)
        if slices == 1
        else mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices, allow_split_physical_axes=True)
    )
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def rule_of(axis: str) -> Rule:
    """The row of a logical axis.

    Raises:
        ConfigError: the table has none.
    """
    if axis not in RULES:
        raise ConfigError(f"logical axis '{axis}' has no row in sharding.RULES; known: {', '.join(RULES)}")
    return RULES[axis]


def spec_of(axes: Sequence[str], layout: Layout = "rest") -> PartitionSpec:
    """The partition of an array with these logical axes.

    Raises:
        ConfigError: the table has no row for one of them, or maps two of them to one mesh axis.
    """
    mapped = [getattr(rule_of(axis), layout) for axis in axes]
    used = [axis for split in mapped for axis in split]
    if len(set(used)) < len(used):
        raise ConfigError(f"logical axes {tuple(axes)} map to {tuple(mapped)}: a mesh axis can split only one of them")
    return PartitionSpec(*(split or None for split in mapped))


def tree_specs(tree: Any, layout: Layout = "rest") -> Any:
    """Partitions of a tree of arrays; those in an `nnx.Variable` name their axes, others are whole."""

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return PartitionSpec()
        return leaf.replace(spec_of(leaf.get_metadata().get("axes", ()), layout))

    return jax.tree.map(of, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """Where the arrays of a tree (or their shapes) lie at rest.

    Raises:
        ConfigError: an axis does not divide into the devices that split it.
    """
    specs = tree_specs(tree)
    for (path, array), spec in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(specs), strict=True):
        for dimension, split in enumerate(spec):
            _check_divides(mesh, jax.tree_util.keystr(path), array.shape, dimension, split or ())
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def _check_divides(mesh: Mesh, name: str, shape: Sequence[int], dimension: int, split: Sequence[str]) -> None:
    parts = 1
    for axis in split:
        parts *= mesh.shape[axis]
    if shape[dimension] % parts:
        sizes = " x ".join(f"mesh.{axis} = {mesh.shape[axis]}" for axis in split)
        raise ConfigError(
            f"axis {dimension} of {name} has size {shape[dimension]}, which does not divide into {parts} devices "
            f"({sizes}); choose mesh sizes whose product divides it, or another model.width"
        )


def at_work(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """Inside shard_map: a parameter from its layout at rest to its layout at work.

    Its transpose adds the gradients of all devices and leaves each with its part. An axis that does not divide at work
    is filled up with zeros (1097 experts on 8 devices are 8 x 138).
    """
    x = varying(x)
    for mesh_axis in reversed(AXES):  # minor axes first, so that the parts join in order
        source, target = (_dimension(axes, mesh_axis, layout) for layout in ("rest", "work"))
        devices = lax.axis_size(mesh_axis)
        if devices == 1 or source == target:
            continue
        if source is None:
            raise ConfigError(f"logical axes {tuple(axes)}: mesh axis '{mesh_axis}' must split one of them at rest")
        if target is None:
            x = lax.all_gather(x, mesh_axis, axis=source, tiled=True)
        else:
            filled = [(0, -x.shape[i] % devices if i == target else 0) for i in range(x.ndim)]
            x = lax.all_to_all(jnp.pad(x, filled), mesh_axis, target, source, tiled=True)
    return x


def moves(axes: Sequence[str]) -> bool:
    """Inside shard_map: whether `at_work` has anything to send of an array with these axes."""
    layouts = ((_dimension(axes, axis, "rest"), _dimension(axes, axis, "work")) for axis in AXES)
    return any(lax.axis_size(axis) > 1 and rest != work for axis, (rest, work) in zip(AXES, layouts, strict=True))


def varying(x: jax.Array) -> jax.Array:
    """Inside shard_map: let every device have, and differentiate, its own copy."""
    known = axes_of(x)
    return lax.pcast(x, tuple(axis for axis in AXES if axis not in known), to="varying")


def vary_together(*arrays: jax.Array) -> list[jax.Array]:
    """Inside shard_map: let all arrays vary over the union of their mesh axes.

    What varies already stays the same array: the depth scan keeps weights apart from other residuals by identity.
    """
    own = [axes_of(a) for a in arrays]
    missing = [tuple(sorted({axis for axes in own for axis in axes} - set(axes))) for axes in own]
    return [lax.pcast(a, axes, to="varying") if axes else a for a, axes in zip(arrays, missing, strict=True)]


def axes_of(x: jax.Array) -> tuple[str, ...]:
    """Inside shard_map: the mesh axes that x varies over, sorted.

    JAX has them as a set, whose order differs from process to process. It would become the order of devices in
    collectives, and processes whose programs differ wait for each other forever.
    """
    return tuple(sorted(jax.typeof(x).manual_axis_type.varying))


def _dimension(axes: Sequence[str], mesh_axis: str, layout: str) -> int | None:
    """The dimension of an array that a mesh axis splits."""
    split = [i for i, axis in enumerate(axes) if mesh_axis in getattr(rule_of(axis), layout)]
    return split[0] if split else None


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over devices."""
    return NamedSharding(mesh, spec_of(("batch",)))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def on_one_device(mesh: Mesh, tree: Any) -> Any:
    """The whole arrays on the first local device; every process takes part."""
    whole = jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(tree)
    return jax.tree.map(lambda array: array.addressable_data(0), whole)


def check_batch(rows: int, microbatches: int, mesh: Mesh) -> None:
    """Every device must get the same whole number of rows in every microbatch.

    Raises:
        ConfigError: it does not.
    """
    parts = mesh.size * microbatches
    if rows % parts:
        fix = max(parts, round(rows / parts) * parts)
        raise ConfigError(
            f"train.batch = {rows} rows do not divide into {mesh.size} devices x {microbatches} microbatches; "
            f"use a multiple of {parts}, such as --train.batch {fix}"
        )
