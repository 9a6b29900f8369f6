"""MathQA: word problems with five options, which its files hold as one text that has to be taken apart."""

import ast
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dreamer_jax.data.template import DEFAULT_TEMPLATE, Template
from dreamer_jax.evaluation.benchmarks.mmlu import (
    choice_items,
    choice_metrics,
    choice_oddities,
    choice_verdicts,
    equal_to,
    lettered,
)
from dreamer_jax.evaluation.benchmarks.rows import Row, find_file, rows_of
from dreamer_jax.evaluation.requests import Choose, EvaluationError, Item, Outcome, Questions, Task, Verdict

FIELDS = ("Problem", "options", "correct")
LETTERS = "abcde"
UNREADABLE = "left out: the options are not five texts, or can be read in two ways"
NO_RIGHT_OPTION = "left out: the right option is none of a to e"
AS_LIST = "the options are written as a list in Python"
COMMA = "an option has a comma and a space in it"
LETTER_TWICE = "an option repeats its letter"
_WAYS = tuple(
    re.compile(r"\s*,\s*".join(rf"\s*{letter}\s*\)\s*(\S{some})" for letter in LETTERS), re.DOTALL)
    for some in (".*?", ".*")
)
"""Of all ways to take five options apart, that with the shortest ones, from the first on, and that with the longest."""


@dataclass(frozen=True)
class MathQa(Task):
    """Rows with a Problem, options and the correct letter, from mathqa/{split}.json.

    The cloze form is what lm-evaluation-harness 0.4.13 asks for in mathqa, but for rows whose options its regular
    expression takes apart wrongly: it cuts an option at a comma and a space ("6 , 030,053" becomes "6"), and leaves
    quotes and brackets in options that are written as a list. The lettered form has MMLU's layout, with A to E.

    Every odd row is counted. Left out are rows whose options cannot be read as five texts, or in two ways, and rows
    whose right option is none of the five. A letter that an option repeats ("b ) b ) 12") stays, as in the harness.
    Where two options have the same text and one of them is right, either counts.
    """

    name: str = "mathqa"
    split: str = "test"
    metrics = choice_metrics(0.2, "cloze")

    def questions(self, root: Path, template: Template = DEFAULT_TEMPLATE) -> Questions:
        """A cloze and a lettered item for each row that can be read, grouped by the row's category."""
        path = find_file(root, [f"mathqa/{self.split}.json", f"mathqa/{self.split}.jsonl"])
        items: list[Item] = []
        notes: Counter[str] = Counter()
        for number, row in enumerate(rows_of(path, FIELDS)):
            options = read_options(row["options"])
            letter = row["correct"].strip().lower()
            if options is None or letter not in set(LETTERS):
                notes[UNREADABLE if options is None else NO_RIGHT_OPTION] += 1
                continue
            right = equal_to(options, LETTERS.index(letter))
            notes.update(_oddities(row["options"], options))
            notes.update(choice_oddities(options, right))
            items += choice_items(_requests(row, options, template), str(number), right, str(row.get("category", "")))
        if not items:
            raise EvaluationError(f"'{path}': no row has options that can be read; get MathQA's own file")
        return Questions(items, dict(notes))

    def verdicts(self, items: Sequence[Item], outcomes: Sequence[Outcome]) -> Iterator[Verdict]:
        """See `choice_verdicts`."""
        return choice_verdicts(items, outcomes)


def mathqa_dev() -> MathQa:
    """The 4,475 questions of mathqa/dev.json: to choose by, not to report."""
    return MathQa("mathqa_dev", "dev")


def read_options(text: str) -> tuple[str, ...] | None:
    """The five options in a text such as "a ) 38 , b ) 27.675 , c ) 30 , d ) data inadequate , e ) none of these".

    None if they are not five, one is empty, or the text can be read in two ways, as "a ) ( a , b ) , b ) ..." can.
    """
    line = _joined(text)
    if line is None:
        return None
    matches = [way.fullmatch(line) for way in _WAYS]
    found = {tuple(option.strip() for option in match.groups()) for match in matches if match}
    return found.pop() if len(found) == 1 else None  # if the two are the same, there is no third


def _joined(text: str) -> str | None:
    """The options in one line, of those that are written as a list of five in Python."""
    if not text.lstrip().startswith("["):
        return text
    try:
        options = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    return " , ".join(map(str, options))


def _oddities(text: str, options: Sequence[str]) -> Iterator[str]:
    if text.lstrip().startswith("["):
        yield AS_LIST
    if any(re.search(r",\s", option) for option in options):
        yield COMMA
    if any(re.match(r"[a-e]\s*\)", option) for option in options):
        yield LETTER_TWICE


def _requests(row: Row, options: Sequence[str], template: Template) -> dict[str, Choose]:
    # Not mmlu.cloze: the harness leaves the white space around a problem.
    return {
        "cloze": Choose(template.asked(row["Problem"]), tuple(map(template.answered, options))),
        "letters": lettered("mathematics", row["Problem"], options),
    }
