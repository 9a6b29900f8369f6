"""A run small enough for a test: documents, model and batch."""

import dataclasses
import json
from pathlib import Path

from dreamer_jax.config import CheckpointConfig, Config, DataConfig, LogConfig, ModelConfig, OptimizerConfig, Source
from dreamer_jax.config import TrainConfig as Train

MODEL = ModelConfig(
    depth=2, width=16, vocab=300, query_heads=2, kv_heads=1, head_size=8, da_head_size=8, router_size=8,
    experts=6, active_experts=2, expert_width=8, attention_experts=3,
)  # fmt: skip


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
        data=DataConfig(sources=(source,), root=str(folder), cache=str(folder / "cache"), context=48),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=3),
        train=Train(**{**defaults, **train}),
        checkpoint=CheckpointConfig(every=2, keep=2),
        log=LogConfig(every=1, tensorboard=False),
    )


def with_model(config: Config, **changes) -> Config:
    """The config with other model keys."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
