"""A run small enough for a test: documents, model and batch."""

import json
from pathlib import Path

from dreamer_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    DepthAttentionConfig,
    ExpertAttentionConfig,
    KernelConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    RouterConfig,
    SequenceAttentionConfig,
    Source,
)
from dreamer_jax.config import TrainConfig as Train
from tests.models import changed

MODEL = ModelConfig(
    depth=2,
    width=16,
    vocab=300,
    sa=SequenceAttentionConfig(query_heads=2, kv_heads=1, head_size=8),
    da=DepthAttentionConfig(head_size=8),
    ea=ExpertAttentionConfig(experts=6, active_experts=2, expert_width=8),
    router=RouterConfig(size=8, attention_experts=3),
)
REFERENCE = KernelConfig(implementation="reference")
"""They compile soonest."""


def toy_config(folder: Path, **train) -> Config:
    """Sums as documents; `train` overrides keys of the train section."""
    train_file, validation_file = folder / "train.jsonl", folder / "validation.jsonl"
    if not train_file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        rows = [
            json.dumps({"question": f"What is {a} + {b}?", "answer": f"{a} + {b} = {a + b}"})
            for a in range(30)
            for b in range(20)
        ]
        train_file.write_text("\n".join(rows[:540]) + "\n")
        validation_file.write_text("\n".join(rows[540:]) + "\n")
    source = Source("sums", train=(train_file.name,), validation=(validation_file.name,))
    defaults = {"steps": 6, "batch": 8, "dtype": "float32", "remat": "full", "validation_batches": 1}
    return Config(
        name="toy",
        out=str(folder / "runs"),
        model=MODEL,
        data=DataConfig(sources=(source,), root=str(folder), prepared=str(folder / "prepared"), context=48),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=3),
        train=Train(**{**defaults, **train}),
        checkpoint=CheckpointConfig(every=2, keep=2),
        log=LogConfig(every=1, tensorboard=False),
    )


def with_model(config: Config, **keys) -> Config:
    """The config with other keys of the model; a dict changes keys of a section: ea={"experts": 5}."""
    return changed(config, model=keys)
