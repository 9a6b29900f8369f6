"""Exact parameter counts by component (Table 1): those stored, and those that take part in one token's forward pass.

Both follow from the tables of weights in `dimensions/`. Router biases are no parameters: Eq. 3 moves them, no
gradient does.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from dreamer_jax.config import ModelConfig
from dreamer_jax.dimensions.base import Weight

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Count(Generic[Number]):
    """Parameters, or FLOPs, by component; a component that a model does not have is absent."""

    components: dict[str, Number]

    @property
    def total(self) -> Number:
        """All components."""
        return sum(self.components.values())

    def by_component(self) -> dict[str, Number]:
        """The rows of a table; they add up to the total."""
        return dict(self.components)


def parameters(config: ModelConfig) -> Count[int]:
    """Stored parameters."""
    return _count(stored_weights(config), lambda weight: weight.size)


def active_parameters(config: ModelConfig) -> Count[int]:
    """Parameters that one token meets in a forward pass, a weight counted at every depth that uses it.

    Counted by use, so that LA and DR of equal FLOPs have about equal numbers. Shared experts are out (merged, Eq. 8),
    routers are whole, and of the embedding it is the token's row.
    """
    return _count(used_weights(config), active_numbers)


def stored_weights(config: ModelConfig) -> Iterator[tuple[Weight, int]]:
    """Every weight with the number of layers that have it: one in DR, in LA one for each depth that it is used at."""
    yield from ((weight, 1) for weight in config.outer_weights())
    for name, dimension in config.dimensions.items():
        layers = 1 if config.depth_recurrent else len(config.depths_of(name))
        yield from ((weight, layers) for weight in dimension.weights(config))


def used_weights(config: ModelConfig) -> Iterator[tuple[Weight, int]]:
    """Every weight with how often one token's forward pass uses it."""
    for weight in config.outer_weights():
        # DR norms the residual stream at every depth.
        yield weight, config.depth if weight.kind == "norm" and config.depth_recurrent else 1
    for name, dimension in config.dimensions.items():
        yield from ((weight, len(config.depths_of(name))) for weight in dimension.weights(config))


def active_numbers(weight: Weight) -> int:
    """Numbers of a weight that one token meets at one depth."""
    return weight.size if weight.active is None else weight.active


def shared_out_experts(config: ModelConfig) -> int:
    """The most experts that devices along the mesh axis "expert" can share out; 1 if there are none."""
    sizes = (dict(zip(weight.axes, weight.shape, strict=True)) for weight, _ in stored_weights(config))
    return max(shape.get("expert", 1) for shape in sizes)


def exchanged_rows(config: ModelConfig) -> int:
    """Rows of one token that travel to experts on other devices in a forward pass, over all depths."""
    return sum(len(config.depths_of(name)) * rows for name, rows in _exchanged(config).items())


def most_exchanged(config: ModelConfig) -> int:
    """The most rows of one token that travel at one time."""
    return max(_exchanged(config).values(), default=0)


def _exchanged(config: ModelConfig) -> dict[str, int]:
    """Experts that a token selects at a depth, for the dimensions whose experts are shared out."""
    return {
        name: dimension.routers(config)
        for name, dimension in config.dimensions.items()
        if any("expert" in weight.axes for weight in dimension.weights(config))
    }


def _count(weights: Iterable[tuple[Weight, int]], numbers: Callable[[Weight], int]) -> Count[int]:
    components: dict[str, int] = {}
    # Norms last: they are of all dimensions.
    for weight, times in sorted(weights, key=lambda pair: pair[0].kind == "norm"):
        if weight.trained:
            components[weight.component] = components.get(weight.component, 0) + times * numbers(weight)
    return Count(components)
