"""FLOPs per token by component (3.8, Table 1), for generation and for training.

A FLOP count is twice the multiply-accumulates of all matrix products: those with weights, and what a dimension computes
beside them. Norms, activations, softmaxes, sorting and the optimizer are left out. Shared experts cost nothing because
they are merged (Eq. 8): once for inference, and once per step in training.
"""

from collections.abc import Iterator

from dreamer_jax.accounting.params import Count, active_numbers, used_weights
from dreamer_jax.config import ModelConfig
from dreamer_jax.dimensions.base import mean_context


def generated_flops(config: ModelConfig, length: int = 1024) -> Count[float]:
    """One generated token, averaged over a generation of `length` tokens: the FLOPs of Table 1."""
    return forward_flops(config, mean_context(length))


def forward_flops(config: ModelConfig, context: float) -> Count[float]:
    """Forward pass of one token that attends to `context` tokens, itself included."""
    flops: dict[str, float] = {}
    for component, multiply_accumulates in _multiply_accumulates(config, context):
        flops[component] = flops.get(component, 0.0) + 2.0 * multiply_accumulates
    return Count({component: count for component, count in flops.items() if count})


def _multiply_accumulates(config: ModelConfig, context: float) -> Iterator[tuple[str, int | float]]:
    """Of all depths, by component: of the weights, and of what dimensions multiply beside them."""
    for weight, times in used_weights(config):
        if weight.multiplies:
            yield weight.component, times * active_numbers(weight)
    for name, dimension in config.dimensions.items():
        yield from dimension.products(config, context, config.depths_of(name)).items()


def training_flops(config: ModelConfig, length: int) -> Count[float]:
    """Forward and backward pass of one token in causal rows of `length` tokens: model FLOPs, for MFU.

    Three times the forward pass: the backward pass has two products for each of its. Recomputation (`train.remat`) is
    not model FLOPs, nor is the score's gradient (`score_gradient_flops`). Rows count as one document each; packed
    documents attend to less, which MFU then credits as work done, as is the custom.
    """
    forward = forward_flops(config, mean_context(length)).by_component()
    return Count({name: 3 * flops for name, flops in forward.items()})


def score_gradient_flops(config: ModelConfig) -> float:
    """FLOPs per token of the backward pass's x W_shared: merged experts trade it for a second forward product (Eq. 7).

    Excluded from `training_flops`: it serves one number per token, depth and attention.
    """
    shared = ((weight.size, times) for weight, times in used_weights(config) if weight.component == "shared_experts")
    return 2.0 * sum(size * times for size, times in shared)
