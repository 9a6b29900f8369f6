"""Does a converted model compute what the model did before? Logits and selected experts of the two, side by side."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dreamer_jax.errors import DreamerError
from dreamer_jax.files import write_whole

PARITY = "parity.json"
ROUTED = ("sa", "da", "ea")
"""Kinds of attention that may have a router."""


class ParityError(DreamerError, ValueError):
    """A converted model that computes something else than the model did before."""


class Computed(NamedTuple):
    """What a model computes of some rows."""

    logits: np.ndarray
    """[B, T, V], float32."""
    experts: dict[str, np.ndarray]
    """By kind of attention, the selected ids: [l, B, T] or [l, B, T, A], with l the depths at which it runs."""


class Limits(NamedTuple):
    """What a model may differ by."""

    difference: float
    """Of logits, over the largest logit."""
    kl: float
    """Mean over tokens, in nats."""
    top1: float
    """Share of tokens with the same likeliest successor, at least."""
    experts: float
    """Share of the selected experts that both select, at least."""


LIMITS = {
    "float32": Limits(difference=1e-3, kl=1e-6, top1=0.999, experts=0.999),
    # Where two experts are all but equal, rounding decides, and one token's logits then differ by much. Where a model
    # has not learned much, so are likely tokens: at its start, DR+DA of 32 depths keeps 86 % of them.
    "bfloat16": Limits(difference=float("inf"), kl=0.05, top1=0.7, experts=0.9),
}
"""By the type of the converted model's computation; the other one computes in float32."""
Figures = dict[str, float]


def compare(expected: Computed, actual: Computed) -> Figures:
    """How far apart two models are: `difference`, `largest_logit`, `kl`, `top1` and `KIND_experts`.

    Raises:
        ParityError: they are models of different shapes.
    """
    shapes = [_shapes(computed) for computed in (expected, actual)]
    if shapes[0] != shapes[1]:
        raise ParityError(f"these are different models: {shapes[0]} and {shapes[1]}; give an export of this checkpoint")
    p, q = (_log_softmax(np.asarray(logits, np.float64)) for logits in (expected.logits, actual.logits))
    figures = {
        "difference": float(np.abs(expected.logits - actual.logits).max()),
        "largest_logit": float(np.abs(expected.logits).max()),
        "kl": float((np.exp(p) * (p - q)).sum(-1).mean()),
        "top1": float((p.argmax(-1) == q.argmax(-1)).mean()),
    }
    return figures | {f"{kind}_experts": _common(ids, actual.experts[kind]) for kind, ids in expected.experts.items()}


def _shapes(computed: Computed) -> dict[str, tuple[int, ...]]:
    """Of the logits, and of each kind's experts: [l, B, T, A]."""
    experts = {kind: (*ids.shape[:3], ids[0, 0, 0].size) for kind, ids in sorted(computed.experts.items())}
    return {"logits": computed.logits.shape, **experts}


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _common(expected: np.ndarray, actual: np.ndarray) -> float:
    """The share of the selected experts that the other selects, too: [l, B, T, A] or, for one expert, [l, B, T]."""
    expected, actual = (ids.reshape(*ids.shape[:3], -1) for ids in (expected, actual))
    return float((expected[..., :, None] == actual[..., None, :]).any(-1).mean())


def beyond(figures: Mapping[str, float], limits: Limits) -> list[str]:
    """The figures that exceed a limit, in words; one that is not a number does."""
    relative = figures["difference"] / max(figures["largest_logit"], 1e-30)
    faults = []
    if not relative <= limits.difference:
        faults.append(f"logits differ by {relative:.2g} of the largest one (limit {limits.difference:g})")
    if not figures["kl"] <= limits.kl:
        faults.append(f"KL is {figures['kl']:.2g} nats (limit {limits.kl:g})")
    if not figures["top1"] >= limits.top1:
        faults.append(f"the likeliest token agrees for {figures['top1']:.1%} (limit {limits.top1:.1%})")
    shares = {name: figures[name] for name in figures if name.endswith("_experts")}
    faults += [
        f"{name.removesuffix('_experts')} selects the same experts for {share:.1%} (limit {limits.experts:.1%})"
        for name, share in shares.items()
        if not share >= limits.experts
    ]
    return faults


def write_parity(
    folder: Path, by: Mapping[str, str], figures: Mapping[str, Figures], limits: Mapping[str, Limits] = LIMITS
) -> None:
    """Write parity.json into a converted model's folder.

    Args:
        folder: the converted model.
        by: what computed the `reference` (in float32) and the `converted` model, in words.
        figures: by the type in which the converted model computed.
        limits: by the same types.

    Raises:
        ParityError: a figure beyond its limit, named; parity.json is written all the same.
    """
    bounds: dict[str, Any] = {dtype: limits[dtype]._asdict() for dtype in figures}
    for bound in bounds.values():  # JSON has no infinity
        bound.update({name: None for name, limit in bound.items() if limit == float("inf")})
    write_whole(folder / PARITY, json.dumps({**by, **figures, "limits": bounds}, indent=2) + "\n")
    faults = [f"{dtype}: {fault}" for dtype in figures for fault in beyond(figures[dtype], limits[dtype])]
    if faults:
        raise ParityError(f"the conversion changes what the model computes: {'; '.join(faults)}")


def spoken(by: Mapping[str, str], figures: Mapping[str, Figures]) -> str:
    """The figures as lines for the terminal."""
    lines = [f"parity ({by['converted']} against {by['reference']}):"]
    for dtype, found in figures.items():
        shares = [name for name in found if name.endswith("_experts")]
        experts = ", ".join(f"{name.removesuffix('_experts')} {found[name]:.2%}" for name in shares)
        lines.append(
            f"  {dtype:8}  logits {found['difference']:.2g} of {found['largest_logit']:.3g}, KL {found['kl']:.2g}, "
            f"top-1 {found['top1']:.2%}{', experts ' + experts if experts else ''}"
        )
    return "\n".join(lines)
