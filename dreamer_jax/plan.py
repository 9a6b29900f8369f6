"""What a config costs and whether it fits: `python -m dreamer_jax.plan --config configs/dr_da_2b.py --device h200`."""

import argparse
import difflib
import json
import math
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from dreamer_jax import config as configuration
from dreamer_jax.accounting import report
from dreamer_jax.accounting.config_file import check_new, config_text, write_new
from dreamer_jax.accounting.hardware import NAMES, hardware, this_machine
from dreamer_jax.accounting.match import TOLERANCE, match
from dreamer_jax.config import Config, ConfigError, MeshConfig, user_path
from dreamer_jax.door import guarded

NO_DEVICES = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}
"""Compiling for absent devices must not look for present ones, in the cloud neither. JAX reads this at its start."""

EPILOG = """any key of the config can be overridden: --train.microbatches 16 --model.depth 24

examples:
  python -m dreamer_jax.plan --config configs/dr_da_2b.py --device h200
  python -m dreamer_jax.plan --config configs/dr_da_2b.py --device v5e --mesh data=32,expert=8
  python -m dreamer_jax.plan --config configs/dr_da_2b.py --match configs/la_2b.py --out sized.py
  python -m dreamer_jax.plan --config configs/dr_da_2b.py --topology v5p:4x4x4 --mesh data=8,expert=8"""


def main(arguments: list[str] | None = None) -> int:
    """Parse, count, report."""
    return guarded(lambda: _planned(sys.argv[1:] if arguments is None else arguments), doing="--out")


def _planned(arguments: list[str]) -> int:
    parsed, overrides = _parser().parse_known_args(arguments)
    _check_options(parsed, overrides)
    return run(parsed, configuration.load(parsed.config, overrides))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dreamer_jax.plan",
        description="Parameters, FLOPs and memory of a config; sizing after another; compiling for absent devices.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="config file")
    parser.add_argument("--device", metavar="NAME", help=f"one of {', '.join(NAMES)}; without it this machine")
    parser.add_argument("--mesh", metavar="AXIS=N,...", help="devices along data, fsdp, expert; 1 if not named")
    parser.add_argument("--mfu", type=float, default=0.4, help="assumed model FLOP utilisation (default 0.4)")
    parser.add_argument(
        "--match",
        metavar="CONFIG",
        help="size F and E after this config; the sized config file goes to stdout and the tables to stderr, unless "
        "--out or --json is given",
    )
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="largest difference that is a match")
    parser.add_argument("--out", metavar="FILE", help="new file for the config that --match sizes")
    parser.add_argument(
        "--topology", metavar="SLICE", help="compile the train step for v5e:16x16, v5p:4x4x4, h200:8, ..."
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    return parser


def _check_options(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Raise ConfigError for values out of range, and for what is nearly an option of this command and no key."""
    own = [f"--{name}" for name in vars(parsed)]
    for word in overrides:
        name = word.partition("=")[0]
        nearest = difflib.get_close_matches(name, own, n=1, cutoff=0.8)
        if name.startswith("--") and "." not in name and nearest:
            raise ConfigError(f"unknown option '{name}'; did you mean '{nearest[0]}'?")
    if not 0 < parsed.mfu <= 1:
        raise ConfigError(f"--mfu {parsed.mfu}: must be above 0 and at most 1")
    if not 0 <= parsed.tolerance < 1:
        raise ConfigError(f"--tolerance {parsed.tolerance}: must be at least 0 and below 1")
    if parsed.out is not None and parsed.match is None:
        raise ConfigError("--out is the file for the config that --match sizes; give both, or neither")


def run(parsed: argparse.Namespace, config: Config) -> int:
    """Gather what was asked for, then print it."""
    record: dict[str, Any] = {}
    text = ""
    if parsed.match is not None:
        config, record["match"], text = _matched(parsed, config)
    compiled = None
    name = parsed.device
    if name is None and parsed.topology is not None:
        name = parsed.topology.partition(":")[0]
    device = this_machine() if name is None else hardware(name)
    if parsed.mesh is not None:
        config = replace(config, mesh=MeshConfig(**parse_mesh(parsed.mesh)))
    if parsed.topology is not None:
        compiled = _compiled(config, parsed.topology)
        mesh = compiled.mesh
    else:
        mesh = {axis: max(1, size) for axis, size in vars(config.mesh).items()}
    _check_rows(config, mesh)
    record |= report.plan_record(config, mesh, device, parsed.mfu)
    if compiled:
        record["compiled"] = report.compiled_record(config, mesh, device.platform, compiled)
    if parsed.out is not None:
        file = user_path(parsed.out, "--out")
        write_new(file, text)
        record["wrote"] = str(file)
    elif parsed.match is not None:
        record["sized"] = text
    if parsed.json:
        print(json.dumps(record))
    else:
        _show(parsed, record)
    return 0


def parse_mesh(text: str) -> dict[str, int]:
    """{"data": 8, "fsdp": 4, "expert": 1} of "data=8,fsdp=4".

    Raises:
        ConfigError: an unknown axis, one that is given twice, or no number.
    """
    mesh, given = ("data", "fsdp", "expert"), dict[str, int]()
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in mesh or not re.fullmatch("[1-9][0-9]{0,6}", size):
            raise ConfigError(f"--mesh {text}: '{part}' is not data=N, fsdp=N or expert=N with N from 1 to 1048576")
        if axis in given:
            raise ConfigError(f"--mesh {text}: {axis} is given twice")
        given[axis] = int(size)
    return {"data": 1, "fsdp": 1, "expert": 1} | given


def _check_rows(config: Config, mesh: dict[str, int]) -> None:
    parts = math.prod(mesh.values()) * config.train.microbatches
    if config.train.batch % parts:
        raise ConfigError(
            f"train.batch = {config.train.batch} rows do not divide into {math.prod(mesh.values())} devices x "
            f"{config.train.microbatches} microbatches; change --train.microbatches, --train.batch or --mesh"
        )


def _matched(parsed: argparse.Namespace, config: Config) -> tuple[Config, list[dict[str, Any]], str]:
    """The sized config, the turns that led to it, and the text of its file."""
    baseline, source = configuration.load(parsed.match), user_path(parsed.config, "config file")
    if parsed.out is None:
        file = Path(f"{source.stem}_as_{Path(parsed.match).stem}.py")
    else:
        file = user_path(parsed.out, "--out")
        check_new(file)
    moves = match(config.model, baseline.model, parsed.tolerance)
    sized = replace(config, model=moves[-1].config)
    named, text = config_text(sized, baseline, source, file, anywhere=parsed.out is None)
    return named, report.match_record(moves), text


def _compiled(config: Config, topology: str) -> Any:
    os.environ.update(NO_DEVICES)
    from dreamer_jax.training.ahead_of_time import compile_step  # late: only this needs JAX

    return compile_step(config, topology)


def _show(parsed: argparse.Namespace, record: dict[str, Any]) -> None:
    aside = "sized" in record  # then stdout is for the config
    console = Console(
        highlight=False, stderr=aside, width=None if (sys.stderr if aside else sys.stdout).isatty() else 110
    )
    if "match" in record:
        report.show_match(record["match"], parsed.config, parsed.match, console)
    report.show_plan(record, console)
    if "compiled" in record:
        report.show_compiled(record["compiled"], parsed.topology, console)
    if "wrote" in record:
        wrote = escape(record["wrote"])
        console.print(f"wrote {wrote}\nnext: python -m dreamer_jax.train --config {wrote}")
    if aside:
        console.print("next: keep the config that follows, with > FILE or with --out FILE")
        print(record["sized"], end="")


if __name__ == "__main__":
    sys.exit(main())
