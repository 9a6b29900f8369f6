"""Small models that many tests share, the oracle's view of them, and packed batches."""

import dataclasses
from typing import Any

import numpy as np

from dreamer_jax.config import (
    DepthAttentionConfig,
    ExpertAttentionConfig,
    LatentAttentionConfig,
    ModelConfig,
    ParameterAttentionConfig,
    RouterConfig,
    SequenceAttentionConfig,
)
from tests.oracle import Sizes

VARIANTS = ("LA", "LA+DA", "DR", "DR+DA")
SEQUENTIAL, ATTENTION_PARALLEL, PARALLEL = MIXTURES = (("da", "sa", "ea"), ("da+sa", "ea"), ("da+sa+ea",))
"""Eq. 4, 5 and 6."""
SMALL = ModelConfig(
    depth=3,
    width=32,
    vocab=61,
    sa=SequenceAttentionConfig(query_heads=4, kv_heads=2, head_size=8),
    da=DepthAttentionConfig(query_heads=2, kv_heads=1, head_size=8),
    ea=ExpertAttentionConfig(experts=7, active_experts=2, expert_width=12),
    latent=LatentAttentionConfig(latents=6, query_heads=4, kv_heads=2, head_size=12),
    parameter=ParameterAttentionConfig(pairs=10),
    router=RouterConfig(size=8, attention_experts=5),
)


def changed(config: Any, **keys: Any) -> Any:
    """The config with other keys; a dict changes keys of a section: changed(model, depth=2, ea={"experts": 5})."""
    values = {k: changed(getattr(config, k), **v) if isinstance(v, dict) else v for k, v in keys.items()}
    return dataclasses.replace(config, **values)


def mixture_of(variant: str, mixture: tuple[str, ...] = ATTENTION_PARALLEL) -> tuple[str, ...]:
    """The mixture, without DA for a variant that has none."""
    if "DA" in variant:
        return mixture
    kept = ("+".join(name for name in group.split("+") if not name.startswith("da")) for group in mixture)
    return tuple(group for group in kept if group)


def variant_of(base: ModelConfig, variant: str, mixture: tuple[str, ...] = ATTENTION_PARALLEL) -> ModelConfig:
    """The model as LA, LA+DA, DR or DR+DA."""
    return dataclasses.replace(base, depth_recurrent="DR" in variant, mixture=mixture_of(variant, mixture))


def small(variant: str, mixture: tuple[str, ...] = ATTENTION_PARALLEL) -> ModelConfig:
    """A model that compiles soon, and in which no two sizes agree by accident."""
    return variant_of(SMALL, variant, mixture)


def sizes_of(config: ModelConfig) -> Sizes:
    """The same model for the oracle."""
    sa, da, ea, latent, router = config.sa, config.da, config.ea, config.latent, config.router
    return Sizes(
        depth_recurrent=config.depth_recurrent, mixture=config.mixture, depth=config.depth, width=config.width,
        vocab=config.vocab, query_heads=sa.query_heads, kv_heads=sa.kv_heads, head_size=sa.head_size,
        da_heads=da.query_heads, da_kv_heads=da.kv_heads, da_head_size=da.head_size, router_size=router.size,
        experts=ea.experts, active=ea.active_experts, expert_width=ea.expert_width,
        attention_experts=router.attention_experts or config.depth, rope_base=sa.rope_base,
        depth_rope_base=config.depth_rope_base, norm_eps=config.norm_epsilon,
        depth_rope_reversed=config.depth_rope_reversed, depth_rope_scaling=config.depth_rope_scaling,
        da_window=da.window, da_dilation=da.dilation, da_linear=da.form == "linear", latents=latent.latents,
        latent_heads=latent.query_heads, latent_kv_heads=latent.kv_heads, latent_head_size=latent.head_size,
        embedding_size=latent.embedding_size,
        pairs=config.parameter.pairs,
    )  # fmt: skip


def packed_batch(vocab: int, rows: int = 2, length: int = 24, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Rows of several documents with padding at the end: tokens, positions, segment ids."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, vocab, (rows, length)).astype(np.int32)
    segments, positions = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
    for row in range(rows):
        start = 0
        for segment in range(1, 4):
            size = int(random.integers(2, length // 3))
            segments[row, start : start + size] = segment
            positions[row, start : start + size] = np.arange(size)
            start += size
    return tokens, positions, segments


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the largest entry."""
    scale = max(float(np.abs(expected).max()), 1e-6)
    return float(np.abs(np.asarray(actual, np.float64) - expected).max()) / scale
