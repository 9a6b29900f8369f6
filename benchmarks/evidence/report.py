"""The report of a family: Markdown with its figures, from what the runs wrote and nothing else."""

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.evidence.figures import against_depth, against_width, along_training, draw
from benchmarks.evidence.findings import (
    GOAL,
    Finding,
    curve,
    efficiency,
    final_spread,
    finding,
    lacking,
    last_of,
    minutes,
    none_accuracy,
    of_variant,
    over_seeds,
    steps_to,
    worst_of,
)
from benchmarks.evidence.packed import pack
from benchmarks.evidence.setup import BASELINE, Group, Run, Setup, matches, steps_of
from dreamer_jax.files import write_whole
from dreamer_jax.values import require

NOTHING = "-"
MARGIN = 0.05
"""How much better than chance LA must be for its best accuracy to be a goal."""
ROUTERS = ("ea", "sa", "da")


def write_report(setup: Setup, runs: Sequence[Run], out: Path, results: Path) -> Path:
    """Write evidence_<family>_<hardware>_<year-month>.md into a folder, with its figures and its finished runs.

    Args:
        setup: of the family.
        runs: all that belong to the comparison; those that are missing are said to be.
        out: folder of the family's runs.
        results: where to write.

    Raises:
        ConfigError: there is nothing to report.
    """
    found = begun(runs, out)
    stem = f"evidence_{setup.family}_{hardware(found)}_{time.strftime('%Y-%m')}"
    path = results / f"{stem}.md"
    results.mkdir(parents=True, exist_ok=True)
    parts = [*_opening(setup, found), *_tables(setup, found), *_pictures(setup, found, results / stem)]
    write_whole(path, "\n\n".join(parts) + "\n")
    pack(found, results / f"{stem}_runs.jsonl.gz")
    return path


def begun(runs: Sequence[Run], out: Path) -> list[Finding]:
    """What the runs wrote.

    Raises:
        ConfigError: not one has begun.
    """
    found = [finding(run, out) for run in runs]
    require(any(one.records for one in found), f"'{out}': none of these runs has a record of a step yet")
    return found


def hardware(found: Sequence[Finding]) -> str:
    """What the finished runs were computed on, for a file's name."""
    devices = {one.final["device"] for one in found if one.final}
    return "-".join(re.sub(r"[^a-z0-9]+", "-", device.lower()) for device in sorted(devices)) or "none"


def _opening(setup: Setup, found: Sequence[Finding]) -> Iterator[str]:
    seeds = sorted({one.run.seed for one in found})
    yield f"# {setup.family}: LA, DR and DR+DA of equal cost"
    cooled = f", the last {setup.cooldown_steps:,} with a falling learning rate" if setup.cooldown_steps else ""
    yield (
        f"Depth {setup.depth}, context {setup.context}, {setup.batch} rows a step, {setup.steps:,} steps{cooled} "
        f"({setup.steps * setup.tokens_per_step / 1e6:.3g} million token positions), weight decay "
        f"{setup.weight_decay:g}, seeds {', '.join(map(str, seeds))}. All runs of a seed have the same batches. The "
        f"question, the tests and how to run this again: docs/evidence.md. Accuracies in per cent are means over "
        f"seeds, with the range behind them."
    )
    yield "Sized after LA:\n\n" + "\n".join(f"* {line}" for line in matches(setup, setup.all_widths))
    missing = lacking(found, lambda run: steps_of(setup, run))
    if missing:
        yield "**Missing runs**, of which the tables have what there is:\n\n" + "\n".join(f"* {m}" for m in missing)


def _tables(setup: Setup, found: Sequence[Finding]) -> Iterator[str]:
    yield "## Cost\n\n" + _cost(setup, found)
    yield "## Accuracy at the end of the training\n\n" + _accuracy(setup, found)
    yield f"## Training to {GOAL:.0%} on {setup.groups[0].name}\n\n" + _goal(setup, found)
    yield "## Data efficiency\n\n" + _efficiencies(setup, found)
    yield "## Have they converged, are experts used?\n\n" + _health(setup, found)
    yield "## Each test\n\n" + _each_test(setup, found)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _rows(
    setup: Setup, found: Sequence[Finding], cells: Callable[[Sequence[Finding]], Sequence[str]]
) -> list[list[str]]:
    """A row for each variant and width that has begun."""
    rows = []
    for width in setup.all_widths:
        for variant in setup.variants:
            of = of_variant(found, variant, width)
            if of:
                rows.append([_name(setup, variant, width), *cells(of)])
    return rows


def _name(setup: Setup, variant: str, width: int) -> str:
    return f"{variant}, width {width}" if setup.widths else variant


def _cost(setup: Setup, found: Sequence[Finding]) -> str:
    def cells(of: Sequence[Finding]) -> Sequence[str]:
        config, final = of[0].config, next((one.final for one in of if one.final), None)
        ea, costs = config["model"]["ea"] if config else {}, [NOTHING] * 3
        if final:
            flops = [f"{final[kind] / 1e6:.3f}" for kind in ("flops_generated", "flops_trained")]
            costs = [f"{final['parameters']:,}", *flops]
        time_of = over_seeds(of, minutes)
        return [
            f"{ea.get('experts')} x {ea.get('expert_width')}",
            *costs,
            f"{config['optimizer']['learning_rate']:g}" if config else NOTHING,
            number(max(one.records[-1]["step"] for one in of) * setup.tokens_per_step / 1e6, "{:.3g}"),
            f"{time_of.mean:.1f} ({time_of.low:.1f} to {time_of.high:.1f})" if time_of else NOTHING,
            str(sum(one.final is not None for one in of)),
        ]

    heads = ["", "experts x width", "parameters", "MFLOP/token, generated", "trained", "learning rate", "tokens (M)"]
    return table([*heads, "minutes of training", "finished runs"], _rows(setup, found, cells)) + (
        "\n\nRandom depths: FLOPs are those at the trained depth, which is the mean of the depths that run."
        if setup.random_depths
        else ""
    )


def _accuracy(setup: Setup, found: Sequence[Finding]) -> str:
    def cells(of: Sequence[Finding]) -> Sequence[str]:
        return [_final(of, group.tests) for group in setup.groups]

    chance = ["chance", *(f"{100 * group.chance:.1f}" for group in setup.groups)]
    return table(["", *(group.name for group in setup.groups)], [*_rows(setup, found, cells), chance])


def _final(of: Sequence[Finding], tests: Sequence[str]) -> str:
    value = final_spread(of, tests)
    return str(value) if value else NOTHING


def _goal(setup: Setup, found: Sequence[Finding]) -> str:
    def cells(of: Sequence[Finding]) -> Sequence[str]:
        steps = [steps_to(GOAL, curve(one, setup.groups[0])) for one in of]
        tokens = [f"{step * setup.tokens_per_step / 1e6:.3g}" if step else "not reached" for step in steps]
        return [", ".join(str(step) if step else "not reached" for step in steps), ", ".join(tokens)]

    return table(["", "steps, by seed", "tokens (M), by seed"], _rows(setup, found, cells))


def _efficiencies(setup: Setup, found: Sequence[Finding]) -> str:
    def cells(of: Sequence[Finding]) -> Sequence[str]:
        return [", ".join(_efficiency(found, one, group) for one in of) for group in setup.groups]

    return (
        "Training that LA needs for its best accuracy, over that of the variant until it has it, seed by seed. "
        f"{NOTHING} where LA is not {MARGIN:.0%} better than chance: its best is then of a lucky moment.\n\n"
    ) + table(["", *(group.name for group in setup.groups)], _rows(setup, found, cells))


def _efficiency(found: Sequence[Finding], one: Finding, group: Group) -> str:
    baseline = next((b for b in found if b.run == one.run._replace(variant=BASELINE)), None)
    if baseline is None or max(curve(baseline, group).values, default=0.0) <= group.chance + MARGIN:
        return NOTHING
    value = efficiency(curve(baseline, group), curve(one, group))
    return str(value) if value else NOTHING


def _health(setup: Setup, found: Sequence[Finding]) -> str:
    """What would show that a variant is worse for another reason than its architecture."""

    def cells(of: Sequence[Finding]) -> Sequence[str]:
        gains = [_gain(one, setup.groups[0]) for one in of]
        ginis = [max((g for one in of if (g := worst_of(one, f"router/{k}/gini"))), default=None) for k in ROUTERS]
        unused = max((u for one in of if (u := worst_of(one, "router/ea/unused")) is not None), default=None)
        return [
            ", ".join(number(last_of(one, "train/loss"), "{:.3f}") for one in of),
            ", ".join(number(last_of(one, "validation/loss"), "{:.3f}") for one in of),
            ", ".join(number(gain, "{:+.1f}") for gain in gains),
            *(number(gini, "{:.2f}") for gini in ginis),
            number(unused, "{:.0f}"),
            number(max((s for one in of if (s := last_of(one, "steps/skipped")) is not None), default=None), "{:.0f}"),
        ]

    heads = ["", "training loss, last", "held-out loss, last", "points gained in the last quarter"]
    heads += [f"Gini of {kind.upper()}" for kind in ROUTERS]
    return (
        "By seed, then the worst of all seeds in the second half of the training: how unevenly routers load experts (0 "
        "is even), EA experts without a token in a step, steps skipped.\n\n"
    ) + table([*heads, "idle experts", "skipped"], _rows(setup, found, cells))


def _gain(one: Finding, group: Group) -> float | None:
    """Percentage points that the last quarter of the training brought."""
    of = curve(one, group)
    before = [value for step, value in zip(of.steps, of.values, strict=True) if step <= 0.75 * of.steps[-1]]
    return 100 * (of.values[-1] - before[-1]) if before else None


def _each_test(setup: Setup, found: Sequence[Finding]) -> str:
    tests = list(dict.fromkeys(t for one in found if one.final for t in one.final["trained"]["tests"]))
    columns = [(v, w) for w in setup.all_widths for v in setup.variants if of_variant(found, v, w)]
    rows = [[test, *(_of_test(of_variant(found, *column), test) for column in columns)] for test in tests]
    said = "Behind a slash: answers that say that there is none, which are counted apart.\n\n"
    has_none = any(one.final["trained"]["tests"][t]["none_asked"] for one in found if one.final for t in tests)
    return said * has_none + table(["", *(_name(setup, *column) for column in columns)], rows)


def _of_test(of: Sequence[Finding], test: str) -> str:
    none = over_seeds(of, lambda one: none_accuracy(one.final["trained"]["tests"], [test]) if one.final else None)
    return _final(of, [test]) + (f" / {100 * none.mean:.0f}" if none else "")


def number(value: float | None, form: str) -> str:
    """A figure of a table."""
    return NOTHING if value is None or not math.isfinite(value) else form.format(value)


def _pictures(setup: Setup, found: Sequence[Finding], stem: Path) -> Iterator[str]:
    """The figures that there is something to draw of."""
    if not any(one.records for one in found):
        return
    for width in setup.all_widths:
        panels = along_training(setup, found, width, setup.tokens_per_step)
        if any(panel.lines for panel in panels):
            name, title = f"training_w{width}", f"Accuracy along the training, width {width}"
            yield _shown(title, draw(panels, "training tokens (millions)", _png(stem, name)))
    for stretched, name in ((False, "depth"), (True, "depth_stretched")):
        panels = against_depth(setup, found, setup.width, setup.depth_groups or setup.groups, stretched=stretched)
        if any(panel.lines for panel in panels):
            how = ", depth positions stretched to the trained range" if stretched else ""
            title = f"Accuracy against the depth that runs{how}, width {setup.width}; the line is the trained depth"
            yield _shown(title, draw(panels, "depth", _png(stem, name)))
    if setup.widths and any(one.final for one in found):
        yield _shown("Accuracy against width", draw(against_width(setup, found), "width", _png(stem, "width")))


def _png(stem: Path, name: str) -> Path:
    return stem.with_name(f"{stem.name}_{name}.png")


def _shown(title: str, path: Path) -> str:
    return f"## {title}\n\n![{title}]({path.name})"


def pilot_table(setup: Setup, runs: Sequence[Run], out: Path) -> str:
    """The pilots' accuracy on the first group and their losses, by variant and learning rate."""
    rows = []
    for one in [finding(run, out) for run in runs]:
        of = curve(one, setup.groups[0])
        figures = [
            number(100 * of.values[-1] if of.values else None, "{:.1f}"),
            number(last_of(one, "train/loss"), "{:.3f}"),
            number(last_of(one, "validation/loss"), "{:.3f}"),
        ]
        rows.append([one.run.variant, f"{one.run.rate:g}", str(of.steps[-1] if of.steps else 0), *figures])
    group = setup.groups[0].name
    return table(["variant", "learning rate", "steps", f"{group} (%)", "training loss", "held-out loss"], rows)
