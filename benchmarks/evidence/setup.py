"""What is compared: the families, the variants of equal cost, and the settings that all of them share."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from benchmarks.sizes import VARIANTS
from dreamer_jax.accounting.flops import generated_flops
from dreamer_jax.accounting.match import TOLERANCE, MatchError, match
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
from dreamer_jax.values import require

BASELINE = "LA"
RANDOM = " random"
"""Ends the names of variants that train at random depths."""
RATES = (1e-4, 3e-4, 1e-3)
"""Learning rates that the pilot tries."""
HEAD = 32
"""Size of heads and of routers' queries."""
BIAS_RATE = 10.0
"""Routers' biases move by this times the learning rate: a short run at a high rate needs biases that keep up with the
routers. configs/tiny.py has the same ratio for EA."""


class Group(NamedTuple):
    """Tests whose accuracies are averaged: a curve of the figures."""

    name: str
    tests: tuple[str, ...]
    chance: float
    """The accuracy of the best guess without the composition (docs/data.md)."""


@dataclass(frozen=True)
class Setup:
    """All of a family that does not depend on the run."""

    family: str
    sources: tuple[Source, ...]
    """Training documents; the first task of each is tested, too."""
    context: int
    vocab: int
    depth: int
    width: int
    steps: int
    batch: int
    """Rows of a step."""
    groups: tuple[Group, ...]
    """The first is in distribution, and steps to 90 % and the choice of the rate go by it."""
    along: tuple[str, ...]
    """Tests that are asked along the training."""
    along_documents: int
    """Of each of them."""
    swept_documents: int
    """Of each test, at other depths than the trained one."""
    evaluate_every: int
    pilot_steps: int
    final_documents: int = 10_000
    """Most of each test at the end of the training; no test has more."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    widths: tuple[int, ...] = ()
    """Further widths; `width` comes first."""
    depth_groups: tuple[Group, ...] = ()
    """Panels of the figure against depth; `groups` where there are none."""
    random_depths: str = ""
    """`train.depths` of the variants that train at random depths."""
    experts: int = 8
    """Of each layer of LA."""
    expert_width: int = 64
    active_experts: int = 2
    weight_decay: float = 0.1
    cooldown_steps: int = 0
    """The last steps, over which the learning rate falls to zero."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Learning rate by variant; docs/evidence.md tells how far the pilots are."""

    @property
    def all_widths(self) -> tuple[int, ...]:
        """The main one first."""
        return (self.width, *self.widths)

    @property
    def tokens_per_step(self) -> int:
        """Positions of a batch."""
        return self.batch * self.context


class Run(NamedTuple):
    """One training."""

    family: str
    variant: str
    width: int
    seed: int
    rate: float | None = None
    """Of a pilot, which is short; None for the rate of the setup."""

    @property
    def name(self) -> str:
        """The name of its folder."""
        pilot = "" if self.rate is None else f"-rate{self.rate:g}"
        return f"{self.variant.replace(' ', '-')}-w{self.width}-s{self.seed}{pilot}"


# The families.


def two_hop() -> Setup:
    """Two facts put together, on a finite set that comes round again and again.

    Weight decay matters here: it is what makes a model prefer a rule to knowing its training by heart. At 0.1 the
    recurrent models know it by heart; at 1 with batches of half the size they do not (docs/evidence.md). Then the
    accuracy of a step differs much from that of the next, which the cooldown ends.
    """
    tests = {"in_distribution": 0.028, "first_held_out": 0.039, "second_held_out": 0.012, "both_held_out": 0.0}
    return Setup(
        family="two_hop",
        sources=(Source("graph", tasks=("two_hop()",)),),
        context=128,
        vocab=224,
        depth=4,
        width=128,
        steps=26_400,
        batch=8,
        weight_decay=1.0,
        cooldown_steps=2400,
        groups=tuple(Group(name, (name,), chance) for name, chance in tests.items()),
        along=tuple(tests),
        along_documents=400,
        swept_documents=1000,
        evaluate_every=600,
        pilot_steps=3000,
        rates=dict.fromkeys(VARIANTS, 1e-3),
    )


WORKED = "worked"
"""Names the sources of p_hop and dag_mod7 whose documents ask for more than a test does."""
HOPS = "hops=(1, 4), length=(16, 28), test_hops=(5, 6, 8), spelling='marks'"
NO_HOP = {"p=1": 0.53, "p=2": 0.52, "p=3": 0.36, "p=4": 0.32, "p=5": 0.28, "p=6": 0.31, "p=8": 0.28}
"""Accuracy of the best guess from a letter and the one before it: one of these two, or one of the two others."""


def p_hop() -> Setup:
    """Chains of p hops.

    Half of the training documents ask after many letters, so that the task is learned soon. In these, the answers given
    before help to guess. The others ask at the ends of chains alone, where they do not help; such documents are the
    test. Marks say what p is, so that p that no training has can be asked for. The longest documents have 66 tokens.
    """
    trained, beyond = list(NO_HOP)[:4], list(NO_HOP)[4:]
    worked = tuple(f"{name} {WORKED}" for name in trained)
    return Setup(
        family="p_hop",
        sources=(
            Source("ends", tasks=(f"p_hop({HOPS}, asked='ends', seed=1)",), documents_per_task=200_000),
            Source(WORKED, tasks=(f"p_hop({HOPS}, asked='some')",), documents_per_task=200_000),
        ),
        context=128,
        vocab=16,
        depth=4,
        width=64,
        expert_width=96,
        steps=6600,
        cooldown_steps=600,
        batch=8,
        groups=(
            Group("p = 1 to 4", tuple(trained), 0.43),
            Group("p = 5 to 8", tuple(beyond), 0.29),
            Group("p = 1 or 2", tuple(trained[:2]), 0.53),
            Group("p = 3 or 4", tuple(trained[2:]), 0.34),
            Group("p = 1 to 4, worked", worked, 0.43),
        ),
        depth_groups=tuple(Group(name, (name,), guess) for name, guess in NO_HOP.items()),
        along=(*trained, *beyond, *worked),
        along_documents=150,
        swept_documents=100,
        evaluate_every=300,
        pilot_steps=1200,
        variants=(*VARIANTS, f"DR{RANDOM}", f"DR+DA{RANDOM}"),
        random_depths="uniform(2, 6)",
        rates=dict.fromkeys(VARIANTS, 1e-3),
    )


GRAPHS = "definitions=(2, 5), test_definitions=(6, 10), names=10"


def dag_mod7() -> Setup:
    """Values that depend on each other, all of which a hidden state of one width must hold.

    Half of the training documents show working: they ask for the values of some lines and of all variables. Of the
    others one token in 30 is an answer, after several steps; from these alone a pilot learned nothing. At depth 4
    neither LA nor DR got far beyond 3 definitions (docs/evidence.md).
    """
    trained, beyond = [f"definitions={n}" for n in range(3, 6)], [f"definitions={n}" for n in range(6, 11)]
    worked = tuple(f"{name} {WORKED}" for name in trained)
    return Setup(
        family="dag_mod7",
        sources=(
            Source("problems", tasks=(f"dag_mod7({GRAPHS}, seed=1)",), documents_per_task=200_000),
            Source(WORKED, tasks=(f"dag_mod7({GRAPHS}, asked='some')",), documents_per_task=200_000),
        ),
        context=128,
        vocab=32,
        depth=8,
        width=64,
        expert_width=96,
        steps=8000,
        cooldown_steps=800,
        batch=8,
        groups=(
            Group("3 to 5 definitions", tuple(trained), 0.15),
            Group("6 to 10 definitions", tuple(beyond), 0.15),
            Group("3 to 5 definitions, worked", worked, 0.53),
        ),
        along=(*trained, *beyond, *worked),
        along_documents=150,
        swept_documents=100,
        evaluate_every=400,
        pilot_steps=2000,
        widths=(32, 128),
        rates=dict.fromkeys(VARIANTS, 3e-4),
    )


FAMILIES = {"two_hop": two_hop, "p_hop": p_hop, "dag_mod7": dag_mod7}


def setup_of(family: str, small: bool = False) -> Setup:
    """What is compared on a family; small for a look at everything within minutes, which proves nothing."""
    setup = FAMILIES[family]()
    if not small:
        return setup
    sources = [replace(source, documents_per_task=min(source.documents_per_task, 2000)) for source in setup.sources]
    return replace(
        setup,
        sources=tuple(sources),
        width=32,
        widths=(),
        depth=3,
        experts=8,
        expert_width=64,
        steps=60,
        batch=2,
        along_documents=16,
        swept_documents=8,
        final_documents=30,
        evaluate_every=20,
        pilot_steps=20,
        cooldown_steps=min(setup.cooldown_steps, 10),
        random_depths="uniform(2, 4)" if setup.random_depths else "",
    )


# The runs.


def steps_of(setup: Setup, run: Run) -> int:
    """Steps of a run; those of a pilot are fewer."""
    return setup.steps if run.rate is None else setup.pilot_steps


def runs_of(setup: Setup, seeds: Sequence[int], variants: Sequence[str] = ()) -> list[Run]:
    """All runs, those first whose comparisons are whole soonest: a seed, and in it a width, with all variants."""
    chosen = [variant for variant in setup.variants if not variants or variant in variants]
    return [
        Run(setup.family, variant, width, seed) for seed in seeds for width in setup.all_widths for variant in chosen
    ]


def checked_variants(setup: Setup, names: Sequence[str]) -> Sequence[str]:
    """The names, if there are such variants.

    Raises:
        ConfigError: one is unknown.
    """
    for name in names:
        require(name in setup.variants, f"--variants '{name}': {setup.family} has {', '.join(setup.variants)}")
    return names


def pilots_of(setup: Setup, variants: Sequence[str] = ()) -> list[Run]:
    """Short runs of one seed at each learning rate."""
    runs = runs_of(replace(setup, variants=tuple(VARIANTS), widths=()), [0], variants)
    return [run._replace(rate=rate) for run in runs for rate in RATES]


def baseline_of(setup: Setup, width: int) -> ModelConfig:
    """LA. The width is that of the hidden state alone: heads, routers and experts are as large at each.

    A token selects at least two experts: of a single one the score would be divided by itself, and no gradient would
    reach the router.
    """
    return ModelConfig(
        **VARIANTS[BASELINE],
        depth=setup.depth,
        width=width,
        vocab=setup.vocab,
        sa=SequenceAttentionConfig(query_heads=4, kv_heads=2, head_size=HEAD),
        da=DepthAttentionConfig(head_size=HEAD),
        ea=ExpertAttentionConfig(
            experts=setup.experts, active_experts=setup.active_experts, expert_width=setup.expert_width
        ),
        router=RouterConfig(size=HEAD),
    )


def architecture(variant: str) -> str:
    """The variant without how it is trained."""
    return variant.removesuffix(RANDOM)


class Cost(NamedTuple):
    """A model sized after LA, and how far it is from it."""

    model: ModelConfig
    flops: float
    """Of a generated token at the mean of the context's lengths, as a share of LA's: 0.01 is 1 % more."""
    parameters: float
    """Likewise."""


def sized(setup: Setup, variant: str, width: int) -> Cost:
    """A recurrent variant with the experts that make it cost what LA does.

    Raises:
        MatchError: it is further than 2 % in parameters, or in FLOPs at 1024 tokens or at the context.
    """
    baseline = baseline_of(setup, width)
    changed = replace(baseline, **VARIANTS[architecture(variant)])
    return sized_after(baseline, changed, setup.context, f"{setup.family}, {variant}, width {width}")


def sized_after(baseline: ModelConfig, changed: ModelConfig, context: int, what: str) -> Cost:
    """A model with the experts that make it cost what a baseline does.

    Args:
        baseline: what it is to cost.
        changed: all else of the model.
        context: tokens at whose mean length FLOPs are held, beside those of `match`.
        what: to name in errors.

    Raises:
        MatchError: it is further than 2 % in parameters, or in FLOPs at 1024 tokens or at the context.
    """
    move = match(changed, baseline)[-1]
    ours, theirs = (generated_flops(model, context).total for model in (move.config, baseline))
    cost = Cost(move.config, ours / theirs - 1, move.parameters_share)
    if abs(cost.flops) > TOLERANCE:
        raise MatchError(
            f"{what}: at {context} tokens a token takes {cost.flops:+.1%} of the baseline's FLOPs; raise the "
            f"baseline's expert_width, where the comparison is set up"
        )
    return cost


def model_of(setup: Setup, variant: str, width: int) -> ModelConfig:
    """The model of a variant.

    Raises:
        MatchError: as `sized`.
    """
    return baseline_of(setup, width) if variant == BASELINE else sized(setup, variant, width).model


def matches(setup: Setup, widths: Sequence[int]) -> Iterator[str]:
    """A line for each sized model: how near it comes to LA.

    Raises:
        MatchError: as `sized`.
    """
    for width in widths:
        for variant in dict.fromkeys(architecture(variant) for variant in setup.variants if variant != BASELINE):
            model, flops, stored = sized(setup, variant, width)
            yield (
                f"{variant}, width {width}: {model.ea.experts} experts of width {model.ea.expert_width}; "
                f"{flops:+.2%} FLOPs per token and {stored:+.2%} parameters beside LA"
            )


def config_of(setup: Setup, run: Run, out: Path) -> Config:
    """The config of a run. Runs of a seed differ in their models, and random depths, alone: they see the same batches.

    Raises:
        MatchError: as `sized`.
    """
    rate = setup.rates[architecture(run.variant)] if run.rate is None else run.rate
    cooldown = setup.cooldown_steps if run.rate is None else 0
    return Config(
        name=run.name,
        out=str(out),
        model=model_of(setup, run.variant, run.width),
        data=data_of(setup, out),
        optimizer=OptimizerConfig(
            learning_rate=rate,
            warmup_steps=min(100, setup.steps // 10),
            cooldown_start=max(0, setup.steps - cooldown) if cooldown else 0,
            cooldown_steps=cooldown,
            weight_decay=setup.weight_decay,
            gradient_clip=1.0,
            expert_bias_rate=BIAS_RATE * rate,
            attention_bias_rate=BIAS_RATE * rate,
        ),
        train=TrainConfig(
            steps=steps_of(setup, run),
            batch=setup.batch,
            seed=run.seed,
            depths=setup.random_depths if run.variant.endswith(RANDOM) else "",
            dtype="float32",
            remat="none",
            validate_every=0,
            validation_batches=4,
            evaluate_every=setup.evaluate_every,
            evaluate_data="generated",  # the tests are; it must not be empty
        ),
        checkpoint=CheckpointConfig(every=setup.evaluate_every, keep=1),
        log=LogConfig(every=max(1, setup.evaluate_every // 10), tensorboard=False),
    )


def data_of(setup: Setup, out: Path) -> DataConfig:
    """What all runs of a family train on; it is prepared once, beside them."""
    return DataConfig(
        sources=setup.sources,
        prepared=str(out / "data"),
        tokenizer="words",
        prompt_template="{text} ",
        response_template="{text}",
        response_only=True,
        context=setup.context,
    )
