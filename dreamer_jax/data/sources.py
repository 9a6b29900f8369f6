"""From raw files and generated exercises to documents: a prompt, a response, and the split they belong to.

Nothing is lost in silence: a row that cannot be used stops the preparation or, where the config says so, is counted.
"""

import difflib
import hashlib
import itertools
import json
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from dreamer_jax.config import DataConfig, Source
from dreamer_jax.data.files import BOM, HEAD, check_file, expanded, foreign, reading
from dreamer_jax.data.files import DataError as DataError

Split = Literal["train", "validation"]

HELD_OUT_PERCENT = 2
"""Share of a source's documents that is held out where its config names no validation files."""
VALIDATION_SEED = 2**30
"""First seed of the held-out exercises. reasoning-gym draws exercise i from seed + i, so seeds must lie far apart."""
ROW_BYTES = 1 << 24
"""Longest row. A longer one is hardly a row, and is never held in memory."""
KINDS = {dict: "an object", list: "a list", float: "a number", bool: "true or false", type(None): "null"}
"""What a JSON value is that is no text."""


class Document(NamedTuple):
    """One exercise: the text that is given and the text to be produced."""

    prompt: str
    response: str


class Found(NamedTuple):
    """A document of a source."""

    split: Split
    document: Document
    origin: str
    """File and line, or the task that generated it."""


class _UnusableRow(Exception):
    """A row that cannot become a document."""

    def __init__(self, cause: str, detail: str = ""):
        """`cause` is the same for all rows that share it, by which they are counted; `detail` is this row's."""
        self.cause = cause
        super().__init__(f"{cause} ({detail})" if detail else cause)


# A number is never used, and may have more digits than Python makes an integer of.
_DECODER = json.JSONDecoder(parse_int=float)


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
    root = expanded(data.root, "data.root")
    with reading(root, "data.root"):
        if root.is_dir():
            return root
    raise DataError(f"data.root = '{data.root}': '{root}' is not a folder; give the raw files' folder as --data.root")


def source_files(source: Source, data: DataConfig) -> list[Path]:
    """Every file of a source; empty for generated exercises.

    Raises:
        DataError: a file is missing, empty, no file, or not to be read.
    """
    paths = [data_root(data) / name for name in source.train + source.validation] if source.train else []
    for path in paths:
        check_file(path, _where(source))
    return paths


def _where(source: Source) -> str:
    """Which keys name the files of a source."""
    return f"data source '{source.name}' (see data.root and the source's file names)"


def documents(source: Source, data: DataConfig, skipped: Counter[str]) -> Iterator[Found]:
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
        for document, origin in _rows(data_root(data) / name, source, data, skipped):
            yield Found("train" if source.validation else _split_by_text(document), document, origin)
    for name in source.validation:
        for document, origin in _rows(data_root(data) / name, source, data, skipped):
            yield Found("validation", document, origin)


def _split_by_text(document: Document) -> Split:
    """A split that depends on the prompt alone, so that it outlives a reordering or a growth of the file."""
    return "validation" if prompt_digest(document.prompt) % 100 < HELD_OUT_PERCENT else "train"


def _rows(path: Path, source: Source, data: DataConfig, skipped: Counter[str]) -> Iterator[tuple[Document, str]]:
    """The documents of one JSON-lines file, each with its place."""
    found, first_fault = 0, "it has no rows"
    with reading(path, _where(source)), path.open("rb") as file:
        _check_kind(file, path, source)
        for number, line in _lines(file):
            origin = f"{path}, line {number}"
            try:
                document = _parse(line, source)
            except _UnusableRow as fault:
                if data.bad_rows == "error":
                    raise DataError(f"{origin}: {fault}; {bad_row_fix('fix the row')}") from None
                first_fault = f"the first is line {number}: {fault}" if first_fault == "it has no rows" else first_fault
                skipped[fault.cause] += 1
                continue
            found += 1
            yield document, origin
    if not found:
        causes = f"skipped: {counts(skipped)}; " if skipped else ""
        raise DataError(f"{path}: not one usable row for data source '{source.name}'; {causes}{first_fault}")


def bad_row_fix(fix: str) -> str:
    """What to do about a row that cannot be used."""
    return f"{fix}, or leave such rows out (and count them) with --data.bad_rows skip"


def counts(skipped: Counter[str]) -> str:
    """Numbers of rows by cause, as text."""
    return ", ".join(f"{n} ({cause})" for cause, n in skipped.items())


def _check_kind(file: BinaryIO, path: Path, source: Source) -> None:
    """Refuse a file that is no JSON lines at all, and go back to its beginning."""
    head = file.read(HEAD)
    file.seek(0)
    kind = foreign(head)
    first, _, rest = head.removeprefix(BOM).lstrip().partition(b"\n")
    if first.startswith(b"["):
        kind = "one JSON array; write one object a line: jq -c '.[]' FILE > FILE.jsonl"
    elif first.rstrip() == b"{" and rest.lstrip().startswith(b'"'):
        kind = "JSON over several lines; write one object a line: jq -c . FILE > FILE.jsonl"
    if kind:
        raise DataError(f"data source '{source.name}': '{path}' is no file of JSON lines, but {kind}")


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Numbered lines but blank ones; of a line that is too long only the beginning, one byte more than is allowed."""
    for number in itertools.count(1):
        line = file.readline(ROW_BYTES + 1)
        if not line:
            return
        rest = line
        while len(rest) > ROW_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(ROW_BYTES + 1)
        line = line.removeprefix(BOM)
        if line.strip():
            yield number, line


def _parse(line: bytes, source: Source) -> Document:
    if len(line) > ROW_BYTES:
        raise _UnusableRow(f"longer than {ROW_BYTES >> 20} MiB")
    if b"\0" in line:
        raise _UnusableRow("NUL bytes", "a crash leaves them behind; fetch the file again")
    try:
        row = _DECODER.decode(line.rstrip().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _UnusableRow("not UTF-8 text", f"from byte {error.start + 1} of the line on") from None
    except json.JSONDecodeError as error:
        raise _UnusableRow("not JSON", f"{error.msg.removesuffix(' at')} at character {error.pos + 1}") from None
    except RecursionError:
        raise _UnusableRow("JSON that is nested too deep") from None
    if not isinstance(row, dict):
        raise _UnusableRow("not a JSON object", KINDS.get(type(row), "a text"))
    return Document(
        _text(row, source.prompt_field, "prompt_field", source),
        _text(row, source.response_field, "response_field", source),
    )


def _text(row: dict[str, Any], name: str, key: str, source: Source) -> str:
    """The text of a field; `key` of the source names it."""
    if name not in row:
        raise _UnusableRow(f"no field '{name}'", _fields(row, name, key))
    value = row[name]
    if not isinstance(value, str):
        raise _UnusableRow(f"field '{name}' is not text", f"it is {KINDS[type(value)]}")
    value = _without(source, value)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _UnusableRow(f"field '{name}' has half a surrogate pair, which is no Unicode text") from None
    if not value:
        raise _UnusableRow(f"field '{name}' is empty")
    return value


def _fields(row: dict[str, Any], name: str, key: str) -> str:
    """What a row has instead of a field."""
    if not row:
        return "the row has no fields"
    nearest = difflib.get_close_matches(name, list(row), n=1)
    guess = f"; did you mean {nearest[0]!r}? Set {key} of the source" if nearest else f"; set {key} of the source"
    return f"the row has {', '.join(repr(field[:40]) for field in list(row)[:10])}{guess}"


def _without(source: Source, text: str) -> str:
    """The text without what the source removes and without white space around it."""
    return (re.sub(source.remove, "", text) if source.remove else text).strip()


def _exercises(source: Source, skipped: Counter[str]) -> Iterator[Found]:
    """Generated exercises, each prompt once over both splits."""
    seen: set[int] = set()
    held_out = -(-source.documents_per_task // 10)
    splits: tuple[tuple[Split, int, int], ...] = (
        ("train", source.documents_per_task, 0),
        ("validation", held_out, VALIDATION_SEED),
    )
    for split, count, seed in splits:
        for task in source.tasks:
            texts = _generate(task, count, seed + zlib.crc32(task.encode()) % VALIDATION_SEED)
            for number, (prompt, response) in enumerate(texts):
                document = Document(_without(source, prompt), _without(source, response))
                digest = prompt_digest(document.prompt)
                if digest in seen or not all(document):
                    skipped["generated twice" if digest in seen else "generated without a prompt or an answer"] += 1
                    continue
                seen.add(digest)
                yield Found(split, document, f"task '{task}', exercise {number} of {split}")


def _generate(task: str, count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Exercises of one reasoning-gym task: the worked answer where there is one, and the result after `####`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import reasoning_gym  # takes seconds, and only generated sources need it
        from reasoning_gym.factory import DATASETS
    if task not in DATASETS:
        raise DataError(f"reasoning-gym has no task '{task}'; it has {', '.join(sorted(DATASETS))}")
    try:
        generator = reasoning_gym.create_dataset(task, size=count, seed=seed)
    except Exception as error:  # each task has its own
        raise DataError(f"reasoning-gym's task '{task}' cannot be used ({error}); name another") from error
    for index in range(count):
        exercise = generator[index]
        answer = exercise["answer"]  # None where many are right, and the task only judges them
        result = "" if answer is None else f"#### {answer}"
        yield exercise["question"], exercise["metadata"].get("answer_cot") or result
