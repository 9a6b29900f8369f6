"""The exchange format's names: read off the model's arrays, which remember them.

A name of the exchange format stands for one array, [in, out], applied as x @ W. Inside the program LA's layers are
stacked along a leading axis and EA's gate and up projections are fused; both are undone here.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from dreamer_jax.config import ModelConfig
from dreamer_jax.errors import DreamerError


class WeightError(DreamerError, ValueError):
    """Weights that do not fit the model; the message names them."""


def expected_shapes(config: ModelConfig, *, merged: bool = False) -> dict[str, tuple[int, ...]]:
    """Every exchange name of this model and its shape."""
    shapes = {weight.name: weight.shape for weight in config.outer_weights()}
    for name, dimension in config.dimensions.items():
        for weight in dimension.weights(config, merged):
            shapes |= {f"{prefix}{name}.{weight.name}": weight.shape for prefix in _layers(config, name)}
    return shapes


class Part(NamedTuple):
    """Where in a model's state the array of an exchange name is."""

    path: tuple[Any, ...]
    layer: int | None
    """Of an array that holds those of all layers."""
    columns: slice | None
    """Of an array that holds two side by side."""

    def of(self, value: Any) -> Any:
        """The part of the array at `path`."""
        value = value if self.layer is None else value[self.layer]
        return value if self.columns is None else value[..., self.columns]


def parts(config: ModelConfig, state: nnx.State) -> dict[str, Part]:
    """Where the exchange names' arrays are in any part of a model's state, array by array; shapes suffice."""
    found: dict[str, Part] = {}
    for path, variable in nnx.to_flat_state(state):
        for names, layer in _places(config, path, variable):
            width = variable.get_value().shape[-1] // len(names)
            for i, name in enumerate(names):
                columns = slice(i * width, (i + 1) * width) if len(names) > 1 else None
                found[name] = Part(path, layer if _is_stacked(config, path) else None, columns)
    return found


def to_named(config: ModelConfig, state: nnx.State) -> dict[str, Any]:
    """The arrays of any part of a model's state (parameters, gradients, router biases) by exchange names."""
    values = {path: variable[...] for path, variable in nnx.to_flat_state(state)}
    return {name: part.of(values[part.path]) for name, part in parts(config, state).items()}


def from_named(config: ModelConfig, named: Mapping[str, Any], state: nnx.State) -> nnx.State:
    """The state of a model (shapes suffice), with its arrays taken from `named`, in float32."""
    filled = {}
    for path, variable in nnx.to_flat_state(state):
        arrays = [_joined([named[name] for name in names]) for names, _ in _places(config, path, variable)]
        value = jnp.stack(arrays) if _is_stacked(config, path) else arrays[0]
        filled[path] = variable.replace(value)
    return nnx.from_flat_state(filled)


def _places(config: ModelConfig, path: tuple[Any, ...], variable: nnx.Variable) -> Iterator[tuple[list[str], int]]:
    """The arrays that an array of the model stands for, a layer each: (names side by side, index of the layer)."""
    names = variable.get_metadata()["exchange"]
    prefixes = _layers(config, str(path[1])) if path[0] == "layer" else [""]
    for i, prefix in enumerate(prefixes):
        yield [prefix + name for name in names], i


def _joined(parts: list[Any]) -> Any:
    arrays = [jnp.asarray(part, jnp.float32) for part in parts]
    return jnp.concatenate(arrays, axis=-1) if len(arrays) > 1 else arrays[0]


def _layers(config: ModelConfig, name: str) -> list[str]:
    """P: the layers that have a dimension's weights."""
    return ["layer."] if config.depth_recurrent else [f"layers.{l}." for l in config.depths_of(name)]


def _is_stacked(config: ModelConfig, path: tuple[Any, ...]) -> bool:
    return path[0] == "layer" and not config.depth_recurrent


def check_names(named: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise WeightError that names every missing, extra and misshapen array."""
    faults = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in named]
    faults += [
        f"not in this model: {name} {tuple(array.shape)}" for name, array in named.items() if name not in expected
    ]
    for name, shape in expected.items():
        if name in named and tuple(named[name].shape) != shape:
            faults.append(f"misshapen: {name} is {tuple(named[name].shape)}, the config asks for {shape}")
    if faults:
        raise WeightError(f"{len(faults)} weights do not fit the model:\n  " + "\n  ".join(faults))
