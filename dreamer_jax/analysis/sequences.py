"""The packed rows that a model is looked at with: the held-out ones of its run, or those of files."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dreamer_jax.analysis.captures import AnalysisError
from dreamer_jax.config import Config
from dreamer_jax.data.batch import Batch
from dreamer_jax.data.builder import prepare
from dreamer_jax.data.loader import empty_row, lay_out, rows
from dreamer_jax.data.template import Template
from dreamer_jax.data.tokenizer import Tokenizer
from dreamer_jax.evaluation.benchmarks.rows import Row, rows_of
from dreamer_jax.inference.likelihood import Window, packed
from dreamer_jax.training.checkpoint import CheckpointError, check_tokenizer

PAIRS = (("question", "answer"), ("instruction", "output"), ("prompt", "response"))
"""Fields that a row of a file may have in place of `text`."""


@dataclass(frozen=True)
class Sequences:
    """Rows by index, in an order that is the same every time."""

    rows: Any
    """Sized, by index: dicts of arrays [T], as `loader.lay_out` makes them."""
    context: int
    source: str

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, size: int) -> Iterator[Batch]:
        """All rows, `size` at a time; the last batch is filled up with empty ones."""
        for start in range(0, len(self), size):
            found = [self.rows[i] for i in range(start, min(start + size, len(self)))]
            found += [empty_row(self.context)] * (size - len(found))
            yield Batch(**{name: np.stack([row[name] for row in found]) for name in Batch._fields})


class First:
    """The first rows of a source that may have more."""

    def __init__(self, source: Any, most: int):
        self._source, self._count = source, min(len(source), most)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row: dict[str, np.ndarray] = self._source[index]
        return row


def held_out(config: Config, run: Path, most: int) -> Sequences:
    """At most so many of the held-out rows of the run in a folder; its data are prepared again if they are gone.

    Raises:
        AnalysisError: the run has none, or what is prepared now has another tokenizer than the run.
        DataError: the raw files or the prepared data cannot be read.
    """
    prepared = prepare(config)
    try:
        check_tokenizer(run, prepared.tokenizer)
    except CheckpointError:
        raise AnalysisError(
            f"'{prepared.directory}' is not what '{run}' was trained on: its tokenizer is another one. Start from the "
            f"folder where the run was started, or give files with --data"
        ) from None
    found = rows(prepared, config, "validation")
    if not len(found):
        raise AnalysisError("the run has no held-out rows: give files with --data")
    return Sequences(First(found, most), config.data.context, "held-out rows of the run")


def of_files(paths: Sequence[Path], tokenizer: Tokenizer, template: Template, context: int, most: int) -> Sequences:
    """At most so many rows with the documents of JSON-lines files, in their order.

    A document is the field `text`, or two fields of `PAIRS` in the layout of the model's training. One that is
    longer than the context is cut into pieces, each read without those before it.

    Raises:
        AnalysisError: a file without a document.
        EvaluationError: a file that cannot be read.
    """
    documents = itertools.chain.from_iterable(_documents(path, tokenizer, template) for path in paths)
    pieces = list(_enough((piece for document in documents for piece in _cut(document, context)), most * context))
    windows = [Window(i, piece["tokens"], 0) for i, piece in enumerate(pieces)]
    laid_out = [lay_out([pieces[w.text] for w in row], context) for row in packed(windows, context)[:most]]
    return Sequences(laid_out, context, ", ".join(path.name for path in paths))


def _enough(pieces: Iterator[dict[str, Any]], most: int) -> Iterator[dict[str, Any]]:
    """The first pieces that have so many tokens together; no more are put into tokens."""
    seen = 0
    for piece in pieces:
        yield piece
        seen += len(piece["tokens"])
        if seen >= most:
            return


def _documents(path: Path, tokenizer: Tokenizer, template: Template) -> Iterator[dict[str, Any]]:
    if path.suffix == ".csv":
        raise AnalysisError(f"'{path}': documents are read from JSON lines, not from CSV")
    found = False
    for row in rows_of(path, ()):
        if document := _document(row, tokenizer, template):
            found = True
            yield document
    if not found:
        pairs = ", ".join(f"{a} and {b}" for a, b in PAIRS)
        raise AnalysisError(f"'{path}': no row has a text; the field text is needed, or {pairs}")


def _document(row: Row, tokenizer: Tokenizer, template: Template) -> dict[str, Any]:
    """Its tokens and where the response starts; empty for a row without text."""
    if text := usable(row.get("text")):
        return {"tokens": [tokenizer.bos, *tokenizer.encode(text), tokenizer.eos], "response_start": 0}
    for first, second in PAIRS:
        prompt, response = usable(row.get(first)), usable(row.get(second))
        if prompt and response:
            given = [tokenizer.bos, *tokenizer.encode(template.asked(prompt.strip()))]
            answer = tokenizer.encode(template.answered(response.strip()))
            return {"tokens": [*given, *answer, tokenizer.eos], "response_start": len(given)}
    return {}


def usable(text: Any) -> str:
    """The text; empty for what is none, is blank or is no Unicode."""
    try:
        return text if isinstance(text, str) and text.strip() and text.encode() else ""
    except UnicodeEncodeError:
        return ""


def _cut(document: dict[str, Any], context: int) -> Iterator[dict[str, Any]]:
    tokens, response = document["tokens"], document["response_start"]
    for start in range(0, len(tokens), context):
        yield {"tokens": tokens[start : start + context], "response_start": max(0, response - start)}
