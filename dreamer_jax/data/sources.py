"""From raw files and generated exercises to documents: a prompt, a response, and the split they belong to.

Nothing is lost in silence: a row that cannot be used stops the preparation or, where the config says so, is counted.
"""

import hashlib
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from dreamer_jax.config import DataConfig, Source
from dreamer_jax.data.files import DataError as DataError
from dreamer_jax.data.files import check_file, expanded, reading
from dreamer_jax.data.layout import UnusableRow, exchange, text_of, values_at
from dreamer_jax.data.rows import Fault, Row, rows_of

Split = Literal["train", "validation"]

HELD_OUT_PERCENT = 2
"""Share of a source's documents that is held out where its config names no validation files."""
VALIDATION_SEED = 2**30
"""First seed of the held-out exercises. reasoning-gym draws exercise i from seed + i, so seeds must lie far apart."""


class Document(NamedTuple):
    """One exercise: the text that is given and the text to be produced."""

    prompt: str
    response: str


class Found(NamedTuple):
    """A document of a source."""

    split: Split
    document: Document
    origin: str
    """File and line or row, or the task that generated it."""


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
    """The documents of one file, each with its place."""
    found, first_fault = 0, ""
    for place, row in rows_of(path, _where(source)):
        document = row if isinstance(row, Fault) else _document(row, source)
        if isinstance(document, Document):
            found += 1
            yield document, place
            continue
        if data.bad_rows == "error":
            raise DataError(f"{place}: {document}; {bad_row_fix('fix the row')}")
        first_fault = first_fault or f"the first is {place.removeprefix(f'{path}, ')}: {document}"
        skipped[document.cause] += 1
    if not found:
        causes = f"skipped: {counts(skipped)}; " if skipped else ""
        raise DataError(
            f"{path}: not one usable row for data source '{source.name}'; {causes}{first_fault or 'it has no rows'}"
        )


def bad_row_fix(fix: str) -> str:
    """What to do about a row that cannot be used."""
    return f"{fix}, or leave such rows out (and count them) with --data.bad_rows skip"


def counts(skipped: Counter[str]) -> str:
    """Numbers of rows by cause, as text."""
    return ", ".join(f"{n} ({cause})" for cause, n in skipped.items())


def _document(row: Row, source: Source) -> Document | Fault:
    """What a row says, without what the source removes; or why it says nothing."""
    try:
        if source.turns_field:
            return _conversation(row, source)
        return Document(
            _text(row, source.prompt_field, "prompt_field of the source", source),
            _text(row, source.response_field, "response_field of the source", source),
        )
    except UnusableRow as unusable:
        return unusable.fault


def _conversation(row: Row, source: Source) -> Document:
    field = source.turns_field
    values = values_at(row, field, "turns_field of the source")
    question, answer = exchange(values[0] if values else [], field)
    return Document(_kept(question, field, source), _kept(answer, field, source))


def _text(row: Row, field: str, key: str, source: Source) -> str:
    """The first text of a field, which the config's `key` names."""
    values = values_at(row, field, key)
    return _kept(text_of(values[0], field) if values else "", field, source)


def _kept(text: str, field: str, source: Source) -> str:
    """The text without what the source removes."""
    if kept := _without(source, text):
        return kept
    raise UnusableRow(f"field '{field}' is empty")


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
