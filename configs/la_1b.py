"""LA at depth 16, 1.17B parameters: the paper's baseline, and the recipe that all six paper configs share (Table 3).

    DREAMER_PREPARED=/prepared python -m dreamer_jax.train --config configs/la_1b.py

Hardware: devices of 80 GB; each holds the whole model (16 bytes a parameter for weights, Adam moments and gradient:
18.7 GB). 32 rows are in flight at a time, so up to 32 devices share a batch as it stands: beyond that, lower
train.microbatches. The run is 3.4e20 model FLOPs, by arithmetic 30 hours on eight H100 at 40 % MFU.

Expected (paper, Tables 1 and 2): 1.1708B parameters, 0.9389 GFLOPs a token, 4.7827 GB at inference; after 100B tokens
of the paper's data, perplexity 6.74 on Maths-College and, in % of answers,
GSM8K 43.8, MATH 40.9, MMLU (math) 26.6, MathQA 22.9. Not trained with this repository yet.

Data: all sets of Table 4, without traces, duplicates and the benchmarks' questions, with the tokenizer of Llama 3.3.
Prepare them once; configs/data/table4.py says what must be where:

    export DREAMER_RAW=/raw DREAMER_DATA=/data DREAMER_PREPARED=/prepared
    python -m dreamer_jax.prepare --config configs/data/table4.py --work.fetch True

The sources and their shares are those of $DREAMER_PREPARED. Other prepared data will do as well, if their rows have
4096 tokens and their tokenizer at most 128,256 entries.
"""

import math

from dreamer_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    DepthAttentionConfig,
    ExpertAttentionConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    RouterConfig,
    SequenceAttentionConfig,
    TrainConfig,
)

CONTEXT = 4096
BATCH_TOKENS = 2**20
TRAINING_TOKENS = 100e9


def get_config() -> Config:
    """Table 3, column LA (16)."""
    return Config(
        name="la_1b",
        model=ModelConfig(
            depth_recurrent=False,
            mixture=("sa", "ea"),
            depth=16,
            width=1024,
            vocab=128_256,
            sa=SequenceAttentionConfig(query_heads=16, kv_heads=8, head_size=128),
            da=DepthAttentionConfig(head_size=128),
            ea=ExpertAttentionConfig(experts=32, active_experts=8, expert_width=512),
            router=RouterConfig(size=128),
        ),
        data=DataConfig(prepared="$DREAMER_PREPARED", context=CONTEXT),
        optimizer=OptimizerConfig(learning_rate=4e-4, warmup_steps=500, weight_decay=1e-3, gradient_clip=0.5),
        train=TrainConfig(
            steps=math.ceil(TRAINING_TOKENS / BATCH_TOKENS),
            batch=BATCH_TOKENS // CONTEXT,
            microbatches=8,
            dtype="bfloat16",
            remat="full",
        ),
        checkpoint=CheckpointConfig(every=500),
        log=LogConfig(figures_every=1000),
    )
