"""What the speed benchmarks run: LA, DR and DR+DA at matched budgets, at a few sizes, and tokens to learn from."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dreamer_jax.accounting.match import match
from dreamer_jax.config import (
    Config,
    DataConfig,
    DepthAttentionConfig,
    ExpertAttentionConfig,
    KernelConfig,
    ModelConfig,
    OptimizerConfig,
    RouterConfig,
    SequenceAttentionConfig,
    TrainConfig,
    load,
)
from dreamer_jax.data.builder import prepare
from dreamer_jax.data.loader import batches

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SIZES = ("tiny", "small", "layer", "1b")
VARIANTS: dict[str, dict[str, Any]] = {
    "LA": {"depth_recurrent": False, "mixture": ("sa", "ea")},
    "DR": {"depth_recurrent": True, "mixture": ("sa", "ea")},
    "DR+DA": {"depth_recurrent": True, "mixture": ("da+sa", "ea")},
}
"""Keys of the model."""

_BASES = {
    "tiny": ModelConfig(
        **VARIANTS["LA"],
        depth=8,
        width=128,
        vocab=1024,
        sa=SequenceAttentionConfig(query_heads=4, kv_heads=2, head_size=32),
        da=DepthAttentionConfig(head_size=32),
        ea=ExpertAttentionConfig(experts=8, active_experts=4, expert_width=128),
        router=RouterConfig(size=32),
    ),
    "small": ModelConfig(
        **VARIANTS["LA"],
        depth=8,
        width=256,
        vocab=1024,
        sa=SequenceAttentionConfig(query_heads=8, kv_heads=4, head_size=32),
        da=DepthAttentionConfig(head_size=64),
        ea=ExpertAttentionConfig(experts=16, active_experts=4, expert_width=128),
        router=RouterConfig(size=64),
    ),
    # The 1B models' layer, all 16 depths of it, with few experts and words: their proportions on a CPU.
    "layer": ModelConfig(
        **VARIANTS["LA"],
        depth=16,
        width=1024,
        vocab=1024,
        sa=SequenceAttentionConfig(query_heads=16, kv_heads=8, head_size=128),
        da=DepthAttentionConfig(head_size=128),
        ea=ExpertAttentionConfig(experts=8, active_experts=8, expert_width=512),
        router=RouterConfig(size=128),
    ),
}
"""LA's shape; DR and DR+DA are sized after it (3.8)."""
_ROWS = {"tiny": 4, "small": 4, "layer": 2, "1b": 8}
_FILES = {"LA": "la_1b.py", "DR": "dr_1b.py", "DR+DA": "dr_da_1b.py"}


def configs(size: str) -> dict[str, Config]:
    """By variant: the config of a run in one microbatch on one device."""
    return {variant: _config(size, variant) for variant in VARIANTS}


def _config(size: str, variant: str) -> Config:
    if size == "1b":
        config = load(CONFIGS / _FILES[variant])
        train = replace(config.train, batch=_ROWS[size], microbatches=1, dtype="bfloat16", remat="products")
        return replace(config, train=train)
    base = _BASES[size]
    model = replace(base, **VARIANTS[variant])
    if model.depth_recurrent:
        model = match(model, base, tolerance=0.05)[-1].config
    return Config(
        name=f"speed-{size}",
        model=model,
        data=DataConfig(context=512),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=20, expert_bias_rate=3e-2),
        train=TrainConfig(batch=_ROWS[size], dtype="float32", remat="products"),
        kernels=KernelConfig(),
    )


def learned_rows(rows: int, context: int, steps: int) -> np.ndarray:
    """Text to train on before anything is timed, [steps, rows, context]: the generated mathematics of configs/tiny.py.

    Documents follow one another without padding, and rows count as one document: then every implementation has the same
    attention to compute, whether it knows of packing or not.
    """
    config = load(CONFIGS / "tiny.py")
    found: list[np.ndarray] = []
    wanted = steps * rows * context
    for batch in batches(prepare(config), config, split="train", start_row=0):
        found.append(batch.tokens[batch.segment_ids > 0])
        if sum(len(part) for part in found) >= wanted:
            break
    return np.concatenate(found)[:wanted].reshape(steps, rows, context).astype(np.int32)
