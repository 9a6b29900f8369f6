"""Calling kernel libraries from inside a shard_map that checks over which mesh axes arrays vary."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec

from dreamer_jax.sharding import axes_of


def unchecked(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call what does not declare the mesh axes of its results, nor keep to strict promotion, with trees of arrays.

    Inside a shard_map it runs in an inner, unchecked one over no axis. Multiplying by one there drops the axes from an
    array's type; what comes out is marked as varying over the axes of all arguments.
    """

    def lenient(*arguments: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return function(*arguments)

    if not jax.sharding.get_abstract_mesh().manual_axes:
        return lenient(*arguments)
    inner = jax.shard_map(
        lambda *arguments: lenient(*jax.tree.map(lambda leaf: leaf * 1, arguments)),
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        axis_names=set(),
        check_vma=False,
    )
    axes = tuple(sorted({axis for leaf in jax.tree.leaves(arguments) for axis in axes_of(leaf)}))
    return jax.tree.map(lambda x: lax.pcast(x, axes, to="varying") if axes else x, inner(*arguments))
