"""From a benchmark's file to its rows: JSON lines, a JSON array or CSV, compressed or not, and every fault named."""

import csv
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

from dreamer_jax.data.files import HEAD, foreign
from dreamer_jax.data.rows import unpacked
from dreamer_jax.evaluation.requests import EvaluationError

ORIGINS = {
    "gsm8k": "https://github.com/openai/grade-school-math (grade_school_math/data)",
    "gsm8k_platinum": "https://huggingface.co/datasets/madrylab/gsm8k-platinum, its rows written as JSON lines",
    "math": "https://github.com/hendrycks/math, and MATH-500 from https://github.com/openai/prm800k (math_splits)",
    "mathqa": "https://math-qa.github.io (MathQA.zip)",
    "mmlu_math": "https://github.com/hendrycks/test (data.tar, in data/test)",
}
"""Where a benchmark's files come from, by the folder that they are looked for in."""
COMPRESSED = (".gz", ".zst")
"""Endings of compressed files. Whether one is compressed is told by its content."""
Row = dict[str, Any]


def read_rows(root: Path, places: Sequence[str], fields: Sequence[str]) -> list[Row]:
    """The rows of the first of several files that is there; `find_file` and `rows_of` in one.

    Args:
        root: the folder of all benchmarks.
        places: paths relative to `root`, the preferred one first.
        fields: what each row must have, as text. Other fields are as the file has them.

    Raises:
        EvaluationError: no such file; the file or a row is damaged, and the message names it.
    """
    return rows_of(find_file(root, places), fields)


def find_file(root: Path, places: Sequence[str]) -> Path:
    """The first of `places` below `root` that is a file as it stands, or with .gz or .zst after its name.

    Raises:
        EvaluationError: none is; the message says where to get it.
    """
    if path := first_file(root, places):
        return path
    folder = PurePath(places[0]).parts[0]
    remedy = f"get it from {ORIGINS[folder]}" if folder in ORIGINS else "put it there"
    raise EvaluationError(f"'{root}' has no {' or '.join(places)} (with .gz or .zst, or without); {remedy}")


def first_file(root: Path, places: Sequence[str]) -> Path | None:
    """As `find_file`, and None if there is no such file.

    Raises:
        EvaluationError: the folder cannot be read.
    """
    try:
        candidates = (root / f"{place}{ending}" for place in places for ending in ("", *COMPRESSED))
        return next((path for path in candidates if path.is_file()), None)
    except OSError as error:
        raise _unreadable(root, error) from error


def rows_of(path: Path, fields: Sequence[str]) -> list[Row]:
    """All rows of a file, in its order.

    Args:
        path: its ending tells what it is, .gz or .zst left aside: .jsonl or .json (one object a line, or an array of
            objects), or .csv without a header, whose columns are `fields`.
        fields: what each row must have, as text.

    Raises:
        EvaluationError: the file is empty or is something else; a row is damaged, and the message names it.
    """
    kind = (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix
    if kind not in (".jsonl", ".json", ".csv"):
        raise EvaluationError(f"'{path}': what it is must be told by its ending, .jsonl, .json or .csv")
    text = _text(path)
    places = _table(path, text, fields) if kind == ".csv" else _objects(path, text)
    rows = [_checked(row, fields, place) for place, row in places]
    if not rows:
        raise EvaluationError(f"'{path}' has no rows; fetch it again")
    return rows


def _text(path: Path) -> str:
    data = _unpacked(path)
    if kind := foreign(data[:HEAD]):
        raise EvaluationError(f"'{path}' has no rows, but is {kind}")
    try:
        return data.decode("utf-8-sig")  # Windows tools put a byte order mark in front
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise EvaluationError(f"'{path}', line {line}: not UTF-8 text; convert it with iconv -t UTF-8") from None


def _unpacked(path: Path) -> bytes:
    try:
        with unpacked(path) as stream:
            return stream.read()
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> EvaluationError:
    reason = getattr(error, "strerror", None) or error
    return EvaluationError(f"'{path}' cannot be read ({reason}); change its rights, or fetch it again")


def _table(path: Path, text: str, fields: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(place, row) of each row of a CSV file."""
    number = 0
    try:
        for number, cells in enumerate(csv.reader(io.StringIO(text, newline=""), strict=True), start=1):
            if cells and len(cells) != len(fields):
                columns = f"{len(fields)} columns ({', '.join(fields)})"
                raise EvaluationError(f"'{path}', row {number}: {len(cells)} columns; there must be {columns}")
            if cells:
                yield f"'{path}', row {number}", dict(zip(fields, cells, strict=True))
    except csv.Error as error:
        raise EvaluationError(f"'{path}', row {number + 1}: not CSV ({error}); fetch the file again") from None


def _objects(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """(place, row) of each value of a JSON array, or of each line."""
    if text.lstrip().startswith("["):
        for number, row in enumerate(_json(text, f"'{path}'"), start=1):
            yield f"'{path}', row {number}", row
        return
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines also splits at what JSON strings may hold
        if line.strip():
            yield f"'{path}', line {number}", _json(line, f"'{path}', line {number}")


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise EvaluationError(f"{place}: not JSON ({error.msg}, {at}column {error.colno}); fetch it again") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; lists in lists
        raise EvaluationError(f"{place}: JSON that cannot be read ({error}); fetch it again") from None


def _checked(row: Any, fields: Sequence[str], place: str) -> Row:
    if not isinstance(row, dict):
        raise EvaluationError(f"{place}: not a JSON object, but {type(row).__name__}; fetch the file again")
    for name in fields:
        if name not in row:
            raise EvaluationError(f"{place}: no field '{name}'; it has {', '.join(map(repr, list(row)[:10]))}")
        if not isinstance(row[name], str):
            raise EvaluationError(f"{place}: field '{name}' must be text, and is {type(row[name]).__name__}")
        if not _is_unicode(row[name]):
            raise EvaluationError(f"{place}: field '{name}' has half a surrogate pair, which is no Unicode text")
    return row


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
