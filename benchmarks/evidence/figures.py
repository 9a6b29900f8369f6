"""Figures of the findings: panels of lines, each the mean over seeds in the band of its range."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.evidence.findings import (
    Finding,
    Spread,
    band,
    curve,
    final_spread,
    of_variant,
)
from benchmarks.evidence.setup import Group, Setup
from dreamer_jax.figures import CURVES, STYLE, WIDTH, image, style
from dreamer_jax.files import write_whole

PANEL_HEIGHT = 2.1
"""Inches of a row of panels."""
ALONE = 3.0
"""Inches of a panel that has the page's width."""
ABREAST = 6
"""Entries of the legend that stand side by side."""
CHANCE: Any = {"color": "#8c8c8c", "linestyle": (0, (1, 2)), "linewidth": 0.9}
"""The line at what guessing gives."""


class Line(NamedTuple):
    """One line of a panel."""

    label: str
    style: int
    """Counts colours, so that a variant looks the same in all figures."""
    x: tuple[float, ...]
    values: tuple[Spread, ...]


class Unit(NamedTuple):
    """What stands along the y axis."""

    label: str
    scale: float = 1.0
    limits: tuple[float, float] | None = None


ACCURACY = Unit("accuracy (%)", 100, (-3, 103))


class Panel(NamedTuple):
    """Lines with a title."""

    title: str
    lines: list[Line]
    chance: float | None = None
    marked: float | None = None
    """An x to point out: the trained depth."""


def draw(panels: Sequence[Panel], x_label: str, path: Path, unit: Unit = ACCURACY) -> Path:
    """Write a PNG file of panels, with one legend for all."""
    from matplotlib.figure import Figure

    columns = 2 if len(panels) in (2, 4) else min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    with style():
        height = rows * (PANEL_HEIGHT if columns > 1 else ALONE)
        figure = Figure(figsize=(WIDTH, height + 0.4), layout="constrained")
        grid = list(figure.subplots(rows, columns, squeeze=False, sharey=True).ravel())
        for ax, panel in zip(grid, panels, strict=False):
            _fill(ax, panel, unit)
        for ax in grid[len(panels) :]:
            ax.remove()
        handles = {h.get_label(): h for ax in grid[: len(panels)] for h in ax.get_legend_handles_labels()[0]}
        figure.legend(
            handles=handles.values(), loc="outside upper center", ncols=min(len(handles), ABREAST), handlelength=2.5
        )
        figure.supxlabel(x_label, fontsize=STYLE["axes.labelsize"])
        figure.supylabel(unit.label, fontsize=STYLE["axes.labelsize"])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, image(figure, "png"))
    return path


def _fill(ax: object, panel: Panel, unit: Unit) -> None:
    from matplotlib.axes import Axes

    assert isinstance(ax, Axes)
    ax.set_title(panel.title)
    if unit.limits:
        ax.set_ylim(unit.limits)
    for label, number, x, values in panel.lines:
        colour, dashes, marker = CURVES[number % len(CURVES)]
        every = max(1, len(x) // 8)
        mean, low, high = ([unit.scale * value[i] for value in values] for i in range(3))
        ax.plot(
            x,
            mean,
            linestyle=dashes,
            color=colour,
            marker=marker,
            markevery=every,
            label=label,
        )
        ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    if panel.chance is not None:
        ax.axhline(unit.scale * panel.chance, label="chance", **CHANCE)
    if panel.marked is not None:
        ax.axvline(panel.marked, color="#b0b0b0", linewidth=0.8, zorder=0.5)


# What the panels show.


def along_training(setup: Setup, found: Sequence[Finding], width: int, tokens_per_step: int) -> list[Panel]:
    """A panel for each group of tests: accuracy against training tokens in millions."""
    panels = []
    for group in setup.groups:
        lines = []
        for number, variant in enumerate(setup.variants):
            steps, values = band([curve(one, group) for one in of_variant(found, variant, width)])
            if steps:
                lines.append(Line(variant, number, tuple(s * tokens_per_step / 1e6 for s in steps), tuple(values)))
        panels.append(Panel(group.name, lines, group.chance))
    return panels


def against_depth(
    setup: Setup, found: Sequence[Finding], width: int, groups: Sequence[Group], *, stretched: bool = False
) -> list[Panel]:
    """A panel for each group: accuracy of the recurrent variants against the depth that runs.

    Args:
        setup: of the family.
        found: what the runs wrote.
        width: of the models.
        groups: of tests.
        stretched: with depth positions stretched to the trained range, instead of as they are.
    """
    panels = []
    for title, tests, chance in groups:
        lines = [
            line
            for number, variant in enumerate(setup.variants)
            if (line := _by_depth(of_variant(found, variant, width), variant, number, stretched, tests)).x
        ]
        panels.append(Panel(title, lines, chance, setup.depth))
    return panels


def _by_depth(found: Sequence[Finding], variant: str, number: int, stretched: bool, tests: tuple[str, ...]) -> Line:
    by_depth: dict[int, list[Finding]] = {}
    for one in found:
        for at in one.final["swept"] if one.final else ():
            if at["scaled"] == stretched or at["depth"] == one.final["trained_depth"]:  # where both are the same
                by_depth.setdefault(at["depth"], []).append(one._replace(final={"trained": at}))
    spreads = {depth: final_spread(of, tests) for depth, of in sorted(by_depth.items())}
    known = {depth: spread for depth, spread in spreads.items() if spread}
    return Line(variant, number, tuple(map(float, known)), tuple(known.values()))


def against_width(setup: Setup, found: Sequence[Finding]) -> list[Panel]:
    """A panel for each group: accuracy of the variants at the end of the training against the model's width."""
    panels = []
    for group in setup.groups:
        lines = []
        for number, variant in enumerate(setup.variants):
            by_width = {w: final_spread(of_variant(found, variant, w), group.tests) for w in sorted(setup.all_widths)}
            known = {width: value for width, value in by_width.items() if value}
            if known:
                lines.append(Line(variant, number, tuple(map(float, known)), tuple(known.values())))
        panels.append(Panel(group.name, lines, group.chance))
    return panels
