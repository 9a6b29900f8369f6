"""The parity of each conversion: which two models are compared, and by what they are computed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from dreamer_jax.config import Config
from dreamer_jax.convert.hf.parity import can_run, compare_export, computed_by_transformers, form_of, versions
from dreamer_jax.convert.hf.source import load_hf
from dreamer_jax.convert.model import build
from dreamer_jax.convert.parity import LIMITS, Computed, Figures, compare, spoken, write_parity
from dreamer_jax.convert.safetensors import load_safetensors
from dreamer_jax.convert.sample import computed, reference, sample_tokens
from dreamer_jax.model.dreamer import Dreamer
from dreamer_jax.training.checkpoint import load_model

CHECKPOINT, READ_BACK = "the checkpoint in JAX", "the export, read back in JAX"


def of_export(
    folder: Path, model: Dreamer, config: Config, tokenizer_path: Path | None, form: Literal["safetensors", "hf"]
) -> str:
    """Compare an export with the checkpoint that it is of; returns the figures in words.

    transformers computes the export for it if it is installed; else this program reads the export back.

    Args:
        folder: the export, where parity.json is written.
        model: of the checkpoint, not merged.
        config: of the run.
        tokenizer_path: of the run.
        form: of the export.

    Raises:
        ParityError: they differ by more than rounding does.
    """
    tokens = sample_tokens(config, tokenizer_path)
    if form == "hf":
        expected = reference(model, tokens, form_of(folder))
        if can_run():
            return compare_export(folder, tokens, expected)
        source = load_hf(folder)
        again = build(source.config.model, source.arrays, merged=source.merged)
    else:
        expected = computed(model, tokens)
        shape, arrays, merged = load_safetensors(folder)
        again = build(shape, arrays, merged=merged)
    return _in_jax(folder, expected, again, tokens, CHECKPOINT, READ_BACK)


def of_stock_export(folder: Path, model: Dreamer, tokens: Int[np.ndarray, "B T"]) -> str:
    """Compare a stock export with its checkpoint, if transformers is installed; returns the figures in words.

    It is an approximation, so the limits are those of rounding to bfloat16.

    Args:
        folder: the export, where parity.json is written.
        model: of the checkpoint.
        tokens: those that its routers were fitted to.

    Raises:
        ParityError: they differ by more than rounding to bfloat16 does.
    """
    if not can_run():
        return "not compared: PyTorch and transformers are not installed, and nothing else computes a stock export"
    expected = computed(model, tokens)._replace(experts={})  # these were compared with the calibration
    return compare_export(folder, tokens, expected, dict.fromkeys(LIMITS, LIMITS["bfloat16"]))


def of_run(
    run: Path, source: Path, form: Literal["safetensors", "hf"], arrays: Mapping[str, Any], *, merged: bool
) -> str:
    """Compare a run that was made of an export with that export; returns the figures in words.

    transformers computes its own exports if it is installed, with this package's code, not with that of the folder.

    Args:
        run: the run's folder, where parity.json is written.
        source: the export.
        form: of the export.
        arrays: of the export by exchange names.
        merged: whether they are merged (Eq. 8).

    Raises:
        ParityError: they differ by more than rounding does.
    """
    loaded = load_model(run)
    config = loaded.config
    tokens = sample_tokens(config, loaded.tokenizer_path)
    by = f"the {'merged' if merged else 'original'} weights in JAX"
    if form == "hf" and can_run():
        depth = config.model.depth if config.model.depth_recurrent else None
        expected, by = computed_by_transformers(source, tokens, own_code=False, depth=depth), versions()
    else:
        expected = computed(build(config.model, arrays, merged=merged), tokens)
    return _in_jax(run, expected, loaded.model, tokens, by, CHECKPOINT)


def _in_jax(
    folder: Path,
    expected: Computed,
    model: Dreamer,
    tokens: Int[np.ndarray, "B T"],
    reference: str,
    converted: str,
) -> str:
    by = {"reference": reference, "converted": converted}
    figures: dict[str, Figures] = {dtype: compare(expected, computed(model, tokens, dtype)) for dtype in LIMITS}
    write_parity(folder, by, figures)
    return spoken(by, figures)
