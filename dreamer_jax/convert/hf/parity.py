"""Does an export compute what the checkpoint computes? Sample logits of the one, held against those of the other.

python -m dreamer_jax.convert.hf.parity --folder EXPORT --sample SAMPLE.npz

Whoever has the checkpoint writes the sample with `save_sample`. Whoever has PyTorch and transformers runs this: it
writes parity.json into the export, and fails where the two differ by more than a limit.
"""

import argparse
import json
import sys
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
    """An export that computes something else than its checkpoint."""


class Limits(NamedTuple):
    """What an export may differ by."""

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
    # Where two experts are all but equal, rounding decides, and one token's logits then differ by much.
    "bfloat16": Limits(difference=float("inf"), kl=0.05, top1=0.9, experts=0.9),
}
"""By the type that transformers computes in; the checkpoint's sample is float32."""


def save_sample(path: Path, tokens: np.ndarray, logits: np.ndarray, experts: Mapping[str, np.ndarray]) -> None:
    """Write what a checkpoint computes of some rows, without padding.

    Args:
        path: an .npz file.
        tokens: [B, T].
        logits: [B, T, V], in float32.
        experts: by kind of attention, the selected ids: [L, B, T] or [L, B, T, A]; negative at depths without it.
    """
    arrays: dict[str, Any] = {f"{kind}_ids": np.asarray(ids) for kind, ids in experts.items()}
    np.savez(path, tokens=np.asarray(tokens), logits=np.asarray(logits, np.float32), **arrays)


def write_parity(folder: Path, sample: Path, limits: Mapping[str, Limits] = LIMITS) -> dict[str, dict[str, float]]:
    """Compare in each type that has limits, write parity.json into the export, and return its figures.

    Raises:
        ParityError: a figure beyond its limit, named; parity.json is written all the same.
    """
    with np.load(sample) as arrays:
        expected = dict(arrays)
    figures = {dtype: compare(expected, computed(folder, expected["tokens"], dtype)) for dtype in limits}
    write_whole(folder / PARITY, json.dumps(figures, indent=2) + "\n")
    faults = [f"{dtype}: {fault}" for dtype in limits for fault in beyond(figures[dtype], limits[dtype])]
    if faults:
        raise ParityError(f"'{folder}' does not compute what its checkpoint does: {'; '.join(faults)}")
    return figures


def computed(folder: Path, tokens: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """Logits and selected experts of an export, computed by transformers in this type: as `save_sample` has them."""
    import torch
    from transformers import AutoModelForCausalLM

    kind = getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=kind).eval()
    seen: dict[str, list[np.ndarray]] = {}
    for name, module in model.named_modules():
        place = name.split(".")
        if place[-1] == "router":
            keep = seen.setdefault(f"{place[-2]}_ids", []).append
            module.register_forward_hook(lambda _, __, route, keep=keep: keep(route.ids.numpy()))
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens.astype(np.int64)), use_cache=False).logits.float().numpy()
    return {"logits": logits, **{name: np.stack(ids) for name, ids in seen.items()}}


def compare(expected: Mapping[str, np.ndarray], actual: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Figures of the distance of two samples: `difference`, `largest_logit`, `kl`, `top1` and `KIND_experts`."""
    p, q = (_log_softmax(np.asarray(sample["logits"], np.float64)) for sample in (expected, actual))
    figures = {
        "difference": float(np.abs(expected["logits"] - actual["logits"]).max()),
        "largest_logit": float(np.abs(expected["logits"]).max()),
        "kl": float((np.exp(p) * (p - q)).sum(-1).mean()),
        "top1": float((p.argmax(-1) == q.argmax(-1)).mean()),
    }
    for kind in ROUTED:
        if f"{kind}_ids" in expected:
            ids = expected[f"{kind}_ids"]
            runs = [depth for depth in range(len(ids)) if ids[depth].min() >= 0]
            figures[f"{kind}_experts"] = _common(ids[runs], actual[f"{kind}_ids"])
    return figures


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


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _common(expected: np.ndarray, actual: np.ndarray) -> float:
    """The share of the selected experts that the other selects, too: [L, B, T, A] or, for one expert, [L, B, T]."""
    expected = expected.reshape(*expected.shape[:3], -1)
    return float((expected[..., :, None] == actual[..., None, :]).any(-1).mean())


def main(arguments: list[str] | None = None) -> int:
    """Compare, print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="the export")
    parser.add_argument("--sample", type=Path, required=True, help="what the checkpoint computes, an .npz file")
    parsed: Any = parser.parse_args(arguments)
    try:
        figures = write_parity(parsed.folder, parsed.sample)
    except (DreamerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(figures, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
