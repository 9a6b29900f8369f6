"""What transformers computes of an exported model, held against its checkpoint.

python -m dreamer_jax.convert.hf.parity --checkpoint RUN --folder EXPORT

writes parity.json into the export, and fails where the two differ by more than a limit. Where JAX and PyTorch are not
on one machine, `--checkpoint RUN --sample FILE.npz` writes what the checkpoint computes, and
`--folder EXPORT --sample FILE.npz` compares with it.
"""

import argparse
import importlib.util
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from dreamer_jax.convert.parity import LIMITS, Computed, Figures, Limits, ParityError, compare, spoken, write_parity
from dreamer_jax.convert.sample import computed, sample_tokens
from dreamer_jax.door import guarded
from dreamer_jax.training.checkpoint import load_model


def can_run() -> bool:
    """Whether PyTorch and transformers are installed."""
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def versions() -> str:
    """What would compute."""
    import torch
    import transformers

    return f"transformers {transformers.__version__}, torch {torch.__version__}"


def computed_by_transformers(
    folder: Path,
    tokens: Int[np.ndarray, "B T"],
    dtype: str = "float32",
    *,
    own_code: bool = True,
    depth: int | None = None,
) -> Computed:
    """What transformers computes of an exported model.

    Args:
        folder: the export.
        tokens: rows without padding.
        dtype: of the computation.
        own_code: run the code in the folder, as users do; otherwise that of this package.
        depth: how many depths run; those of config.json if None.
    """
    import torch
    from transformers import AutoModelForCausalLM

    settings: dict[str, Any] = {"dtype": getattr(torch, dtype)} | ({} if depth is None else {"depth": depth})
    if own_code:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **settings).eval()
    else:
        from dreamer_jax.convert.hf.exported.modeling_dreamer import DreamerForCausalLM

        model = DreamerForCausalLM.from_pretrained(folder, **settings).eval()
    seen: dict[str, list[np.ndarray]] = {}
    for name, module in model.named_modules():
        place = name.split(".")
        if place[-1] == "router":
            keep = seen.setdefault(place[-2], []).append
            module.register_forward_hook(lambda _, __, route, keep=keep: keep(route.ids.numpy()))
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens.astype(np.int64)), use_cache=False).logits.float().numpy()
    return Computed(logits, {name: np.stack(ids) for name, ids in seen.items()})


def compare_export(
    folder: Path, tokens: Int[np.ndarray, "B T"], expected: Computed, limits: Mapping[str, Limits] = LIMITS
) -> str:
    """Compare in each type that has limits and write parity.json into the export; returns the figures in words.

    Raises:
        ParityError: a figure beyond its limit, named; parity.json is written all the same.
    """
    by = {"reference": "the checkpoint in JAX", "converted": versions()}
    figures: dict[str, Figures] = {
        dtype: compare(expected, computed_by_transformers(folder, tokens, dtype)) for dtype in limits
    }
    write_parity(folder, by, figures, limits)
    return spoken(by, figures)


def main(arguments: list[str] | None = None) -> int:
    """Compute, compare, print the figures."""
    description, _, rest = (__doc__ or "").partition("\n\n")
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, epilog=rest, formatter_class=form)
    parser.add_argument("--checkpoint", type=Path, help="the run folder, or one of its checkpoints")
    parser.add_argument("--folder", type=Path, help="the export")
    parser.add_argument("--sample", type=Path, help="an .npz file of what the checkpoint computes")
    parsed: Any = parser.parse_args(arguments)
    if sum(given is not None for given in (parsed.checkpoint, parsed.folder, parsed.sample)) != 2:
        parser.error("give two of --checkpoint, --folder, --sample")
    return guarded(lambda: run(parsed.checkpoint, parsed.folder, parsed.sample), doing="--sample")


def run(checkpoint: Path | None, folder: Path | None, sample: Path | None) -> int:
    """Write a sample, or compare an export with a checkpoint or with a sample of it."""
    tokens, expected = _read_sample(sample) if checkpoint is None and sample else _sample_of(checkpoint)
    if folder is None:
        assert sample is not None
        arrays: dict[str, Any] = {f"{kind}_ids": ids for kind, ids in expected.experts.items()}
        with sample.open("wb") as file:  # given a path, NumPy would add an ending to it
            np.savez(file, tokens=tokens, logits=expected.logits, **arrays)
        print(f"wrote {sample}\nnext: python -m dreamer_jax.convert.hf.parity --folder EXPORT --sample {sample}")
        return 0
    print(compare_export(folder, tokens, expected))
    return 0


def _sample_of(checkpoint: Path | None) -> tuple[np.ndarray, Computed]:
    assert checkpoint is not None
    loaded = load_model(checkpoint)
    tokens = sample_tokens(loaded.config.model.vocab, loaded.config.data.context, loaded.tokenizer_path)
    return tokens, computed(loaded.model, tokens)


def _read_sample(path: Path) -> tuple[np.ndarray, Computed]:
    try:
        with path.open("rb") as file, np.load(file) as opened:
            arrays = dict(opened)
        tokens, logits = arrays.pop("tokens"), arrays.pop("logits")
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, TypeError) as error:
        raise ParityError(f"'{path}' is no sample that --checkpoint wrote ({error}); write it again") from error
    return tokens, Computed(logits, {name.removesuffix("_ids"): ids for name, ids in arrays.items()})


if __name__ == "__main__":
    sys.exit(main())
