"""A checksum of each array of a checkpoint, computed where the array lies, on any mesh.

Two sums modulo 2^32: of an array's words, and of its columns' sums (along the last axis) times odd numbers. A flipped
bit changes the first for certain. Sums of integers are exact in any order, so devices and their mesh do not matter.
Accelerators sum about as fast as they read; on CPUs XLA does not, and NumPy sums the shards.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

Checksums = dict[str, str]

PART_BYTES = 2**22
"""What one thread sums at a time: large enough that handing it out costs nothing."""


def checksums(arrays: Mapping[str, Array | np.ndarray]) -> Checksums:
    """By name, 16 hexadecimal digits."""
    if all(_on_host(array) for array in arrays.values()):
        sums = _columns_on_host(arrays)
    else:
        sums = jax.device_get(_program(_everywhere(arrays))(dict(arrays)))
    return {name: _digits(columns) for name, columns in sums.items()}


def damaged(arrays: Mapping[str, Array | np.ndarray], expected: Mapping[str, str]) -> list[str]:
    """The names of arrays whose checksum is not the expected one; without an expectation none is compared."""
    if not expected:
        return []
    return sorted(name for name, found in checksums(arrays).items() if expected.get(name, found) != found)


def looked_for_damage(arrays: Mapping[str, Array], expected: Mapping[str, str]) -> "Future[list[str]]":
    """What `damaged` finds, later: on CPUs it looks in a thread while other work goes on.

    On accelerators, which take no time to speak of, at once: programs of several processes must run in one order.
    """
    if all(_on_host(array) for array in arrays.values()):
        thread = ThreadPoolExecutor(1)
        found = thread.submit(damaged, arrays, expected)
        thread.shutdown(wait=False)
        return found
    found = Future()
    found.set_result(damaged(arrays, expected))
    return found


def _digits(columns: np.ndarray) -> str:
    odd = 2 * np.arange(columns.size, dtype=np.uint32) + np.uint32(1)
    plain, weighted = (int(np.add.reduce(a, dtype=np.uint32)) for a in (columns, columns * odd))
    return f"{plain:08x}{weighted:08x}"


def _on_host(array: Array | np.ndarray) -> bool:
    if isinstance(array, np.ndarray):
        return True
    return array.is_fully_addressable and all(device.platform == "cpu" for device in array.devices())


def _columns_on_host(arrays: Mapping[str, Array | np.ndarray]) -> dict[str, np.ndarray]:
    """The sums of columns, by parts of arrays of about the same size, so that all threads end together."""
    columns = {name: np.zeros(array.shape[-1:] or (1,), np.uint32) for name, array in arrays.items()}
    parts = [(name, *part) for name, array in arrays.items() for part in _parts(array)]
    with ThreadPoolExecutor() as threads:  # NumPy sums without Python's lock
        sums = threads.map(lambda part: _column_sums(part[2]), parts)
        for (name, where, _), found in zip(parts, sums, strict=True):
            columns[name][where] += found
    return columns


def _column_sums(words: np.ndarray) -> np.ndarray:
    """Of [rows, columns], several rows laid side by side: NumPy adds long rows twice as fast as short ones."""
    rows, columns = words.shape
    beside = min(rows, max(1, 8192 // max(1, columns)))
    whole = rows // beside * beside
    laid = np.add.reduce(words[:whole].reshape(-1, beside * columns), axis=0, dtype=np.uint32)
    rest = np.concatenate([laid.reshape(beside, columns), words[whole:]])
    return np.add.reduce(rest, axis=0, dtype=np.uint32)


def _parts(array: Array | np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """(columns that the part has, its words [rows, columns]) of each part."""
    for columns, shard in _shards(array):
        held = np.ascontiguousarray(np.atleast_1d(shard))
        words = held.view(f"uint{8 * held.itemsize}").reshape(-1, held.shape[-1])
        rows = max(1, PART_BYTES // max(1, words[:1].nbytes))
        for at in range(0, len(words), rows):
            yield columns, words[at : at + rows]


def _shards(array: Array | np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """(columns that it has, numbers) of each part of an array that lies by itself."""
    if isinstance(array, np.ndarray):
        yield slice(None), array
        return
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            yield shard.index[-1] if shard.index else slice(None), np.asarray(shard.data)


def _everywhere(arrays: Mapping[str, Array | np.ndarray]) -> NamedSharding | None:
    """Where results must lie for every process to see them; None for arrays of one device."""
    places = [array.sharding for array in arrays.values() if isinstance(array, Array)]
    return next((NamedSharding(place.mesh, P()) for place in places if isinstance(place, NamedSharding)), None)


@functools.cache
def _program(place: NamedSharding | None) -> Callable[..., dict[str, Array]]:
    return jax.jit(_columns, out_shardings=place)


def _columns(arrays: dict[str, Array]) -> dict[str, Array]:
    def of(array: Array) -> Array:
        words = lax.bitcast_convert_type(jnp.atleast_1d(array), jnp.dtype(f"uint{8 * array.dtype.itemsize}"))
        return jnp.sum(words.astype(jnp.uint32), axis=tuple(range(words.ndim - 1)), dtype=jnp.uint32)

    return {name: of(array) for name, array in arrays.items()}
