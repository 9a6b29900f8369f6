"""The finished runs of a comparison in one file, so that another machine can write its report again, or add runs to it.

A line of the file is the JSON object of a run: its name, and what its folder has. Of the records only the figures that
reports use are kept.
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence.campaign import changed_setting
from benchmarks.evidence.findings import CONFIG, FINAL, RECORDS, Finding
from benchmarks.evidence.setup import Run
from dreamer_jax.config import Config, ConfigError
from dreamer_jax.files import write_whole
from dreamer_jax.values import require

REPORTED = re.compile(
    r"step|train/loss|validation/loss|accuracy/.*|router/\w+/gini|router/ea/unused|steps/skipped|speed/tokens_per_second"
)
"""Figures of the records that reports use."""
PARTS = {"name": str, RECORDS: list, FINAL: dict, CONFIG: dict}
"""What a line has."""


def pack(found: Sequence[Finding], path: Path) -> Path:
    """Write the finished runs to a .jsonl.gz file, if there are any. Other runs that it has stay.

    Args:
        found: what the runs wrote.
        path: the file.

    Raises:
        ConfigError: there is a file, and it is none of packed runs.
    """
    lines = _read(path) if path.is_file() else {}
    lines |= {one.run.name: _packed(one) for one in found if one.final}
    if lines:
        text = "".join(json.dumps(line) + "\n" for line in lines.values())
        write_whole(path, gzip.compress(text.encode(), mtime=0))
    return path


def _packed(one: Finding) -> dict[str, Any]:
    assert one.config is not None, f"'{one.run.name}' is finished and has no {CONFIG}"
    records = [{key: value for key, value in r.items() if REPORTED.fullmatch(key)} for r in one.records]
    config = one.config | {"out": ".", "data": one.config["data"] | {"prepared": "data"}}  # folders of this machine
    return {"name": one.run.name, RECORDS: records, FINAL: one.final, CONFIG: config}


def unpack(path: Path, runs: Sequence[Run], out: Path, config: Callable[[Run], Config]) -> list[Run]:
    """Make the folders of those runs that a packed file has. What has been trained here is left as it is.

    Args:
        path: the file.
        runs: all that are wanted, of one family.
        out: folder of the family's runs.
        config: of a run.

    Returns:
        The runs that the file has.

    Raises:
        ConfigError: it is no such file, has runs of another family, or was trained with another setup.
    """
    require(path.is_file(), f"--finished '{path}': no such file")
    packed = _read(path)
    for name, line in packed.items():
        theirs = line[FINAL].get("family")
        require(theirs == runs[0].family, f"--finished '{path}': {name} is of {theirs}, not of {runs[0].family}")
    taken = [run for run in runs if run.name in packed]
    for run in taken:
        changed = changed_setting(json.dumps(packed[run.name][CONFIG]), config(run))
        require(not changed, f"--finished '{path}': {run.name} was trained with another setup ({changed})")
    for run in taken:
        folder = out / run.name
        if not (folder / FINAL).exists() and not (folder / "checkpoints").exists():
            _write(packed[run.name], folder)
    return taken


def _write(line: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / RECORDS, "".join(json.dumps(record) + "\n" for record in line[RECORDS]))
    write_whole(folder / CONFIG, json.dumps(line[CONFIG], indent=2) + "\n")
    write_whole(folder / FINAL, json.dumps(line[FINAL], indent=1) + "\n")  # last, since it means that all is there


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """The lines by the names of their runs."""
    what = f"'{path}': not a file of packed runs, as a report writes them"
    try:
        lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ConfigError(f"{what} ({error})") from error
    require(bool(lines) and all(map(_is_whole, lines)), what)
    return {line["name"]: line for line in lines}


def _is_whole(line: object) -> bool:
    return isinstance(line, dict) and all(isinstance(line.get(part), kind) for part, kind in PARTS.items())
