"""Small maps along a training: where depths look, and which experts they use, of the model as it is.

They are drawn pixel by pixel: the figures of dreamer_jax.analysis.figures, with their layout, take several steps' time
of a small model. Colours mean the same at every step.
"""

import functools
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from dreamer_jax.analysis.measure import Sums, attention_sums
from dreamer_jax.data.batch import Batch
from dreamer_jax.figures import SEQUENTIAL, UNKNOWN
from dreamer_jax.inference.decoder import ROWS, Decoder, make_decoder, on_devices
from dreamer_jax.kernels.compute import Compute
from dreamer_jax.model.dreamer import Glimpse
from dreamer_jax.sharding import AXES
from dreamer_jax.training.loop import Snapshot

SIDE, TEXT, MARGIN = 208, 12, 44
"""Pixels of the side of a map that has few cells, of letters, and around a map."""
COLOUR_BAR = 12
"""Pixels of its height."""


class AttentionMap(NamedTuple):
    """Means over non-padding tokens of what each depth sees in the entries that a dimension attends to."""

    weight: Float[np.ndarray, "L N S"]
    weighted_norm: Float[np.ndarray, "L N S"]
    """Of weight times the norm of the value."""


class Scale(NamedTuple):
    """What colours mean: evenly from 0 to `most`, and one colour for all beyond."""

    label: str
    most: float
    ticks: tuple[str, ...]
    """Written at even distances from 0 on."""


OF_LARGEST = Scale("share of the depth's largest", 1.0, ("0", "0.5", "1"))
OF_EVEN = Scale("times an even share of the depth's tokens", 4.0, ("0", "1", "2", "3", "≥ 4"))


class Panel(NamedTuple):
    """A map, with depths down."""

    title: str
    across: str
    """What the columns are."""
    values: Float[np.ndarray, "L columns"]
    """NaN where there is nothing to see."""


def live_figures(snapshot: Snapshot, rows: Batch | None, counts: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    """PNG images: figures/{dimension} for each map of attention, and figures/load; none in processes other than 0.

    Args:
        snapshot: the model.
        rows: packed rows on the devices, one on each; without them no map of attention is drawn.
        counts: selections [L, E] of each router's experts.
    """
    maps = {} if rows is None else attention_maps(snapshot, rows)  # all processes compute this together
    if jax.process_index():
        return {}
    images = {}
    for name, seen in maps.items():
        images[f"figures/{name}"] = picture(attention_panels(snapshot, name, seen), OF_LARGEST)
    if counts:
        loads = [Panel(f"router of {name}", "expert", load(of)) for name, of in counts.items()]
        images["figures/load"] = picture(loads, OF_EVEN)
    return images


def attention_maps(snapshot: Snapshot, rows: Batch) -> dict[str, AttentionMap]:
    """The maps of the dimensions that have one, on the host; compiled at the first call of a run."""
    config = snapshot.config
    if not any(section.entries for section in config.model.dimensions.values()):
        return {}
    compute = replace(Compute.of(config, snapshot.mesh), remat="none")
    decoder = make_decoder(snapshot.model, compute, mesh=snapshot.mesh)
    tokens, sums = jax.device_get(_sums(decoder, rows.tokens, rows.positions, rows.segment_ids))
    means = {name: total / max(int(tokens), 1) for name, total in sums.items()}
    names = [name for name in config.model.dimensions if f"attention/{name}/weight" in means]
    return {name: AttentionMap(*(means[f"attention/{name}/{of}"] for of in AttentionMap._fields)) for name in names}


@jax.jit
def _sums(decoder: Decoder, tokens: Any, positions: Any, segment_ids: Any) -> Any:
    def local(decoder: Decoder, tokens: Array, positions: Array, segment_ids: Array) -> Any:
        passed = decoder.model.forward(tokens, positions, segment_ids, decoder.compute, look=_look)
        sums = jnp.sum(segment_ids > 0), passed.seen
        return sums if decoder.mesh is None else lax.psum(sums, AXES)

    return on_devices(local, decoder, given=(ROWS,) * 3, result=P())(tokens, positions, segment_ids)


def _look(at: Glimpse) -> Sums:
    """Of one depth, the sums of all maps."""
    sums: Sums = {}
    for name, update in at.updates.items():
        sums |= attention_sums(name, update, at.counted)
    return sums


def attention_panels(snapshot: Snapshot, name: str, seen: AttentionMap) -> list[Panel]:
    """The paper's Figure 4, in the mean over heads: weights, and weights times norms of values."""
    model = snapshot.config.model
    section = model.dimensions[name]
    visible = np.array(section.visible(model, model.depth), bool)
    titles = f"{name}: weight", f"{name}: weight × norm of value"
    shown = [np.where(visible, of.mean(axis=1), np.nan) for of in seen]
    return [Panel(title, section.entries, _of_largest(values)) for title, values in zip(titles, shown, strict=True)]


def load(counts: Int[np.ndarray, "L E"]) -> Float[np.ndarray, "L E"]:
    """How many times an even share of the depth's selections each expert has; NaN at depths without any."""
    mean = counts.mean(axis=1, keepdims=True)
    return np.divide(counts, mean, out=np.full(counts.shape, np.nan), where=mean > 0)


def _of_largest(values: Float[np.ndarray, "L S"]) -> Float[np.ndarray, "L S"]:
    largest = np.max(np.nan_to_num(values), axis=1, keepdims=True)
    return np.divide(values, largest, out=np.full(values.shape, np.nan), where=largest > 0)


# Pixels.


def picture(panels: Sequence[Panel], scale: Scale) -> bytes:
    """Maps side by side over one colour bar, as a PNG file."""
    from PIL import Image, ImageDraw

    maps = [_pixels(_cells(panel.values), scale.most) for panel in panels]
    widths = [max(pixels.shape[1], _length(panel.title)) for pixels, panel in zip(maps, panels, strict=True)]
    lefts = list(accumulate([MARGIN, *(width + MARGIN for width in widths)]))
    bottom = MARGIN + max(len(pixels) for pixels in maps)
    drawn = Image.new("RGB", (max(lefts[-1], SIDE + 2 * MARGIN), bottom + 3 * MARGIN), "white")
    pen = ImageDraw.Draw(drawn)
    pen.font = _font()
    for panel, pixels, left in zip(panels, maps, lefts, strict=False):
        drawn.paste(Image.fromarray(pixels), (left, MARGIN))
        _name_axes(pen, panel, left, pixels.shape[:2])
    _colour_bar(drawn, pen, scale, bottom + MARGIN + TEXT)
    file = io.BytesIO()
    drawn.save(file, "png")
    return file.getvalue()


def _cells(values: Float[np.ndarray, "L columns"]) -> Float[np.ndarray, "height width"]:
    """Each value as a rectangle of pixels, one at least."""
    rows, columns = (max(1, SIDE // size) for size in values.shape)
    return values.repeat(rows, axis=0).repeat(columns, axis=1)


def _pixels(values: Float[np.ndarray, "height width"], most: float) -> np.ndarray:
    """In colours, [height, width, 3] of uint8."""
    from matplotlib import colormaps

    colours = colormaps[SEQUENTIAL].with_extremes(bad=UNKNOWN)
    found: np.ndarray = colours(np.ma.masked_invalid(values / most), bytes=True)
    return np.ascontiguousarray(found[..., :3])


def _name_axes(pen: Any, panel: Panel, left: int, size: tuple[int, ...]) -> None:
    """The title, what the columns are, and numbers from 1 on where they have room."""
    (rows, columns), (height, width) = panel.values.shape, size
    pen.text((left, MARGIN - TEXT // 2), panel.title, "black", anchor="ls")
    pen.text((left + width / 2, MARGIN + height + 2 * TEXT), panel.across, "black", anchor="mt")
    for l in _numbered(rows, height, 3 * TEXT // 2):
        pen.text((left - TEXT // 2, MARGIN + (l + 0.5) * height / rows), str(l + 1), "black", anchor="rm")
    for i in _numbered(columns, width, 3 * TEXT):
        pen.text((left + (i + 0.5) * width / columns, MARGIN + height + TEXT // 2), str(i + 1), "black", anchor="mt")


def _numbered(cells: int, pixels: int, room: int) -> range:
    """The cells whose numbers have so many pixels each."""
    return range(0, cells, max(1, -(-room * cells // pixels)))


def _colour_bar(drawn: Any, pen: Any, scale: Scale, top: int) -> None:
    from PIL import Image

    ramp = np.tile(np.linspace(0.0, 1.0, SIDE), (COLOUR_BAR, 1))
    drawn.paste(Image.fromarray(_pixels(ramp, 1.0)), (MARGIN, top))
    for i, tick in enumerate(scale.ticks):
        x = MARGIN + i / (len(scale.ticks) - 1) * SIDE
        pen.text((x, top + COLOUR_BAR + TEXT // 2), tick, "black", anchor="mt")
    pen.text((MARGIN, top + COLOUR_BAR + 2 * TEXT), scale.label, "black", anchor="lt")


def _length(text: str) -> int:
    return int(np.ceil(_font().getlength(text)))


@functools.cache
def _font() -> Any:
    """The one of the other figures."""
    from matplotlib import get_data_path
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), TEXT)
