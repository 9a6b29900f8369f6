"""Checkpoints to the exchange format or to transformers, and back.

python -m dreamer_jax.convert --checkpoint RUN --to safetensors --out DIR [--merged]
python -m dreamer_jax.convert --checkpoint RUN --to hf --out DIR [--merged | --stock] [--dtype bfloat16]
python -m dreamer_jax.convert --from safetensors --source DIR --out RUN
python -m dreamer_jax.convert --from hf --source DIR --out RUN
"""

import contextlib
import dataclasses
import functools
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tqdm import tqdm

from dreamer_jax.config import Config, ConfigError, ModelConfig, readable_path, to_json
from dreamer_jax.convert import checks
from dreamer_jax.convert.hf import export_hf, load_hf
from dreamer_jax.convert.hf.card import Score
from dreamer_jax.convert.hf.export import check_model
from dreamer_jax.convert.hf.stock import (
    LIMIT,
    calibrate,
    check_change,
    check_stock,
    export_stock,
    stock_arrays,
    stock_targets,
)
from dreamer_jax.convert.hf.weights import Target, targets
from dreamer_jax.convert.model import build, named_arrays
from dreamer_jax.convert.parity import PARITY
from dreamer_jax.convert.safetensors import (
    CONFIG,
    RUN_CONFIG,
    WEIGHTS,
    load_safetensors,
    run_of_export,
    save_safetensors,
    unmerged,
)
from dreamer_jax.convert.sample import sample_tokens
from dreamer_jax.convert.stored import StoredArrays
from dreamer_jax.data.tokenizer import FILES, find_tokenizer, load_tokenizer
from dreamer_jax.door import guarded
from dreamer_jax.evaluation.checkpoints import run_folder
from dreamer_jax.evaluation.comparison.results import read_runs
from dreamer_jax.files import write_whole
from dreamer_jax.training.checkpoint import load_model, save_model, saved


@dataclass(frozen=True)
class Arguments:
    """Convert a checkpoint (--checkpoint, --to) to safetensors or for transformers, or either to a checkpoint (--from,
    --source)."""

    out: Path
    """Folder to write."""
    checkpoint: Path | None = None
    """Folder of a run, or of one of its checkpoints."""
    to: Literal["safetensors", "hf"] | None = None
    """Format of the export. safetensors: model.safetensors, config.json and the tokenizer. hf: a folder that
    transformers loads (docs/transformers.md)."""
    merged: bool = False
    """Export W_e + W_shared as the attention experts (Eq. 8): smaller, for inference."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights, with --to hf. Router biases are float32 in either case."""
    stock: bool = False
    """With --to hf, write LA as GLM-4 MoE, which transformers loads without code of ours. An approximation: how often
    other experts are selected is measured and printed."""
    stock_limit: Annotated[float, tyro.conf.arg(name="stock-limit")] = LIMIT
    """Largest share of tokens and layers in which --stock may select other experts."""
    source: Path | None = None
    """Folder of an export, or of the model that save_pretrained wrote after fine-tuning one."""
    from_: Annotated[Literal["safetensors", "hf"] | None, tyro.conf.arg(name="from")] = None
    """Format of the export."""
    parity: bool = True
    """Compare what the model computes before and after, write parity.json, and fail where they differ. It needs memory
    for both models; --no-parity leaves it out."""


def main(arguments: list[str] | None = None) -> int:
    """Parse, convert, report."""
    given = sys.argv[1:] if arguments is None else arguments
    parsed = tyro.cli(tyro.conf.FlagCreatePairsOff[Arguments], args=given, prog="python -m dreamer_jax.convert")
    return guarded(lambda: run(parsed), doing="--out")


def run(arguments: Arguments) -> int:
    """Convert in the direction that the arguments give."""
    out = arguments.out.expanduser()
    if arguments.to and arguments.checkpoint and not (arguments.from_ or arguments.source):
        if (arguments.dtype != "float32" or arguments.stock) and arguments.to != "hf":
            raise ConfigError("--dtype and --stock go with --to hf; the exchange format has one form, in float32")
        if arguments.stock and arguments.merged:
            raise ConfigError("--stock exports LA, which has nothing to merge; leave --merged out")
        write = export if arguments.to == "safetensors" else export_to_transformers
        write = export_as_stock if arguments.stock else write
        return write(arguments.checkpoint.expanduser(), out, arguments)
    forms = arguments.merged or arguments.stock or arguments.dtype != "float32"
    beside = arguments.to or arguments.checkpoint or forms
    if arguments.from_ and arguments.source and not beside:
        read = restore if arguments.from_ == "safetensors" else restore_from_transformers
        return read(arguments.source.expanduser(), out, parity=arguments.parity)
    raise ConfigError(f"these arguments do not go together; use one of\n{(__doc__ or '').split('back.')[1].strip()}")


def export(checkpoint: Path, out: Path, arguments: Arguments) -> int:
    """Write a checkpoint's weights by their exchange names, with all that a reader needs."""
    _check_out(out)
    loaded = load_model(checkpoint)
    model = loaded.model.merged() if arguments.merged else loaded.model
    arrays = named_arrays(model)
    _check_earlier(out, loaded.config)
    out.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, PARITY, *FILES):  # of an export that was here before
        (out / name).unlink(missing_ok=True)
    if loaded.tokenizer_path is not None:
        load_tokenizer(loaded.tokenizer_path, loaded.config.data.special_tokens).save(out)
    write_whole(out / RUN_CONFIG, to_json(loaded.config))
    save_safetensors(out, loaded.config.model, arrays, model.is_merged)  # last: what has a config.json is whole
    if arguments.parity:
        with _withdrawn(out, CONFIG, WEIGHTS):
            print(checks.of_export(out, loaded.model, loaded.config, loaded.tokenizer_path, "safetensors"))
    form = "merged" if model.is_merged else "original"
    count = sum(array.size for array in arrays.values())
    beside = "config" if loaded.tokenizer_path is None else "config, tokenizer"
    print(f"wrote {out}: {len(arrays)} arrays of step {loaded.step} ({form}, {count:,} numbers), {beside}")
    print(f"next: python -m dreamer_jax.convert --from safetensors --source {out} --out RUN")
    return 0


@contextlib.contextmanager
def _withdrawn(out: Path, *written: str) -> Iterator[None]:
    """After an error, remove what was written: a conversion that failed leaves nothing that looks whole."""
    try:
        yield
    except BaseException:
        for name in written:
            if (out / name).is_dir():
                shutil.rmtree(out / name)
            else:
                (out / name).unlink(missing_ok=True)
        raise


def export_to_transformers(checkpoint: Path, out: Path, arguments: Arguments) -> int:
    """Write a folder that AutoModelForCausalLM loads; one array of the checkpoint is in memory at a time."""
    _check_out(out)
    with saved(checkpoint) as found:
        config, tokenizer, step = found.config, found.tokenizer_path, found.step
        check_model(config.model)
        arrays = StoredArrays(found, merged=arguments.merged)

        def check(draft: Path) -> None:
            bar.close()
            if arguments.parity:
                print(checks.of_export(draft, found.model(), config, tokenizer, "hf"))

        with _progress(targets(config.model, arguments.dtype, merged=arrays.merged)) as bar:
            count = export_hf(
                config,
                arrays,
                tokenizer,
                out,
                merged=arrays.merged,
                dtype=arguments.dtype,
                step=step,
                scores=_scores(checkpoint, step),
                wrote=bar.update,
                check=check,
            )
    form = "merged" if arrays.merged else "original"
    print(f"wrote {out}: {count:,} numbers of step {step} ({form}), for transformers 5.19 and newer")
    if not arguments.parity:
        print(f"not compared: python -m dreamer_jax.convert.hf.parity --checkpoint {checkpoint} --folder {out}")
    print(f"next: AutoModelForCausalLM.from_pretrained('{out}', trust_remote_code=True)")
    return 0


def export_as_stock(checkpoint: Path, out: Path, arguments: Arguments) -> int:
    """Write a folder that AutoModelForCausalLM loads without remote code."""
    _check_out(out)
    loaded = load_model(checkpoint)
    config, tokenizer = loaded.config, loaded.tokenizer_path
    check_stock(config.model)
    tokens = sample_tokens(config, tokenizer)
    calibration, arrays = calibrate(loaded.model, tokens), named_arrays(loaded.model)
    print(calibration.change)
    check_change(calibration.change, arguments.stock_limit)
    tensors = stock_targets(config.model, stock_arrays(config.model, arrays, calibration), arguments.dtype)

    def check(draft: Path) -> None:
        bar.close()
        if arguments.parity:
            print(checks.of_stock_export(draft, loaded.model, tokens))

    with _progress(tensors) as bar:
        count = export_stock(
            config,
            arrays,
            calibration,
            tokenizer,
            out,
            limit=arguments.stock_limit,
            dtype=arguments.dtype,
            step=loaded.step,
            scores=_scores(checkpoint, loaded.step),
            wrote=bar.update,
            check=check,
        )
    print(f"wrote {out}: {count:,} numbers of step {loaded.step} as GLM-4 MoE, for transformers 5.19 and newer")
    print(f"next: AutoModelForCausalLM.from_pretrained('{out}')")
    return 0


def _progress(tensors: Sequence[Target]) -> Any:
    """A bar of the bytes that will be written."""
    total = sum(target.bytes for target in tensors)
    return tqdm(total=total, desc="write", unit="B", unit_scale=True, dynamic_ncols=True)


def _scores(checkpoint: Path, step: int) -> list[Score]:
    """Of evaluations of this checkpoint at its trained depth that lie in the run's folder."""
    folder = run_folder(checkpoint)
    if not any(folder.glob("evaluation/*/scores.json")):
        return []
    [run] = read_runs([folder])
    tasks = [task for result in run.checkpoints if result.step == step for task in result.tasks.items()]
    return [
        Score(name, metric, estimate.value, estimate.low, estimate.high, estimate.n)
        for name, task in tasks
        for metric, estimate in task.metrics.items()
    ]


def _check_out(out: Path) -> None:
    """Raise ConfigError unless an export may be written there."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out '{out}' is a file; give a folder")
    runs = [folder for folder in (out.absolute(), *out.absolute().parents) if _is_run(folder)]
    if runs or (out / "checkpoints").is_dir():
        raise ConfigError(f"--out '{out}' is a run folder, or lies inside of one; choose another --out")
    if any((out / name).exists() for name in (CONFIG, WEIGHTS)) and not (out / RUN_CONFIG).is_file():
        raise ConfigError(f"--out '{out}' holds a model that is no export of a run; choose another --out, or delete it")


def _is_run(folder: Path) -> bool:
    return (folder / "checkpoints").is_dir() and (folder / "config.json").is_file()


def _check_earlier(out: Path, config: Config) -> None:
    """Raise ConfigError if there is an export of another model."""
    earlier = run_of_export(out)
    if earlier and (earlier.name, earlier.model) != (config.name, config.model):
        raise ConfigError(
            f"--out '{out}' has the export of the run '{earlier.name}'; choose another --out, or delete it"
        )


def restore(source: Path, out: Path, *, parity: bool) -> int:
    """Write a run folder whose first checkpoint, at step 0, has an export's weights."""
    _check_new_run(out, source)
    model, arrays, merged = load_safetensors(source)
    check = functools.partial(checks.of_run, out, source, "safetensors", arrays, merged=merged) if parity else None
    return _write_run(out, config_of_run(source, model), arrays, find_tokenizer(source), check, merged=merged)


def restore_from_transformers(source: Path, out: Path, *, parity: bool) -> int:
    """Write a run folder whose first checkpoint, at step 0, has the weights of a folder for transformers."""
    _check_new_run(out, source)
    found = load_hf(source)
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    config = found.config
    if found.tokenizer is not None:  # training must prepare its data with this one
        path = str(out / "tokenizer" / found.tokenizer.name)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=path))
    check = functools.partial(checks.of_run, out, source, "hf", found.arrays, merged=found.merged) if parity else None
    return _write_run(out, config, found.arrays, found.tokenizer, check, merged=found.merged)


def _check_new_run(out: Path, source: Path) -> None:
    """Raise ConfigError unless a run folder may be written there."""
    readable_path(out, "--out")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out '{out}' is a file; give a folder")
    if out.resolve() == source.resolve():
        raise ConfigError(f"--out '{out}' is --source, too; choose another --out")


def _write_run(
    out: Path,
    config: Config,
    arrays: dict[str, Any],
    tokenizer: Path | None,
    check: Callable[[], str] | None,
    *,
    merged: bool,
) -> int:
    if tokenizer is None:
        print("note: the export has no tokenizer; train will put the one of its data there", file=sys.stderr)
    if merged:
        print("note: merged weights compute the same with shared experts of zero, which they get", file=sys.stderr)
        arrays = unmerged(config.model, arrays)
    run_config = dataclasses.replace(config, name=out.name, out=str(out.parent))
    if tokenizer is not None:
        load_tokenizer(tokenizer, run_config.data.special_tokens)  # a damaged one is refused now
    save_model(out, run_config, build(run_config.model, arrays), tokenizer)
    if check:
        with _withdrawn(out, "checkpoints", "config.json"):
            print(check())
    print(f"wrote {out}: checkpoint 0 with {len(arrays)} arrays, config.json{', tokenizer' if tokenizer else ''}")
    print("the optimizer's state is new: an export has none")
    print(f'next: python -m dreamer_jax.generate --checkpoint {out} --prompt "..."')
    return 0


def config_of_run(source: Path, model: ModelConfig) -> Config:
    """The config of the run that was exported; if the export does not have it, the defaults around the model."""
    run = run_of_export(source)
    return Config(name=source.name, model=model) if run is None else dataclasses.replace(run, model=model)


if __name__ == "__main__":
    sys.exit(main())
