"""How a model uses its experts: Section 4.2 of the paper in numbers.

`counts` [L, E] are the selections of each expert at each depth ("experts/*/counts" of the captures). In DR all depths
share E experts; in LA each layer has E of its own, so that the model has L x E of them.
"""

from fractions import Fraction
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from dreamer_jax.analysis.captures import AnalysisError, Captures
from dreamer_jax.training.metrics import gini

SHARE = 0.9
"""Of an expert's selections or a depth's routings: what is left out is the tail of rare ones."""
COUNTS = "experts/ea/counts"
"""The router that the paper's numbers are about."""
CLAIMS = (
    (
        "experts that prefer one or two depths of the upper half",
        "about 22 %",
        "share of the selected experts; an expert's top depths are the fewest with 90 % of its selections",
    ),
    (
        "experts that prefer one or two depths of the lower half",
        "almost none",
        "share of the selected experts, by their top depths",
    ),
    (
        "the depth with the most experts of its own",
        "the last",
        "experts with one top depth",
    ),
    (
        "experts that serve more than 20 % of the depths",
        "about 50 %",
        "share of the selected experts, by the number of their top depths",
    ),
    (
        "low depths use more experts than high ones",
        "up to 5×",
        "fewest experts for 90 % of a depth's routings: most in the lower half over least in the upper half",
    ),
    (
        "global Gini coefficient",
        "0.075",
        "of the experts' selections, added up over the depths",
    ),
    (
        "DR uses more experts per depth than LA",
        "2× to 11×",
        "fewest experts for 90 % of a depth's routings, over those {baseline}: least and most over the depths",
    ),
)
"""What Section 4.2 says of EA in numbers: what, the paper's number, how ours is defined."""
NONE = "–"
"""No answer."""


class Row(NamedTuple):
    """One of the paper's numbers beside ours."""

    what: str
    paper: str
    ours: str
    note: str
    """How ours is defined, or why there is none."""


# Which depths an expert serves.


def depth_given_expert(counts: Int[np.ndarray, "L E"]) -> Float[np.ndarray, "L E"]:
    """P(depth | expert) of Figure 5: columns sum to 1, those of unused experts are 0."""
    return _shares(counts, axis=0)


def expert_given_depth(counts: Int[np.ndarray, "L E"]) -> Float[np.ndarray, "L E"]:
    """P(expert | depth) of Figure 7: rows sum to 1, those of depths without a selection are 0."""
    return _shares(counts, axis=1)


def top_depths(counts: Int[np.ndarray, "L E"], share: float = SHARE) -> Int[np.ndarray, "E"]:
    """Size of the smallest set of depths that has at least this share of an expert's selections; 0 if it is unused.

    Section 4.2: "the number of depths in the top 90th percentile" of P(depth | expert), a measure of how general an
    expert is. `share` is read to a thousandth.
    """
    return _fewest(counts.T, share)


def display_order(counts: Int[np.ndarray, "L E"], seed: int = 0) -> Int[np.ndarray, "used"]:
    """The experts from special to general, as in Figures 5 and 7; unused ones are left out.

    They are grouped by `top_depths`, and sorted within a group by a depth that is sampled from P(depth | expert).
    """
    selections = counts.sum(axis=0, dtype=np.int64)
    drawn = np.random.default_rng(seed).integers(np.maximum(selections, 1))
    sampled = np.sum(np.cumsum(counts, axis=0, dtype=np.int64) <= drawn, axis=0)
    order = np.lexsort((sampled, top_depths(counts)))
    return order[selections[order] > 0]


# How many experts a depth uses.


def lorenz(counts: Int[np.ndarray, "E"]) -> tuple[Float[np.ndarray, "points"], Int[np.ndarray, "points"]]:
    """The share of routings that the k busiest experts carry, and k, for k = 0 .. E: a curve of Figure 6.

    The textbook's curve starts with the least busy; this one starts with the busiest. The figure is read upwards, on a
    log axis of distinct experts, as how many experts a depth needs for its routings. With the busiest first that is
    the fewest that carry the share, and a factor between two curves is the factor between the experts used. With the
    least busy first a few stray selections would put most experts into the first percent. Even use is a straight line
    in both orders (curved on the log axis), and the Gini coefficient is the same.

    Returns:
        Shares from 0 to 1 (all 0 if nothing was counted) and numbers of experts from 0 to E.
    """
    busiest_first = -np.sort(-counts.astype(np.int64))
    carried = np.concatenate([[0], np.cumsum(busiest_first)])
    return carried / max(carried[-1], 1), np.arange(len(carried))


def experts_for(counts: Int[np.ndarray, "*stack E"], share: float = SHARE) -> Int[np.ndarray, "*stack"]:
    """Fewest distinct experts that carry at least this share of the routings; 0 if there are none.

    `share` is read to a thousandth.
    """
    return _fewest(counts, share)


def diversity(
    counts: Int[np.ndarray, "L E"], baseline: Int[np.ndarray, "layers experts"] | None = None
) -> Float[np.ndarray, "L"]:
    """How many times more distinct experts a depth uses than a layer of the baseline (Section 4.2, Figure 6).

    Both are the fewest experts for 90 % of the routings; the baseline's is the mean over the layers that have any. It
    is a ratio of numbers, not of shares of all experts: LA has few of them a layer, DR hundreds over all depths.
    Without a baseline it is an LA that has as many experts in all and uses its E / L a layer evenly: 0.9 E / L.

    Raises:
        AnalysisError: the baseline selected no expert.
    """
    return experts_for(counts) / _baseline_experts(counts, baseline)


# The paper's numbers beside ours.


def paper_numbers(captures: Captures, baseline: Captures | None) -> list[Row]:
    """What Section 4.2 says of EA in numbers, and what these captures say; where there is no answer, the note says why.

    Args:
        captures: of a DR model.
        baseline: of the LA model that it is compared with; without it (or without its EA), as in `diversity`.
    """
    missing = _why_no_numbers(captures)
    if missing:
        return [Row(what, paper, NONE, missing) for what, paper, _ in CLAIMS]
    known = baseline is not None and COUNTS in baseline
    others = baseline[COUNTS] if baseline and known else None
    whose = f"of the layers of '{baseline.about.run}' (mean)" if baseline and known else "of an even LA (0.9 E / L)"
    answers = zip(CLAIMS, _answers(captures[COUNTS], others), strict=True)
    return [Row(what, paper, ours, note.format(baseline=whose)) for (what, paper, note), ours in answers]


def _why_no_numbers(captures: Captures) -> str:
    if COUNTS not in captures:
        return "the model has no expert attention"
    if not captures.about.depth_recurrent:
        return "each layer has its own experts"
    if len(captures[COUNTS]) == 1:
        return "the model ran one depth"
    return "" if captures[COUNTS].any(axis=1).all() else "a depth has no selections"


def _answers(counts: Int[np.ndarray, "L E"], baseline: Int[np.ndarray, "layers experts"] | None) -> list[str]:
    """Ours, in the order of CLAIMS."""
    L = len(counts)
    upper = 2 * np.arange(L) >= L
    general = 5 * top_depths(counts)[counts.any(axis=0)] > L
    per_depth = experts_for(counts)
    ratio = diversity(counts, baseline)
    return [
        _percent(_specialised(counts, upper)),
        _percent(_specialised(counts, ~upper)),
        _owner_of_most(counts),
        _percent(np.mean(general)),
        f"{np.max(per_depth[~upper]) / np.min(per_depth[upper]):.1f}×",
        f"{gini(counts.sum(axis=0)):.3f}",
        f"{ratio.min():.1f}× to {ratio.max():.1f}×",
    ]


def _specialised(counts: Int[np.ndarray, "L E"], depths: Bool[np.ndarray, "L"]) -> np.floating:
    """Share of the selected experts whose top depths are one or two, all of them among `depths`."""
    top = top_depths(counts)
    busiest_first = np.argsort(-counts, axis=0, kind="stable")
    beyond = np.arange(len(counts))[:, None] >= top
    special = np.all(depths[busiest_first] | beyond, axis=0) & (top <= 2)
    return np.mean(special[top > 0])


def _owner_of_most(counts: Int[np.ndarray, "L E"]) -> str:
    """The depth with the most experts that have a single top depth."""
    single = top_depths(counts) == 1
    owned = np.bincount(np.argmax(counts[:, single], axis=0), minlength=len(counts))
    return f"depth {np.argmax(owned) + 1} of {len(counts)} ({np.max(owned)} experts)" if single.any() else NONE


def _percent(share: np.floating) -> str:
    return f"{100 * share:.0f} %"


# Sums.


def _fewest(counts: Int[np.ndarray, "*stack entries"], share: float) -> Int[np.ndarray, "*stack"]:
    """How many of the largest entries reach the share of the sum; whole numbers, because the sum may equal it."""
    exact = Fraction(share).limit_denominator(1000)
    reached = np.cumsum(-np.sort(-counts.astype(np.int64), axis=-1), axis=-1)
    total = reached[..., -1:]
    short = reached * exact.denominator < total * exact.numerator
    return np.where(total[..., 0] > 0, np.sum(short, axis=-1) + 1, 0)


def _shares(counts: Int[np.ndarray, "*stack"], axis: int) -> Float[np.ndarray, "*stack"]:
    """Of the sum along the axis; 0 where that is 0."""
    return counts / np.maximum(counts.sum(axis=axis, keepdims=True, dtype=np.int64), 1)


def _baseline_experts(
    counts: Int[np.ndarray, "L E"], baseline: Int[np.ndarray, "layers experts"] | None
) -> float | np.floating:
    """Distinct experts for 90 % of a layer's routings."""
    if baseline is None:
        return SHARE * counts.shape[1] / counts.shape[0]
    per_layer = experts_for(baseline)
    if not per_layer.any():
        raise AnalysisError("the baseline selected no expert: analyze it on at least one sequence with tokens")
    return np.mean(per_layer[per_layer > 0])
