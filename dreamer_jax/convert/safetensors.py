"""The exchange format on disk: `model.safetensors` with the arrays by name, `config.json` with the model's shape."""

import dataclasses
import json
import os
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from dreamer_jax.config import Config, ConfigError, ModelConfig, from_json, model_from_dict
from dreamer_jax.convert.names import WeightError, check_names, expected_shapes
from dreamer_jax.files import umask, write_whole

WEIGHTS, CONFIG = "model.safetensors", "config.json"
RUN_CONFIG = "run.json"
"""The resolved config of the run that an export came from, for those that `convert` writes."""
CHECKSUMS = "crc32"
"""Key of the file's own metadata: a checksum of each array's bytes, as JSON."""


def save_safetensors(
    directory: str | Path, config: ModelConfig, arrays: Mapping[str, Any], merged: bool = False
) -> None:
    """Write the arrays (float32), a checksum of each, and the config into a folder.

    The config is written last: a folder that has one is whole.

    Raises:
        WeightError: a missing, extra or misshapen array, or one with numbers that are not finite, named.
    """
    check_names(arrays, expected_shapes(config, merged=merged))
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).unlink(missing_ok=True)
    # The writer reads memory as it lies, so the arrays must be contiguous.
    on_host = {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}
    _check_finite(on_host)
    with tempfile.TemporaryDirectory(prefix=f".{WEIGHTS}.", dir=directory) as scratch:
        draft = Path(scratch) / WEIGHTS
        save_file(on_host, draft, {CHECKSUMS: json.dumps({name: _checksum(array) for name, array in on_host.items()})})
        draft.chmod(0o666 & ~umask())  # the library's files are readable by their owner alone
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(directory / WEIGHTS)
    fields = {"model": dataclasses.asdict(config), "merged": merged, "dtype": "float32"}
    write_whole(directory / CONFIG, json.dumps(fields, indent=2) + "\n")


def load_safetensors(directory: str | Path) -> tuple[ModelConfig, dict[str, np.ndarray], bool]:
    """The config, the arrays by name, and whether they are merged (Eq. 8): what `build` takes.

    Raises:
        WeightError: an absent, unreadable or damaged file; a missing, extra or misshapen array, or one that does not
            hold finite floating-point numbers, named.
    """
    directory = Path(directory)
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise WeightError(f"'{directory}' has no {name}: not an export, or an unfinished one")
    config, merged = _fields(directory / CONFIG)
    try:
        with safe_open(directory / WEIGHTS, "numpy") as file:
            expected = json.loads((file.metadata() or {}).get(CHECKSUMS, "{}"))
        arrays = load_file(directory / WEIGHTS)
    except (SafetensorError, ValueError, TypeError) as error:  # of types that NumPy does not have, too
        raise WeightError(f"'{directory / WEIGHTS}' cannot be read: {type(error).__name__}: {error}") from error
    check_names(arrays, expected_shapes(config, merged=merged))
    for name, array in arrays.items():
        if not np.issubdtype(array.dtype, np.floating):
            raise WeightError(
                f"'{directory / WEIGHTS}': {name} holds {array.dtype}; weights are floating-point numbers"
            )
        if expected.get(name, "") not in ("", _checksum(array)):
            raise WeightError(f"'{directory / WEIGHTS}' is damaged: {name} is not what was written; export it again")
    _check_finite(arrays)
    return config, arrays, merged


def run_of_export(directory: str | Path) -> Config | None:
    """The config of the run that was exported, where the export has it.

    Raises:
        ConfigError: it cannot be read.
    """
    file = Path(directory) / RUN_CONFIG
    return from_json(file.read_bytes()) if file.is_file() else None


def _fields(path: Path) -> tuple[ModelConfig, bool]:
    """The model's config, and whether the weights are merged."""
    try:
        fields = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise WeightError(f"'{path}' is not JSON: {type(error).__name__}: {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("model"), dict):
        raise WeightError(f"'{path}' has no section 'model': not the config of an export")
    if not isinstance(fields.get("merged"), bool):
        raise WeightError(f"'{path}': 'merged' must be true or false, not {fields.get('merged')!r}")
    try:
        return model_from_dict(fields["model"]), fields["merged"]
    except ConfigError as error:
        raise WeightError(f"'{path}': {error}") from error


def _checksum(array: np.ndarray) -> str:
    return f"{zlib.crc32(array.data if array.size else b''):08x}"


def _check_finite(arrays: Mapping[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise WeightError(f"{name} has numbers that are not finite (nan or inf): these weights are of no use")


def unmerged(config: ModelConfig, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Merged arrays in the original form: shared experts of zero, which compute the same."""
    absent = {name: shape for name, shape in expected_shapes(config).items() if name not in arrays}
    return {**arrays, **{name: np.zeros(shape, np.float32) for name, shape in absent.items()}}
