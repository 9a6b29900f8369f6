"""Kinds of parameter, and how a dimension's table of weights becomes arrays (initialisation: Table 3)."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from dreamer_jax.dimensions.base import Weight
from dreamer_jax.model_config import ModelConfig

Stack = tuple[int, ...]
"""Leading axes of a parameter: () for the one layer of DR; for LA the number of layers that have it."""


class Matrix(nnx.Param):
    """A trained matrix: used in the compute dtype, with weight decay."""


class RouterKeys(nnx.Param):
    """Router keys: used in float32 because logits are float32, with weight decay."""


class Norm(nnx.Param):
    """An RMSNorm weight: used in float32, without weight decay."""


class RouterBias(nnx.Variable):
    """b of Eq. 2: moved by Eq. 3 alone. Float32, no gradient, no weight decay."""


class Constant(nnx.Variable):
    """An array without gradient that stays as it was made, such as embeddings of texts. Float32."""


_KINDS: dict[str, type[nnx.Variable]] = {
    "input": Matrix,
    "output": Matrix,
    "keys": RouterKeys,
    "norm": Norm,
    "bias": RouterBias,
    "constant": Constant,
}


class WeightTable:
    """Makes the arrays of one dimension, or of what surrounds the layers, by their names in the exchange format.

    Every array remembers its logical axes and its names: `sharding` and `convert` read them off the model.
    """

    def __init__(self, config: ModelConfig, weights: Sequence[Weight], rngs: nnx.Rngs, prefix: str, stack: Stack):
        """Names begin with `prefix`: "sa.", or nothing outside the layers."""
        self._config, self._rngs, self._prefix, self._stack = config, rngs, prefix, stack
        self._weights = {weight.name: weight for weight in weights}

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def make(self, *names: str) -> Any:
        """One array; or several side by side along the last axis, drawn as one."""
        weights = [self._weights[name] for name in names]
        first = weights[0]
        shape = (*self._stack, *first.shape[:-1], sum(weight.shape[-1] for weight in weights))
        axes = ("depth",) * len(self._stack) + first.axes
        value = self._initial(first, shape)
        return _KINDS[first.kind](value, axes=axes, exchange=tuple(self._prefix + name for name in names))

    def _initial(self, weight: Weight, shape: tuple[int, ...]) -> jax.Array:
        if weight.kind == "norm":
            return jnp.ones(shape, jnp.float32)
        if weight.kind in ("bias", "constant"):
            return jnp.zeros(shape, jnp.float32)
        std = output_std(self._config) if weight.kind == "output" else input_std(self._config)
        return std * jax.random.normal(self._rngs.params(), shape, jnp.float32)


def table_of(config: ModelConfig, name: str, rngs: nnx.Rngs, *, merged: bool) -> WeightTable:
    """The weights of the dimension of this name: of one layer in DR, of all layers in LA that have it."""
    stack = () if config.depth_recurrent else (len(config.depths_of(name)),)
    return WeightTable(config, config.dimensions[name].weights(config, merged), rngs, f"{name}.", stack)


def input_std(config: ModelConfig) -> float:
    """Standard deviation of everything but output projections: sqrt(1 / (5 D)) (Table 3)."""
    return math.sqrt(1 / (5 * config.width))


def output_std(config: ModelConfig) -> float:
    """Standard deviation of output projections: sqrt(1 / (2.5 D depth attention_dims)) (Table 3)."""
    return math.sqrt(1 / (2.5 * config.width * config.depth * config.attention_dims))


def taken_apart(module: nnx.Module) -> tuple[Any, nnx.State, nnx.State]:
    """(graph definition, parameters, router biases and constants); `nnx.merge` puts them together again."""
    graph, *states = nnx.split(module, nnx.Param, (RouterBias, Constant))
    return graph, states[0], states[1]


def cast_matrices(params: nnx.State, dtype: DTypeLike) -> nnx.State:
    """`params` with every Matrix in the compute dtype; norms and router keys stay float32."""

    def cast(variable: nnx.Variable) -> nnx.Variable:
        return variable.replace(variable[...].astype(dtype)) if isinstance(variable, Matrix) else variable

    return jax.tree.map(cast, params, is_leaf=lambda v: isinstance(v, nnx.Variable))
