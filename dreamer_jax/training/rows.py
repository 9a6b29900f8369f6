"""Rows of a global batch: which of them this process's devices hold, and how they get there."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import PyTree


def held_rows(place: NamedSharding, batch: int) -> tuple[int, ...]:
    """The rows, in their order, that devices of this process hold of a batch laid out by `place`.

    They need not be neighbours, since a mesh may go through the devices in any order, and several processes hold the
    same rows where a mesh axis splits the model but not the batch.
    """
    indices = place.addressable_devices_indices_map((batch,)).values()
    return tuple(sorted({row for index in indices if index for row in range(*index[0].indices(batch))}))


def place_rows(place: NamedSharding, batch: int, held: Sequence[int], rows: PyTree[np.ndarray]) -> PyTree[jax.Array]:
    """The global batch of which this process gives the rows `held`; arrays are [len(held), ...]."""
    position = {row: i for i, row in enumerate(held)}

    def put(array: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # None stands for devices of other processes
            return array[[position[row] for row in range(*index[0].indices(batch))]]

        return jax.make_array_from_callback((batch, *array.shape[1:]), place, part)

    return jax.tree.map(put, rows)
