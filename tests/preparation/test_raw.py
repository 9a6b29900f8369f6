"""From files of a raw set to questions and answers: which files, which rows, and what is wrong with others."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dreamer_jax.config import ConfigError
from dreamer_jax.data.files import DataError
from dreamer_jax.data.layout import UnusableRow
from dreamer_jax.preparation import raw
from dreamer_jax.preparation.dedup import RANK_BITS
from dreamer_jax.preparation.raw import (
    ROW_BITS,
    Group,
    files_of,
    folder_of,
    groups_of,
    raw_root,
    read_group,
    texts_of,
)
from dreamer_jax.preparation.recipe import Keep, RawSource
from dreamer_jax.preparation.stage import Row, rows
from tests.preparation.conftest import draft, write_jsonl

QUESTIONS = {"files": ("*.jsonl",), "prompt": ("q",), "response": ("a",)}


def source(**values: Any) -> RawSource:
    return RawSource(**{"name": "set", **QUESTIONS, **values})


def texts(row: dict[str, Any], **values: Any) -> list[tuple[str, str]]:
    return list(texts_of(row, source(**values), Counter()))


def read(
    tmp_path: Path, lines: list[Any], shard_rows: int = 100, priority: int = 0, number: int = 0, **values: Any
) -> tuple[list[list[Row]], Counter[str], dict[str, Any]]:
    """The shards that come of a file of JSON lines, the counts, and the samples."""
    path = write_jsonl(tmp_path / "x.jsonl", lines)
    folder = draft(tmp_path)
    counts, _ = read_group(folder, source(**values), priority, Group(number, (path,)), shard_rows)
    samples = json.loads((folder / "samples.json").read_text())
    return [list(rows(shard)) for shard in sorted(folder.glob("*.parquet"))], counts, samples


# Which files


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")


def found(root: Path, **values: Any) -> list[str]:
    return [path.relative_to(root).as_posix() for path in files_of(source(**values), root)]


@pytest.mark.parametrize("folder", ["owner/Set-1", "owner__Set-1", "Set-1", "set"])
def test_a_set_lies_in_a_folder_that_is_named_as_the_hub_or_the_recipe_names_it(tmp_path: Path, folder: str):
    touch(tmp_path, f"{folder}/a.parquet", "other/b.parquet")
    assert found(tmp_path, hub="owner/Set-1", files=()) == [f"{folder}/a.parquet"]


def test_a_set_that_is_not_there_would_lie_where_the_hub_says(tmp_path: Path):
    assert found(tmp_path, hub="owner/Set-1", files=()) == []
    assert folder_of(source(hub="owner/Set-1", files=()), tmp_path) == tmp_path / "owner/Set-1"


def test_only_files_with_rows_are_taken(tmp_path: Path):
    rows = ["a.parquet", "b.jsonl", "c.JSON", "d.ndjson.gz", "e.jsonl.zst"]
    touch(tmp_path, *(f"set/{name}" for name in [*rows, "README.md", "dataset_infos.json", ".cache/x.json", "f.txt"]))
    assert found(tmp_path, hub="owner/set", files=()) == [f"set/{name}" for name in rows]


def test_patterns_are_looked_for_below_the_root_and_each_file_is_taken_once(tmp_path: Path):
    touch(tmp_path, "b/1.txt", "a/1.jsonl", "a/2.jsonl")
    assert found(tmp_path, files=("b/*", "a/1*", "a/*.jsonl", "nothing/*")) == ["a/1.jsonl", "a/2.jsonl", "b/1.txt"]


HUB = ["algebra/test-0.parquet", "algebra/train-0.parquet", "geometry/train-0.parquet"]


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"subset": "algebra"}, HUB[1:2]),
        ({"subset": "geometry", "split": "test"}, []),  # its only file is of another split
        ({"split": "train"}, HUB[1:]),
        ({"split": "tra"}, []),  # all names tell that they are of other splits
        ({"subset": "alg"}, []),  # all names tell that they are of others
    ],
)
def test_subset_and_split_choose_files_where_names_tell(tmp_path: Path, values: dict[str, str], wanted: list[str]):
    touch(tmp_path, *(f"set/{name}" for name in HUB))
    assert found(tmp_path, hub="o/set", files=(), **values) == [f"set/{name}" for name in wanted]


def test_a_file_whose_name_tells_no_split_is_taken_and_one_of_another_split_never(
    tmp_path: Path,
):
    touch(tmp_path, "set/test.jsonl")
    assert found(tmp_path, hub="o/set", files=()) == []
    touch(tmp_path, "set/rows.jsonl")
    assert found(tmp_path, hub="o/set", files=()) == ["set/rows.jsonl"]


def test_small_files_are_read_together_and_a_large_one_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(raw, "BYTES_AT_ONCE", 100)
    paths = [tmp_path / f"{n}.jsonl" for n in range(5)]
    for path, size in zip(paths, (40, 50, 20, 300, 10), strict=True):
        path.write_bytes(b"x" * size)
    groups = groups_of(paths)
    assert [group.paths for group in groups] == [tuple(paths[:2]), (paths[2],), (paths[3],), (paths[4],)]
    assert [group.number for group in groups] == [0, 1, 2, 3]


def test_an_empty_file_is_an_error(tmp_path: Path):
    (tmp_path / "x.jsonl").touch()
    with pytest.raises(DataError, match=r"x\.jsonl' is empty"):
        groups_of([tmp_path / "x.jsonl"])


def test_a_root_that_is_no_folder_is_an_error_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NO_SUCH_VARIABLE", raising=False)
    for root, said in (("$NO_SUCH_VARIABLE", "is not set"), (str(tmp_path / "x"), "is not a folder"), ("", "is empty")):
        with pytest.raises(DataError, match=f"{said}.*--root"):
            raw_root(root)


@pytest.mark.parametrize("pattern", ["/data/x.jsonl", "a/**b/x.jsonl"])
def test_a_pattern_that_cannot_be_one_is_an_error(tmp_path: Path, pattern: str):
    with pytest.raises((DataError, ConfigError), match=r"files.*below"):
        files_of(source(files=(pattern,)), tmp_path)


# Which texts


def test_questions_of_several_fields_are_joined_and_empty_ones_left_out():
    row = {"q": "Add.", "input": "1, 2", "note": " ", "x": {"more": "Please."}, "a": "3"}
    assert texts(row, prompt=("q", "input", "note", "x.more")) == [("Add.\n\n1, 2\n\nPlease.", "3")]


def test_each_of_several_answers_makes_a_row():
    row = {"q": "?", "a": "1", "b": None, "c": {"d": [{"e": "2"}, {"e": "3"}]}, "f": ["4", "5"]}
    pairs = texts(row, response=("a", "b", "c.d.e", "f"))
    assert pairs == [("?", answer) for answer in "12345"]


def test_joined_answers_are_one():
    assert texts({"q": "?", "a": ["First.", "Then."]}, joined=True) == [("?", "First. Then.")]


def test_numbers_are_texts_as_they_are_spelt(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"q": "?", "a": 1.50}\n')
    read_group(folder := draft(tmp_path), source(), 0, Group(0, (path,)), 10)
    assert list(rows(folder / "0000.parquet")) == [Row(0, "?", "1.50")]


def test_a_conversation_gives_its_first_question_and_answer():
    turns = [["user", "One?"], ["assistant", "1"], ["user", "Two?"], ["assistant", "2"]]
    assert texts({"talk": turns}, prompt=(), response=(), turns="talk") == [("One?", "1")]


def test_plain_text_has_no_question():
    assert texts({"text": "A line."}, prompt=(), response=(), text="text") == [("", "A line.")]


def test_marks_are_taken_out_of_questions_and_answers():
    assert texts({"q": "a<1>?", "a": "<22>b"}, remove=r"<\d+>") == [("a?", "b")]


# What is kept


def test_a_row_is_kept_by_a_field_of_its_own():
    keep = (Keep("ok", ("true",)), Keep("kind", ("3", "null")))
    assert len(texts({"q": "?", "a": ["1", "2"], "ok": True, "kind": None}, keep=keep)) == 2
    assert len(texts({"q": "?", "a": "1", "ok": True, "kind": 3}, keep=keep)) == 1
    assert texts({"q": "?", "a": "1", "ok": False, "kind": 3}, keep=keep) == []
    assert texts({"q": "?", "a": "1", "ok": "True", "kind": 3}, keep=keep) == []


def test_answers_are_kept_one_by_one_where_the_field_has_a_value_for_each():
    row = {"q": "?", "a": ["1", "2", "3"], "ok": [True, False, True]}
    counts = Counter[str]()
    assert [answer for _, answer in texts_of(row, source(keep=(Keep("ok", ("true",)),)), counts)] == ["1", "3"]
    assert +counts == {"not kept: ok": 1}


def test_drop_keeps_all_but_these():
    keep = (Keep("kind", ("code", "web"), drop=True),)
    assert texts({"q": "?", "a": "1", "kind": "code"}, keep=keep) == []
    assert len(texts({"q": "?", "a": "1", "kind": "math"}, keep=keep)) == 1


def test_answers_with_what_a_source_is_to_be_without_are_not_kept():
    counts = Counter[str]()
    row = {"q": "?", "a": ["1", "import os"]}
    assert list(texts_of(row, source(without=r"^import "), counts)) == [("?", "1")]
    assert texts({"q": "import os?", "a": "1"}, without=r"^import ") == []
    assert +counts == {"not kept: without": 1}


def test_values_that_match_no_answer_make_a_row_unusable():
    with pytest.raises(UnusableRow, match=r"field 'ok' does not match the answers \(2 values, 3 answers\)"):
        texts({"q": "?", "a": ["1", "2", "3"], "ok": [True, False]}, keep=(Keep("ok", ("true",)),))


# Reading


def lines(count: int) -> list[dict[str, str]]:
    return [{"q": f"{n}?", "a": f"{n}!"} for n in range(count)]


@pytest.mark.parametrize(("count", "sizes"), [(7, [3, 3, 1]), (6, [3, 3]), (1, [1])])
def test_rows_are_divided_in_shards_of_some_rows(tmp_path: Path, count: int, sizes: list[int]):
    shards, counts, _ = read(tmp_path, lines(count), shard_rows=3)
    assert [len(shard) for shard in shards] == sizes
    assert [row.prompt for shard in shards for row in shard] == [line["q"] for line in lines(count)]
    assert (counts["rows of files"], counts["in"], counts["out"]) == (count, count, count)


def test_a_set_of_which_nothing_is_kept_has_one_empty_shard(tmp_path: Path):
    shards, counts, _ = read(tmp_path, lines(3), keep=(Keep("q", ("none",)),))
    assert shards == [[]]
    assert (counts["in"], counts["not kept: q"]) == (0, 3)


def test_a_rank_tells_source_group_and_row(tmp_path: Path):
    shards, _, _ = read(tmp_path, lines(4), shard_rows=2, priority=3, number=5)
    first = (3 << RANK_BITS) + (5 << ROW_BITS)
    assert [row.rank for shard in shards for row in shard] == [first, first + 1, first + 2, first + 3]


def test_files_of_a_group_are_read_in_their_order_and_known_by_their_digests(tmp_path: Path):
    paths = tuple(write_jsonl(tmp_path / f"{n}.jsonl.gz", [{"q": f"{n}?", "a": "!"}]) for n in range(2))
    _, facts = read_group(folder := draft(tmp_path), source(), 0, Group(0, paths), 10)
    assert [row.prompt for row in rows(folder / "0000.parquet")] == ["0?", "1?"]
    assert list(facts["files"]) == [str(path) for path in paths]
    assert len(set(facts["files"].values())) == 2


def test_a_share_is_drawn_at_random_and_the_same_every_time(tmp_path: Path):
    shards, counts, _ = read(tmp_path, lines(600), share=0.25, shard_rows=5000)
    again, _, _ = read(tmp_path, lines(600), share=0.25, shard_rows=5000)
    assert shards == again
    assert 110 < counts["out"] < 190
    assert counts["in"] == counts["out"] + counts["not drawn (share)"] == 600
    assert {row.rank for row in shards[0]} != {row.rank for row in read(tmp_path, lines(600), 5000)[0][0]}


def test_rows_that_cannot_be_used_are_counted_and_shown(tmp_path: Path):
    some = [*lines(2), {"q": "?", "a": {"b": 1}}, ["no object"], {"q": "?"}]
    shards, counts, samples = read(tmp_path, some)
    assert len(shards[0]) == counts["in"] == 2
    causes = {"dropped: field 'a' is not text", "dropped: not a JSON object", "dropped: no field 'a'"}
    assert {cause for cause in counts if cause.startswith("dropped")} == causes == set(samples)
    assert samples["dropped: no field 'a'"][0]["place"].endswith("x.jsonl, line 5")


@pytest.mark.parametrize("values", [{}, {"keep": (Keep("kind", ("x",)),)}], ids=["texts", "keep"])
def test_a_changed_schema_is_an_error_that_names_what_is_there_and_what_is_expected(
    tmp_path: Path, values: dict[str, Any]
):
    with pytest.raises(DataError, match="expects the fields q, ") as caught:
        read(tmp_path, [{"q" if values else "question": "?", "a": "!"}, *lines(3)], **values)
    said = str(caught.value)
    assert "x.jsonl, line 1: source 'set'" in said
    assert f"the row has {'q' if values else 'question'}, a; no field '{'kind' if values else 'q'}'" in said
    assert "\n" not in said


def test_parquet_is_read_as_well(tmp_path: Path):
    table = pa.table({"q": ["1?", "2?"], "a": [["x", "y"], None]})
    pq.write_table(table, tmp_path / "x.parquet")
    counts, _ = read_group(folder := draft(tmp_path), source(), 0, Group(0, (tmp_path / "x.parquet",)), 10)
    assert [row[1:] for row in rows(folder / "0000.parquet")] == [("1?", "x"), ("1?", "y")]
    assert (counts["rows of files"], counts["out"]) == (2, 2)
