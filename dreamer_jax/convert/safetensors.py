"""The exchange format on disk: `model.safetensors` with the arrays by name, `config.json` with the model's shape."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from dreamer_jax.config import ConfigError, ModelConfig, from_dict
from dreamer_jax.convert.names import WeightError, check_names, expected_shapes

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def save_safetensors(
    directory: str | Path, config: ModelConfig, arrays: Mapping[str, Any], merged: bool = False
) -> None:
    """Write the arrays (float32) and the config into a folder.

    The config is written last: a folder that has one is whole.

    Raises:
        WeightError: a missing, extra or misshapen array, named.
    """
    check_names(arrays, expected_shapes(config, merged=merged))
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).unlink(missing_ok=True)
    # The writer reads memory as it lies, so the arrays must be contiguous.
    on_host = {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}
    weights, fields = directory / f"{WEIGHTS}.tmp", directory / f"{CONFIG}.tmp"
    fields.write_text(
        json.dumps({"model": dataclasses.asdict(config), "merged": merged, "dtype": "float32"}, indent=2) + "\n"
    )
    save_file(on_host, weights)
    shutil.copymode(fields, weights)  # the library's files are readable by their owner alone
    weights.replace(directory / WEIGHTS)
    fields.replace(directory / CONFIG)


def load_safetensors(directory: str | Path) -> tuple[ModelConfig, dict[str, np.ndarray], bool]:
    """The config, the arrays by name, and whether they are merged (Eq. 8): what `build` takes.

    Raises:
        WeightError: an absent or unreadable file; a missing, extra or misshapen array, named.
    """
    directory = Path(directory)
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise WeightError(f"'{directory}' has no {name}: not an export, or an unfinished one")
    try:
        fields = json.loads((directory / CONFIG).read_text())
        config, merged = from_dict(ModelConfig, fields["model"], "model."), bool(fields["merged"])
        arrays = load_file(directory / WEIGHTS)
    except (json.JSONDecodeError, KeyError, ConfigError, SafetensorError) as error:
        raise WeightError(f"'{directory}' cannot be read: {type(error).__name__}: {error}") from error
    check_names(arrays, expected_shapes(config, merged=merged))
    return config, arrays, merged


def unmerged(config: ModelConfig, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Merged arrays in the original form: shared experts of zero, which compute the same."""
    absent = {name: shape for name, shape in expected_shapes(config).items() if name not in arrays}
    return {**arrays, **{name: np.zeros(shape, np.float32) for name, shape in absent.items()}}
