"""Kinds of parameter, their initialisation and the logical axes that `sharding.py` maps to the mesh."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from dreamer_jax.config import ModelConfig

Stack = tuple[int, ...]
"""Leading axes of a parameter: () for the one layer of DR, (L,) for the distinct layers of LA."""


class Matrix(nnx.Param):
    """A trained matrix: used in the compute dtype, with weight decay."""


class RouterKeys(nnx.Param):
    """Router keys: used in float32 because logits are float32, with weight decay."""


class Norm(nnx.Param):
    """An RMSNorm weight: used in float32, without weight decay."""


class RouterBias(nnx.Variable):
    """b of Eq. 2: moved by Eq. 3 alone. Float32, no gradient, no weight decay."""


def matrix(rngs: nnx.Rngs, stack: Stack, shape: tuple[int, ...], axes: tuple[str, ...], std: float) -> Matrix:
    """A matrix drawn from N(0, std)."""
    value = std * jax.random.normal(rngs.params(), (*stack, *shape), jnp.float32)
    return Matrix(value, axes=("depth",) * len(stack) + axes)


def norm(stack: Stack, size: int) -> Norm:
    """A norm weight that starts at one."""
    return Norm(jnp.ones((*stack, size), jnp.float32), axes=("depth",) * len(stack) + ("norm",))


def input_std(config: ModelConfig) -> float:
    """Standard deviation of everything but output projections: sqrt(1 / (5 D)) (Table 3)."""
    return math.sqrt(1 / (5 * config.width))


def output_std(config: ModelConfig) -> float:
    """Standard deviation of output projections: sqrt(1 / (2.5 D depth attention_dims)) (Table 3)."""
    return math.sqrt(1 / (2.5 * config.width * config.depth * config.attention_dims))


def taken_apart(module: nnx.Module) -> tuple[Any, nnx.State, nnx.State]:
    """(graph definition, parameters, router biases) of a model or layer; `nnx.merge` puts them together again."""
    graph, *states = nnx.split(module, nnx.Param, RouterBias)
    return graph, states[0], states[1]


def cast_matrices(params: nnx.State, dtype: DTypeLike) -> nnx.State:
    """`params` with every Matrix in the compute dtype; norms and router keys stay float32."""

    def cast(variable: nnx.Variable) -> nnx.Variable:
        return variable.replace(variable[...].astype(dtype)) if isinstance(variable, Matrix) else variable

    return jax.tree.map(cast, params, is_leaf=lambda v: isinstance(v, nnx.Variable))
