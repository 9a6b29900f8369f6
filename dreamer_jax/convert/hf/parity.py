"""What transformers computes of an exported model, held against its checkpoint.

python -m dreamer_jax.convert.hf.parity --checkpoint RUN --folder EXPORT

writes parity.json into the export, and fails where the two differ by more than a limit. Where JAX and PyTorch are not
on one machine, `--checkpoint RUN --sample FILE.npz` writes what the checkpoint computes, and
`--folder EXPORT --sample FILE.npz` compares with it. The sample of an export in bfloat16 is written with
`--dtype bfloat16`, and with `--merged` if it is merged.
"""

import argparse
import importlib.util
import json
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from dreamer_jax.convert.hf.export import MODEL_TYPE
from dreamer_jax.convert.parity import LIMITS, Computed, Figures, Limits, ParityError, compare, spoken, write_parity
from dreamer_jax.convert.sample import Form, reference, sample_tokens
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

    Args:
        folder: the export.
        tokens: of the sample.
        expected: by `reference` with the form of the export.
        limits: by the type in which transformers computes.

    Raises:
        ParityError: a figure beyond its limit, named; parity.json is written all the same.
    """
    by = {"reference": "the checkpoint in JAX", "converted": versions()}
    figures: dict[str, Figures] = {
        dtype: compare(expected, computed_by_transformers(folder, tokens, dtype)) for dtype in limits
    }
    write_parity(folder, by, figures, limits)
    return spoken(by, figures)


def form_of(folder: Path) -> Form:
    """The form of an export.

    Raises:
        ParityError: it is none of this program, or is one that only approximates its checkpoint.
    """
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        kind, form = fields["model_type"], Form(fields["dtype"], fields.get("merged", False))
    except (ValueError, KeyError, TypeError) as error:
        raise ParityError(f"'{path}' is not the config of an export ({error}); export the model again") from error
    if kind != MODEL_TYPE:
        raise ParityError(f"'{folder}' is of type '{kind}', which is at best near its checkpoint; give one of --to hf")
    return form


def main(arguments: list[str] | None = None) -> int:
    """Compute, compare, print the figures."""
    description, _, rest = (__doc__ or "").partition("\n\n")
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, epilog=rest, formatter_class=layout)
    parser.add_argument("--checkpoint", type=Path, help="the run folder, or one of its checkpoints")
    parser.add_argument("--folder", type=Path, help="the export")
    parser.add_argument("--sample", type=Path, help="an .npz file of what the checkpoint computes")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the export, for a sample"
    )
    parser.add_argument("--merged", action="store_true", help="whether the export is, for a sample")
    parsed: Any = parser.parse_args(arguments)
    if sum(given is not None for given in (parsed.checkpoint, parsed.folder, parsed.sample)) != 2:
        parser.error("give two of --checkpoint, --folder, --sample")
    form = Form(parsed.dtype, parsed.merged)
    return guarded(lambda: run(parsed.checkpoint, parsed.folder, parsed.sample, form), doing="--sample")


def run(checkpoint: Path | None, folder: Path | None, sample: Path | None, form: Form) -> int:
    """Write a sample for exports of a form, or compare an export with a checkpoint or with a sample of it."""
    if folder is None:
        assert checkpoint is not None
        assert sample is not None
        _write_sample(sample, form, *_sample_of(checkpoint, form))
        print(f"wrote {sample}\nnext: python -m dreamer_jax.convert.hf.parity --folder EXPORT --sample {sample}")
        return 0
    form = form_of(folder)
    if checkpoint is not None:
        tokens, expected = _sample_of(checkpoint, form)
    else:
        assert sample is not None
        tokens, expected = _read_sample(sample, form)
    print(compare_export(folder, tokens, expected))
    return 0


def _sample_of(checkpoint: Path, form: Form) -> tuple[np.ndarray, Computed]:
    loaded = load_model(checkpoint)
    tokens = sample_tokens(loaded.config, loaded.tokenizer_path)
    return tokens, reference(loaded.model, tokens, form)


def _write_sample(path: Path, form: Form, tokens: np.ndarray, expected: Computed) -> None:
    arrays: dict[str, Any] = {f"{kind}_ids": ids for kind, ids in expected.experts.items()}
    with path.open("wb") as file:  # given a path, NumPy would add an ending to it
        np.savez(file, form=[form.dtype, str(form.merged)], tokens=tokens, logits=expected.logits, **arrays)


def _read_sample(path: Path, form: Form) -> tuple[np.ndarray, Computed]:
    try:
        with path.open("rb") as file, np.load(file) as opened:
            arrays = dict(opened)
        tokens, logits, (dtype, merged) = (arrays.pop(name) for name in ("tokens", "logits", "form"))
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, TypeError) as error:
        raise ParityError(f"'{path}' is no sample that --checkpoint wrote ({error}); write it again") from error
    if form.dtype != dtype or (form.dtype == "bfloat16" and str(form.merged) != merged):
        flags = f"--dtype {form.dtype}{' --merged' if form.merged else ''}"
        raise ParityError(f"'{path}' is for another form of export; write it with {flags}")
    return tokens, Computed(logits, {name.removesuffix("_ids"): ids for name, ids in arrays.items()})


if __name__ == "__main__":
    sys.exit(main())
