"""The report of the comparison on mathematics in words: Markdown with its figures, from what the runs wrote."""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.evidence.figures import Line, Panel, Unit, draw
from benchmarks.evidence.findings import (
    Curve,
    Finding,
    band,
    is_done,
    lacking,
    last_of,
    minutes,
    over_seeds,
)
from benchmarks.evidence.language.setup import (
    ABLATIONS,
    MAIN,
    MODEL,
    RATE,
    REFERENCE,
    VARIANTS,
    Plan,
    is_main,
    run_of,
    sized,
    steps_of,
)
from benchmarks.evidence.report import NOTHING, ROUTERS, begun, hardware, number, table
from benchmarks.evidence.setup import BASELINE, Run
from dreamer_jax import analyze
from dreamer_jax.evaluation.comparison.results import read_items
from dreamer_jax.evaluation.comparison.statistics import Difference, data_efficiency, paired_rate_difference
from dreamer_jax.evaluation.requests import EvaluationError
from dreamer_jax.files import write_whole

LOSS = "validation/loss"
NATS = Unit("held-out loss (nats per token)")
EVERYTHING = "all"
TEXTS = "ppl"
"""The task of `evaluate --text`."""

TOKENS = "training tokens (millions)"
COMPARED = {
    "figure_6_ea": "Experts that carry the load, by depth (the paper's Figure 6)",
    "logit_lens": "What the LM head would predict after each depth",
    "router_confidence_ea": "How sure the routers of EA are",
}
"""Of `dreamer_jax.analyze --compare`, with all main variants of a seed."""
OF_REFERENCE = {
    "figure_4_da": "Depth attention (the paper's Figure 4)",
    "figure_5_ea": "Experts by depth (the paper's Figure 5)",
    "removals": "What leaving parts out costs",
}
"""Of `dreamer_jax.analyze`, with the reference alone."""

Documents = Mapping[str, tuple[float, float]]
"""Nats and tokens of each document."""


def write_report(plan: Plan, runs: Sequence[Run], out: Path, results: Path) -> Path:
    """Write evidence_language_<hardware>_<year-month>.md and its figures into a folder.

    Args:
        plan: how much is trained.
        runs: all that belong to the comparison; those that are missing are said to be.
        out: folder of the runs.
        results: where to write.

    Raises:
        ConfigError: there is nothing to report.
    """
    found = begun(runs, out)
    stem = f"evidence_language_{hardware(found)}_{time.strftime('%Y-%m')}"
    results.mkdir(parents=True, exist_ok=True)
    parts = [*_opening(plan, found), *_main(plan, found, out), *_ablations(plan, found, out)]
    parts += [*_pictures(plan, found, results / stem), *_analysis(plan, found, out, results / stem)]
    write_whole(results / f"{stem}.md", "\n\n".join(parts) + "\n")
    return results / f"{stem}.md"


def _opening(plan: Plan, found: Sequence[Finding]) -> Iterator[str]:
    seeds = sorted({one.run.seed for one in found})
    yield "# Mathematics in words: LA, DR and DR+DA of equal cost"
    yield (
        f"GSM8K, MATH and generated exercises, depth {MODEL.depth}, width {MODEL.width}, context {plan.context}, "
        f"{plan.batch} rows a step, learning rate {RATE:g}, seeds {', '.join(map(str, seeds))}. All runs of a seed "
        f"have the same batches. The question, and how to run this again: docs/evidence.md."
    )
    if missing := lacking(found, lambda run: steps_of(plan, run)):
        yield "**Missing runs**, of which the tables have what there is:\n\n" + "\n".join(f"* {m}" for m in missing)
    yield "## Cost\n\n" + _cost(plan, found)


def _cost(plan: Plan, found: Sequence[Finding]) -> str:
    rows = []
    for name in VARIANTS:
        of = _of(found, name)
        final, config = (next((one.final for one in of if one.final), None), of[0].config if of else None)
        if not final or not config:
            continue
        ea, spent, cost = config["model"]["ea"], over_seeds(of, minutes), sized(plan, name)
        rows.append(
            [
                name,
                f"{ea['experts']} x {ea['expert_width']}",
                f"{final['parameters']:,} ({cost.parameters:+.1%})",
                f"{final['flops_generated'] / 1e6:.3f} ({cost.flops:+.1%})",
                f"{final['flops_trained'] / 1e6:.3f}",
                f"{final['tokens'] / 1e6:.3g}",
                f"{spent.mean:.1f}" if spent else NOTHING,
            ]
        )
    heads = ["", "experts x width", "parameters", "MFLOP/token, generated", "trained", "tokens (M)"]
    return "In brackets: beside LA.\n\n" + table([*heads, "minutes of training"], rows)


def pilot_table(runs: Sequence[Run], out: Path) -> str:
    """The pilots' losses, by variant and learning rate."""
    rows = []
    for one in begun(runs, out):
        losses = [number(last_of(one, key), "{:.4f}") for key in ("train/loss", LOSS)]
        rows.append([one.run.variant, f"{one.run.rate:g}", str(last_of(one, "step") or 0), *losses])
    return table(["variant", "learning rate", "steps", "training loss", "held-out loss"], rows)


# The main variants.


def _main(plan: Plan, found: Sequence[Finding], out: Path) -> Iterator[str]:
    names = [variant.name for variant in MAIN]
    yield "## Held-out loss at the end of the training\n\n" + _losses(names, BASELINE, found, out, plan.steps)
    yield "## Data efficiency and routers\n\n" + _efficiency_and_routers(found)


def _losses(names: Sequence[str], baseline: str, found: Sequence[Finding], out: Path, step: int) -> str:
    """Nats per token of all held-out documents, and the difference to the baseline, document by document."""
    rows, sources = [], list[str]()
    for seed in sorted({one.run.seed for one in found}):
        read = {name: _documents(name, seed, found, out, step) for name in names}
        reference = read.get(baseline)
        for name, documents in read.items():
            if not documents or not reference:
                continue
            sources = sources or list(documents)
            cells = [_loss(documents[source], reference[source], name == baseline) for source in documents]
            rows.append([name, str(seed), *cells])
    said = (
        f"Nats per token at step {step:,}, over all held-out documents; behind it the difference to {baseline} on the "
        f"same documents with its 95 % interval (documents are the sample; it says nothing of other seeds).\n\n"
    )
    return said + table(["", "seed", *sources], rows)


def _documents(name: str, seed: int, found: Sequence[Finding], out: Path, step: int) -> dict[str, Documents]:
    """By source, and all together; empty of a run that was not evaluated there, or not to the end."""
    one = next((one for one in _of(found, name) if one.run.seed == seed and one.final), None)
    folder = out / one.run.name / "evaluation" / str(step) if one else None
    if folder is None or not folder.is_dir():
        return {}
    by_source: dict[str, dict[str, tuple[float, float]]] = {EVERYTHING: {}}
    for item, scores in read_items(folder)[TEXTS].items():
        score = scores["nats"], scores["tokens"]
        by_source.setdefault(item.partition(".jsonl/")[0], {})[item] = score
        by_source[EVERYTHING][item] = score
    return dict(by_source)


def _loss(documents: Documents, reference: Documents, is_baseline: bool) -> str:
    nats, tokens = (sum(score[i] for score in documents.values()) for i in (0, 1))
    text = f"{nats / tokens:.4f}"
    if is_baseline:
        return text
    difference = compared(documents, reference)
    return f"{text}, {difference.value:+.4f} ({difference.low:+.4f} to {difference.high:+.4f})"


def compared(documents: Documents, reference: Documents) -> Difference:
    """Nats per token more than a reference on the same documents.

    Raises:
        EvaluationError: the two were asked of other documents.
    """
    sizes = ({name: tokens for name, (_, tokens) in of.items()} for of in (documents, reference))
    if next(sizes) != next(sizes):
        raise EvaluationError("runs were evaluated on other held-out texts; delete their folders evaluation, and go on")
    ours, theirs = ([of[name][0] for name in documents] for of in (documents, reference))
    return paired_rate_difference(ours, theirs, [tokens for _, tokens in documents.values()])


def _efficiency_and_routers(found: Sequence[Finding]) -> str:
    rows = []
    for one in found:
        if not one.records:
            continue
        ginis = [last_of(one, f"router/{kind}/gini") for kind in ROUTERS]
        rows.append(
            [
                one.run.variant,
                str(one.run.seed),
                _efficiency(found, one) if is_main(one.run) else NOTHING,
                *(number(gini, "{:.2f}") for gini in ginis),
                number(last_of(one, "router/ea/unused"), "{:.0f}"),
                number(last_of(one, "steps/skipped"), "{:.0f}"),
            ]
        )
    heads = ["", "seed", "DE", *(f"Gini of {kind.upper()}" for kind in ROUTERS), "idle experts", "skipped steps"]
    return (
        "DE is Table 2's: the tokens that LA needs for its best held-out loss, over those that the variant needs for "
        "it; a bound where only a bound is known. The loss is that of the curves below, on a sample of the packed "
        "held-out rows. Gini is how unevenly a router loads its experts at the end (0 is even): of LA and LA+DA the "
        "mean over layers, each with its own few experts; of the others over all depths, which share theirs.\n\n"
    ) + table(heads, rows)


def _efficiency(found: Sequence[Finding], one: Finding) -> str:
    baseline = next((b for b in _of(found, BASELINE) if b.run.seed == one.run.seed and b.final), None)
    if baseline is None:
        return NOTHING
    (steps, ours), (their_steps, theirs) = loss_curve(one), loss_curve(baseline)
    value = data_efficiency(their_steps, [-v for v in theirs], steps, [-v for v in ours])
    return str(value) if value else NOTHING


def loss_curve(one: Finding, last: int | None = None) -> Curve:
    """The held-out loss along the training, up to a step."""
    points = [(r["step"], r[LOSS]) for r in one.records if r.get(LOSS) is not None]
    points = [point for point in points if last is None or point[0] <= last]
    return Curve(tuple(step for step, _ in points), tuple(value for _, value in points))


# The ablations.


def _ablations(plan: Plan, found: Sequence[Finding], out: Path) -> Iterator[str]:
    names = [REFERENCE, "DR", BASELINE, *(variant.name for variant in ABLATIONS)]
    seed = min(one.run.seed for one in found)
    first = [one for one in found if one.run.seed == seed]
    yield (
        f"## Ablations of {REFERENCE}\n\n"
        + _losses(names, REFERENCE, first, out, plan.ablation_steps)
        + "\n\nDR is without DA; LA is DR with layers of its own, LA+DA is DR+DA with them. "
        + " ".join(f"{variant.name}: {variant.asks}." for variant in ABLATIONS)
    )


# The figures.


def _pictures(plan: Plan, found: Sequence[Finding], stem: Path) -> Iterator[str]:
    panels = [
        Panel(
            "Equal cost",
            [line for number, v in enumerate(MAIN) if (line := _line(plan, found, v.name, number)).x],
        ),
        Panel(
            "Ablations",
            [
                line
                for number, name in enumerate([REFERENCE, *(v.name for v in ABLATIONS)])
                if (line := _line(plan, found, name, number, plan.ablation_steps)).x
            ],
        ),
    ]
    for panel, name in zip(panels, ("training", "ablations"), strict=True):
        if panel.lines:
            path = stem.with_name(f"{stem.name}_{name}.png")
            yield f"## {panel.title}\n\n![{panel.title}]({draw([panel], TOKENS, path, NATS).name})"


def _analysis(plan: Plan, found: Sequence[Finding], out: Path, stem: Path) -> Iterator[str]:
    """Figures of the door analyze, of the first seed that has all main variants."""
    done = [one.run for one in found if is_main(one.run) and is_done(one, steps_of(plan, one.run))]
    seed = next((run.seed for run in done if all(run._replace(variant=v.name) in done for v in MAIN)), None)
    if seed is None:
        return
    folders = {v.name: analyze.newest(out / run_of(v.name, seed).name) for v in MAIN}
    together = out / "analysis"
    if analyze.main(["--compare", *map(str, folders.values()), "--out", str(together)]):
        return  # it has said why
    for folder, figures, whose in (
        (together, COMPARED, "all"),
        (folders[REFERENCE], OF_REFERENCE, REFERENCE),
    ):
        for figure, title in figures.items():
            path = stem.with_name(f"{stem.name}_{figure}.png")
            shutil.copyfile(folder / "figures" / f"{figure}.png", path)
            yield f"## {title}: {whose}, seed {seed}\n\n![{title}]({path.name})"


def _line(plan: Plan, found: Sequence[Finding], name: str, number: int, last: int | None = None) -> Line:
    steps, values = band([loss_curve(one, last) for one in _of(found, name)])
    return Line(name, number, tuple(step * plan.tokens_per_step / 1e6 for step in steps), tuple(values))


def _of(found: Sequence[Finding], name: str) -> list[Finding]:
    """The runs of a variant that have begun."""
    return [one for one in found if one.run.variant == name and one.records]
