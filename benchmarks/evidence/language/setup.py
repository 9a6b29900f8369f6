"""What is compared: the variants, the ablations, the mixture of documents and the settings that all share."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.evidence.setup import BIAS_RATE, Cost, Run, sized_after
from dreamer_jax.config import (
    CALCULATOR_MARKS,
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
from dreamer_jax.values import require

FAMILY = "language"
RATE = 1e-3
"""Learning rate of all."""
RATES = (3e-4, 1e-3, 3e-3)
"""Those that the pilot tries."""
REFERENCE = "DR+DA"
"""What the ablations change."""
MODEL = ModelConfig(
    depth_recurrent=False,
    mixture=("sa", "ea"),
    depth=16,
    width=128,
    vocab=2048,
    sa=SequenceAttentionConfig(query_heads=4, kv_heads=2, head_size=32),
    da=DepthAttentionConfig(head_size=32),
    ea=ExpertAttentionConfig(experts=7, active_experts=3, expert_width=72),
    router=RouterConfig(size=32),
)
"""LA, after which all others are sized."""
DR = {"depth_recurrent": True}
DR_DA = DR | {"mixture": ("da+sa", "ea")}


class Variant(NamedTuple):
    """A model, as it differs from LA, and how it is trained."""

    name: str
    model: Mapping[str, Any]
    depths: str = ""
    """`train.depths`."""
    asks: str = ""
    """Of an ablation: what it is there to tell."""


MAIN = (
    Variant("LA", {}),
    Variant("DR", DR),
    Variant("DR+DA", DR_DA),
)
ABLATIONS = (
    Variant("DR+DA Eq. 4", DR_DA | {"mixture": ("da", "sa", "ea")}, asks="DA, SA and EA one after another"),
    Variant("DR+DA Eq. 6", DR_DA | {"mixture": ("da+sa+ea",)}, asks="DA, SA and EA side by side"),
    Variant("DR+DA two DA heads", DR_DA | {"da": replace(MODEL.da, query_heads=2, kv_heads=2)}, asks="more DA"),
    Variant("DR+DA all depths counted up", DR_DA | {"depth_rope_reversed": False}, asks="depths to come, unknown"),
    Variant("LA+DA", {"mixture": ("da+sa", "ea")}, asks="DA with layers of their own: untied"),
    Variant("DR+DA random depth", DR_DA, depths="uniform(8, 24)", asks="depths drawn for each step, 16 on average"),
)
"""Beside these DR is DR+DA without DA, and LA is DR untied."""
VARIANTS = {variant.name: variant for variant in (*MAIN, *ABLATIONS)}


class Plan(NamedTuple):
    """How much is trained."""

    steps: int = 1600
    """Of the main variants."""
    ablation_steps: int = 400
    pilot_steps: int = 250
    batch: int = 8
    context: int = 512
    every: int = 100
    """Steps between measurements of the held-out loss, on a sample of the rows."""
    held_out_batches: int = 16
    documents_per_task: int = 3000
    held_out_documents: int = 0
    """Of each file at the end; 0 for all."""
    analyzed_rows: int = 200
    removal_rows: int = 16

    @property
    def tokens_per_step(self) -> int:
        """Positions of a batch."""
        return self.batch * self.context


SMALL = Plan(
    steps=8,
    ablation_steps=4,
    pilot_steps=4,
    batch=2,
    context=256,
    every=2,
    held_out_batches=1,
    documents_per_task=50,
    held_out_documents=20,
    analyzed_rows=4,
    removal_rows=1,
)
"""Everything within minutes, which proves nothing."""


def plan_of(small: bool) -> Plan:
    """How much is trained."""
    return SMALL if small else Plan()


def run_of(variant: str, seed: int, rate: float | None = None) -> Run:
    """One training; with a learning rate a pilot, which is short."""
    return Run(FAMILY, variant, MODEL.width, seed, rate)


def runs_of(seeds: Sequence[int], variants: Sequence[str] = ()) -> list[Run]:
    """The main variants of all seeds, then the ablations of the lowest one.

    Raises:
        ConfigError: a variant is unknown.
    """
    for name in variants:
        require(name in VARIANTS, f"--variants '{name}': there are {', '.join(VARIANTS)}")
    chosen = [name for name in VARIANTS if not variants or name in variants]
    runs = [run_of(name, seed) for seed in seeds for name in chosen]
    return [run for run in runs if is_main(run)] + [run for run in runs if not is_main(run) and run.seed == min(seeds)]


def is_main(run: Run) -> bool:
    """Whether it is no ablation."""
    return run.variant in {variant.name for variant in MAIN}


def pilots_of(variants: Sequence[str] = ()) -> list[Run]:
    """Short runs of the main variants at each learning rate.

    Raises:
        ConfigError: no main variant is asked for, or one is unknown.
    """
    chosen = [run for run in runs_of([0], variants) if is_main(run)]
    require(bool(chosen), f"--pilot is for the main variants: {', '.join(variant.name for variant in MAIN)}")
    return [run._replace(rate=rate) for run in chosen for rate in RATES]


def steps_of(plan: Plan, run: Run) -> int:
    """Steps of a run."""
    if run.rate is not None:
        return plan.pilot_steps
    return plan.steps if is_main(run) else plan.ablation_steps


def sized(plan: Plan, variant: str) -> Cost:
    """The model of a variant, with the experts that make it cost what LA does.

    Raises:
        MatchError: FLOPs or parameters are further than 2 % from LA's.
    """
    changed = replace(MODEL, **VARIANTS[variant].model)
    return Cost(MODEL, 0.0, 0.0) if changed == MODEL else sized_after(MODEL, changed, plan.context, variant)


def config_of(plan: Plan, run: Run, data: Path, out: Path) -> Config:
    """The config of a run. Runs of a seed see the same batches in the same order.

    Raises:
        MatchError: as `sized`.
    """
    rate = RATE if run.rate is None else run.rate
    return Config(
        name=run.name,
        out=str(out),
        model=sized(plan, run.variant).model,
        data=data_of(plan, data, out),
        optimizer=OptimizerConfig(
            learning_rate=rate,
            warmup_steps=min(50, plan.steps // 4),
            gradient_clip=1.0,
            expert_bias_rate=BIAS_RATE * rate,
            attention_bias_rate=BIAS_RATE * rate,
        ),
        train=TrainConfig(
            steps=steps_of(plan, run),
            batch=plan.batch,
            seed=run.seed,
            depths=VARIANTS[run.variant].depths,
            dtype="float32",
            remat="products",
            validate_every=plan.every,
            validation_batches=plan.held_out_batches,
        ),
        checkpoint=CheckpointConfig(every=plan.every, keep=1, keep_every=plan.ablation_steps),
        log=LogConfig(every=max(1, plan.every // 10), tensorboard=False),
    )


def data_of(plan: Plan, data: Path, out: Path) -> DataConfig:
    """GSM8K, MATH and generated exercises, one tokenizer for all; prepared once, beside the runs.

    No gsm_symbolic among them: reasoning-gym's is made of questions of GSM8K's test.
    """
    return DataConfig(
        root=str(data),
        prepared=str(out / "data"),
        sources=(
            Source(
                "gsm8k",
                weight=0.35,
                train=("gsm8k/train.jsonl",),
                validation=("gsm8k/test.jsonl",),
                remove=CALCULATOR_MARKS,
            ),
            Source(
                "math",
                weight=0.35,
                train=("math/train.jsonl",),
                validation=("math/math500.jsonl",),
                prompt_field="problem",
                response_field="solution",
            ),
            Source(
                "generated",
                weight=0.3,
                tasks=("chain_sum", "products", "simple_equations", "gcd", "lcm", "fraction_simplification"),
                documents_per_task=plan.documents_per_task,
            ),
        ),
        context=plan.context,
    )
