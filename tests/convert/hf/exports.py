"""Exported models that many tests share, and what the oracle knows of them."""

import functools
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dreamer_jax.config import Config, ModelConfig
from dreamer_jax.convert.hf import export_hf
from tests import oracle
from tests.models import ATTENTION_PARALLEL, changed, sizes_of, small

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 9))


class Export(NamedTuple):
    """An exported model with its origins."""

    folder: Path
    sizes: oracle.Sizes
    weights: dict[str, np.ndarray]
    """Not merged; float64."""


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="dreamer-jax-hf-")


@functools.cache
def exported(variant: str, mixture: tuple[str, ...] = ATTENTION_PARALLEL, merged: bool = False) -> Export:
    """A small model's export; made once for all tests."""
    return export_of(small(variant, mixture), merged)


@functools.cache
def export_of(model: ModelConfig, merged: bool = False) -> Export:
    """The export of any model; made once for all tests."""
    sizes = sizes_of(model)
    weights = oracle.random_weights(sizes, seed=3)
    folder = Path(tempfile.mkdtemp(dir=_scratch().name)) / "model"
    arrays = float32(oracle.merge(weights, sizes) if merged else weights)
    export_hf(Config(name="small", model=model), arrays, None, folder, merged=merged)
    return Export(folder, sizes, weights)


def float32(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a checkpoint holds."""
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def odd_model(variant: str) -> ModelConfig:
    """Windows, dilation and slices of depths; SA is not at the first depth."""
    model = small(variant, ("sa[1:]+da[::2]", "ea[:-1]"))
    return changed(model, depth=5, da={"window": 2, "dilation": 2})


def rows(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, positions and segment ids of rows that are one document each."""
    return tokens, np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape), np.ones_like(tokens)


def experts_of(passed: oracle.Outputs) -> dict[str, np.ndarray]:
    """The selected experts [l, B, T, A] by kind of attention, of the l depths at which it runs."""
    every = {"sa": passed.sa_ids, "da": passed.da_ids, "ea": passed.ea_ids}
    return {kind: ids[[bool(row.min() >= 0) for row in ids]] for kind, ids in every.items() if ids is not None}
