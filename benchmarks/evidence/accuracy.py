"""How often a model is right: at every answer of a document its likeliest token is compared with the true one.

The true answers before are given (teacher forcing), as in training. The end of a document is no answer.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from benchmarks.evidence.setup import WORKED, Setup
from dreamer_jax.config import Source
from dreamer_jax.data.document import Document
from dreamer_jax.data.exercises import FamilyTask, family_task
from dreamer_jax.data.families import check_disjoint
from dreamer_jax.data.families.p_hop import NONE
from dreamer_jax.data.template import Template
from dreamer_jax.data.tokenizer import Tokenizer
from dreamer_jax.inference.decoder import ROWS, Decoder, on_devices, on_hosts, read_packed
from dreamer_jax.inference.likelihood import packed, packed_arrays, token_nats

Tests = Mapping[str, Sequence[Document]]
"""Documents by test."""


class Question(NamedTuple):
    """A document as a model reads it."""

    test: str
    tokens: list[int]
    places: list[int]
    """Where answers stand among the tokens."""
    is_none: list[bool]
    """Whether an answer says that there is none, which is counted apart."""


class Score(NamedTuple):
    """Answers of a test: those that were asked for, and the right ones."""

    right: int = 0
    asked: int = 0
    none_right: int = 0
    """Of answers that say that there is none."""
    none_asked: int = 0

    @property
    def accuracy(self) -> float:
        """Share of right answers; NaN where nothing was asked."""
        return self.right / self.asked if self.asked else float("nan")


def documents_of(setup: Setup) -> dict[str, list[Document]]:
    """All tests of a family. Those that show working say so in their names."""
    found: dict[str, list[Document]] = {}
    for source, task in _tasks(setup):
        ending = f" {WORKED}" if source.name == WORKED else ""
        tests = task.family.tests(task.settings, task.seed)
        found |= {name + ending: documents for name, documents in tests.items()}
    return found


def check_tests(setup: Setup) -> None:
    """Make sure that no test asks for what is trained on, or for what another test asks for.

    A test with working may have a problem of the same test without.

    Raises:
        DataError: one does.
    """
    tasks = list(_tasks(setup))
    trained = [task.family.train(task.settings, source.documents_per_task, task.seed) for source, task in tasks]
    tests = defaultdict[str, list[Document]](list)
    for _, task in tasks:
        for name, documents in task.family.tests(task.settings, task.seed).items():
            tests[name] += documents
    check_disjoint(itertools.chain(*trained), tests, tasks[0][1].family.same)  # all are of one family


def _tasks(setup: Setup) -> Iterator[tuple[Source, FamilyTask]]:
    for source in setup.sources:
        task = family_task(source.tasks[0])
        assert task, f"{source.tasks[0]} is none of our families"
        yield source, task


def first(tests: Tests, count: int, names: Sequence[str] = ()) -> dict[str, Sequence[Document]]:
    """The first documents of each of these tests, of all where none is named."""
    return {name: documents[:count] for name, documents in tests.items() if not names or name in names}


def questions_of(tests: Tests, tokenizer: Tokenizer, template: Template) -> list[Question]:
    """The documents of all tests, tokenized; an answer is one token."""
    return [
        _question(name, document, tokenizer, template) for name, documents in tests.items() for document in documents
    ]


def _question(test: str, document: Document, tokenizer: Tokenizer, template: Template) -> Question:
    turns = [(template.asked(document.prompt), template.answered(document.response)), *document.further]
    tokens, places = [tokenizer.bos], []
    for given, answered in turns:
        tokens += tokenizer.encode(given)
        places.append(len(tokens))
        [answer] = tokenizer.encode(answered)
        tokens.append(answer)
    return Question(test, tokens, places, [answered == NONE for _, answered in turns])


Row = Sequence[Question]


def scores(rows: Sequence[Row], right: Bool[np.ndarray, "N T"]) -> dict[str, Score]:
    """The score of each test.

    Args:
        rows: what was read.
        right: at each token, whether the likeliest token after it is the one that follows.
    """
    found: dict[str, Score] = {}
    for row, questions in enumerate(rows):
        for start, question in _placed(questions):
            hits = [bool(right[row, start + place - 1]) for place in question.places]
            found[question.test] = _added(found.get(question.test, Score()), hits, question.is_none)
    return found


def _placed(questions: Row) -> Iterator[tuple[int, Question]]:
    """Questions of a row, and where they begin."""
    start = 0
    for question in questions:
        yield start, question
        start += len(question.tokens)


def _added(score: Score, hits: Sequence[bool], is_none: Sequence[bool]) -> Score:
    of_none = [hit for hit, none in zip(hits, is_none, strict=True) if none]
    others = [hit for hit, none in zip(hits, is_none, strict=True) if not none]
    more = Score(sum(others), len(others), sum(of_none), len(of_none))
    return Score(*(a + b for a, b in zip(score, more, strict=True)))


def asked(decoder: Decoder, questions: Sequence[Question], context: int, batch: int) -> dict[str, Score]:
    """What a model makes of questions, `batch` rows of `context` tokens at a time (on a mesh: a multiple of it)."""
    count = -(-batch // decoder.parts) * decoder.parts
    rows = packed(questions, context)
    right = [
        np.asarray(_right(decoder, *packed_arrays(rows[at : at + count], count, context)))
        for at in range(0, len(rows), count)
    ]
    return scores(rows, np.concatenate(right))


@jax.jit
def _right(
    decoder: Decoder, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
) -> Bool[Array, "B T"]:
    """At each token, whether the likeliest token after it is the one that follows."""

    def local(decoder: Decoder, tokens: Array, positions: Array, segment_ids: Array) -> Any:
        hidden = read_packed(decoder, tokens, positions, segment_ids)
        return token_nats(decoder, hidden, jnp.roll(tokens, -1, axis=1))[1]

    right: Array = on_hosts(
        decoder, on_devices(local, decoder, given=(ROWS,) * 3, result=ROWS)(tokens, positions, segment_ids)
    )
    return right
