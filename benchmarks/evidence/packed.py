"""The finished runs of a report in one file, so that another machine can write it again, or add runs to it.

A line of the file is the JSON object of a run: its name, and what its folder has. Of the records only the figures that
reports use are kept.
"""

import gzip
import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence.findings import CONFIG, FINAL, RECORDS, Finding
from dreamer_jax.files import write_whole
from dreamer_jax.values import ConfigError, require

REPORTED = re.compile(
    r"step|train/loss|validation/loss|accuracy/.*|router/\w+/gini|router/ea/unused|steps/skipped|speed/tokens_per_second"
)
"""Figures of the records that reports use."""


def pack(found: Sequence[Finding], path: Path) -> Path:
    """Write the finished runs to a .jsonl.gz file; runs that were packed again give the same bytes.

    Args:
        found: what the runs wrote.
        path: the file; it is replaced.
    """
    lines = [json.dumps(_packed(one)) + "\n" for one in found if one.final]
    write_whole(path, gzip.compress("".join(lines).encode(), mtime=0))
    return path


def _packed(one: Finding) -> dict[str, Any]:
    records = [{key: value for key, value in r.items() if REPORTED.fullmatch(key)} for r in one.records]
    config = one.config or {}
    config = config | {"out": ".", "data": config["data"] | {"prepared": "data"}}  # folders of this machine
    return {"name": one.run.name, RECORDS: records, FINAL: one.final, CONFIG: config}


def unpack(path: Path, family: str, out: Path) -> None:
    """Make folders of the runs in a packed file; those that are there are left as they are.

    Args:
        path: the file.
        family: whose runs it must have.
        out: folder of the family's runs.

    Raises:
        ConfigError: it is no such file, or has runs of another family.
    """
    for packed in _read(path):
        name, theirs = packed["name"], packed[FINAL]["family"]
        require(theirs == family, f"--finished '{path}': has runs of {theirs}, not of {family}")
        folder = out / name
        if folder.exists():
            continue
        folder.mkdir(parents=True)
        write_whole(folder / RECORDS, "".join(json.dumps(record) + "\n" for record in packed[RECORDS]))
        write_whole(folder / CONFIG, json.dumps(packed[CONFIG], indent=2) + "\n")
        write_whole(folder / FINAL, json.dumps(packed[FINAL], indent=1) + "\n")


def _read(path: Path) -> list[dict[str, Any]]:
    require(path.is_file(), f"--finished '{path}': no such file")
    what = f"--finished '{path}': not a file of packed runs, as a report writes them"
    try:
        runs = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ConfigError(f"{what} ({error})") from error
    parts = {"name", RECORDS, FINAL, CONFIG}
    require(all(isinstance(run, dict) and parts <= run.keys() for run in runs), what)
    return runs
