"""Rows to look at: what each stage cut, changed and dropped, a few of each."""

from pathlib import Path

import pytest

from dreamer_jax.data.files import DataError
from dreamer_jax.preparation.inspection import shown
from tests.preparation.conftest import Run, changed

pytestmark = pytest.mark.xdist_group("preparation")


def titles(lines: list[str]) -> list[str]:
    return [line.strip() for line in lines if line.startswith("\n")]


def test_every_cause_has_a_few_rows(run: Run):
    lines = list(shown(run.recipe, 2))
    wanted = {
        "strip, chats: marked traces cut",
        "strip, chats: dropped: a trace without an end",
        "strip, chats: dropped: a proof question without a proof",
        "clean, stories: dropped: a placeholder for an answer",
        "clean, plain: dropped: empty question or answer",
        "unique, chats: dropped: duplicate",
        "unique, chats: dropped: near duplicate",
        "unique, stories: dropped: enough answers to its question",
        "unique, stories: dropped: its question is held out in another source",
        "unique, plain: dropped: beyond the cap of its source",
        "decontaminate, stories: shelves, whole prompt",
        "decontaminate, plain: chats, contained",
    }
    assert wanted <= set(titles(lines))
    start = lines.index("\nstrip, chats: marked traces cut")
    assert [line.split(":")[0] for line in lines[start + 1 : start + 9]] == [
        *("  1.", "    question", "    cut", "    left"),
        *("  2.", "    question", "    cut", "    left"),
    ]
    assert lines[start + 9].startswith("\n")


def test_as_many_rows_are_shown_as_asked_from_as_many_shards_as_it_takes(run: Run):
    lines = list(shown(run.recipe, 33))
    start = lines.index("\nunique, plain: dropped: beyond the cap of its source")
    rest = lines[start + 1 :]
    end = next((place for place, line in enumerate(rest) if line.startswith("\n")), len(rest))
    assert 20 < sum(line.endswith(".") and line.strip(" .").isdigit() for line in rest[:end]) <= 33


def test_long_texts_are_indented(run: Run):
    lines = list(shown(run.recipe, 1))
    start = lines.index("\ndecontaminate, plain: chats, contained")
    answer = next(line for line in lines[start:] if line.startswith("    answer: "))
    assert answer.count("\n      ") == 2


def test_a_source_that_is_left_out_is_not_shown(run: Run):
    lines = list(shown(changed(run.recipe, exclude=("chats",)), 1))
    assert not [title for title in titles(lines) if ", chats:" in title]
    assert titles(lines)


def test_nothing_done_is_an_error_with_a_remedy(run: Run, tmp_path: Path):
    with pytest.raises(DataError, match="has nothing to look at; run the same command without --inspect first"):
        list(shown(changed(run.recipe, out=str(tmp_path)), 1))
