"""Figures of evaluations: accuracy against training tokens, as Figure 3 of the paper, and scores against depth."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dreamer_jax.evaluation.comparison.statistics import running_best
from dreamer_jax.figures import CURVES, STYLE, WIDTH, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CHANCE: Any = {"color": "#8c8c8c", "linestyle": (0, (1, 2)), "linewidth": 0.9}
"""The line at what guessing gives."""
PANEL_HEIGHT = 2.15
"""Inches of a row of panels."""
LEGEND_HEIGHT, LEGEND_WIDTH, LETTER_WIDTH = 0.22, 0.8, 0.075
"""Inches of a line of the legend, of an entry without its text, and of a letter."""
UNITS = ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))
LABEL = 50
"""Longest name in a legend, in characters."""
ARROWS, ARROW_STEP = 3, 0.085
"""Most arrows that a panel has room for, and how far apart they are, as a share of its height."""
DECADES = 10
"""Perplexities that are further apart than by this factor are drawn on a logarithmic scale."""


@dataclass(frozen=True)
class Curve:
    """A run in a panel: scores with their intervals over training tokens or depth, in rising order; it may be empty."""

    label: str
    x: tuple[float, ...]
    value: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    marked: float | None = None
    """The x to point out: the trained depth."""


@dataclass(frozen=True)
class Saving:
    """Tokens that a run saves on the way to the baseline's best score."""

    curve: int
    """Which run, among the panel's curves."""
    start: float
    """Tokens that the baseline needed."""
    end: float
    """Tokens that the run needed."""
    text: str


@dataclass(frozen=True)
class Panel:
    """One task."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    """The same runs in the same order in every panel."""
    goal: float | None = None
    """The baseline's best score."""
    savings: tuple[Saving, ...] = ()
    baseline: int = 0
    """Which run, among the curves."""
    chance: float | None = None
    """The score that guessing gives, if it gives any."""


def figure_3(panels: Sequence[Panel]) -> "Figure":
    """Scores against training tokens.

    Points are single checkpoints, lines the running best, bands its intervals. A thin line marks the baseline's best,
    and arrows below it how much earlier other runs reach it. A dotted line is what guessing gives.
    """
    size, unit = _token_unit(panels)
    with style():
        figure, axes = _grid(panels, f"training tokens ({unit})" if unit else "training tokens")
        for ax, panel in zip(axes, panels, strict=True):
            for i, curve in enumerate(panel.curves):
                _draw_running_best(ax, i, curve, size)
            if panel.goal is not None:
                ax.axhline(panel.goal, color=CURVES[panel.baseline % len(CURVES)][0], linewidth=0.7, zorder=1.5)
            ax.set_xlim(0, 1.05 * max((x for curve in panel.curves for x in curve.x), default=1.0) / size)
            _draw_savings(ax, panel, size)
    return figure


def against_depth(panels: Sequence[Panel]) -> "Figure":
    """Scores against the depth that a model ran at.

    A ring marks the depth that it was trained at, a dotted line what guessing gives.
    """
    with style():
        figure, axes = _grid(panels, "depth (ring: as trained)")
        for ax, panel in zip(axes, panels, strict=True):
            for i, curve in enumerate(panel.curves):
                _draw_by_depth(ax, i, curve)
            ax.set_xticks(sorted({x for curve in panel.curves for x in curve.x}))
            values = [value for curve in panel.curves for value in curve.value]
            if panel.unit == "perplexity" and max(values) > DECADES * min(values):
                ax.set_yscale("log")
    return figure


def _grid(panels: Sequence[Panel], x_label: str) -> "tuple[Figure, list[Axes]]":
    """Panels in rows of up to three, below a legend of all runs."""
    from matplotlib.figure import Figure

    columns = min(len(panels), 2 if len(panels) in (2, 4) else 3)
    rows = math.ceil(len(panels) / columns)
    handles = _handles(panels)
    labels = [handle.get_label() for handle in handles]
    width = WIDTH if columns > 1 else 0.7 * WIDTH
    abreast = max(1, min(len(labels), int(width / (LEGEND_WIDTH + LETTER_WIDTH * max(map(len, labels))))))
    legend = LEGEND_HEIGHT * math.ceil(len(labels) / abreast)
    figure = Figure(figsize=(width, rows * PANEL_HEIGHT * (1 if columns > 2 else 1.25) + legend), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).ravel())
    axes = grid[: len(panels)]
    for unused in grid[len(panels) :]:
        unused.remove()
    for i, (ax, panel) in enumerate(zip(axes, panels, strict=True)):
        ax.set_title(panel.title)
        if i % columns == 0 or panel.unit != panels[i - 1].unit:
            ax.set_ylabel(panel.unit)
        if panel.chance is not None:
            ax.axhline(panel.chance, zorder=1.5, **CHANCE)
    figure.supxlabel(x_label, fontsize=STYLE["axes.labelsize"])
    figure.legend(handles=handles, loc="outside upper center", ncols=abreast, handlelength=3.5)
    return figure, axes


def _handles(panels: Sequence[Panel]) -> list[Any]:
    """Entries of the legend: the runs, and chance where a panel has it."""
    from matplotlib.lines import Line2D

    handles = []
    for i, curve in enumerate(panels[0].curves):
        colour, line, marker = CURVES[i % len(CURVES)]
        handles.append(Line2D([], [], color=colour, linestyle=line, marker=marker, label=_shortened(curve.label)))
    if any(panel.chance is not None for panel in panels):
        handles.append(Line2D([], [], label="chance", **CHANCE))
    return handles


def _draw_running_best(ax: "Axes", i: int, curve: Curve, size: float) -> None:
    colour, line, marker = CURVES[i % len(CURVES)]
    x, best = np.array(curve.x) / size, running_best(curve.value)
    ax.plot(x, curve.value, linestyle="", marker=marker, color=colour, alpha=0.35, markeredgewidth=0)
    if len(x) == 1:
        _draw_bars(ax, x, curve, colour)
    value, low, high = (np.array([bound[k] for k in best]) for bound in (curve.value, *_bounds(curve)))
    ax.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
    new = [k for k, at in enumerate(best) if at == k]
    ax.plot(x, value, linestyle=line, marker=marker, color=colour, markevery=new, markeredgecolor="white")


def _draw_by_depth(ax: "Axes", i: int, curve: Curve) -> None:
    colour, line, marker = CURVES[i % len(CURVES)]
    low, high = _bounds(curve)
    ax.fill_between(curve.x, low, high, color=colour, alpha=0.12, linewidth=0)
    ax.plot(curve.x, curve.value, linestyle=line, marker=marker, color=colour, markeredgecolor="white")
    if len(curve.x) == 1:
        _draw_bars(ax, np.array(curve.x), curve, colour)
    if curve.marked in curve.x:
        at = curve.x.index(curve.marked)
        ax.plot(
            curve.marked, curve.value[at], marker="o", markersize=10, color=colour, fillstyle="none", markeredgewidth=1
        )


def _draw_bars(ax: "Axes", x: np.ndarray, curve: Curve, colour: str) -> None:
    """Intervals of points that no band can show."""
    low, high = _bounds(curve)
    ax.vlines(x, low, high, color=colour, alpha=0.5, linewidth=1)


def _draw_savings(ax: "Axes", panel: Panel, size: float) -> None:
    """An arrow for each run, from the tokens that the baseline needed to its own; one below the other."""
    from matplotlib.patheffects import withStroke

    if panel.goal is None or not 0 < len(panel.savings) <= ARROWS:
        return
    (bottom, top), right = ax.get_ylim(), ax.get_xlim()[1]
    step = (top - bottom) * ARROW_STEP
    ax.set_xlim(right=1.16 * right)
    ax.set_ylim(bottom=min(bottom, panel.goal - (len(panel.savings) + 0.7) * step), top=top)
    for row, saving in enumerate(sorted(panel.savings, key=lambda saving: saving.end), 1):
        colour, y = CURVES[saving.curve % len(CURVES)][0], panel.goal - row * step
        arrow = {"arrowstyle": "->", "color": colour, "linewidth": 1, "shrinkA": 0, "shrinkB": 0}
        ax.annotate("", xy=(saving.end / size, y), xytext=(saving.start / size, y), arrowprops=arrow)
        tail = max(saving.start, saving.end) / size + 0.02 * right
        halo = [withStroke(linewidth=2, foreground="white")]
        ax.text(tail, y, saving.text, color=colour, fontsize=8, va="center", path_effects=halo)


def _bounds(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Of the intervals; where there are none, the scores themselves."""
    value, low, high = (np.array(numbers) for numbers in (curve.value, curve.low, curve.high))
    return np.where(np.isfinite(low), low, value), np.where(np.isfinite(high), high, value)


def _token_unit(panels: Sequence[Panel]) -> tuple[float, str]:
    """What tokens are counted in."""
    most = max((x for panel in panels for curve in panel.curves for x in curve.x), default=0.0)
    return next(((size, name) for size, name in UNITS if most >= size), (1.0, ""))


def _shortened(label: str) -> str:
    """With its middle left out if it is too long: runs differ in their beginnings and ends."""
    half = (LABEL - 1) // 2
    return label if len(label) <= LABEL else f"{label[:half]}…{label[-half:]}"
