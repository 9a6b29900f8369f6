"""The exchange format's names: one table, read both ways.

A name of the exchange format stands for one array, [in, out], applied as x @ W. Inside the program LA's layers are
stacked along a leading axis and EA's gate and up projections are fused; both are undone here.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from dreamer_jax.config import ModelConfig
from dreamer_jax.model.dreamer import Dreamer
from dreamer_jax.model.parameters import RouterBias

Path = tuple[Any, ...]


class WeightError(ValueError):
    """Weights that do not fit the model; the message names them."""


def _router(prefix: str, path: Path) -> dict[str, Path]:
    return {f"{prefix}.router.{leaf}": (*path, "router", leaf) for leaf in ("w_q", "keys", "bias", "q_norm", "k_norm")}


def _attention(kind: str, config: ModelConfig, merged: bool) -> dict[str, Path]:
    path: Path = ("layer", kind, "projections")
    table: dict[str, Path] = {f"{kind}.{leaf}": (*path, leaf) for leaf in ("w_qkv", "w_o", "q_norm", "k_norm")}
    table[f"{kind}.norm"] = ("layer", kind, "norm")
    if config.routed_attention:
        table |= _router(kind, path)
        if not merged:
            table |= {f"{kind}.{leaf}": (*path, leaf) for leaf in ("w_qkv_shared", "w_o_shared")}
    return table


def layer_table(config: ModelConfig, merged: bool) -> dict[str, Path]:
    """Names below P (`layer` in DR, `layers.0` ... in LA) and where the model keeps them."""
    table = _attention("sa", config, merged)
    if config.depth_attention:
        table |= _attention("da", config, merged)
    table |= _router("ea", ("layer", "ea"))
    # `w_gate` and `w_up` are the halves of this array's last axis.
    table |= {"ea.norm": ("layer", "ea", "norm"), "ea.w_down": ("layer", "ea", "w_down")}
    return table | {"ea.w_gate_up": ("layer", "ea", "w_gate_up")}


def outer_table(config: ModelConfig) -> dict[str, Path]:
    """Names outside the layers."""
    last = "residual_norm" if config.depth_recurrent else "final_norm"
    return {"embed": ("embed",), "lm_head": ("lm_head",), last: ("residual_norm",)}


def to_named(config: ModelConfig, values: Mapping[Path, Any], *, merged: bool = False) -> dict[str, Any]:
    """Arrays by the model's paths (parameters, gradients, biases: any part of the model) -> by exchange names."""
    named = {name: values[path] for name, path in outer_table(config).items() if path in values}
    for name, path in layer_table(config, merged).items():
        if path not in values:
            continue
        if config.depth_recurrent:
            named |= _split_gate_up(f"layer.{name}", values[path])
            continue
        for l in range(config.depth):
            named |= _split_gate_up(f"layers.{l}.{name}", values[path][l])
    return named


def _split_gate_up(name: str, value: Any) -> dict[str, Any]:
    if not name.endswith("w_gate_up"):
        return {name: value}
    gate, up = jnp.split(jnp.asarray(value), 2, axis=-1)
    stem = name.removesuffix("w_gate_up")
    return {stem + "w_gate": gate, stem + "w_up": up}


def from_named(config: ModelConfig, named: Mapping[str, Any], *, merged: bool = False) -> dict[Path, Any]:
    """Arrays by exchange names -> by the model's paths; all must be there."""
    values = {path: named[name] for name, path in outer_table(config).items()}
    for name, path in layer_table(config, merged).items():
        if config.depth_recurrent:
            values[path] = _join_gate_up(f"layer.{name}", named)
        else:
            values[path] = jnp.stack([_join_gate_up(f"layers.{l}.{name}", named) for l in range(config.depth)])
    return values


def _join_gate_up(name: str, named: Mapping[str, Any]) -> Any:
    if not name.endswith("w_gate_up"):
        return jnp.asarray(named[name])
    stem = name.removesuffix("w_gate_up")
    return jnp.concatenate([jnp.asarray(named[stem + "w_gate"]), jnp.asarray(named[stem + "w_up"])], axis=-1)


def flat_values(state: nnx.State) -> dict[Path, Any]:
    """A state's arrays by path."""
    return {path: variable[...] for path, variable in nnx.to_flat_state(state)}


def expected_shapes(config: ModelConfig, *, merged: bool = False) -> dict[str, tuple[int, ...]]:
    """Every exchange name of this model and its shape."""
    model = nnx.eval_shape(lambda: Dreamer(config, nnx.Rngs(0), merged=merged))
    params, biases = nnx.state(model, nnx.Param), nnx.state(model, RouterBias)
    zeros = nnx.eval_shape(lambda: to_named(config, flat_zeros(params) | flat_zeros(biases), merged=merged))
    return {name: tuple(array.shape) for name, array in zeros.items()}


def flat_zeros(state: nnx.State) -> dict[Path, Any]:
    """Zeros in the shapes of a state."""
    return {path: jnp.zeros(variable.shape, jnp.float32) for path, variable in nnx.to_flat_state(state)}


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
