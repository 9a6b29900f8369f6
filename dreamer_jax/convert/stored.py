"""A checkpoint's arrays by exchange names, each read from disk when its turn comes."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dreamer_jax.convert.names import Part, expected_shapes, parts
from dreamer_jax.training.checkpoint import Saved

SHARED = "_shared"
"""How the names of shared experts end, which Eq. 8 adds to those of the routed ones."""


class StoredArray:
    """An array of a checkpoint, which NumPy reads when it is asked for the numbers."""

    def __init__(self, arrays: "StoredArrays", name: str, shape: tuple[int, ...]):
        self._arrays, self._name, self.shape = arrays, name, shape

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Read it."""
        return np.array(self._arrays.read(self._name), dtype, copy=copy)


class StoredArrays(Mapping[str, StoredArray]):
    """All arrays of a model by exchange names, in the order in which they lie in the checkpoint.

    One array of the checkpoint is in memory at a time. It may hold the arrays of several names: LA's layers lie in
    one, and so do the gate and up projections of experts. Whoever goes through the names in order reads each once.
    """

    def __init__(self, saved: Saved, *, merged: bool):
        """Look at names and shapes; `merged` adds the shared attention experts to the routed ones (Eq. 8).

        Raises:
            CheckpointError: arrays are missing, or do not fit the config.
        """
        saved.check()
        self._saved = saved
        self._parts: dict[str, tuple[str, Part]] = {}
        for kind, state in saved.abstract()[1].items():
            for name, part in parts(saved.config.model, state).items():
                self._parts[name] = ".".join([kind, *map(str, part.path)]), part
        shapes = expected_shapes(saved.config.model, merged=merged)
        self.merged = shapes.keys() != self._parts.keys()
        self._arrays = {name: StoredArray(self, name, shapes[name]) for name in self._parts if name in shapes}
        self._newest: tuple[str, np.ndarray] | None = None

    def __getitem__(self, name: str) -> StoredArray:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def read(self, name: str) -> np.ndarray:
        """The numbers of one array, float32.

        Raises:
            CheckpointError: it is damaged.
        """
        shared = name + SHARED
        if shared in self._parts and shared not in self._arrays:
            addend = self._stored(shared).copy()  # small; the next line drops what it is a part of
            return self._stored(name) + addend
        return self._stored(name)

    def _stored(self, name: str) -> np.ndarray:
        leaf, part = self._parts[name]
        if self._newest is None or self._newest[0] != leaf:
            self._newest = None  # before the next one takes its room
            self._newest = leaf, self._saved.leaf(leaf)
        return part.of(self._newest[1])
