"""From captures to plates: which figures a model has, what each is called, and what is to be said below it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dreamer_jax.analysis.captures import Captures
from dreamer_jax.analysis.figures import depths as draw_depths
from dreamer_jax.analysis.figures import experts as draw_experts
from dreamer_jax.analysis.figures.experts import Routings
from dreamer_jax.figures import image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Runs = Mapping[str, Captures]
"""Models by label."""


class Plate(NamedTuple):
    """A figure and what is to be said of it."""

    name: str
    """Of its files."""
    title: str
    text: str
    """What is drawn, how to read it, what it does not show."""
    figure: "Figure"

    def _repr_png_(self) -> bytes:
        """What a notebook shows of it."""
        return image(self.figure, "png", dpi=80)


class Missing(NamedTuple):
    """What there is no figure of."""

    title: str
    why: str


def plates(captures: Captures) -> list[Plate]:
    """All figures of one model; what it has no arrays for is left out, and said by `missing`."""
    groups = (_experts, _routers, _attention, _stream, _lens, _exits, _removals, _saturation, _trajectories)
    return [plate for group in groups for plate in group(captures)]


def compared(captures: Sequence[Captures]) -> list[Plate]:
    """Figures with a curve for each of several models."""
    groups = (_lorenz_of_all, _confidence_of_all, _stream_of_all, _lens_of_all)
    runs = dict(zip(labels(captures), captures, strict=True))
    return [plate for group in groups for plate in group(runs)]


def missing(captures: Captures) -> list[Missing]:
    """What this model has no figure of, and why."""
    expected = (
        ("experts/ea/counts", "Experts (Figures 5 to 7)", "The mixture of this model has no expert attention."),
        ("attention/da/weight", "Depth attention (Figure 4)", _why_no_depth_attention(captures)),
        ("residual/rms", "The residual stream", "It was not captured."),
        ("lens/loss", "The logit lens", "It was not captured."),
        ("exit/*/loss", "Exits", "They were not asked for."),
        ("removal/loss", "Removals", "They were not asked for: they need passes of their own."),
        ("saturation/step", "Saturation of the routers", "One checkpoint was analyzed, and it takes several."),
        ("trajectory/points", "Trajectories of tokens", "No tokens were chosen."),
    )
    found = [Missing(title, why) for name, title, why in expected if not _has(captures, name)]
    if not captures.about.depth_recurrent and _has(captures, "experts/ea/counts"):
        why = "Each layer has its own experts, so that an expert serves one depth."
        found.append(Missing("Depths of an expert, and experts of a depth (Figures 5 and 7)", why))
    if not _few(captures):
        found.append(Missing("Attention experts", _why_no_attention_experts(captures)))
    return found


def labels(captures: Sequence[Captures]) -> list[str]:
    """A name for each model, no two alike: the run's, with as much more as it takes."""
    about = [one.about for one in captures]
    names = [a.run for a in about]
    for more in ([f"step {a.step}" for a in about], [f"depth {a.depth}" for a in about], range(1, len(about) + 1)):
        if len(set(names)) < len(names):
            names = [f"{name}, {addition}" for name, addition in zip(names, more, strict=True)]
    return names


# Of one model.


def _experts(captures: Captures) -> Iterator[Plate]:
    """Routers that select several of many experts."""
    for dimension in _many(captures):
        counts, name = captures[f"experts/{dimension}/counts"], dimension.upper()
        if captures.about.depth_recurrent:
            yield Plate(
                f"figure_5_{dimension}",
                f"Depths of each expert of {name} (Figure 5)",
                "How the selections of each expert are spread over depths, P(depth | expert). Experts are sorted from "
                "those that serve one or two depths to those that serve many, and within a group by a depth drawn "
                "from their own distribution. Experts that were never selected are left out. How "
                "busy an expert is does not show.",
                draw_experts.depths_of_experts(counts, seed=captures.about.seed),
            )
        yield Plate(
            f"figure_6_{dimension}",
            f"How many experts carry the routings of {name} (Figure 6)",
            "Fewest distinct experts that carry a share of a depth's routings, busiest first. Thin curves are single "
            "depths, the thick one all of them: together where they share experts, in the mean where they do not. "
            "Lower curves are depths that rely on few experts. Which experts those are is not shown.",
            draw_experts.lorenz_curves([Routings(captures.about.run, counts, captures.about.depth_recurrent)]),
        )
        if captures.about.depth_recurrent:
            yield Plate(
                f"figure_7_{dimension}",
                f"Experts of each depth of {name} (Figure 7)",
                "How the selections of each depth are spread over experts, P(expert | depth), with the experts in the "
                "order of Figure 5. A bright cell is an expert that a depth selects often. A row says nothing of how "
                "useful its experts are.",
                draw_experts.experts_of_depths(counts, seed=captures.about.seed),
            )
        yield from _coactivation(captures, dimension)


def _coactivation(captures: Captures, dimension: str) -> Iterator[Plate]:
    """Of all depths together where they share their experts; else of the first and the last."""
    counts, active, seed = (
        captures[f"experts/{dimension}/counts"],
        captures.about.active[dimension],
        captures.about.seed,
    )
    title = f"Experts of {dimension.upper()} that are selected together"
    text = (
        "How many times as often as by chance two experts are selected for the same token. Pairs that stand out work "
        "together or avoid each other. The cause is not shown: experts that serve the same depths, or the same words, "
        "meet more often for this alone."
    )
    if (name := f"experts/{dimension}/together") in captures:
        drawn = draw_experts.coactivation(captures[name], counts, int(counts.sum()) // active, seed=seed)
        yield Plate(f"coactivation_{dimension}", title, text, drawn)
    if (name := f"experts/{dimension}/together_per_depth") in captures:
        busy = np.flatnonzero(counts.any(axis=1)).tolist()
        for l in sorted({*busy[:1], *busy[-1:]}):
            tokens = int(counts[l].sum()) // active
            drawn = draw_experts.coactivation(captures[name][l], counts[l : l + 1], tokens, seed=seed)
            yield Plate(f"coactivation_{dimension}_{l + 1}", f"{title} at depth {l + 1}", text, drawn)


def _routers(captures: Captures) -> Iterator[Plate]:
    """Attention experts, and how sure all routers are."""
    if few := _few(captures):
        yield Plate(
            "attention_experts",
            "Attention experts of each depth",
            "Share of a depth's tokens that each linear expert of an attention dimension is selected for. One bright "
            "cell in a row is a depth that has an expert of its own; an even row leaves the choice to the token. The "
            "shared expert, which is always active, is not drawn.",
            draw_experts.usage({dimension: captures[f"experts/{dimension}/counts"] for dimension in few}),
        )
    if routers := captures.names("experts/*/entropy"):
        yield Plate(
            "router_confidence",
            "How sure the routers are",
            "Mean entropy of a token's scores, taken as shares of all experts, and how far the last selected expert is "
            "ahead of the best one left out. Low entropy and a wide margin are clear choices. More experts allow more "
            "entropy, so routers of different sizes do not compare in it. Both are means, and hide how tokens differ.",
            draw_experts.router_confidence(
                {dimension: captures[f"experts/{dimension}/entropy"] for dimension in routers},
                # Where all experts are selected, none is left out.
                {
                    dimension: captures[f"experts/{dimension}/margin"]
                    for dimension in captures.names("experts/*/margin")
                },
            ),
        )


def _attention(captures: Captures) -> Iterator[Plate]:
    for dimension in captures.names("attention/*/weight"):
        name, entries = dimension.upper(), _entries(captures, dimension)
        weight, norm, visible = (
            captures[f"attention/{dimension}/{of}"] for of in ("weight", "weighted_norm", "visible")
        )
        number = " (Figure 4)" if dimension == "da" else ""
        yield Plate(
            f"figure_4_{dimension}" if dimension == "da" else f"attention_{dimension}",
            f"What each depth attends to in {name}{number}",
            f"Mean attention of each depth (down) to each {entries} (across): (a) as shares of the depth's largest "
            "weight, as the paper draws it; (b) against uniform attention; (c) with each weight times the norm of its "
            "value. Entries that are bright in (a) and dark in (c) are looked at and give little. All are means over "
            "tokens and heads, and a weight is not an effect: removals show effects.",
            draw_depths.depth_attention(weight, visible, norm, entries),
        )
        if weight.shape[1] > 1:
            yield Plate(
                f"heads_{dimension}",
                f"What each head attends to in {name}",
                "Mean attention of each head, against uniform attention. Heads that differ divide the work. Their "
                "order has no meaning. A mean does not show that a head may look elsewhere for some tokens.",
                draw_depths.depth_attention_heads(weight, visible, entries),
            )


def _stream(captures: Captures) -> Iterator[Plate]:
    if "residual/rms" in captures:
        yield _plate_of_stream({captures.about.run: captures})
    if dimensions := captures.names("residual/update/*"):
        yield Plate(
            "updates",
            "What each dimension adds",
            "Root mean square of the update of each attention dimension at each depth. A higher curve writes more into "
            "the stream. Size is not use: an update may be undone later.",
            draw_depths.updates({dimension: captures[f"residual/update/{dimension}"] for dimension in dimensions}),
        )


def _lens(captures: Captures) -> Iterator[Plate]:
    if "lens/loss" in captures:
        yield _plate_of_lens({captures.about.run: captures})
    if "lens/change" in captures:
        yield Plate(
            "help_of_depth",
            "Whom further depth helps",
            "Shares of positions whose loss improves, stays or worsens from this depth to the last. Where grey "
            "prevails, further depth changes little. How much a loss changes is not shown.",
            draw_depths.help_of_depth(captures["lens/change"]),
        )
    if "lens/settled" in captures:
        yield _plate_of_settling({captures.about.run: captures})


def _exits(captures: Captures) -> Iterator[Plate]:
    criteria = captures.names("exit/*/loss")
    if criteria and "lens/loss" in captures:
        readouts = {c: (captures[f"exit/{c}/depth"], captures[f"exit/{c}/loss"]) for c in criteria}
        yield Plate(
            "exits",
            "Loss and depth of early exits",
            "Each position is read out at the first depth that meets a criterion; each point is one threshold. Lower "
            "and further left is better: the same loss at fewer depths. No time was measured, and fewer depths need "
            "not be less time.",
            draw_depths.exits(readouts, float(captures["lens/loss"][-1])),
        )


def _removals(captures: Captures) -> Iterator[Plate]:
    if "removal/depth" in captures:
        updates = {d: captures[f"removal/update/{d}"] for d in captures.names("removal/update/*")}
        whole = {d: float(captures[f"removal/dimension/{d}"]) for d in captures.names("removal/dimension/*")}
        yield Plate(
            "removals",
            "Loss without a part",
            "By how much the loss changes with one depth, or a dimension at one depth (left), or a dimension at all "
            f"depths (right) left out, on {captures.about.removal_sequences:,} sequences. The larger the change, the "
            "more the rest depends on the part. In DR the residual norm between depths stays. The model was not "
            "trained without the part, so this does not say what another model would need.",
            draw_depths.removals(float(captures["removal/loss"]), captures["removal/depth"], updates, whole),
        )
    for dimension in captures.names("removal/entry/*"):
        yield Plate(
            f"removed_entries_{dimension}",
            f"Loss when a depth does not see an entry in {dimension.upper()}",
            "By how much the loss changes when one depth (down) does not attend to one "
            f"{_entries(captures, dimension)} (across). Strong cells are paths that the model "
            "relies on. Paths that can replace each other do not show.",
            draw_depths.removed_entries(
                float(captures["removal/loss"]), captures[f"removal/entry/{dimension}"], _entries(captures, dimension)
            ),
        )


def _saturation(captures: Captures) -> Iterator[Plate]:
    for dimension in captures.names("saturation/share/*"):
        yield Plate(
            f"saturation_{dimension}",
            f"When the router of {dimension.upper()} settles in training",
            "Share of a token's experts at the last checkpoint that an earlier one selects as well, by depth. Curves "
            "that are high early are routers that have settled. It is of the same tokens at every checkpoint, and says "
            "nothing of whether the choice is a good one.",
            draw_experts.saturation(captures["saturation/step"], captures[f"saturation/share/{dimension}"]),
        )


def _trajectories(captures: Captures) -> Iterator[Plate]:
    if "trajectory/points" in captures:
        yield Plate(
            "trajectories",
            "Paths of tokens through the depths",
            "Residual streams of a few tokens from the embedding (ring) to the last depth (filled), in the plane that "
            "those of all tokens vary most in. Short steps at the end are tokens that have arrived. The plane holds "
            "only a part of the variance, which its axes give: what looks near may be far apart.",
            draw_depths.trajectories(
                captures["trajectory/points"],
                captures["trajectory/explained"],
                [str(text) for text in captures["trajectory/token"]],
            ),
        )


# Of several models.


def _lorenz_of_all(runs: Runs) -> Iterator[Plate]:
    for dimension in sorted({dimension for captures in runs.values() for dimension in _many(captures)}):
        name = f"experts/{dimension}/counts"
        routings = [Routings(label, c[name], c.about.depth_recurrent) for label, c in runs.items() if name in c]
        if len(routings) > 1:
            yield Plate(
                f"figure_6_{dimension}",
                f"How many experts carry the routings of {dimension.upper()} (Figure 6)",
                "Fewest distinct experts that carry a share of a depth's routings, busiest first, of all models. A "
                "factor between two curves is the factor between the experts that are used. It does not show which "
                "ones.",
                draw_experts.lorenz_curves(routings),
            )


def _confidence_of_all(runs: Runs) -> Iterator[Plate]:
    for dimension in sorted({d for captures in runs.values() for d in captures.names("experts/*/entropy")}):
        entropy, margin = (_by_run(runs, f"experts/{dimension}/{of}") for of in ("entropy", "margin"))
        if len(entropy) > 1:
            yield Plate(
                f"router_confidence_{dimension}",
                f"How sure the routers of {dimension.upper()} are",
                "Mean entropy of a token's scores, taken as shares of all experts, and how far the last selected "
                "expert is ahead of the best one left out. Low entropy and a wide margin are clear choices. More "
                "experts allow more entropy, so only models with as many of them compare in it.",
                draw_experts.router_confidence(entropy, margin),
            )


def _stream_of_all(runs: Runs) -> Iterator[Plate]:
    if len(_by_run(runs, "residual/rms")) > 1:
        yield _plate_of_stream(runs)


def _lens_of_all(runs: Runs) -> Iterator[Plate]:
    if len(_by_run(runs, "lens/loss")) > 1:
        yield _plate_of_lens(runs)
    if len(_by_run(runs, "lens/settled")) > 1:
        yield _plate_of_settling(runs)


# Of one or several: curves by label.


def _plate_of_stream(runs: Runs) -> Plate:
    return Plate(
        "residual_stream",
        "The residual stream",
        "Root mean square of the stream after each depth and of all that a depth adds to it, and the mean cosine "
        "between the steps of neighbouring depths. A positive cosine is a depth that goes on in the direction of the "
        "one before. Means over tokens hide that tokens differ.",
        draw_depths.residual_stream(*(_by_run(runs, f"residual/{of}") for of in ("rms", "step", "cosine"))),
    )


def _plate_of_lens(runs: Runs) -> Plate:
    names = ("loss", "entropy", "divergence", "agreement")
    return Plate(
        "logit_lens",
        "What the model would say at each depth",
        "The LM head reads out every depth: loss and entropy of the prediction, its divergence from the last depth's, "
        "and how often both have the same likeliest token. A steep curve is where predictions are made. The head is "
        "trained on what comes last, so a poor reading of an early depth does not mean that it knows nothing.",
        draw_depths.logit_lens(*(_by_run(runs, f"lens/{of}") for of in names)),
    )


def _plate_of_settling(runs: Runs) -> Plate:
    return Plate(
        "settling",
        "Where predictions settle",
        "Share of positions whose likeliest token is final from this depth on, and was not before; on the right, up to "
        "this depth. A large share at "
        "the last depth means that many tokens are open to the end. A token that settles need not be right.",
        draw_depths.settling(_by_run(runs, "lens/settled")),
    )


def _by_run(runs: Runs, name: str) -> dict[str, np.ndarray]:
    """The array of each model that has it."""
    return {label: captures[name] for label, captures in runs.items() if name in captures}


# What there is.


def _entries(captures: Captures, dimension: str) -> str:
    return captures.about.entries.get(dimension, "entry")


def _many(captures: Captures) -> list[str]:
    """Routers that select among many experts: EA's, and all that select several."""
    active = captures.about.active
    return [d for d in captures.names("experts/*/counts") if d == "ea" or active.get(d, 1) > 1]


def _few(captures: Captures) -> list[str]:
    """The other routers: those of attention experts."""
    return [d for d in captures.names("experts/*/counts") if d not in _many(captures)]


def _has(captures: Captures, name: str) -> bool:
    return bool(captures.names(name)) if "*" in name else name in captures


def _why_no_depth_attention(captures: Captures) -> str:
    if "DA" in captures.about.variant.split("+"):
        return "It has no weights to draw: they were not captured, or its form has none."
    return "The mixture of this model has no depth attention."


def _why_no_attention_experts(captures: Captures) -> str:
    if captures.about.depth_recurrent:
        return "No dimension of this model routes its projections."
    return "Layers that are distinct have dense projections; only a recurrent layer routes them."
