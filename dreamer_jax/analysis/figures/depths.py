"""Figures of what happens over depth: depth attention (the paper's Figure 4), residual stream, logit lens, removals.

Letters: L depths, N heads, S entries that a dimension attends to (for depth attention: depths), K thresholds. A mapping
holds a curve for each label: a run, a dimension, a criterion. NaN is drawn as unknown in maps and left out of curves.
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dreamer_jax.analysis.captures import CHANGES
from dreamer_jax.figures import CURVES, DIVERGING, SEQUENTIAL, STYLE, UNKNOWN, WIDTH, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

PANEL_HEIGHT, MAP_HEIGHT, LINE_HEIGHT = 2.3, 2.9, 0.2
"""Inches of a row of panels with curves, of one with maps and colour bars, and of a line of text."""
LEGEND_WIDTH, LETTER_WIDTH = 0.7, 0.07
"""Inches of an entry of a legend without its text, and of a letter."""
LABEL, TOKEN = 50, 24
"""Longest label of a curve and longest token, in characters."""
HEADS = 16
"""Most heads that a grid has room for."""
TICKS, MARKERS = 5, 16
"""About how many depths are written at an axis, and marked on a curve."""
FAR = 30
"""Changes that are this many times the usual one would leave the rest at zero on a linear scale."""
REFERENCE: Any = {"color": "#8c8c8c", "linestyle": "-", "linewidth": 0.9, "zorder": 1.5}
"""A line to compare with."""
CRITERIA = {
    "latent": "latent difference",
    "entropy": "entropy",
    "divergence": "divergence of predictions",
    "stable": "stable prediction",
}
"""What criteria of exits are called in print."""
SHARES = (("#0072b2", ""), ("#d9d9d9", ""), ("#d55e00", "////"))
"""Colour and hatching of each of CHANGES."""
EDGE: Any = {"edgecolor": "white", "linewidth": 0.4}
"""What parts bars, and what they are hatched with."""
END: Any = {"linestyle": "", "marker": "o", "markersize": 7, "markeredgewidth": 1.2, "zorder": 4}
"""The points at the ends of a path."""


def depth_attention(
    weight: np.ndarray, visible: np.ndarray, weighted_norm: np.ndarray, entries: str = "source depth"
) -> "Figure":
    """The paper's Figure 4: where each depth (down) looks (across), in the mean over heads.

    Panel (a) shows weights as shares of the depth's largest one, as the paper does. (b) shows how many times uniform
    attention they are. (c) shows weight times the norm of the value as in (a): an attention sink with a small value
    has much weight and moves little.

    Args:
        weight: [L, N, S], mean weights.
        visible: [L, S], whether a depth may attend to an entry; other entries are unknown.
        weighted_norm: [L, N, S], means of weight times the norm of the value.
        entries: what the axis of the S entries is called.
    """
    from matplotlib.colors import Normalize

    mean = _seen(weight.mean(axis=1), visible)
    moved = _seen(weighted_norm.mean(axis=1), visible)
    uniform = _times_uniform(mean, visible)
    with style():
        figure = _page(WIDTH, MAP_HEIGHT)
        a, b, c = figure.subplots(1, 3)
        share = Normalize(0, 1), SEQUENTIAL, "share of the depth's largest"
        _map_with_bar(a, "(a) weight", _shares_of_largest(mean), *share)
        _map_with_bar(b, "(b) weight against uniform", uniform, _around_one(uniform), DIVERGING, "times uniform")
        _map_with_bar(c, "(c) weight × norm of value", _shares_of_largest(moved), *share)
        a.set_ylabel("target depth")
        for ax in (a, b, c):
            ax.set_xlabel(entries)
    return figure


def depth_attention_heads(weight: np.ndarray, visible: np.ndarray, entries: str = "source depth") -> "Figure":
    """How many times uniform attention the weight is, for each of the first 16 heads.

    Args:
        weight: [L, N, S], mean weights.
        visible: [L, S], whether a depth may attend to an entry; other entries are unknown.
        entries: what the axis of the S entries is called.
    """
    uniform = [_times_uniform(_seen(weight[:, head], visible), visible) for head in range(weight.shape[1])][:HEADS]
    columns = min(len(uniform), 4 if len(uniform) > 6 or len(uniform) == 4 else 3)
    rows, side = math.ceil(len(uniform) / columns), (WIDTH - 1.2) / max(columns, 2)
    norm = _around_one(np.stack(uniform))
    with style():
        figure = _page(columns * side + 1.2, rows * (side + LINE_HEIGHT) + 0.4)
        axes = figure.subplots(rows, columns, squeeze=False)
        for head, (ax, values) in enumerate(zip(axes.flat, uniform, strict=False)):
            image = _map(ax, values, norm, DIVERGING)
            ax.set_title(f"head {head + 1}" + (f" of {weight.shape[1]}" if weight.shape[1] > HEADS else ""))
            ax.tick_params(labelleft=head % columns == 0, labelbottom=head + columns >= len(uniform))
        for unused in axes.flat[len(uniform) :]:
            unused.remove()
        _name_ratios(figure.colorbar(image, ax=figure.axes, label="times uniform").ax.yaxis, norm)
        figure.supxlabel(entries, fontsize=STYLE["axes.labelsize"])
        figure.supylabel("target depth", fontsize=STYLE["axes.labelsize"])
    return figure


def residual_stream(
    rms: Mapping[str, np.ndarray], step: Mapping[str, np.ndarray], cosine: Mapping[str, np.ndarray]
) -> "Figure":
    """How large the residual stream is after each depth [L], what each adds [L], and how far steps agree [L - 1].

    The cosine at depth l is that of the steps of depths l and l + 1.
    """
    with style():
        styles = _styles((rms, step, cosine))
        figure = _page(WIDTH, PANEL_HEIGHT)
        left, middle, right = figure.subplots(1, 3)
        _curves(left, rms, styles, "RMS after the depth")
        _curves(middle, step, styles, "RMS of the step")
        _curves(right, cosine, styles, "cosine to the next step")
        for ax, curves in ((left, rms), (middle, step)):
            _spread(ax, curves)
        right.set(xlim=left.get_xlim(), xticks=left.get_xticks())
        right.axhline(0, **REFERENCE)
        _legend(figure, styles)
    return figure


def updates(update: Mapping[str, np.ndarray]) -> "Figure":
    """How much each dimension adds to the residual stream [L]."""
    with style():
        styles = _styles((update,))
        figure = _page(0.7 * WIDTH, 1.2 * PANEL_HEIGHT)
        ax = figure.subplots()
        _curves(ax, update, styles, "RMS of the update")
        _spread(ax, update)
        _legend(figure, styles)
    return figure


def logit_lens(
    loss: Mapping[str, np.ndarray],
    entropy: Mapping[str, np.ndarray],
    divergence: Mapping[str, np.ndarray],
    agreement: Mapping[str, np.ndarray],
) -> "Figure":
    """What the LM head would say after each depth.

    Args:
        loss: [L], in nats.
        entropy: [L], in nats.
        divergence: [L], KL divergence of the last depth's prediction from this depth's, in nats. A logarithmic axis
            leaves out zeros, as that of the last depth.
        agreement: [L], share of positions whose likeliest token is the last depth's.
    """
    with style():
        styles = _styles((loss, entropy, divergence, agreement))
        figure = _page(WIDTH, 2 * PANEL_HEIGHT)
        axes = figure.subplots(2, 2)
        _curves(axes[0, 0], loss, styles, "loss (nats)")
        _curves(axes[0, 1], entropy, styles, "entropy (nats)")
        _curves(axes[1, 0], divergence, styles, "KL to the last depth (nats)")
        _curves(axes[1, 1], agreement, styles, "agrees with the last depth")
        _spread(axes[1, 0], divergence)
        _percent(axes[1, 1])
        _legend(figure, styles)
    return figure


def help_of_depth(change: np.ndarray) -> "Figure":
    """Shares of positions whose loss improves, stays or worsens from each depth to the last: [L, 3], as CHANGES."""
    depth = np.arange(1, len(change) + 1)
    with style():
        figure = _page(0.7 * WIDTH, 1.2 * PANEL_HEIGHT)
        ax = figure.subplots()
        bottom = np.zeros(len(change))
        bars = []
        for name, shares, (colour, hatch) in zip(CHANGES, _finite(change).T, SHARES, strict=True):
            bars.append(ax.bar(depth, shares, 1.0, bottom, color=colour, hatch=hatch, label=name, **EDGE))
            bottom = bottom + shares
        _depth_axis(ax, len(change), "depth")
        ax.set(ylabel="share of positions", ylim=(0, 1))
        ax.set_title("loss from this depth to the last")
        _percent(ax)
        figure.legend(handles=bars, loc="outside upper center", ncols=len(bars))
    return figure


def settling(settled: Mapping[str, np.ndarray]) -> "Figure":
    """At which depth the likeliest token becomes final: share of positions [L], and the sum up to each depth."""
    with style():
        styles = _styles((settled,))
        figure = _page(WIDTH, PANEL_HEIGHT)
        left, right = figure.subplots(1, 2)
        _curves(left, settled, styles, "token final from here on")
        _curves(right, {label: np.cumsum(share) for label, share in settled.items()}, styles, "token final by now")
        for ax in (left, right):
            _percent(ax)
            ax.set_ylim(bottom=0)
        _legend(figure, styles)
    return figure


def exits(readouts: Mapping[str, tuple[np.ndarray, np.ndarray]], last_loss: float) -> "Figure":
    """What readouts before the last depth cost.

    Args:
        readouts: of each criterion, the mean number of depths that ran [K] and the loss in nats [K], by threshold.
        last_loss: the loss of the last depth, in nats.
    """
    from matplotlib.lines import Line2D

    with style():
        named = {CRITERIA.get(criterion, criterion): readout for criterion, readout in readouts.items()}
        styles = _styles((named,))
        figure = _page(0.7 * WIDTH, 1.3 * PANEL_HEIGHT)
        ax = figure.subplots()
        for label, (depth, loss) in named.items():
            order = np.argsort(depth, kind="stable")
            ax.plot(depth[order], loss[order], **styles[label])
        ax.axhline(last_loss, **REFERENCE)
        ax.set(xlabel="mean number of depths that ran", ylabel="loss (nats)")
        _legend(figure, styles, Line2D([], [], label="last depth", **REFERENCE))
    return figure


def removals(
    loss: float, depth: np.ndarray, update: Mapping[str, np.ndarray], dimension: Mapping[str, float]
) -> "Figure":
    """By how many nats the loss changes when a part is left out.

    Args:
        loss: with nothing left out.
        depth: [L], losses without one depth.
        update: [L], losses without a dimension at one depth.
        dimension: losses without a dimension at any depth.
    """
    at_depths = {"all of the depth": depth - loss, **{label: of - loss for label, of in update.items()}}
    as_a_whole = {label: without - loss for label, without in dimension.items()}
    with style():
        styles = _styles((at_depths, as_a_whole))
        figure = _page(WIDTH, 1.1 * PANEL_HEIGHT)
        left, right = figure.subplots(1, 2, width_ratios=(2, 1))
        _curves(left, at_depths, styles, "change of the loss (nats)", "depth at which it is left out")
        _widen(left, np.concatenate([*at_depths.values()]))
        left.axhline(0, **REFERENCE)
        _bars(right, as_a_whole, styles)
        right.set_xlabel("left out at all depths (nats)")
        _legend(figure, {label: styles[label] for label in at_depths})
    return figure


def removed_entries(loss: float, entry: np.ndarray, entries: str = "source depth") -> "Figure":
    """By how many nats the loss changes when one depth does not attend to one entry.

    Args:
        loss: with nothing left out.
        entry: [L, S], the losses; NaN is unknown.
        entries: what the axis of the S entries is called.
    """
    change = entry - loss
    with style():
        figure = _page(0.7 * WIDTH, 0.6 * WIDTH)
        ax = figure.subplots()
        norm = _around_zero(change)
        bar = figure.colorbar(_map(ax, change, norm, DIVERGING), ax=ax, label="change of the loss (nats)")
        bar.ax.yaxis.set_major_formatter(_plain)
        bar.ax.yaxis.minorticks_off()
        ax.set(xlabel=entries, ylabel="target depth")
    return figure


def trajectories(points: np.ndarray, explained: np.ndarray, token: Sequence[str] | np.ndarray) -> "Figure":
    """The paths of tokens over depth, in the plane of two principal components.

    A ring is the start (the embedding), a filled point the end (after the last depth), and numbers are depths.

    Args:
        points: [n, L + 1, 2], the residual streams x_0 .. x_L in that plane.
        explained: [2], shares of the variance.
        token: n texts.
    """
    from matplotlib.lines import Line2D

    with style():
        figure = _page(WIDTH, max(0.65 * WIDTH, LINE_HEIGHT * (len(points) + 4)))
        ax = figure.subplots()
        styles = [_curve_style(i) for i in range(len(points))]
        for path, of in zip(points, styles, strict=True):
            ax.plot(*path.T, color=of["color"], linestyle=of["linestyle"], linewidth=1.2, marker=".", markersize=3)
            ax.plot(*path[0], color=of["color"], markerfacecolor="white", **END)
            ax.plot(*path[-1], color=of["color"], **END)
        for i, name in enumerate(("first", "second")):
            label = f"{name} principal component ({explained[i]:.0%} of the variance)"
            (ax.set_xlabel, ax.set_ylabel)[i](label)
        _number_depths(ax, points, styles)
        _name_ends(ax, points[:, -1], [_drawable(repr(str(text))) for text in token], styles)
        start = Line2D([], [], color=CURVES[0][0], markerfacecolor="white", label="embedding", **END)
        end = Line2D([], [], color=CURVES[0][0], label="after the last depth", **END)
        figure.legend(handles=[start, end], loc="outside upper center", ncols=2)
    return figure


def _page(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06))


def _seen(values: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """NaN where nothing can be seen."""
    return np.where(visible, values, np.nan)


def _shares_of_largest(values: np.ndarray) -> np.ndarray:
    """Rows divided by their largest value; rows of zeros stay."""
    largest = np.max(_finite(values), axis=-1, keepdims=True)
    return np.divide(values, largest, out=np.array(values, dtype=float), where=largest > 0)


def _times_uniform(values: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Weights against those of attention that is the same to all entries that a depth may attend to."""
    return values * visible.sum(axis=-1, keepdims=True)


def _around_one(values: np.ndarray) -> "Normalize":
    """Ratios from 1/2^k to 2^k, where 2^k holds the largest; smaller ones have the colour of 1/2^k."""
    from matplotlib.colors import LogNorm

    largest = _finite(values).max(initial=1)
    bound = 2.0 ** max(1, math.ceil(math.log2(largest) - 1e-3))
    return LogNorm(1 / bound, bound, clip=True)


def _around_zero(values: np.ndarray) -> "Normalize":
    """Differences of both signs, on a scale that is linear near zero only if some are far larger than most."""
    from matplotlib.colors import Normalize, SymLogNorm

    largest = float(np.abs(_finite(values)).max(initial=0)) or 1.0
    near = _near_zero(values)
    return SymLogNorm(near, vmin=-largest, vmax=largest) if near else Normalize(-largest, largest)


def _finite(values: np.ndarray) -> np.ndarray:
    """Zero in place of NaN and infinities."""
    return np.where(np.isfinite(values), values, 0.0)


def _near_zero(values: np.ndarray) -> float | None:
    """The power of ten below the usual change if some are far larger than it, else None."""
    sizes = np.abs(values[np.isfinite(values) & (values != 0)])
    if not len(sizes) or sizes.max() < FAR * np.median(sizes):
        return None
    return float(10.0 ** math.floor(math.log10(np.median(sizes))))


def _map_with_bar(ax: "Axes", title: str, values: np.ndarray, norm: "Normalize", colours: str, label: str) -> None:
    image = _map(ax, values, norm, colours)
    ax.set_title(title)
    bar = ax.figure.colorbar(image, ax=ax, orientation="horizontal", label=label, aspect=14)
    if norm.vmin:
        _name_ratios(bar.ax.xaxis, norm)
    else:
        bar.set_ticks([0, 0.5, 1], labels=["0", "0.5", "1"])


def _map(ax: "Axes", values: np.ndarray, norm: "Normalize", colours: str) -> "AxesImage":
    """Depths down, entries across, both from 1 on."""
    from matplotlib import colormaps

    L, S = values.shape
    colour_map = colormaps[colours].with_extremes(bad=UNKNOWN)
    corners = (0.5, S + 0.5, L + 0.5, 0.5)
    image = ax.imshow(np.ma.masked_invalid(values), cmap=colour_map, norm=norm, aspect="auto", extent=corners)
    ax.set(xticks=_ticks(S), yticks=_ticks(L))
    ax.grid(False)
    return image


def _name_ratios(axis: "Axis", norm: "Normalize") -> None:
    """Write 1/4, 1 and 4 at the scale of `_around_one`."""
    largest = round(math.log2(norm.vmax or 1))
    step = max(1, math.ceil(largest / 2))
    powers = range(-(largest // step) * step, largest + 1, step)
    axis.set_ticks([2.0**k for k in powers], labels=[f"{2**k}" if k >= 0 else f"1/{2**-k}" for k in powers])
    axis.set_minor_locator(_no_ticks())


def _styles(curves: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """How to draw the curve of each label, the same in all panels."""
    labels = dict.fromkeys(label for panel in curves for label in panel)
    return {label: _curve_style(i) for i, label in enumerate(labels)}


def _curve_style(i: int) -> dict[str, Any]:
    """Of the i-th curve; markers are hollow once all styles are used up."""
    colour, line, marker = CURVES[i % len(CURVES)]
    filled = i // len(CURVES) % 2 == 0
    return {
        "color": colour,
        "linestyle": line,
        "marker": marker,
        "markerfacecolor": colour if filled else "white",
        "markeredgecolor": "white" if filled else colour,
    }


def _curves(
    ax: "Axes", curves: Mapping[str, np.ndarray], styles: Mapping[str, Any], y_label: str, x_label: str = "depth"
) -> None:
    """A value for each depth, from 1 on."""
    for label, values in curves.items():
        every = max(1, math.ceil(len(values) / MARKERS))
        ax.plot(np.arange(1, len(values) + 1), values, markevery=every, **styles[label])
    ax.set_ylabel(y_label)
    _depth_axis(ax, max(map(len, curves.values()), default=1), x_label)


def _depth_axis(ax: "Axes", depths: int, label: str) -> None:
    ax.set_xticks(_ticks(depths))
    ax.set_xlabel(label)


def _ticks(count: int) -> list[int]:
    """1 and the multiples of a power of two, up to `count`."""
    step = 2 ** max(0, math.ceil(math.log2(max(count, 1) / TICKS)))
    return sorted({1, *range(step, count + 1, step)})


def _spread(ax: "Axes", curves: Mapping[str, np.ndarray]) -> None:
    """A logarithmic axis if positive values are more than a factor of ten apart."""
    from matplotlib.ticker import LogLocator

    positive = np.concatenate([np.ravel(values) for values in curves.values()] or [np.ones(1)])
    positive = positive[np.isfinite(positive) & (positive > 0)]
    if len(positive) and positive.max() > 10 * positive.min():
        ax.set_yscale("log", nonpositive="mask")
        subs = (1.0,) if positive.max() > 100 * positive.min() else (1.0, 2.0, 5.0)
        ax.yaxis.set(major_locator=LogLocator(subs=subs), minor_locator=_no_ticks(), major_formatter=_plain)
        ax.autoscale_view()  # margins as wide on the new scale


def _widen(ax: "Axes", changes: np.ndarray) -> None:
    """An axis that is linear only near zero if some changes are far larger than most."""
    near = _near_zero(changes)
    if near:
        ax.set_yscale("symlog", linthresh=near)
        ax.yaxis.set(minor_locator=_no_ticks(), major_formatter=_plain)
        ax.autoscale_view()  # margins as wide on the new scale


def _plain(value: float, position: object = None) -> str:
    """A number in full-size figures: exponents of 10 would be too small to read."""
    return f"{value:g}".replace("-", "−")


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _percent(ax: "Axes") -> None:
    from matplotlib.ticker import PercentFormatter

    ax.yaxis.set_major_formatter(PercentFormatter(1))


def _bars(ax: "Axes", values: Mapping[str, float], styles: Mapping[str, Any]) -> None:
    """A bar across for each label, the first on top, with its value in words."""
    rows, widths = range(len(values)), _finite(np.array([*values.values()]))
    bars = ax.barh(rows, widths, 0.6, color=[styles[label]["color"] for label in values])
    ax.bar_label(bars, [_plain(float(f"{value:.3g}")) for value in values.values()], padding=3, fontsize=8)
    ax.set_yticks(rows, [_shortened(_drawable(label), TOKEN) for label in values], parse_math=False)
    ax.axvline(0, **REFERENCE)
    ax.invert_yaxis()
    ax.margins(x=0.35)


def _legend(figure: "Figure", styles: Mapping[str, Any], *more: Any) -> None:
    """Above the panels, in as many lines as it takes, for which the figure grows; none if there is only one entry."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **of, label=_shortened(_drawable(label), LABEL)) for label, of in styles.items()]
    handles += more
    if len(handles) < 2:
        return
    labels = [str(handle.get_label()) for handle in handles]
    columns = _columns([LEGEND_WIDTH + LETTER_WIDTH * len(label) for label in labels], figure.get_figwidth())
    legend = figure.legend(handles, labels, loc="outside upper center", ncols=columns, handlelength=3.5)
    for text in legend.get_texts():
        text.set_parse_math(False)
    figure.set_figheight(figure.get_figheight() + LINE_HEIGHT * math.ceil(len(handles) / columns))


def _columns(widths: Sequence[float], page: float) -> int:
    """The most columns that fit on a page, where entries go down columns that are as wide as their widest."""
    split = {columns: np.array_split(widths, columns) for columns in range(len(widths), 0, -1)}
    return next((n for n, columns in split.items() if sum(column.max() for column in columns) <= page), 1)


def _number_depths(ax: "Axes", points: np.ndarray, styles: Sequence[Mapping[str, Any]]) -> None:
    """Write depths beside some points between the ends of paths, where nothing else is near."""
    from matplotlib.patheffects import withStroke

    taken = [*_within(ax, points[:, [0, -1]].reshape(-1, 2))]
    for path, of in zip(points, styles, strict=True):
        for depth in _ticks(len(path) - 2)[1:]:
            at = _within(ax, path[depth])
            if np.isfinite(at).all() and not any(np.abs((at - other) / (0.045, 0.05)).max() <= 1 for other in taken):
                taken.append(at)
                halo = [withStroke(linewidth=2, foreground="white")]
                beside: Any = {"xytext": (4, 3), "textcoords": "offset points", "path_effects": halo}
                ax.annotate(f"{depth}", path[depth], color=of["color"], fontsize=8, **beside)


def _name_ends(ax: "Axes", ends: np.ndarray, texts: Sequence[str], styles: Sequence[Mapping[str, Any]]) -> None:
    """Name the ends of paths in a column beside the panel, from top to bottom as the ends are, with thin lines."""
    if not len(ends):
        return
    height = _within(ax, ends)[:, 1]
    order = np.argsort(height, kind="stable")
    gap, rank = 1 / max(len(ends), 20), np.arange(len(ends))
    apart = np.maximum.accumulate(_finite(height[order]) - gap * rank) + gap * rank
    for i, y in zip(order, np.minimum(apart, 1 - gap * (len(ends) - 1 - rank)), strict=True):
        known = bool(np.isfinite(ends[i]).all())
        line = {"arrowstyle": "-", "color": styles[i]["color"], "linewidth": 0.5, "alpha": 0.7, "shrinkB": 4}
        ax.annotate(
            _shortened(texts[i], TOKEN),
            ends[i] if known else (1, y),
            xycoords="data" if known else "axes fraction",
            xytext=(1.04, y),
            textcoords="axes fraction",
            arrowprops=line if known else None,
            color=styles[i]["color"],
            va="center",
            parse_math=False,
            annotation_clip=False,
        )


def _within(ax: "Axes", points: np.ndarray) -> np.ndarray:
    """Points [..., 2] as shares of the panel's width and height."""
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    return np.asarray((points - (left, bottom)) / (right - left, top - bottom))


def _drawable(text: str) -> str:
    """The text with escapes such as \\u6570 for what the font has no glyph for."""
    glyphs = _glyphs()
    return "".join(
        letter if letter.isprintable() and ord(letter) in glyphs else letter.encode("unicode_escape").decode()
        for letter in text
    )


@functools.cache
def _glyphs() -> frozenset[int]:
    """The characters that the font of figures can draw."""
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont(STYLE["font.family"])).get_charmap())


def _shortened(label: str, longest: int) -> str:
    """With its middle left out if it is too long: names differ in their beginnings and ends."""
    half = (longest - 1) // 2
    return label if len(label) <= longest else f"{label[:half]}…{label[-half:]}"
