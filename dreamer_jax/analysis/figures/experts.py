"""Figures of routing: which depths and experts go together, how evenly and how surely experts are selected.

Depths are numbered from 1 and run downwards in maps. `counts` [L, E] are the selections of each expert at each depth.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Num

from dreamer_jax.analysis.captures import AnalysisError
from dreamer_jax.analysis.experts import (
    depth_given_expert,
    display_order,
    expert_given_depth,
    lorenz,
    top_depths,
)
from dreamer_jax.figures import CURVES, DIVERGING, SEQUENTIAL, STYLE, UNKNOWN, WIDTH, style
from dreamer_jax.training.metrics import gini

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import BoundaryNorm, Colormap, Normalize
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

ROW, LEAST_HEIGHT, MOST_HEIGHT = 0.1, 1.6, 4.4
"""Inches of a depth in a map, and of a map without its labels."""
PANEL_HEIGHT, TITLE_HEIGHT = 2.6, 0.35
"""Inches of a panel of curves, and of a title of two lines."""
GROUP_GAP = 0.045
"""How far apart the labels of groups are at least, as a share of the axis."""
NOTHING = "no expert was selected: analyze at least one sequence with tokens"
DIMENSIONS = {"sa": "sequence attention (SA)", "da": "depth attention (DA)", "ea": "expert attention (EA)"}
SHARES = (0, 0.02, 0.1, 0.25, 0.5, 1)
"""Ticks of colour bars of shares: the scale is their square root, so that even use of many can be told from none."""
FAINTEST = 0.1
"""Times an even share: what is below is drawn alike."""
NEVER = "#b0b0b0"
"""Pairs without a lift: darker than UNKNOWN, which is too near to the colour of chance."""
MOST_DOUBLINGS = 5
"""Of the scale of lifts, to both sides: a few pairs are far beyond what most are."""
DASHES: tuple[Any, ...] = ("--", (0, (2, 1)), "-.", (0, (6, 1, 1, 1, 1, 1)))
"""Of the means of LA, of the first run, and so on."""
TOGETHER: Any = {"color": "black", "linewidth": 1.6, "linestyle": ":"}
"""The curve of all depths together."""
EVEN: Any = {"color": "#8c8c8c", "linewidth": 0.8, "linestyle": "-"}
"""The curve of even use."""
LEGEND_HEIGHT, LEGEND_WIDTH, LETTER_WIDTH = 0.2, 0.8, 0.075
"""Inches of a line of the legend, of an entry without its text, and of a letter."""
LABEL = 32
"""Longest name of a run in a figure, in characters."""


class Routings(NamedTuple):
    """The selections of a run."""

    label: str
    counts: Int[np.ndarray, "L E"]
    shared: bool
    """Whether depths share their experts (DR); if not, each layer has its own (LA)."""


# Maps.


def depths_of_experts(counts: Int[np.ndarray, "L E"], *, seed: int = 0) -> "Figure":
    """P(depth | expert): Figure 5 of the paper. Experts run from special to general, in groups of `top_depths`.

    Raises:
        AnalysisError: no expert was selected.
    """
    from matplotlib.colors import PowerNorm

    order = _order(counts, seed)
    with style():
        figure, ax = _expert_map(counts, order)
        shown = _map(ax, depth_given_expert(counts)[:, order], PowerNorm(0.5, 0, 1))
        figure.colorbar(shown, ax=ax, label="P(depth | expert)", ticks=SHARES, format="{x:g}", pad=0.015)
    return figure


def experts_of_depths(counts: Int[np.ndarray, "L E"], *, seed: int = 0) -> "Figure":
    """P(expert | depth): Figure 7 of the paper, with the experts of Figure 5 in the same order.

    Colours are times 1 / E, what each of the E experts would have if a depth used all alike: shares themselves are
    small numbers that depend on E. Depths without a selection are grey.

    Raises:
        AnalysisError: no expert was selected.
    """
    from matplotlib.colors import LogNorm

    order = _order(counts, seed)
    times = np.where(counts.any(axis=1, keepdims=True), expert_given_depth(counts) * counts.shape[1], np.nan)[:, order]
    most = max(2.0, float(np.nanmax(times)))
    ticks = _ticks_1_2_5(FAINTEST, most)
    with style():
        figure, ax = _expert_map(counts, order)
        shown = _map(ax, np.maximum(times, FAINTEST), LogNorm(FAINTEST, most))
        bar = figure.colorbar(shown, ax=ax, label="P(expert | depth),\ntimes an even share", pad=0.015)
        bar.set_ticks(ticks, labels=[f"≤ {ticks[0]:g}×", *(f"{tick:g}×" for tick in ticks[1:])])
        bar.minorticks_off()
    return figure


def usage(counts: Mapping[str, Int[np.ndarray, "_ _"]]) -> "Figure":
    """P(expert | depth) of the attention experts, a map of counts [L, M] for each dimension ("sa", "da").

    Experts are in their own order. Depths without a selection are grey.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    height = _map_height(max(len(of) for of in counts.values()))
    with style():
        figure = Figure(figsize=(WIDTH if len(counts) > 1 else 0.6 * WIDTH, height + 0.7), layout="constrained")
        axes = figure.subplots(1, len(counts), squeeze=False)[0]
        for ax, (dimension, of) in zip(axes, counts.items(), strict=True):
            shares = np.where(of.any(axis=1, keepdims=True), expert_given_depth(of), np.nan)
            shown = _map(ax, shares, PowerNorm(0.5, 0, 1))
            ax.set_xticks(_numbers(of.shape[1]))
            ax.set(title=DIMENSIONS.get(dimension, dimension), xlabel="attention expert")
        axes[0].set_ylabel("depth")
        figure.colorbar(shown, ax=list(axes), label="P(expert | depth)", ticks=SHARES, format="{x:g}", pad=0.015)
    return figure


def coactivation(
    together: Int[np.ndarray, "E E"], counts: Int[np.ndarray, "L E"], tokens: int, *, seed: int = 0
) -> "Figure":
    """Which experts are selected together: lift = P(i and j) / (P(i) P(j)), on a log scale around 1.

    Over all depths at once, so that experts of the same depths have a lift above 1 for this alone. Experts are in the
    order of Figure 5. The diagonal is left out; pairs that were never seen are grey.

    Args:
        together: selections of both experts ("experts/*/together").
        counts: selections of each expert at each depth.
        tokens: pairs of a token and a depth behind them: tokens times L.
        seed: of the order.

    Raises:
        AnalysisError: no expert was selected.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    order = _order(counts, seed)
    lift = _lift(together, counts, tokens)[np.ix_(order, order)]
    doublings = _doublings(lift)
    low, high = 2.0**-doublings, 2.0**doublings
    shown = np.where(lift > 0, np.clip(lift, low, high), np.where(lift == 0, low / 2, np.nan))
    with style():
        figure = Figure(figsize=(0.85 * WIDTH, 0.78 * WIDTH), layout="constrained")
        ax = figure.subplots()
        image = _map(ax, shown, LogNorm(low, high), DIVERGING, bad="white", under=NEVER)
        ax.set_aspect("equal")
        _mark_groups(ax, counts, order)
        ax.set_xticks(_numbers(len(order)))
        ax.set_yticks(_numbers(len(order)))
        ax.set(xlabel=_experts_label(counts), ylabel="experts, in the same order")
        bar = figure.colorbar(
            image, ax=ax, label="selected together, times as often as by chance", pad=0.02, shrink=0.8
        )
        ticks = range(-doublings, doublings + 1)
        bar.set_ticks([2.0**tick for tick in ticks], labels=[_power_of_2(tick, doublings) for tick in ticks])
        bar.minorticks_off()
        if (lift == 0).any():
            never = Patch(color=NEVER, label="never\ntogether")
            bar.ax.legend(handles=[never], loc="upper left", bbox_to_anchor=(-0.5, -0.02), handlelength=1.2)
    return figure


# Curves.


def lorenz_curves(routings: Sequence[Routings]) -> "Figure":
    """Distinct experts against the share of routings that they carry, busiest first: Figure 6 of the paper.

    A panel for each run that shares experts, with its depths (thin, coloured) and all of them together (dotted); in
    every panel the layers of the runs that do not (thin) and their mean (thick dashed). Grey lines are even use. A
    depth without a selection has no curve.

    Raises:
        AnalysisError: no run selected an expert.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    seen = [run for run in routings if run.counts.any()]
    recurrent, layered = ([run for run in seen if run.shared == shared] for shared in (True, False))
    if not seen:
        raise AnalysisError(NOTHING)
    panels = max(1, len(recurrent))
    columns, rows = min(2, panels), math.ceil(panels / 2)
    with style():
        handles = _lorenz_legend(recurrent, layered)
        abreast = _abreast([handle.get_label() for handle in handles], WIDTH)
        panel = (1 if columns > 1 else 1.3) * PANEL_HEIGHT + TITLE_HEIGHT
        height = rows * panel + LEGEND_HEIGHT * math.ceil(len(handles) / abreast)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
        for unused in axes[panels:]:
            unused.remove()
        for i, ax in enumerate(axes[:panels]):
            _draw_even_use(ax, [*recurrent[i : i + 1], *layered])
            for k, run in enumerate(layered):
                _draw_layers(ax, run, k)
            for run in recurrent[i : i + 1]:
                _draw_depths(ax, run)
            ax.set(yscale="log", xlim=(0, 100), ylim=(1, None))
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter("{x:,.0f}")
            ax.yaxis.set_minor_formatter(NullFormatter())
            ax.tick_params(labelbottom=i + columns >= panels)
        figure.supxlabel("share of the routings (%)", fontsize=STYLE["axes.labelsize"])
        figure.supylabel("distinct experts, busiest first", fontsize=STYLE["axes.labelsize"])
        figure.legend(handles=handles, loc="outside upper center", ncols=abreast, handlelength=3)
    return figure


def router_confidence(
    entropy: Mapping[str, Float[np.ndarray, "_"]], margin: Mapping[str, Float[np.ndarray, "_"]]
) -> "Figure":
    """How sure routers are at each depth, a curve for each label (a router or a run); one of the two may be empty.

    A sure router has scores of low entropy, and a wide margin.

    Args:
        entropy: mean entropy of a token's scores, in nats.
        margin: mean biased logit of the last selected expert minus that of the best one left out.
    """
    from matplotlib.figure import Figure

    panels = [
        (curves, name)
        for curves, name in ((entropy, "entropy of the scores (nats)"), (margin, "margin of the selection (logits)"))
        if curves
    ]
    labels = list(dict.fromkeys([*entropy, *margin]))
    width = WIDTH if len(panels) > 1 else 0.6 * WIDTH
    abreast = _abreast([_shortened(label) for label in labels], width)
    height = PANEL_HEIGHT + LEGEND_HEIGHT * math.ceil(len(labels) / abreast)
    with style():
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for ax, (curves, name) in zip(axes, panels, strict=True):
            for label, values in curves.items():
                _draw_by_depth(ax, labels.index(label), label, values)
            ax.set_xticks(_numbers(max(len(values) for values in curves.values())))
            ax.set(xlabel="depth", ylabel=name)
        drawn = {line.get_label(): line for ax in axes for line in ax.lines}
        names, handles = [_shortened(label) for label in labels], [drawn[label] for label in labels]
        figure.legend(handles, names, loc="outside upper center", ncols=abreast, handlelength=3.5)
    return figure


def saturation(steps: Num[np.ndarray, "C"], share: Float[np.ndarray, "C L"]) -> "Figure":
    """How many of a token's experts at the last checkpoint were selected already at earlier ones (router saturation).

    Args:
        steps: training steps of the checkpoints, rising.
        share: of the experts, at each checkpoint and depth; NaN where there is none.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    colours, norm = _depth_colours(share.shape[1])
    with style():
        figure = Figure(figsize=(0.75 * WIDTH, PANEL_HEIGHT + 0.4), layout="constrained")
        ax = figure.subplots()
        for l in range(share.shape[1]):
            ax.plot(steps, 100 * share[:, l], color=colours(l), linewidth=0.9, marker="o", markersize=2.5)
        mean = np.ma.masked_invalid(100 * share).mean(axis=1)
        ax.plot(steps, mean, color="black", linewidth=2.2, marker="o", label="mean over depths")
        ax.set(xlabel="training step", ylabel="experts as at the last checkpoint (%)", ylim=(0, 103))
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.xaxis.set_major_formatter("{x:,.0f}")
        ax.legend(loc="lower right")
        _depth_bar(ax, colours, norm)
    return figure


# Parts of maps.


def _order(counts: Int[np.ndarray, "L E"], seed: int) -> Int[np.ndarray, "used"]:
    order = display_order(counts, seed)
    if not order.size:
        raise AnalysisError(NOTHING)
    return order


def _expert_map(counts: Int[np.ndarray, "L E"], order: Int[np.ndarray, "used"]) -> "tuple[Figure, Axes]":
    """Axes for depths by experts, with the groups of experts named above."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, _map_height(len(counts)) + 1.0), layout="constrained")
    ax = figure.subplots()
    ax.set_xlim(0.5, len(order) + 0.5)
    _mark_groups(ax, counts, order)
    ax.set_xticks(_numbers(len(order)))
    ax.set(xlabel=_experts_label(counts), ylabel="depth")
    return figure, ax


def _map(
    ax: "Axes",
    values: Float[np.ndarray, "rows columns"],
    norm: "Normalize",
    colours: str = SEQUENTIAL,
    **extremes: str,
) -> "AxesImage":
    """Values as colours, with the middles of rows and columns at 1, 2, ..."""
    from matplotlib import colormaps

    rows, columns = values.shape
    ax.grid(False)
    ax.set_yticks(_numbers(rows))
    return ax.imshow(
        values,
        cmap=colormaps[colours].with_extremes(**{"bad": UNKNOWN, **extremes}),
        norm=norm,
        aspect="auto",
        extent=(0.5, columns + 0.5, rows + 0.5, 0.5),
        interpolation_stage="rgba",  # what is not defined keeps its colour where pixels are fewer than values
    )


def _mark_groups(ax: "Axes", counts: Int[np.ndarray, "L E"], order: Int[np.ndarray, "used"]) -> None:
    """Ticks above the map at the borders of groups (alike in `top_depths`), and this number where it has room."""
    if len(counts) == 1:
        return
    top = top_depths(counts)[order]
    groups, first, sizes = np.unique(top, return_index=True, return_counts=True)
    middles = first + sizes / 2 + 0.5
    named = _apart(middles, sizes, GROUP_GAP * len(top))
    above = ax.secondary_xaxis("top")
    above.set_xticks([*(first + 0.5), len(top) + 0.5], minor=True)
    above.set_xticks(middles[named], labels=[str(group) for group in groups[named]])
    above.tick_params(axis="x", which="major", length=0, pad=3)
    above.tick_params(axis="x", which="minor", length=5, width=0.6)
    above.set_xlabel("how many depths have 90 % of an expert's selections")


def _apart(places: Float[np.ndarray, "n"], sizes: Int[np.ndarray, "n"], gap: float) -> list[int]:
    """The places that keep a gap to each other, the larger ones first."""
    kept: list[int] = []
    for i in np.argsort(-sizes, kind="stable").tolist():
        if all(abs(places[i] - places[k]) >= gap for k in kept):
            kept.append(i)
    return sorted(kept)


def _experts_label(counts: Int[np.ndarray, "L E"]) -> str:
    unused = int(np.sum(~counts.any(axis=0)))
    left_out = f" ({unused:,} of {counts.shape[1]:,} never selected)" if unused else ""
    return f"experts{', from special to general' if len(counts) > 1 else ''}{left_out}"


def _map_height(depths: int) -> float:
    return min(max(LEAST_HEIGHT, ROW * depths), MOST_HEIGHT)


def _numbers(count: int) -> list[int]:
    """About eight of 1 .. count, the first among them."""
    step = next(step for step in _steps() if count <= 8 * step)
    return [1, *range(step, count + 1, step)] if step > 1 else list(range(1, count + 1))


def _steps() -> Iterable[int]:
    return (factor * 10**power for power in range(10) for factor in (1, 2, 4, 5))


def _ticks_1_2_5(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from low to high."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [tick for power in powers for tick in (10.0**power, 2 * 10.0**power, 5 * 10.0**power) if low <= tick <= high]


# Parts of the map of pairs.


def _lift(together: Int[np.ndarray, "E E"], counts: Int[np.ndarray, "L E"], tokens: int) -> Float[np.ndarray, "E E"]:
    """NaN on the diagonal and for unused experts.

    A token selects A different experts, so even routers that draw at random select a pair less often than the product
    of the shares says: by (A - 1) E / (A (E - 1)).
    """
    selections, E = counts.sum(axis=0).astype(np.float64), counts.shape[1]
    A = selections.sum() / tokens
    by_chance = np.outer(selections, selections) / tokens * (A - 1) * E / (A * max(E - 1, 1))
    np.fill_diagonal(by_chance, 0)
    return np.divide(together, by_chance, out=np.full(by_chance.shape, np.nan), where=by_chance > 0)


def _doublings(lift: Float[np.ndarray, "used used"]) -> int:
    """How far the scale goes to both sides, in powers of 2: as far as most pairs."""
    seen = lift[np.nan_to_num(lift) > 0]
    most = np.quantile(np.abs(np.log2(seen)), 0.95) if seen.size else 0
    return min(max(1, math.ceil(most)), MOST_DOUBLINGS)


def _power_of_2(exponent: int, last: int) -> str:
    """As a number or a fraction; the ends of the scale stand for what is beyond them too."""
    number = f"{2**exponent}" if exponent >= 0 else f"1/{2**-exponent}"
    return {last: "≥ ", -last: "≤ "}.get(exponent, "") + number


# Parts of curves.


def _abreast(labels: Sequence[str], width: float) -> int:
    """How many entries a line of the legend has room for."""
    return max(1, min(len(labels), int(width / (LEGEND_WIDTH + LETTER_WIDTH * max(map(len, labels))))))


def _lorenz_legend(recurrent: Sequence[Routings], layered: Sequence[Routings]) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label="even use", **EVEN)]
    for k, run in enumerate(layered):
        label = f"{_shortened(run.label)}, mean of layers (Gini {np.mean(gini(run.counts[_busy(run.counts)])):.3f})"
        handles.append(Line2D([], [], label=label, **_mean_line(k)))
    if recurrent:
        handles.append(Line2D([], [], label="all depths together", **TOGETHER))
        handles.append(Line2D([], [], label="one depth", color=_depth_colours(3)[0](1), linewidth=0.8))
    return handles


def _draw_even_use(ax: "Axes", runs: Sequence[Routings]) -> None:
    """What each run's curve would be if it used its experts alike."""
    for experts in {run.counts.shape[1] for run in runs}:
        _draw_lorenz(ax, np.ones(experts, np.int64), zorder=1.5, **EVEN)


def _draw_depths(ax: "Axes", run: Routings) -> None:
    colours, norm = _depth_colours(len(run.counts))
    busy, whole = np.flatnonzero(_busy(run.counts)), run.counts.sum(axis=0)
    for l in busy.tolist():
        _draw_lorenz(ax, run.counts[l], color=colours(l), linewidth=0.8)
    _draw_lorenz(ax, whole, **TOGETHER)
    of_depths = _span(gini(run.counts[busy]))
    ax.set_title(f"{_shortened(run.label)}\nGini {gini(whole):.3f}, of one depth {of_depths}")
    _depth_bar(ax, colours, norm)


def _draw_layers(ax: "Axes", run: Routings, k: int) -> None:
    """The layers, and the mean of what as many experts carry in each of them."""
    busy = run.counts[_busy(run.counts)]
    for layer in busy:
        _draw_lorenz(ax, layer, color=_mean_line(k)["color"], linewidth=0.5, alpha=0.35)
    shares = np.mean([lorenz(layer)[0] for layer in busy], axis=0)
    ax.plot(100 * shares[1:], np.arange(1, len(shares)), **_mean_line(k))


def _mean_line(k: int) -> dict[str, Any]:
    """Of the k-th run with layers of its own."""
    return {"color": CURVES[k % len(CURVES)][0], "linestyle": DASHES[k % len(DASHES)], "linewidth": 2.2, "zorder": 2.5}


def _draw_lorenz(ax: "Axes", counts: Int[np.ndarray, "E"], **line: Any) -> None:
    """Of the experts that were selected; a log axis has no 0."""
    shares, experts = lorenz(counts)
    used = slice(1, int(np.sum(counts > 0)) + 1)
    ax.plot(100 * shares[used], experts[used], **line)


def _busy(counts: Int[np.ndarray, "L E"]) -> Bool[np.ndarray, "L"]:
    return np.asarray(counts.any(axis=1))


def _span(values: Float[np.ndarray, "_"]) -> str:
    low, high = (f"{bound:.2f}" for bound in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"


def _shortened(label: str) -> str:
    """With its middle left out if it is too long: runs differ in their beginnings and ends."""
    half = (LABEL - 1) // 2
    return label if len(label) <= LABEL else f"{label[:half]}…{label[-half:]}"


def _draw_by_depth(ax: "Axes", i: int, label: str, values: Float[np.ndarray, "L"]) -> None:
    colour, line, marker = CURVES[i % len(CURVES)]
    every = math.ceil(len(values) / 16)
    ax.plot(
        np.arange(1, len(values) + 1), values, color=colour, linestyle=line, marker=marker, markevery=every, label=label
    )


def _depth_colours(depths: int) -> "tuple[Colormap, BoundaryNorm]":
    """A colour for each depth; the brightest are left out, since they fade on paper."""
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm, ListedColormap

    colours = ListedColormap(colormaps[SEQUENTIAL](np.linspace(0, 0.9, depths)))
    return colours, BoundaryNorm(np.arange(depths + 1) + 0.5, depths)


def _depth_bar(ax: "Axes", colours: "Colormap", norm: "BoundaryNorm") -> None:
    from matplotlib.cm import ScalarMappable

    bar = ax.figure.colorbar(ScalarMappable(norm, colours), ax=ax, label="depth", ticks=_numbers(colours.N), pad=0.02)
    bar.minorticks_off()
