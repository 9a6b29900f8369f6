"""What a benchmark asks of a model, what comes back, and what it is worth."""

import abc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dreamer_jax.data.template import DEFAULT_TEMPLATE, Template
from dreamer_jax.errors import DreamerError

if TYPE_CHECKING:
    from dreamer_jax.evaluation.comparison.statistics import Estimate


class EvaluationError(DreamerError, ValueError):
    """An evaluation that cannot be done as asked; the message says what to change."""


@dataclass(frozen=True)
class Generate:
    """Continue a prompt."""

    prompt: str
    stop: tuple[str, ...]
    """The text ends before the first of these, which is not part of it; it also ends where the document does."""
    max_tokens: int


@dataclass(frozen=True)
class Choose:
    """How likely is each option after the context?"""

    context: str
    options: tuple[str, ...]
    """Each continues the context as it stands: it begins with the space that separates the two."""


@dataclass(frozen=True)
class Read:
    """How likely is a whole text, as a document of its own?"""

    text: str


Request = Generate | Choose | Read


class Generated(NamedTuple):
    """The answer to `Generate`."""

    text: str
    tokens: int
    finished: bool
    """False: cut at the largest number of tokens, or at the end of the context."""
    cut: bool = False
    """Whether the prompt did not fit the context and lost its beginning."""


class Likelihoods(NamedTuple):
    """The answer to `Choose`: a number for each option."""

    nats: tuple[float, ...]
    """Log-likelihoods, at most 0."""
    greedy: tuple[bool, ...]
    """Whether each token of the option was the likeliest."""
    tokens: tuple[int, ...]
    cut: bool = False


class Reading(NamedTuple):
    """The answer to `Read`."""

    nats: float
    """Negative log-likelihood of the text's tokens after the one that begins a document."""
    tokens: int


Outcome = Generated | Likelihoods | Reading


@dataclass(frozen=True)
class Item:
    """One request of a task with what is needed to judge its outcome."""

    id: str
    """Unique in its task and the same in every run: paired comparisons join on it."""
    request: Request
    gold: Any = None
    """What is right, as JSON can hold it: an answer, the index of an option."""
    solution: str = ""
    """The benchmark's own solution, in the place of a generated text."""
    group: str = ""
    """A part of the task that has scores of its own, such as a subject."""


@dataclass(frozen=True)
class Verdict:
    """What an outcome is worth."""

    scores: dict[str, float]
    """By metric."""
    extracted: dict[str, Any] = field(default_factory=dict)
    """What was found in a text, by how it was looked for, as JSON can hold it."""


@dataclass(frozen=True)
class Questions:
    """A task's items, read from its files."""

    items: list[Item]
    notes: dict[str, int] = field(default_factory=dict)
    """Rows that are odd or were left out, counted by what is wrong with them."""


@dataclass(frozen=True)
class Metric:
    """A number that a task reports."""

    about: str
    """One line."""
    chance: float | None = None
    """What guessing gives; None where guessing gives nothing."""


class Task(abc.ABC):
    """A benchmark."""

    name: str
    metrics: dict[str, Metric]
    """The first is the one that stands in tables."""

    @abc.abstractmethod
    def questions(self, root: Path, template: Template = DEFAULT_TEMPLATE) -> Questions:
        """The items, from the files below `root`, in the layout of the model's training.

        Raises:
            EvaluationError: a file is missing or cannot be read as what it should be; the message names it.
        """

    @abc.abstractmethod
    def verdicts(self, items: Sequence[Item], outcomes: Sequence[Outcome]) -> Iterator[Verdict]:
        """The verdict on each outcome, in order."""

    def add_up(self, scores: Mapping[str, Sequence[float]]) -> "dict[str, Estimate] | None":
        """The metrics, from the items' scores; None where each is the mean of the scores of its name."""
        return None
