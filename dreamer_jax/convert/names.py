"""The exchange format's names: read off the model's arrays, which remember them.

A name of the exchange format stands for one array, [in, out], applied as x @ W. Inside the program LA's layers are
stacked along a leading axis and EA's gate and up projections are fused; both are undone here.
"""

from collections.abc import Iterator, Mapping
from typing import Any

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


def to_named(config: ModelConfig, state: nnx.State) -> dict[str, Any]:
    """The arrays of any part of a model's state (parameters, gradients, router biases) by exchange names."""
    named: dict[str, Any] = {}
    for path, variable in nnx.to_flat_state(state):
        for names, value in _arrays(config, path, variable, variable[...]):
            parts = jnp.split(jnp.asarray(value), len(names), axis=-1) if len(names) > 1 else [value]
            named |= dict(zip(names, parts, strict=True))
    return named


def from_named(config: ModelConfig, named: Mapping[str, Any], state: nnx.State) -> nnx.State:
    """The state of a model (shapes suffice), with its arrays taken from `named`, in float32."""
    filled = {}
    for path, variable in nnx.to_flat_state(state):
        arrays = [_joined([named[name] for name in names]) for names, _ in _arrays(config, path, variable, None)]
        value = jnp.stack(arrays) if _is_stacked(config, path) else arrays[0]
        filled[path] = variable.replace(value)
    return nnx.from_flat_state(filled)


def _arrays(
    config: ModelConfig, path: tuple[Any, ...], variable: nnx.Variable, value: Any
) -> Iterator[tuple[list[str], Any]]:
    """The arrays that an array of the model stands for, a layer each: (names side by side, value)."""
    names = variable.get_metadata()["exchange"]
    if path[0] != "layer":
        yield list(names), value
        return
    for i, prefix in enumerate(_layers(config, str(path[1]))):
        own = value[i] if value is not None and _is_stacked(config, path) else value
        yield [prefix + name for name in names], own


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
