"""How figures look, and how they are written: one style for all that draws, on paper and for any colour vision."""

import io
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreamer_jax.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same everywhere
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "lines.markeredgewidth": 0.5,
    "legend.frameon": False,
    "savefig.dpi": 200,
    "svg.hashsalt": "dreamer-jax",
}
"""For print: a page's width, no text below 8 points."""
CURVES: tuple[tuple[str, Any, str], ...] = (
    ("#4d4d4d", "-", "o"),
    ("#d55e00", "--", "s"),
    ("#0072b2", "-.", "^"),
    ("#009e73", ":", "D"),
    ("#cc79a7", (0, (5, 1, 1, 1, 1, 1)), "v"),
    ("#e69f00", (0, (1, 1)), "P"),
)
"""Colour (after Okabe and Ito: told apart with any colour vision), line style, marker; of the first run, and so on."""
SEQUENTIAL, DIVERGING, UNKNOWN = "viridis", "PuOr", "#e6e6e6"
"""Colour maps of amounts and of differences, rising or parting evenly in brightness; and what is not defined."""
WIDTH = 7.0
"""Inches of a page."""


def style() -> AbstractContextManager[None]:
    """Within it, matplotlib draws in our style."""
    from matplotlib import rc_context

    return rc_context(STYLE)


def save(figure: "Figure", path: Path) -> tuple[Path, Path]:
    """Write PATH.png and PATH.svg, the same bytes for the same figure; returns the two."""
    png, svg = path.with_name(path.name + ".png"), path.with_name(path.name + ".svg")
    write_whole(png, image(figure, "png"))
    write_whole(svg, image(figure, "svg"))
    return png, svg


def image(figure: "Figure", kind: str, dpi: float | None = None) -> bytes:
    """The figure as the bytes of a PNG or an SVG file; `dpi` is that of STYLE if None."""
    drawn = io.BytesIO()
    metadata = {"Software": None} if kind == "png" else {"Date": None}
    with style():
        figure.savefig(drawn, format=kind, metadata=metadata, dpi=dpi or STYLE["savefig.dpi"])
    return drawn.getvalue()
