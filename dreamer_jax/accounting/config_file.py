"""The text of a config file for a sized model: the file that it came from, with `replace` of what differs."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from dreamer_jax.accounting.flops import generated_flops
from dreamer_jax.accounting.params import parameters
from dreamer_jax.config import Config, ConfigError, load

_TEMPLATE = '''\
"""{variant} at depth {depth}, {billions:.2f}B parameters: {source}, sized after {baseline} (section 3.8).

    python -m dreamer_jax.train --config {file}

{parameters:,} parameters ({more_parameters:+.3%} of the baseline's) and {gflops:.4f} GFLOPs for a generated token
({more_flops:+.3%}).
"""

import runpy
from dataclasses import replace
from pathlib import Path

from dreamer_jax.config import {imports}


def get_config() -> Config:
    """What differs from {source}."""
    source = {path}
    base = runpy.run_path(str(source))["get_config"]()
    return {replacement}
'''


def config_text(
    config: Config, baseline: Config, source: Path, file: Path, *, anywhere: bool = False
) -> tuple[Config, str]:
    """The text of a file whose get_config() gives `config`: what `source` gives but for the keys in which they differ.

    The run is named after the file, or the sized run would share its folder with that of `source`; a name that already
    differs from the source's stays.

    Args:
        config: what it gives.
        baseline: what `config` was matched to, for the figures in the docstring.
        source: the file that `config` came from.
        file: where the text will be.
        anywhere: the text finds `source` from any folder, but not once `source` is moved; else from that of `file`, and
            both may be moved together.

    Returns:
        The config in the file, and its text.
    """
    base = load(source)
    named = dataclasses.replace(config, name=file.stem) if config.name == base.name else config
    whole = source.resolve()
    path = f"Path({_literal(whole.as_posix())})"
    if not anywhere:
        relative = Path(os.path.relpath(whole, file.parent.resolve())).as_posix()
        path = f"Path(__file__).resolve().parent / {_literal(relative)}"
    return named, _text(named, base, baseline, source, file, path)


def check_new(file: Path) -> None:
    """Raise ConfigError if the file is there, or its folder is not."""
    if not file.parent.is_dir():
        raise ConfigError(f"there is no folder '{file.parent}' for '{file.name}': make it, or give another")
    if file.is_dir():
        raise ConfigError(f"'{file}' is a folder: give a file in it")
    if os.path.lexists(file):
        raise ConfigError(f"'{file}' exists and is not overwritten: choose another name")


def write_new(file: Path, text: str) -> None:
    """Write a file that is not there.

    Raises:
        ConfigError: as `check_new`.
    """
    check_new(file)
    with file.open("x", encoding="utf-8") as out:
        try:
            out.write(text)
            out.flush()
        except OSError:
            file.unlink(missing_ok=True)  # half a config helps nobody, and would be in the way
            raise


def _text(config: Config, base: Config, baseline: Config, source: Path, file: Path, path: str) -> str:
    ours, theirs = parameters(config.model).total, parameters(baseline.model).total
    flops, baseline_flops = generated_flops(config.model).total, generated_flops(baseline.model).total
    return _TEMPLATE.format(
        variant=config.model.variant,
        depth=config.model.depth,
        billions=ours / 1e9,
        source=_in_docstring(source.name),
        baseline=baseline.name,
        file=_in_docstring(file.as_posix()),
        parameters=ours,
        more_parameters=ours / theirs - 1,
        gflops=flops / 1e9,
        more_flops=flops / baseline_flops - 1,
        imports="Config" if config.data.sources == base.data.sources else "Config, Source",
        path=path,
        replacement=_replacement(config, base, "base", "    "),
    )


def _replacement(value: Any, base: Any, expression: str, indent: str) -> str:
    """Source text of `value`: `base`, which `expression` gives, with `replace` of the fields that differ."""
    if not dataclasses.is_dataclass(value):
        return _literal(value)
    names = [field.name for field in dataclasses.fields(value)]
    changed = [name for name in names if getattr(value, name) != getattr(base, name)]
    lines = [f"{indent}    {expression},\n"]
    for name in changed:
        inner = _replacement(getattr(value, name), getattr(base, name), f"{expression}.{name}", indent + "    ")
        lines.append(f"{indent}    {name}={inner},\n")
    return f"replace(\n{''.join(lines)}{indent})"


def _in_docstring(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _literal(value: Any) -> str:
    """Source text of a string (in double quotes, as in the configs), a number or a tuple of sources."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
