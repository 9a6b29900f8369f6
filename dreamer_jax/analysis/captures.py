"""What is known of a model after a look at many sequences: named arrays, and what they are of.

Letters: L depths that ran, E experts of a router, A selected ones, N heads, S entries that a dimension attends to (for
DA: depths), K thresholds, C checkpoints. `{dimension}` is a name of the mixture: sa, da, ea, latent, ... A name that
the model has nothing for (DA's maps of a model without DA) is absent. Means are over non-padding tokens, means of
losses and readouts over the positions that the loss counts. Losses, entropies and divergences are in nats.
"""

import csv
import io
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ConfigDict, TypeAdapter

from dreamer_jax.errors import DreamerError
from dreamer_jax.files import write_whole

AXES: Mapping[str, tuple[str, ...]] = {
    # How much was seen.
    "tokens": (),  # non-padding tokens
    "positions": (),  # of them, those that the loss counts
    # Routing. `experts/{dimension}/...`
    "experts/*/counts": ("depth", "expert"),  # selections of each expert, int64
    "experts/*/entropy": ("depth",),  # mean entropy, nats, of a token's sigmoid scores as shares of their sum
    "experts/*/margin": ("depth",),  # mean biased logit of the last selected expert minus that of the best one left out
    "experts/*/together": ("expert", "expert with it"),  # tokens (over depths) that selected both, int64; A > 1
    "experts/*/together_per_depth": ("depth", "expert", "expert with it"),  # in its place where layers are distinct
    # Maps of attention. `attention/{dimension}/...`
    "attention/*/weight": ("depth", "head", "entry"),  # mean weight; of DA, entry = source depth
    "attention/*/weighted_norm": ("depth", "head", "entry"),  # mean of weight times the norm of the value
    "attention/*/visible": ("depth", "entry"),  # whether a depth may attend to an entry, bool
    # The residual stream. Root mean squares are over tokens and width.
    "residual/rms": ("depth",),  # of y_l, the stream after depth l
    "residual/step": ("depth",),  # of y_l - x_l, all that depth l adds
    "residual/update/*": ("depth",),  # of what a dimension adds
    "residual/cosine": ("step",),  # mean cosine of the steps of depths l and l + 1: L - 1 entries
    # The logit lens: what the LM head would say after depth l (x_{l+1}; of LA, its final norm first).
    "lens/loss": ("depth",),
    "lens/entropy": ("depth",),
    "lens/divergence": ("depth",),  # mean KL(last depth's prediction || this depth's)
    "lens/agreement": ("depth",),  # share of positions whose likeliest token is the last depth's
    "lens/accuracy": ("depth",),  # share of positions whose likeliest token is the next one
    "lens/change": ("depth", "change"),  # shares whose loss improves, stays (< 1e-3) or worsens from here to the last
    "lens/settled": ("depth",),  # share of positions whose likeliest token is final from this depth on and not before
    # Exits: each position is read out at the first depth that meets the criterion, at the last if none does.
    # `exit/{criterion}/...`: latent, entropy, divergence (all: below the threshold), stable (as many depths the same).
    "exit/*/threshold": ("threshold",),
    "exit/*/depth": ("threshold",),  # mean number of depths that ran
    "exit/*/loss": ("threshold",),
    # Removals: the loss on some sequences with a part left out.
    "removal/loss": (),  # with nothing left out, of the same sequences
    "removal/dimension/*": (),  # without this dimension
    "removal/update/*": ("depth",),  # without this dimension at one depth
    "removal/depth": ("depth",),  # without one depth: no updates, later depths do not attend to it; DR's norm stays
    "removal/entry/*": ("depth", "entry"),  # one depth does not attend to one entry; NaN where it could not
    # Saturation: share of a token's experts at the last checkpoint that an earlier one selected as well.
    "saturation/step": ("checkpoint",),
    "saturation/share/*": ("checkpoint", "depth"),
    # Trajectories of chosen tokens over depth, in the plane that the residual streams of all tokens vary most in.
    "trajectory/points": ("token", "depth", "component"),  # x_0 .. x_L: L + 1 entries, 2 components
    "trajectory/explained": ("component",),  # shares of the variance
    "trajectory/token": ("token",),  # the texts of the tokens
}
"""Every array that a capture may have, by its name (* is one word), and its axes."""
CHANGES = ("improves", "stays", "worsens")
"""The entries of "lens/change"."""
ARRAYS, ABOUT, TABLES = "captures.npz", "captures.json", "csv"


class AnalysisError(DreamerError, ValueError):
    """An analysis that cannot be made; the message names the cause and the fix."""


@dataclass(frozen=True)
class About:
    """What captures are of."""

    run: str
    variant: str
    """LA, DR, DR+DA, ..."""
    step: int
    depth: int
    """How many depths ran."""
    trained_depth: int
    depth_recurrent: bool
    active: dict[str, int]
    """A, the experts that a token selects, by dimension."""
    parameters: int
    sequences: int
    """Rows that were read."""
    context: int
    """Tokens of a row."""
    source: str
    """Where they are from."""
    removal_sequences: int
    """Rows behind the removals."""
    seed: int
    config: dict[str, Any]
    """The model section of the run's config."""
    entries: dict[str, str] = field(default_factory=dict)
    """By dimension, what the entries of its map of attention are: "source depth", "latent", ..."""

    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Captures:
    """Arrays by name, and what they are of."""

    arrays: dict[str, np.ndarray]
    about: About

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            raise AnalysisError(f"the captures of '{self.about.run}' lack '{name}': analyze the checkpoint again")
        return self.arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def names(self, pattern: str) -> list[str]:
        """The words that stand for * in the names that match: `names("experts/*/counts")` are the routers."""
        before, after = pattern.split("*")
        return [name[len(before) : len(name) - len(after)] for name in self.arrays if _pattern(name) == pattern]

    def save(self, folder: Path) -> None:
        """Write captures.npz, captures.json and csv/NAME.csv for each array, with a dot for each / of its name."""
        (folder / TABLES).mkdir(parents=True, exist_ok=True)
        about = json.dumps(asdict(self.about), indent=2, allow_nan=False) + "\n"
        packed = io.BytesIO()
        stored: dict[str, Any] = {**self.arrays, ABOUT: np.array(about)}
        np.savez_compressed(packed, **stored)
        write_whole(folder / ARRAYS, packed.getvalue())
        write_whole(folder / ABOUT, about)
        tables = {f"{name.replace('/', '.')}.csv": name for name in self.arrays}
        for file, name in tables.items():
            write_whole(folder / TABLES / file, table(self[name], axes_of(name)))
        for path in (folder / TABLES).glob("*.csv"):  # of an earlier analysis that had more
            if path.name not in tables and _is_name(path.stem.replace(".", "/")):
                path.unlink()


def load(folder: Path) -> Captures:
    """The captures that `save` wrote.

    Raises:
        AnalysisError: there are none, or they cannot be read.
    """
    if not (folder / ARRAYS).is_file():
        raise AnalysisError(f"'{folder}' has no captures ({ARRAYS}): analyze a checkpoint first")
    try:
        with np.load(io.BytesIO((folder / ARRAYS).read_bytes()), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        about = TypeAdapter(About).validate_json(str(arrays.pop(ABOUT)))
        for name in arrays:
            axes_of(name)
    except (ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        said = str(error).partition("\n")[0]
        raise AnalysisError(f"the captures in '{folder}' cannot be read ({said}): analyze again") from error
    return Captures(arrays, about)


def axes_of(name: str) -> tuple[str, ...]:
    """What the axes of an array are.

    Raises:
        AnalysisError: no array has this name.
    """
    return AXES[_pattern(name)]


def _is_name(name: str) -> bool:
    try:
        return bool(_pattern(name))
    except AnalysisError:
        return False


def _pattern(name: str) -> str:
    words = name.split("/")
    for pattern in AXES:
        parts = pattern.split("/")
        if len(parts) == len(words) and all(p in ("*", w) for p, w in zip(parts, words, strict=True)):
            return pattern
    raise AnalysisError(f"captures have no array '{name}'")


def table(array: np.ndarray, axes: Sequence[str]) -> str:
    """The array as lines of CSV: a column for each axis, with the position along it from 0 on, and the value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*axes, "value"])
    writer.writerows(
        [*index, value] for index, value in zip(np.ndindex(array.shape), array.ravel().tolist(), strict=True)
    )
    return text.getvalue()
