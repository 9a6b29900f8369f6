"""MATH: competition problems whose answer is a formula, compared as text and by what it means."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamer_jax.data.template import DEFAULT_TEMPLATE, Template
from dreamer_jax.evaluation.benchmarks.answers import math_answer, normalised
from dreamer_jax.evaluation.benchmarks.rows import Row, read_rows
from dreamer_jax.evaluation.benchmarks.verification import Comparison, check_installed, compare
from dreamer_jax.evaluation.requests import Generate, Generated, Item, Metric, Outcome, Questions, Task, Verdict

STOPS = ("Problem:", "</s>", "<|im_end|>")
"""The beginning of another problem in the harness's layout, and what ends a text in others."""
METRICS = {
    "verified": Metric("accuracy of the final answer, compared by math-verify or equal after normalisation"),
    "normalised": Metric("accuracy of the final answer, equal as text after normalisation"),
}
NO_ANSWER = "no answer in the solution, left out"


@dataclass(frozen=True)
class Math(Task):
    r"""The 5,000 test problems of MATH, from math/test.jsonl: fields problem and solution, with type or subject_dir.

    The right answer is the field `answer`, or, without one, what `math_answer` finds in the solution. 1,024 tokens hold
    99 % of the benchmark's own solutions with Llama 3's tokenizer, and 95 % with a vocabulary of 2,000 pieces.
    """

    name: str = "math"
    place: str = "math/test.jsonl"
    max_tokens: int = 1024
    metrics = METRICS

    def questions(self, root: Path, template: Template = DEFAULT_TEMPLATE) -> Questions:
        """An item for each row, named by its number and grouped by subject; problems are stripped, as for training."""
        check_installed()  # before answers are asked for that nobody could judge
        items: list[Item] = []
        notes: Counter[str] = Counter()
        for number, row in enumerate(read_rows(root, [self.place], ["problem", "solution"])):
            if (gold := _gold(row)) is None:
                notes[NO_ANSWER] += 1
                continue
            request = Generate(template.asked(row["problem"].strip()), template.stops(STOPS), self.max_tokens)
            items.append(Item(str(number), request, gold, row["solution"], _subject(row)))
        return Questions(items, dict(notes))

    def verdicts(self, items: Sequence[Item], outcomes: Sequence[Outcome]) -> Iterator[Verdict]:
        """Both metrics of each text, all comparisons made before the first; a text without an answer scores 0.

        What math-verify could not compare is "killed" or "failed" in `Verdict.extracted["verification"]`.

        Raises:
            EvaluationError: math-verify is not installed, or does not start.
        """
        answers = [_answer(item, outcome) for item, outcome in zip(items, outcomes, strict=True)]
        pairs = [(item.gold, answer) for item, answer in zip(items, answers, strict=True) if answer is not None]
        unlike = [pair for pair in dict.fromkeys(pairs) if normalised(pair[0]) != normalised(pair[1])]
        compared = dict(zip(unlike, compare(unlike), strict=True))
        for item, answer in zip(items, answers, strict=True):
            yield _verdict(answer, compared.get((item.gold, answer or "")))


def math500() -> Math:
    """The 500 test problems of MATH that Lightman et al. (2023) evaluate on, from math/math500.jsonl."""
    return Math("math500", "math/math500.jsonl")


def _gold(row: Row) -> str | None:
    answer = row.get("answer")
    return answer if isinstance(answer, str) and answer.strip() else math_answer(row["solution"])


def _subject(row: Row) -> str:
    """One name of a subject for all layouts: `counting_and_probability` for Counting & Probability."""
    name = row.get("subject_dir") or row.get("subject") or row.get("type") or ""
    return str(name).lower().replace(" & ", "_and_").replace(" ", "_")


def _answer(item: Item, outcome: Outcome) -> str | None:
    if not isinstance(outcome, Generated):
        raise TypeError(f"{item.id}: not a generated text")
    return math_answer(outcome.text)


def _verdict(answer: str | None, compared: Comparison | None) -> Verdict:
    """The verdict on an answer; one that needed no comparison is equal after normalisation."""
    alike = answer is not None and compared is None
    extracted: dict[str, Any] = {"answer": answer}
    if compared and compared.fault:
        extracted["verification"] = compared.fault
    return Verdict(
        {"verified": float(alike or bool(compared and compared.equal)), "normalised": float(alike)}, extracted
    )
