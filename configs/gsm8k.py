"""DR+DA on GSM8K and MATH, from JSON-lines files.

    DREAMER_DATA=~/data python -m dreamer_jax.train --config configs/gsm8k.py
    python -m dreamer_jax.train --config configs/gsm8k.py --data.root ~/data --data.tokenizer llama3/tokenizer.json \\
        --model.vocab 128256

The data root holds gsm8k/{train,test}.jsonl (fields question, answer) and math/{train,math500}.jsonl (fields problem,
solution). Validation is GSM8K's test set and MATH-500, less what also occurs in training.

Hardware: one GPU.
Expected result: see README.
"""

from dreamer_jax.config import Config, DataConfig, ModelConfig, Source, TrainConfig


def get_config() -> Config:
    """What differs from the defaults."""
    return Config(
        name="gsm8k",
        model=ModelConfig(depth=12, width=512, vocab=4096),
        data=DataConfig(
            root="$DREAMER_DATA",
            sources=(
                Source("gsm8k", weight=0.5, train=("gsm8k/train.jsonl",), validation=("gsm8k/test.jsonl",)),
                Source(
                    "math",
                    weight=0.5,
                    train=("math/train.jsonl",),
                    validation=("math/math500.jsonl",),
                    prompt_field="problem",
                    response_field="solution",
                ),
            ),
            context=1024,
        ),
        train=TrainConfig(steps=2000, batch=32),
    )
