"""How well a model predicts texts: nats per token and per byte, and perplexity, over whole documents."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dreamer_jax.data.template import DEFAULT_TEMPLATE, Template
from dreamer_jax.evaluation.benchmarks.rows import Row, first_file, rows_of
from dreamer_jax.evaluation.comparison.statistics import Estimate, paired_rate_difference
from dreamer_jax.evaluation.requests import (
    EvaluationError,
    Item,
    Metric,
    Outcome,
    Questions,
    Read,
    Reading,
    Task,
    Verdict,
)

HELD_OUT = "maths_college/validation.jsonl"
"""Part of ajibawa-2023/Maths-College, on which the paper reports perplexity, if it is there."""
ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst")
NO_TEXT = "left out: no text"
METRICS = {
    "perplexity": Metric("exp of the nats per token; models compare only with the same tokenizer"),
    "nats_per_token": Metric("negative log-likelihood per token"),
    "nats_per_byte": Metric("negative log-likelihood per UTF-8 byte of the text, whatever the tokenizer"),
    "bits_per_byte": Metric("the same in bits"),
}


@dataclass(frozen=True)
class PerplexityTask(Task):
    """Texts of JSON-lines files, each row a document of its own.

    A row's text is its field `text`, as it stands; or, of rows with `instruction` and `output` (the fields of
    Maths-College), the two in the layout that models are trained with.

    The scores of a document are the terms of sums, not metrics: its "nats", "tokens" and "bytes" (of its text in
    UTF-8). `perplexity` makes the metrics of them.
    """

    files: tuple[Path, ...] = ()
    """Without any: maths_college/validation.jsonl below the root, or else all .jsonl files in ppl and its folders."""
    name: str = "ppl"
    metrics = METRICS

    def questions(self, root: Path, template: Template = DEFAULT_TEMPLATE) -> Questions:
        """An item for each row with a text, grouped by file. Rows without one are counted."""
        items: list[Item] = []
        notes: Counter[str] = Counter()
        for place, path in _files(self.files, root).items():
            texts = _texts(path, template)
            notes[NO_TEXT] += texts.count("")
            items += [Item(f"{place}/{i}", Read(text), group=place) for i, text in enumerate(texts) if text]
        return Questions(items, {cause: n for cause, n in notes.items() if n})

    def verdicts(self, items: Sequence[Item], outcomes: Sequence[Outcome]) -> Iterator[Verdict]:
        """The nats, tokens and bytes of each document.

        Raises:
            EvaluationError: a log-likelihood is not a number.
        """
        for item, outcome in zip(items, outcomes, strict=True):
            if not isinstance(item.request, Read) or not isinstance(outcome, Reading):
                raise TypeError(f"{item.id}: not the reading of a text")
            if math.isnan(outcome.nats):
                raise EvaluationError(f"{item.id}: the log-likelihood is not a number; the model's weights are broken")
            size = len(item.request.text.encode())
            yield Verdict({"nats": outcome.nats, "tokens": float(outcome.tokens), "bytes": float(size)})

    def add_up(self, scores: Mapping[str, Sequence[float]]) -> dict[str, Estimate]:
        """Ratios of sums over documents."""
        return perplexity(scores["nats"], scores["tokens"], scores["bytes"])


def perplexity(nats: Sequence[float], tokens: Sequence[float], text_bytes: Sequence[float]) -> dict[str, Estimate]:
    """The metrics of a set of documents, by name.

    Each is a sum over documents divided by another, so that a long document weighs more than a short one. Tokens of one
    document depend on each other; the 95 % intervals therefore take documents for the independent sample, by the delta
    method for a ratio of sums. That is a large-sample rule: below some thirty documents the intervals are too narrow,
    and of one document they are infinite.

    Args:
        nats: negative log-likelihoods of documents.
        tokens: how many tokens were predicted in each.
        text_bytes: their lengths in UTF-8.

    Raises:
        EvaluationError: no documents, or not a single token or byte.
    """
    per_token, per_byte = _rate(nats, tokens), _rate(nats, text_bytes)
    return {
        "perplexity": _mapped(_exp, per_token),
        "nats_per_token": per_token,
        "nats_per_byte": per_byte,
        "bits_per_byte": _mapped(lambda nats: nats / math.log(2), per_byte),
    }


def _rate(nats: Sequence[float], sizes: Sequence[float]) -> Estimate:
    rate = paired_rate_difference(nats, [0.0] * len(nats), sizes)
    return Estimate(rate.value, max(rate.low, 0.0), rate.high, rate.n)


def _mapped(function: Callable[[float], float], estimate: Estimate) -> Estimate:
    """The estimate of a rising function of what is estimated."""
    return Estimate(function(estimate.value), function(estimate.low), function(estimate.high), estimate.n)


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def _files(files: Sequence[Path], root: Path) -> dict[str, Path]:
    """The files to read, by the names that their documents go by: the same wherever the files lie."""
    if files:
        named = {path.name: path for path in files}
        if len(named) < len(files):
            raise EvaluationError("two of the texts' files have the same name, by which their scores go; rename one")
        return named
    if held_out := first_file(root, [HELD_OUT]):
        return {HELD_OUT: held_out}
    folder = root / "ppl"
    found = sorted(path for path in folder.rglob("*") if path.name.endswith(ENDINGS) and path.is_file())
    if not found:
        raise EvaluationError(
            f"'{root}' has neither {HELD_OUT} nor a .jsonl file in ppl; put texts there, "
            'one {"text": ...} a line, or name a file with --text'
        )
    return {path.relative_to(root).as_posix(): path for path in found}


def _texts(path: Path, template: Template) -> list[str]:
    """The texts of all rows, "" for a row without one."""
    rows = rows_of(path, ())
    texts = [_text(row, template) for row in rows]
    if not any(texts):
        fields = ", ".join(map(repr, list(rows[0])[:10])) or "no fields"
        raise EvaluationError(f"'{path}': no row has a text; the first has {fields}, and {{\"text\": ...}} is needed")
    return texts


def _text(row: Row, template: Template) -> str:
    """The text of a row; empty if it has none."""
    if isinstance(text := row.get("text"), str):
        return _usable(text)
    instruction, output = row.get("instruction"), row.get("output")
    if isinstance(instruction, str) and isinstance(output, str) and _usable(output):
        return _usable(template.asked(instruction.strip()) + template.answered(output.strip()))
    return ""


def _usable(text: str) -> str:
    """The text, but for one that is blank or no Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return ""
    return text if text.strip() else ""
