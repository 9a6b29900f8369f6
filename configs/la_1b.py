"""LA at depth 16, 1.17B parameters: the paper's baseline, and the recipe that all six paper configs share (Table 3).

    DREAMER_DATA=/data python -m dreamer_jax.train --config configs/la_1b.py

Hardware: devices of 80 GB; each holds the whole model (16 bytes a parameter for weights, Adam moments and gradient:
18.7 GB). 32 rows are in flight at a time, so up to 32 devices share a batch as it stands: beyond that, lower
train.microbatches. The run is 3.4e20 model FLOPs, by arithmetic 30 hours on eight H100 at 40 % MFU.

Expected (paper, Tables 1 and 2): 1.1708B parameters, 0.9389 GFLOPs a token, 4.7827 GB at inference; after 100B tokens
of the paper's data, perplexity 6.74 on Maths-College and, in % of answers,
GSM8K 43.8, MATH 40.9, MMLU (math) 26.6, MathQA 22.9. Not trained with this repository yet.

Data: a stand-in. The paper mixes the instruction sets of Table 4; until they are prepared, the training parts of
GSM8K and MATH as JSON lines under $DREAMER_DATA prove the run, with the tokenizer of Llama 3.3 as tokenizer.json:

    $DREAMER_DATA/tokenizer.json   gsm8k/{train,test}.jsonl   math/{train,math500}.jsonl

They hold a few million tokens: 100B of them would only be learned by heart.
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
    Source,
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
        data=DataConfig(
            sources=(
                Source(
                    name="gsm8k",
                    train=("gsm8k/train.jsonl",),
                    validation=("gsm8k/test.jsonl",),
                    remove=r"<<[^<>]*>>",  # its calculator's marks
                ),
                Source(
                    name="math",
                    train=("math/train.jsonl",),
                    validation=("math/math500.jsonl",),
                    prompt_field="problem",
                    response_field="solution",
                ),
            ),
            root="$DREAMER_DATA",
            tokenizer="$DREAMER_DATA/tokenizer.json",
            context=CONTEXT,
        ),
        optimizer=OptimizerConfig(learning_rate=4e-4, warmup_steps=500, weight_decay=1e-3, gradient_clip=0.5),
        train=TrainConfig(
            steps=math.ceil(TRAINING_TOKENS / BATCH_TOKENS),
            batch=BATCH_TOKENS // CONTEXT,
            microbatches=8,
            dtype="bfloat16",
            remat="full",
            # The stand-in's held-out documents do not fill one batch.
            validation_batches=1,
        ),
        checkpoint=CheckpointConfig(every=500),
        log=LogConfig(figures_every=1000),
    )
