"""From raw files and generated exercises to documents: a prompt, a response, and the split they belong to.

Nothing is lost in silence: a row that cannot be used stops the preparation or, where the config says so, is counted.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from dreamer_jax.config import DataConfig, Source
from dreamer_jax.data.document import Document as Document
from dreamer_jax.data.document import Found as Found
from dreamer_jax.data.document import Split as Split
from dreamer_jax.data.document import prompt_digest as prompt_digest
from dreamer_jax.data.document import without
from dreamer_jax.data.exercises import exercises
from dreamer_jax.data.files import DataError as DataError
from dreamer_jax.data.files import check_file, expanded, reading
from dreamer_jax.data.layout import UnusableRow, exchange, text_of, values_at
from dreamer_jax.data.rows import Fault, Row, rows_of

HELD_OUT_PERCENT = 2
"""Share of a source's documents that is held out where its config names no validation files."""


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
        yield from exercises(source, skipped)
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
    return "validation" if prompt_digest(document.given) % 100 < HELD_OUT_PERCENT else "train"


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
    if kept := without(source, text):
        return kept
    raise UnusableRow(f"field '{field}' is empty")
