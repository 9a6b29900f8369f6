"""A first model in minutes: DR+DA on generated mathematics; needs no files.

    python -m dreamer_jax.train --config configs/tiny.py

Hardware: a laptop's CPU.
Expected result: see README for the loss; it lies far below the unigram entropy that the preparation reports, and the
sample at the end shows the worked-answer format of grade-school exercises.
"""

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


def get_config() -> Config:
    """What differs from the defaults."""
    return Config(
        name="tiny",
        model=ModelConfig(
            depth=4,
            width=128,
            vocab=1024,
            sa=SequenceAttentionConfig(head_size=32),
            da=DepthAttentionConfig(head_size=32),
            ea=ExpertAttentionConfig(experts=32, expert_width=64),
            router=RouterConfig(size=32),
        ),
        data=DataConfig(
            sources=(
                Source("word_problems", weight=0.6, tasks=("gsm_symbolic",), documents_per_task=8000),
                Source(
                    "arithmetic",
                    weight=0.25,
                    tasks=(
                        "chain_sum",
                        "products",
                        "basic_arithmetic",
                        "decimal_chain_sum",
                        "decimal_arithmetic",
                        "fraction_simplification",
                        "gcd",
                        "lcm",
                        "prime_factorization",
                    ),
                    documents_per_task=1200,
                ),
                Source(
                    "algebra",
                    weight=0.15,
                    tasks=("simple_equations", "complex_arithmetic", "simple_geometry"),
                    documents_per_task=1200,
                ),
            ),
            context=512,
        ),
        # A short run at a high rate: the router biases must keep up with the router.
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=30, gradient_clip=1.0, expert_bias_rate=3e-2),
        train=TrainConfig(steps=240, batch=4, dtype="float32", remat="products", validate_every=80),
        checkpoint=CheckpointConfig(every=80),
        log=LogConfig(figures_every=80),
    )
