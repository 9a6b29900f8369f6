"""The mathematics of MMLU: four options each, asked for by letter as the harness does, and by their texts."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dreamer_jax.data.template import DEFAULT_TEMPLATE, Template
from dreamer_jax.evaluation.benchmarks.rows import Row, find_file, first_file, rows_of
from dreamer_jax.evaluation.requests import (
    Choose,
    EvaluationError,
    Item,
    Likelihoods,
    Metric,
    Outcome,
    Questions,
    Task,
    Verdict,
)

SUBJECTS = (
    "abstract_algebra",
    "college_mathematics",
    "elementary_mathematics",
    "high_school_mathematics",
    "high_school_statistics",
)
LETTERS = "ABCDE"
FIELDS = ("question", "A", "B", "C", "D", "answer")
EQUAL = "two options are equal"
EQUAL_AND_RIGHT = "two options are equal and right: either counts"


def choice_metrics(chance: float, first: str) -> dict[str, Metric]:
    """The metrics of `choice_verdicts`; `first` stands in tables."""
    metrics = {
        "letters": Metric("accuracy of the likeliest letter, the options listed in the prompt", chance),
        "cloze": Metric("accuracy of the likeliest option, none of them in the prompt", chance),
        "cloze_per_byte": Metric("the same by log-likelihood per UTF-8 byte of the option", chance),
    }
    return {first: metrics[first]} | metrics


@dataclass(frozen=True)
class Mmlu(Task):
    """Five subjects, from mmlu_math/{subject}_{split}.csv: no header; question, four options and the right letter.

    The lettered form is what lm-evaluation-harness 0.4.13 asks for in mmlu_abstract_algebra and the others, without
    examples. The cloze form has the layout that models are trained with here, without the white space around question
    and options. Where two options have the same text and one of them is right, either counts.
    """

    name: str = "mmlu_math"
    split: str = "test"
    metrics = choice_metrics(0.25, "letters")

    def questions(self, root: Path, template: Template = DEFAULT_TEMPLATE) -> Questions:
        """A lettered and a cloze item for each row, grouped by subject."""
        items: list[Item] = []
        notes: Counter[str] = Counter()
        self._check_split(root)
        for subject in SUBJECTS:
            path = find_file(root, [_place(subject, self.split)])
            for number, row in enumerate(rows_of(path, FIELDS)):
                options, right = _options(row, f"'{path}', row {number + 1}")
                notes.update(choice_oddities(options, right))
                requests = {
                    "letters": lettered(subject.replace("_", " "), row["question"], options),
                    "cloze": cloze(row["question"], options, template),
                }
                items += choice_items(requests, f"{subject}/{number}", right, subject)
        return Questions(items, dict(notes))

    def verdicts(self, items: Sequence[Item], outcomes: Sequence[Outcome]) -> Iterator[Verdict]:
        """See `choice_verdicts`."""
        return choice_verdicts(items, outcomes)

    def _check_split(self, root: Path) -> None:
        """Tell of a folder that has no file of this split, but those of the other one."""
        for split, task in (("val", "mmlu_math_val"), ("test", "mmlu_math")):
            mine, other = (first_file(root, [_place(subject, s) for subject in SUBJECTS]) for s in (self.split, split))
            if other and not mine:
                raise EvaluationError(
                    f"'{other.parent}' has only the {split} files of MMLU; evaluate them as {task}, or put the "
                    f"{self.split} files there"
                )


def mmlu_math_val() -> Mmlu:
    """The 115 questions of the val files: to choose by, not to report."""
    return Mmlu("mmlu_math_val", "val")


def lettered(subject: str, question: str, options: Sequence[str]) -> Choose:
    """How likely is each letter, after a list of the options? The options are printed as they stand."""
    letters = LETTERS[: len(options)]
    listed = "".join(f"{letter}. {option}\n" for letter, option in zip(letters, options, strict=True))
    title = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    return Choose(f"{title}{question.strip()}\n{listed}Answer:", tuple(f" {letter}" for letter in letters))


def cloze(question: str, options: Sequence[str], template: Template) -> Choose:
    """How likely is the text of each option, after the question alone?"""
    return Choose(template.asked(question.strip()), tuple(template.answered(option.strip()) for option in options))


def choice_items(requests: dict[str, Choose], id: str, right: Sequence[int], group: str) -> Iterator[Item]:
    """An item for each form of one question; `right` are the places of the options that count."""
    for form, request in requests.items():
        yield Item(f"{form}/{id}", request, gold=list(right), group=group)


def choice_oddities(options: Sequence[str], right: Sequence[int]) -> Iterator[str]:
    """What is odd about a question's options, if anything."""
    if len(set(options)) < len(options):
        yield EQUAL
    if len(right) > 1:
        yield EQUAL_AND_RIGHT


def equal_to(options: Sequence[str], index: int) -> tuple[int, ...]:
    """The places of all options that have the text of one of them."""
    return tuple(i for i, option in enumerate(options) if option == options[index])


def choice_verdicts(items: Sequence[Item], outcomes: Sequence[Outcome]) -> Iterator[Verdict]:
    """Whether the likeliest option is right. Of options that are equally likely, the first is taken.

    A lettered item is judged by log-likelihood ("letters"), a cloze item by log-likelihood ("cloze", the harness's acc)
    and by that per UTF-8 byte of the option without the white space in front ("cloze_per_byte", the harness's
    acc_bytes; its acc_norm counts characters, which is the same for ASCII).

    Raises:
        EvaluationError: a log-likelihood is not a number.
    """
    for item, outcome in zip(items, outcomes, strict=True):
        if not isinstance(item.request, Choose) or not isinstance(outcome, Likelihoods):
            raise TypeError(f"{item.id}: not a choice between options")
        if any(nats != nats for nats in outcome.nats):
            raise EvaluationError(f"{item.id}: a log-likelihood is not a number; the model's weights are broken")
        if item.id.startswith("letters/"):
            chosen = {"letters": _likeliest(outcome.nats)}
        else:
            sizes = [len(option.lstrip().encode()) for option in item.request.options]
            rates = [nats / size for nats, size in zip(outcome.nats, sizes, strict=True)]
            chosen = {"cloze": _likeliest(outcome.nats), "cloze_per_byte": _likeliest(rates)}
        yield Verdict({metric: float(index in item.gold) for metric, index in chosen.items()}, dict(chosen))


def _likeliest(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)  # the first of equal ones


def _place(subject: str, split: str) -> str:
    return f"mmlu_math/{subject}_{split}.csv"


def _options(row: Row, place: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The four options of a row, and the places of those that are right."""
    letters = FIELDS[1:5]
    options = tuple(row[letter] for letter in letters)
    if not all(text.strip() for text in (row["question"], *options)):
        raise EvaluationError(f"{place}: the question or an option is empty; fetch the file again")
    answer = row["answer"].strip()
    if answer not in letters:
        raise EvaluationError(f"{place}: the answer is {answer[:20]!r}, and must be A, B, C or D; fetch the file again")
    return options, equal_to(options, letters.index(answer))
