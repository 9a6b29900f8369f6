"""From raw files and generated exercises to documents: a prompt, a response, and the split they belong to.

Nothing is lost in silence: a row that cannot be used stops the preparation or, where the config says so, is counted.
"""

import hashlib
import json
import os
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from dreamer_jax.config import DataConfig, Source
from dreamer_jax.errors import DreamerError

Split = Literal["train", "validation"]

CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")
HELD_OUT_PERCENT = 2
"""Share of a source's documents that is held out where its config names no validation files."""
VALIDATION_SEED = 2**30
"""First seed of the held-out exercises. reasoning-gym draws exercise i from seed + i, so seeds must lie far apart."""


class DataError(DreamerError, ValueError):
    """Data that cannot be used; the message names the file, the line, the cause and the fix."""


class Document(NamedTuple):
    """One exercise: the text that is given and the text to be produced."""

    prompt: str
    response: str


class _UnusableRow(Exception):
    """A row that cannot become a document; its text is the cause, the same for all rows that share it."""


def render_prompt(prompt: str) -> str:
    """The text a model reads before it answers, in training and in generation alike.

    The layout is the one that evaluation harnesses use for GSM8K, so that benchmarks meet the model's own format.
    """
    return f"Question: {prompt}\nAnswer:"


def render_response(response: str) -> str:
    """The text that follows `render_prompt`: it begins with the space that separates the two."""
    return f" {response}"


def prompt_digest(prompt: str) -> int:
    """64 bits of the prompt without regard to case and white space: what makes two prompts the same."""
    normalised = " ".join(prompt.casefold().split())
    return int.from_bytes(hashlib.blake2b(normalised.encode(), digest_size=8).digest(), "little")


def data_root(data: DataConfig) -> Path:
    """The folder of the raw files.

    Raises:
        DataError: an unset environment variable, or no such folder.
    """
    text = os.path.expanduser(os.path.expandvars(data.root))
    if "$" in text:
        raise DataError(
            f"data.root = '{data.root}': the environment variable is not set; export it or give --data.root"
        )
    if not text or not Path(text).is_dir():
        raise DataError(
            f"data.root = '{data.root}': '{text}' is not a folder; give the raw files' folder as --data.root"
        )
    return Path(text)


def source_files(source: Source, data: DataConfig) -> list[Path]:
    """Every file of a source; empty for generated exercises.

    Raises:
        DataError: a file is missing or empty.
    """
    paths = [data_root(data) / name for name in source.train + source.validation] if source.train else []
    for path in paths:
        if not path.is_file():
            raise DataError(
                f"data source '{source.name}': file '{path}' does not exist; see data.root and the file names"
            )
        if path.stat().st_size == 0:
            raise DataError(f"data source '{source.name}': file '{path}' is empty; fetch it again")
    return paths


def documents(source: Source, data: DataConfig, skipped: Counter[str]) -> Iterator[tuple[Split, Document]]:
    """All documents of a source with their splits, training documents first where the source says which they are.

    Args:
        source: the set of documents.
        data: how rows are treated.
        skipped: receives the number of rows left out, by cause.

    Raises:
        DataError: a file or row that cannot be used.
    """
    if source.tasks:
        yield from _exercises(source, skipped)
        return
    source_files(source, data)
    for name in source.train:
        for document in _rows(data_root(data) / name, source, data, skipped):
            yield ("train" if source.validation else _split_by_text(document)), document
    for name in source.validation:
        for document in _rows(data_root(data) / name, source, data, skipped):
            yield "validation", document


def _split_by_text(document: Document) -> Split:
    """A split that depends on the prompt alone, so that it outlives a reordering or a growth of the file."""
    return "validation" if prompt_digest(document.prompt) % 100 < HELD_OUT_PERCENT else "train"


def _rows(path: Path, source: Source, data: DataConfig, skipped: Counter[str]) -> Iterator[Document]:
    """The documents of one JSON-lines file."""
    found = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                document = _parse(line, source, data)
            except _UnusableRow as cause:
                if data.bad_rows == "error":
                    raise DataError(
                        f"{path}, line {number}: {cause}; fix the row, or leave such rows out (and count them) with "
                        "--data.bad_rows skip"
                    ) from None
                skipped[str(cause)] += 1
                continue
            found += 1
            yield document
    if not found:
        raise DataError(f"{path}: not one usable row for data source '{source.name}'; {_causes(skipped)}")


def _causes(skipped: Counter[str]) -> str:
    return "skipped: " + ", ".join(f"{n} ({cause})" for cause, n in skipped.items()) if skipped else "it has no rows"


def _parse(line: bytes, source: Source, data: DataConfig) -> Document:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise _UnusableRow("not UTF-8 text") from None
    except json.JSONDecodeError:
        raise _UnusableRow("not JSON") from None
    if not isinstance(row, dict):
        raise _UnusableRow("not a JSON object")
    return Document(_text(row, source.prompt_field, data), _text(row, source.response_field, data))


def _text(row: dict[str, object], key: str, data: DataConfig) -> str:
    if key not in row:
        raise _UnusableRow(f"no field '{key}'")
    value = row[key]
    if not isinstance(value, str):
        raise _UnusableRow(f"field '{key}' is not text")
    if data.calculator_marks == "drop":
        value = CALCULATOR_MARK.sub("", value)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _UnusableRow(f"field '{key}' has half a surrogate pair, which is no Unicode text") from None
    if not value.strip():
        raise _UnusableRow(f"field '{key}' is empty")
    return value.strip()


def _exercises(source: Source, skipped: Counter[str]) -> Iterator[tuple[Split, Document]]:
    """Generated exercises, each prompt once over both splits."""
    seen: set[int] = set()
    held_out = -(-source.documents_per_task // 10)
    splits: tuple[tuple[Split, int, int], ...] = (
        ("train", source.documents_per_task, 0),
        ("validation", held_out, VALIDATION_SEED),
    )
    for split, count, seed in splits:
        for task in source.tasks:
            for document in _generate(task, count, seed + zlib.crc32(task.encode()) % VALIDATION_SEED):
                digest = prompt_digest(document.prompt)
                if digest in seen:
                    skipped["generated twice"] += 1
                    continue
                seen.add(digest)
                yield split, document


def _generate(task: str, count: int, seed: int) -> Iterator[Document]:
    """Exercises of one reasoning-gym task: the worked answer where there is one, and the result after `####`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import reasoning_gym  # takes seconds, and only generated sources need it
        from reasoning_gym.factory import DATASETS
    if task not in DATASETS:
        raise DataError(f"reasoning-gym has no task '{task}'; it has {', '.join(sorted(DATASETS))}")
    generator = reasoning_gym.create_dataset(task, size=count, seed=seed)
    for index in range(count):
        exercise = generator[index]
        response = exercise["metadata"].get("answer_cot") or f"#### {exercise['answer']}"
        yield Document(exercise["question"].strip(), response.strip())
