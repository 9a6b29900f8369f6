"""Task families: generated documents that are hard to answer in a single pass, with tests of their own.

A family is a set of pure functions. The same settings and seed give the same documents; training, validation and tests
of one seed belong together.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import attrgetter
from typing import Any, NamedTuple

from dreamer_jax.data.document import Document, prompt_digest
from dreamer_jax.data.families import dag_mod7, p_hop, two_hop
from dreamer_jax.data.files import DataError

VERSION = 3
"""Raise when the same settings and seed would give other documents."""


class Family(NamedTuple):
    """What each family offers."""

    settings: type[Any]
    """A frozen dataclass that checks its values when it is made; all have defaults."""
    train: Callable[[Any, int, int], Iterator[Document]]
    """Training documents of (settings, count, seed)."""
    validation: Callable[[Any, int, int], Iterator[Document]]
    """Held-out documents, likewise."""
    tests: Callable[[Any, int], dict[str, list[Document]]]
    """Documents of each test, of (settings, seed)."""
    words: Callable[[Any], tuple[str, ...]]
    """Every word of any of these documents, by the settings."""
    same: Callable[[Document], str] = attrgetter("given")
    """A key that two documents share if they ask for the same thing."""
    is_finite: bool = False
    """Whether the documents are finitely many: a count is then the most that are taken, and 0 takes all."""


FAMILIES: dict[str, Family] = {
    "two_hop": Family(
        two_hop.Settings, two_hop.train, two_hop.validation, two_hop.tests, two_hop.words, is_finite=True
    ),
    "p_hop": Family(p_hop.Settings, p_hop.train, p_hop.validation, p_hop.tests, p_hop.words, p_hop.same),
    "dag_mod7": Family(
        dag_mod7.Settings, dag_mod7.train, dag_mod7.validation, dag_mod7.tests, dag_mod7.words, dag_mod7.same
    ),
}
"""By the names that they have in `tasks` of a data source."""


def check_disjoint(
    train: Iterable[Document],
    tests: Mapping[str, Iterable[Document]],
    same: Callable[[Document], str] = attrgetter("given"),
) -> None:
    """Make sure that no test asks for what is trained on, or for what another test asks for.

    Args:
        train: all training documents.
        tests: the documents of each test by its name.
        same: when two documents ask for the same thing, as `Family.same` says it; by default, if they give the same.

    Raises:
        DataError: a test does; the message names it and its document.
    """
    seen = {prompt_digest(same(document)): "the training documents" for document in train}
    for name, documents in tests.items():
        for document in documents:
            where = seen.setdefault(prompt_digest(same(document)), name)
            if where != name:
                raise DataError(
                    f"the test {name} has a document that {where} have as well: {document.given[:80]!r}; draw one of "
                    f"the two with other settings or another seed"
                )
