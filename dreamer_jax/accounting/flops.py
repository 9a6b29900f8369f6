"""FLOPs per token by component (3.8, Table 1), for generation and for training.

A FLOP count is twice the multiply-accumulates of all matrix products. Norms, activations, softmaxes, sorting and the
optimizer are left out. Shared experts cost nothing because they are merged (Eq. 8): once for inference, and once per
step in training.
"""

import dataclasses
from dataclasses import dataclass

from dreamer_jax.accounting.params import attention_weights, expert_weights, router_weights
from dreamer_jax.config import ModelConfig


@dataclass(frozen=True)
class FlopCount:
    """FLOPs per token by component, summed over depths."""

    sa_projections: float
    sa_attention: float
    """Scores and weighted values over the context."""
    da_projections: float
    da_attention: float
    """Scores and weighted values over the token's earlier depths and the current one."""
    attention_routers: float
    ea_experts: float
    ea_router: float
    lm_head: float

    @property
    def total(self) -> float:
        """All components."""
        return sum(self.by_component().values())

    def by_component(self) -> dict[str, float]:
        """The rows of a table; they add up to the total."""
        return dataclasses.asdict(self)


def mean_context(length: int) -> float:
    """Keys that a token of a causal sequence attends to, itself included: the mean of 1 .. length."""
    return (length + 1) / 2


def generated_flops(config: ModelConfig, length: int = 1024) -> FlopCount:
    """One generated token, averaged over a generation of `length` tokens: the FLOPs of Table 1."""
    return forward_flops(config, mean_context(length))


def forward_flops(config: ModelConfig, context: float) -> FlopCount:
    """Forward pass of one token that attends to `context` tokens, itself included."""
    depth, weights = config.depth, attention_weights(config)
    attention_router = router_weights(config, config.linear_experts) if config.routed_attention else 0
    multiply_accumulates = {
        "sa_projections": depth * weights["sa"],
        "sa_attention": depth * 2 * config.query_heads * config.head_size * context,
        "da_projections": depth * weights.get("da", 0),
        "da_attention": depth * _da_products(config) * mean_context(depth),
        "attention_routers": depth * len(weights) * attention_router,
        "ea_experts": depth * config.active_experts * expert_weights(config),
        "ea_router": depth * router_weights(config, config.experts),
        "lm_head": config.width * config.vocab,
    }
    return FlopCount(**{name: 2.0 * macs for name, macs in multiply_accumulates.items()})


def training_flops(config: ModelConfig, length: int) -> FlopCount:
    """Forward and backward pass of one token in causal rows of `length` tokens: model FLOPs, for MFU.

    Three times the forward pass: the backward pass has two products for each of its. Recomputation (`train.remat`) is
    not model FLOPs, nor is the score's gradient (`score_gradient_flops`). Rows count as one document each; packed
    documents attend to less, which MFU then credits as work done, as is the custom.
    """
    forward = forward_flops(config, mean_context(length)).by_component()
    return FlopCount(**{name: 3 * flops for name, flops in forward.items()})


def score_gradient_flops(config: ModelConfig) -> float:
    """FLOPs per token of the backward pass's x W_shared: merged experts trade it for a second forward product (Eq. 7).

    Excluded from `training_flops`: it serves one number per token, depth and attention.
    """
    return 2.0 * config.depth * sum(attention_weights(config).values()) if config.routed_attention else 0.0


def _da_products(config: ModelConfig) -> int:
    """Multiply-accumulates of DA for each depth it attends to."""
    return 2 * config.da_heads * config.da_head_size if config.depth_attention else 0
