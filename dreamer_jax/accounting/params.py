"""Exact parameter counts by component (Table 1): those stored, and those that take part in one token's forward pass.

Router biases are no parameters: Eq. 3 moves them, no gradient does.
"""

import dataclasses
from dataclasses import dataclass

from dreamer_jax.config import ModelConfig


@dataclass(frozen=True)
class ParameterCount:
    """Trained weights by component."""

    embedding: int
    lm_head: int
    norms: int
    """All RMSNorm weights: of the residual stream, before each attention, of queries and keys, of routers."""
    sa_projections: int
    """QKV and output of SA; in DR the routed experts."""
    da_projections: int
    """QKV and output of DA; in DR the routed experts."""
    shared_experts: int
    """The shared experts of the attention MoEs, which Eq. 8 merges away for inference."""
    attention_routers: int
    """Query projections and keys of the attention MoEs' routers."""
    ea_experts: int
    ea_router: int

    @property
    def total(self) -> int:
        """All components."""
        return sum(self.by_component().values())

    @property
    def embeddings(self) -> int:
        """Embedding and LM head."""
        return self.embedding + self.lm_head

    def by_component(self) -> dict[str, int]:
        """The rows of a table; they add up to the total."""
        return dataclasses.asdict(self)


def parameters(config: ModelConfig) -> ParameterCount:
    """Stored parameters."""
    layers = 1 if config.depth_recurrent else config.depth
    return _count(
        config,
        layers,
        embedding=config.vocab * config.width,
        residual_norms=1,
        linear_experts=config.linear_experts if config.routed_attention else 1,
        shared=config.routed_attention,
        experts=config.experts,
    )


def active_parameters(config: ModelConfig) -> ParameterCount:
    """Parameters that one token meets in a forward pass, a weight counted at every depth that uses it.

    Counted by use, so that LA and DR of equal FLOPs have about equal numbers. Shared experts are out (merged, Eq. 8),
    routers are whole, and of the embedding it is the token's row.
    """
    return _count(
        config,
        config.depth,
        embedding=config.width,
        residual_norms=config.depth if config.depth_recurrent else 1,
        linear_experts=1,
        shared=False,
        experts=config.active_experts,
    )


def attention_weights(config: ModelConfig) -> dict[str, int]:
    """Weights of one QKV and one output projection, by attention kind: 'sa' and, with DA, 'da'."""
    heads = {"sa": (config.query_heads, config.kv_heads, config.head_size)}
    if config.depth_attention:
        heads["da"] = (config.da_heads, config.da_kv_heads, config.da_head_size)
    # q, k, v and the output; the output has as many columns as q.
    return {kind: config.width * (2 * query + 2 * kv) * size for kind, (query, kv, size) in heads.items()}


def expert_weights(config: ModelConfig) -> int:
    """Weights of one SwiGLU expert: gate, up and down."""
    return 3 * config.width * config.expert_width


def router_weights(config: ModelConfig, experts: int) -> int:
    """Weights of one router over `experts`: query projection and keys."""
    return (config.width + experts) * config.router_size


def _count(
    config: ModelConfig,
    layers: int,
    *,
    embedding: int,
    residual_norms: int,
    linear_experts: int,
    shared: bool,
    experts: int,
) -> ParameterCount:
    """`layers` layers with so many experts each; routers always choose among all."""
    weights = attention_weights(config)
    routers = len(weights) if config.routed_attention else 0
    return ParameterCount(
        embedding=embedding,
        lm_head=config.width * config.vocab,
        norms=residual_norms * config.width + layers * _norms_in_layer(config, routers + 1),
        sa_projections=layers * linear_experts * weights["sa"],
        da_projections=layers * linear_experts * weights.get("da", 0),
        shared_experts=layers * sum(weights.values()) if shared else 0,
        attention_routers=layers * routers * router_weights(config, config.linear_experts),
        ea_experts=layers * experts * expert_weights(config),
        ea_router=layers * router_weights(config, config.experts),
    )


def _norms_in_layer(config: ModelConfig, routers: int) -> int:
    """Pre-norms of SA, DA and EA; queries and keys of SA and DA, one weight for all heads; those of the routers."""
    heads = 2 * config.head_size + (2 * config.da_head_size if config.depth_attention else 0)
    return config.attention_dims * config.width + heads + routers * 2 * config.router_size
