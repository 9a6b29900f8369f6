"""Fetching raw sets: where the files come to lie, that they come whole or not at all, and what is said if they do not.

A module in place of `datasets` has a hub of its own: no test needs a network, nor the seconds of that import.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dreamer_jax.data.files import DataError
from dreamer_jax.data.rows import rows_of
from dreamer_jax.preparation import fetch as fetching
from dreamer_jax.preparation.fetch import fetch
from dreamer_jax.preparation.pipeline import groups_of_sources
from dreamer_jax.preparation.raw import files_of
from dreamer_jax.preparation.recipe import RawSource, Recipe

SETS = {"algebra": 5, "geometry": 2}
"""Rows of the subsets of the hub's only set."""
SOURCE = RawSource(
    name="school", hub="someone/school", subset="algebra", prompt=("question",), response=("answer",), licence="MIT"
)


class DatasetsError(Exception):
    """As the module has it."""


class Stream:
    """Rows of a subset, one in a batch; `fails_at` breaks the connection."""

    def __init__(self, subset: str, fails_at: int | None):
        self._subset, self._fails_at = subset, fails_at
        self.info = SimpleNamespace(splits={"train": SimpleNamespace(num_examples=SETS[subset])})

    def with_format(self, form: str) -> "Stream":
        assert form == "arrow"
        return self

    def iter(self, batch_size: int) -> Iterator[pa.Table]:
        for number in range(SETS[self._subset]):
            if number == self._fails_at:
                raise ConnectionError("the hub does not answer\nany more")
            yield pa.table({"question": [f"{self._subset} {number}?"], "answer": [str(number)]})


class Hub(ModuleType):
    """What of `datasets` is used."""

    def __init__(self) -> None:
        super().__init__("datasets")
        self.exceptions = ModuleType("datasets.exceptions")
        self.exceptions.DatasetsError = DatasetsError  # type: ignore[attr-defined]
        self.fails_at: int | None = None
        self.refuses: Exception | None = None
        self.loaded: list[str] = []

    def get_dataset_config_names(self, hub: str) -> list[str]:
        if self.refuses:
            raise self.refuses
        return list(SETS)

    def load_dataset(self, hub: str, subset: str, *, split: str, streaming: bool) -> Stream:
        assert (hub, streaming) == ("someone/school", True)
        if split != "train":
            raise ValueError(f"Bad split: {split}. Available splits: ['train']")
        self.loaded.append(subset)
        return Stream(subset, self.fails_at)


@pytest.fixture
def hub(monkeypatch) -> Hub:
    module = Hub()
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setitem(sys.modules, "datasets.exceptions", module.exceptions)
    monkeypatch.setattr(fetching, "FILE_BYTES", 1)
    return module


def questions(source: RawSource, root: Path) -> list[str]:
    rows: list[Any] = [row for path in files_of(source, root) for _, row in rows_of(path, "sources")]
    return [row["question"] for row in rows]


def test_a_subset_comes_in_files_of_some_size_where_they_are_looked_for(hub, tmp_path) -> None:
    folder = fetch(SOURCE, tmp_path)
    assert folder == tmp_path / "someone" / "school" / "algebra" / "train"
    assert files_of(SOURCE, tmp_path) == [folder / f"{number:05d}.parquet" for number in range(5)]
    assert questions(SOURCE, tmp_path) == [f"algebra {number}?" for number in range(5)]


def test_small_batches_share_a_file(hub, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(fetching, "FILE_BYTES", 1 << 20)
    [path] = fetch(SOURCE, tmp_path).iterdir()
    assert pq.read_metadata(path).num_rows == 5


def test_without_a_subset_all_of_them_come(hub, tmp_path) -> None:
    fetch(replace(SOURCE, subset=""), tmp_path)
    expected = [f"algebra {number}?" for number in range(5)] + ["geometry 0?", "geometry 1?"]
    assert questions(replace(SOURCE, subset=""), tmp_path) == expected


def test_one_subset_is_not_taken_for_another(hub, tmp_path) -> None:
    fetch(SOURCE, tmp_path)
    other = replace(SOURCE, subset="geometry")
    assert files_of(other, tmp_path) == []
    fetch(other, tmp_path)
    assert questions(other, tmp_path) == ["geometry 0?", "geometry 1?"]
    assert len(questions(SOURCE, tmp_path)) == 5


def test_a_set_that_breaks_off_leaves_nothing_and_is_fetched_again(hub, tmp_path) -> None:
    hub.fails_at = 3
    with pytest.raises(DataError, match=r"not fetched \(the hub does not answer any more\); check the network"):
        fetch(SOURCE, tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    hub.fails_at = None
    assert len(list(fetch(SOURCE, tmp_path).iterdir())) == 5


def test_only_sets_that_are_not_there_are_fetched_and_only_if_asked_for(hub, tmp_path) -> None:
    recipe = Recipe(sources=(SOURCE,), root=str(tmp_path))
    with pytest.raises(DataError, match=r"someone/school\nput them there, fetch them with --work.fetch True"):
        groups_of_sources(recipe, {0: SOURCE})
    asked = replace(recipe, work=replace(recipe.work, fetch=True))
    for _ in range(2):
        [group] = groups_of_sources(asked, {0: SOURCE})["school"]
        assert len(group.paths) == 5
    assert hub.loaded == ["algebra"]


def test_an_unknown_subset_is_answered_with_those_there_are(hub, tmp_path) -> None:
    with pytest.raises(DataError, match=r"has no subset 'algebr'; it has \['algebra', 'geometry'\]"):
        fetch(replace(SOURCE, subset="algebr"), tmp_path)


@pytest.mark.parametrize(
    ("source", "refusal", "message"),
    [
        (replace(SOURCE, split="test"), None, r"Available splits: \['train'\]\); compare the source's hub, subset and"),
        (SOURCE, DatasetsError("no such set"), r"no such set\); compare the source's hub"),
        (SOURCE, FileNotFoundError("It is a gated dataset"), "ask for access at https.* export HF_TOKEN"),
        (replace(SOURCE, gated=True), OSError("401"), "ask for access at https.* export HF_TOKEN"),
        (SOURCE, ConnectionError(), r"\(ConnectionError\); check the network, or put the set's files in"),
    ],
)
def test_a_refusal_is_one_line_with_a_remedy(hub, tmp_path, source, refusal, message) -> None:
    hub.refuses = refusal
    with pytest.raises(DataError, match=message) as raised:
        fetch(source, tmp_path)
    assert "\n" not in str(raised.value)


def test_without_the_module_one_is_told_to_install_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "datasets.exceptions", raising=False)
    with pytest.raises(DataError, match="pip install datasets, or put the set's files in"):
        fetch(SOURCE, tmp_path)
