"""What a config costs and whether it fits: `python -m dreamer_jax.plan --config configs/dr_da_2b.py --device h200`."""

import argparse
import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from dreamer_jax import config as configuration
from dreamer_jax.accounting import report
from dreamer_jax.accounting.config_file import write_config
from dreamer_jax.accounting.hardware import NAMES, hardware, this_machine
from dreamer_jax.accounting.match import TOLERANCE, match
from dreamer_jax.config import Config, ConfigError, MeshConfig

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
  python -m dreamer_jax.plan --config configs/dr_da_2b.py --match configs/la_2b.py
  python -m dreamer_jax.plan --config configs/dr_da_2b.py --topology v5p:4x4x4 --mesh data=8,expert=8"""


def main(arguments: list[str] | None = None) -> int:
    """Parse, count, report."""
    try:
        parsed, overrides = _parser().parse_known_args(sys.argv[1:] if arguments is None else arguments)
        return run(parsed, configuration.load(parsed.config, overrides))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


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
    parser.add_argument("--match", metavar="CONFIG", help="size F and E after this config and write the result")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="largest difference that is a match")
    parser.add_argument("--out", metavar="FILE", help="config file that --match writes")
    parser.add_argument(
        "--topology", metavar="SLICE", help="compile the train step for v5e:16x16, v5p:4x4x4, h200:8, ..."
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    return parser


def run(parsed: argparse.Namespace, config: Config) -> int:
    """Gather what was asked for, then print it."""
    record: dict[str, Any] = {}
    if parsed.match:
        config, record["match"], record["wrote"] = _matched(parsed, config)
    compiled = None
    name = parsed.device or (parsed.topology or "").partition(":")[0]
    device = hardware(name) if name else this_machine()
    if parsed.mesh:
        config = replace(config, mesh=MeshConfig(**parse_mesh(parsed.mesh)))
    if parsed.topology:
        compiled = _compiled(config, parsed.topology)
        mesh = compiled.mesh
    else:
        mesh = {axis: max(1, size) for axis, size in vars(config.mesh).items()}
    _check_rows(config, mesh)
    record |= report.plan_record(config, mesh, device, parsed.mfu)
    if compiled:
        record["compiled"] = report.compiled_record(config, mesh, device.platform, compiled)
    if parsed.json:
        print(json.dumps(record))
    else:
        _show(parsed, record)
    return 0


def parse_mesh(text: str) -> dict[str, int]:
    """{"data": 8, "fsdp": 4, "expert": 1} of "data=8,fsdp=4".

    Raises:
        ConfigError: an unknown axis or no number.
    """
    mesh = {"data": 1, "fsdp": 1, "expert": 1}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in mesh or not size.isdigit():
            raise ConfigError(f"--mesh {text}: '{part}' is not data=N, fsdp=N or expert=N")
        mesh[axis] = int(size)
    return mesh


def _check_rows(config: Config, mesh: dict[str, int]) -> None:
    parts = math.prod(mesh.values()) * config.train.microbatches
    if config.train.batch % parts:
        raise ConfigError(
            f"train.batch = {config.train.batch} rows do not divide into {math.prod(mesh.values())} devices x "
            f"{config.train.microbatches} microbatches; change --train.microbatches, --train.batch or --mesh"
        )


def _matched(parsed: argparse.Namespace, config: Config) -> tuple[Config, list[dict[str, Any]], str]:
    baseline, source = configuration.load(parsed.match), Path(parsed.config)
    moves = match(config.model, baseline.model, parsed.tolerance)
    file = Path(parsed.out) if parsed.out else source.with_name(f"{source.stem}_as_{Path(parsed.match).stem}.py")
    config = write_config(replace(config, model=moves[-1].config), baseline, source, file)
    return config, report.match_record(moves), str(file)


def _compiled(config: Config, topology: str) -> Any:
    os.environ.update(NO_DEVICES)
    from dreamer_jax.training.ahead_of_time import compile_step  # late: only this needs JAX

    return compile_step(config, topology)


def _show(parsed: argparse.Namespace, record: dict[str, Any]) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    if "match" in record:
        report.show_match(record["match"], parsed.config, parsed.match, console)
    report.show_plan(record, console)
    if "compiled" in record:
        report.show_compiled(record["compiled"], parsed.topology, console)
    if "wrote" in record:
        console.print(f"wrote {record['wrote']}\nnext: python -m dreamer_jax.train --config {record['wrote']}")


if __name__ == "__main__":
    sys.exit(main())
