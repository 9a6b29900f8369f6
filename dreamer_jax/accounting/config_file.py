"""A config file for a sized model: the file that it came from, with `replace` of what differs."""

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
    source = Path(__file__).resolve().parent / {path}
    base = runpy.run_path(str(source))["get_config"]()
    return {replacement}
'''


def write_config(config: Config, baseline: Config, source: Path, file: Path) -> Config:
    """Write `file`, whose get_config() gives `config`: what `source` gives but for the keys in which they differ.

    The run is named after the file, or the sized run would share its folder with that of `source`; a name that already
    differs from the source's stays. `baseline` is what `config` was matched to, for the figures in the docstring.

    Returns:
        The config in the file.

    Raises:
        ConfigError: `file` exists.
    """
    base = load(source)
    named = dataclasses.replace(config, name=file.stem) if config.name == base.name else config
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(_text(named, base, baseline, source, file))
    except FileExistsError:
        raise ConfigError(f"'{file}' exists and is not overwritten: choose another name") from None
    return named


def _text(config: Config, base: Config, baseline: Config, source: Path, file: Path) -> str:
    ours, theirs = parameters(config.model).total, parameters(baseline.model).total
    flops, baseline_flops = generated_flops(config.model).total, generated_flops(baseline.model).total
    return _TEMPLATE.format(
        variant=config.model.variant,
        depth=config.model.depth,
        billions=ours / 1e9,
        source=source.name,
        baseline=baseline.name,
        file=file.as_posix(),
        parameters=ours,
        more_parameters=ours / theirs - 1,
        gflops=flops / 1e9,
        more_flops=flops / baseline_flops - 1,
        imports="Config" if config.data.sources == base.data.sources else "Config, Source",
        path=_literal(Path(os.path.relpath(source.resolve(), file.parent.resolve())).as_posix()),
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


def _literal(value: Any) -> str:
    """Source text of a string (in double quotes, as in the configs), a number or a tuple of sources."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
