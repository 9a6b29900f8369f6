"""Exports beside their models: every variant and mixture, original and merged, float32 and bfloat16.

python benchmarks/parity.py

makes each model with fresh weights and random router biases, exports it, lets the installed transformers compute
sample ids, and prints a table. Run it once for each release of transformers.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dreamer_jax.config import (
    Config,
    DepthAttentionConfig,
    ExpertAttentionConfig,
    ModelConfig,
    RouterConfig,
    SequenceAttentionConfig,
)
from dreamer_jax.convert.hf import export_hf
from dreamer_jax.convert.hf.parity import computed_by_transformers, versions
from dreamer_jax.convert.model import named_arrays
from dreamer_jax.convert.parity import Figures, compare
from dreamer_jax.convert.sample import computed, sample_tokens
from dreamer_jax.model.dreamer import Dreamer
from dreamer_jax.model.parameters import RouterBias

MIXTURES = {
    "LA": [("sa", "ea"), ("sa+ea",)],
    "DR": [("sa", "ea"), ("sa+ea",)],
    "LA+DA": [("da+sa", "ea"), ("da", "sa", "ea"), ("da+sa+ea",)],
    "DR+DA": [("da+sa", "ea"), ("da", "sa", "ea"), ("da+sa+ea",), ("sa[1:]+da[::2]", "ea[:-1]")],
}
"""Eq. 5, 4 and 6 with DA, and one with depths left out."""


class Case(NamedTuple):
    """A row of the table."""

    variant: str
    mixture: tuple[str, ...]
    merged: bool


def cases() -> Iterator[Case]:
    for variant, mixtures in MIXTURES.items():
        for mixture in mixtures:
            for merged in (False, True) if variant.startswith("DR") else (False,):
                yield Case(variant, mixture, merged)


def model_of(case: Case) -> Dreamer:
    """A model with fresh weights, and biases that matter."""
    config = ModelConfig(
        depth_recurrent=case.variant.startswith("DR"),
        mixture=case.mixture,
        depth=6,
        width=128,
        vocab=1024,
        sa=SequenceAttentionConfig(head_size=32),
        da=DepthAttentionConfig(head_size=32),
        ea=ExpertAttentionConfig(experts=32, expert_width=64),
        router=RouterConfig(size=32),
    )
    model = Dreamer(config, nnx.Rngs(0))
    state = nnx.state(model, RouterBias)
    noise = iter(jax.random.split(jax.random.key(1), 64))
    nnx.update(model, jax.tree.map(lambda bias: 0.3 * jax.random.normal(next(noise), bias.shape, jnp.float32), state))
    return model


def figures_of(case: Case, dtypes: tuple[str, ...]) -> dict[str, Figures]:
    """By the type in which transformers computes; the model computes in float32 and is not merged."""
    model = model_of(case)
    tokens = sample_tokens(Config(name="model", model=model.config), None)
    expected = computed(model, tokens)
    form = model.merged() if case.merged else model
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        export_hf(Config(name="model", model=model.config), named_arrays(form), None, folder, merged=form.is_merged)
        return {dtype: compare(expected, computed_by_transformers(folder, tokens, dtype)) for dtype in dtypes}


def main() -> None:
    print(f"{versions()}, jax {jax.__version__}\n")
    print("| variant | mixture | form | float32: logits | KL | top-1, experts | bfloat16: KL | top-1 | experts |")
    print("|---|---|---|---|---|---|---|---|---|")
    for case in cases():
        exact, rounded = figures_of(case, ("float32", "bfloat16")).values()
        relative = exact["difference"] / exact["largest_logit"]
        same = [exact["top1"], *(share for name, share in exact.items() if name.endswith("_experts"))]
        shares = " ".join(f"{k.removesuffix('_experts')} {v:.1%}" for k, v in rounded.items() if k.endswith("_experts"))
        row = [
            case.variant,
            ", ".join(f"`{group}`" for group in case.mixture),
            "merged" if case.merged else "original",
            f"{relative:.1e}",
            f"{exact['kl']:.1e}",
            f"{np.min(same):.2%}",
            f"{rounded['kl']:.1e}",
            f"{rounded['top1']:.1%}",
            shares,
        ]
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
