"""DR+DA on GSM8K and MATH, from JSON-lines files.

    DREAMER_DATA=~/data python -m dreamer_jax.train --config configs/gsm8k.py
    python -m dreamer_jax.train --config configs/gsm8k.py --data.root ~/data --data.tokenizer llama3/tokenizer.json \\
        --model.vocab 128256

The data root holds gsm8k/{train,test}.jsonl (fields question, answer) and math/{train,math500}.jsonl (fields problem,
solution). Validation is GSM8K's test set and MATH-500, less what also occurs in training.

Hardware: a laptop's CPU; on an accelerator, give it more: --model.width 512 --model.depth 12 --train.dtype bfloat16.
Expected result: 2.4 million parameters; the README has the held-out loss of 400 steps.
"""

from dreamer_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    DepthAttentionConfig,
    ExpertAttentionConfig,
    ModelConfig,
    OptimizerConfig,
    RouterConfig,
    SequenceAttentionConfig,
    Source,
    TrainConfig,
)


def get_config() -> Config:
    """What differs from the defaults."""
    return Config(
        name="gsm8k",
        model=ModelConfig(
            depth=4,
            width=128,
            vocab=2048,
            sa=SequenceAttentionConfig(head_size=32),
            da=DepthAttentionConfig(head_size=32),
            ea=ExpertAttentionConfig(experts=64, expert_width=64),
            router=RouterConfig(size=32),
        ),
        data=DataConfig(
            root="$DREAMER_DATA",
            sources=(
                Source(
                    "gsm8k",
                    weight=0.5,
                    train=("gsm8k/train.jsonl",),
                    validation=("gsm8k/test.jsonl",),
                    remove=r"<<[^<>]*>>",  # its calculator's marks
                ),
                Source(
                    "math",
                    weight=0.5,
                    train=("math/train.jsonl",),
                    validation=("math/math500.jsonl",),
                    prompt_field="problem",
                    response_field="solution",
                ),
            ),
            context=512,
        ),
        # A short run at a high rate: the router biases must keep up with the router.
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=30, gradient_clip=1.0, expert_bias_rate=3e-2),
        train=TrainConfig(steps=400, batch=4, dtype="float32", remat="none", validate_every=50),
        checkpoint=CheckpointConfig(every=100),
    )
