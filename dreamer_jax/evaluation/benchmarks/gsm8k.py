"""GSM8K: word problems whose answer is a number, judged by three ways to find it in a generated text."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dreamer_jax.data.template import DEFAULT_TEMPLATE, Template
from dreamer_jax.evaluation.benchmarks.answers import CALCULATOR_MARK, number_value, robust_number
from dreamer_jax.evaluation.benchmarks.rows import read_rows
from dreamer_jax.evaluation.requests import Generate, Generated, Item, Metric, Outcome, Questions, Task, Verdict

STOPS = ("Question:", "</s>", "<|im_end|>")
"""Those of lm-evaluation-harness 0.4.13."""
METRICS = {
    "robust": Metric("accuracy of the number given as the answer, however it is written"),
    "strict": Metric("accuracy of the number after '#### ', the harness's strict-match"),
    "flexible": Metric("accuracy of the last digits, the harness's flexible-extract; it misreads $18.00 and 18..."),
}
LONGEST = 1000
"""Characters of a number; no answer is as long, and Python reads no number of thousands of digits."""
NO_ANSWER = "no number after '####', left out"


@dataclass(frozen=True)
class Gsm8k(Task):
    """The 1,319 test problems of GSM8K, from gsm8k/test.jsonl: fields question and answer, as published and on the hub.

    The requests are those of the harness's `gsm8k` without examples. 512 tokens hold all of the benchmark's own answers
    with Llama 3's tokenizer (at most 311 with calculator marks, 242 without), and 99.9 % of them (without marks) with a
    vocabulary of 2,000 pieces.
    """

    name: str = "gsm8k"
    place: str = "gsm8k/test.jsonl"
    max_tokens: int = 512
    metrics = METRICS

    def questions(self, root: Path, template: Template = DEFAULT_TEMPLATE) -> Questions:
        """An item for each row, named by its number; solutions are without calculator marks, as models are trained."""
        items: list[Item] = []
        notes: Counter[str] = Counter()
        for number, row in enumerate(read_rows(root, [self.place], ["question", "answer"])):
            gold = _compared(strict_number(row["answer"]) or "")
            if not re.fullmatch(r"-?\d*\.?\d+", gold):
                notes[NO_ANSWER] += 1
                continue
            request = Generate(template.asked(row["question"]), template.stops(STOPS), self.max_tokens)
            solution = CALCULATOR_MARK.sub("", row["answer"]).strip()
            items.append(Item(str(number), request, gold, solution))
        return Questions(items, dict(notes))

    def verdicts(self, items: Sequence[Item], outcomes: Sequence[Outcome]) -> Iterator[Verdict]:
        """The three metrics of each text; a text without a number scores 0."""
        for item, outcome in zip(items, outcomes, strict=True):
            if not isinstance(outcome, Generated):
                raise TypeError(f"{item.id}: not a generated text")
            robust = robust_number(outcome.text)
            exact = {"strict": strict_number(outcome.text), "flexible": flexible_number(outcome.text)}
            scores = {"robust": float(robust is not None and _same_value(robust, item.gold))}
            scores |= {way: float(found is not None and _compared(found) == item.gold) for way, found in exact.items()}
            yield Verdict(scores, {"robust": robust, **exact})


def gsm8k_platinum() -> Gsm8k:
    """The test problems of GSM8K whose errors were corrected (Vendrow et al., 2025), from gsm8k_platinum/test.jsonl."""
    return Gsm8k("gsm8k_platinum", "gsm8k_platinum/test.jsonl")


def strict_number(text: str) -> str | None:
    """What the harness's strict-match finds: digits, dots and commas after the first `#### `, or None."""
    found = re.search(r"#### (-?[0-9.,]+)", text)
    return found[1] if found else None


def flexible_number(text: str) -> str | None:
    """What the harness's flexible-extract finds: the last run of `$`, digits, dots and commas, or None."""
    found = re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", text)
    return found[-1] if found else None


def _same_value(number: str, gold: str) -> bool:
    return len(number) < LONGEST and number_value(number) == number_value(gold)


def _compared(number: str) -> str:
    """What of a number the harness compares: neither commas, nor `$`, nor a dot at the end."""
    return re.sub(r"\.$", "", re.sub(r"[,$]", "", number))
