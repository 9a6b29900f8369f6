"""Questions of benchmarks as their files have them: of every kind, and what is wrong with others."""

import dataclasses
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dreamer_jax.config import ConfigError
from dreamer_jax.data.files import DataError
from dreamer_jax.preparation.benchmarks import WITHOUT_TOKENS, files_of, questions_in, write_questions
from dreamer_jax.preparation.decontaminate import Index, Question
from dreamer_jax.preparation.recipe import Benchmark, DecontaminateConfig
from tests.preparation.conftest import draft, write_rows

LETTERS = ("question", "A", "B", "C", "answer")
ROWS = [{"question": "How many apples are 1 and 2?"}, {"question": "How many pears are 3 and 4?"}]
LONG = "What is the sum of all the numbers from 1 to 10, both included?"


def benchmark(*files: str, **values: Any) -> Benchmark:
    return Benchmark("set", files, values.pop("question", "question"), **values)


def questions(folder: Path, of: Benchmark) -> list[Question]:
    """What is written of a benchmark's files in a folder."""
    files = files_of(of, DecontaminateConfig(root=str(folder)))
    made = draft(folder)
    counts, _ = write_questions(made, [(of, files)], [])
    found = list(questions_in(made / "parquet"))
    assert counts["out"] == len(found)
    return found


def texts(folder: Path, of: Benchmark) -> list[str]:
    return [question.text for question in questions(folder, of)]


def _write(path: Path, kind: str) -> None:
    content = {
        "jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
        "json": json.dumps(ROWS),
        "csv": "question,other\n" + "".join(f'"{row["question"]}",x\n' for row in ROWS),
    }
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        name, _, packed = kind.partition(".")
        path.write_bytes(gzip.compress(content[name].encode()) if packed else content[name].encode())


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "json.gz", "csv", "csv.gz", "parquet"])
def test_files_of_every_kind_are_read(tmp_path: Path, kind: str):
    _write(tmp_path / f"test.{kind}", kind)
    found = questions(tmp_path, benchmark("test.*"))
    assert [question.text for question in found] == [row["question"] for row in ROWS]
    assert found[1] == Question("set", f"test.{kind}, row 2", ROWS[1]["question"])


def test_a_table_without_a_line_of_names_gets_them_from_the_recipe(tmp_path: Path):
    (tmp_path / "x.csv").write_text(f'"{LONG}",1,2,3,A\n', encoding="utf-8-sig")
    assert texts(tmp_path, benchmark("x.csv", columns=LETTERS)) == [LONG]


def test_a_row_of_another_length_is_an_error(tmp_path: Path):
    (tmp_path / "x.csv").write_text("Q,1,2,3,A\nQ,1,2,A\n")
    with pytest.raises(DataError, match=r"x\.csv, row 2: benchmark 'set': 4 columns; there must be 5: question, A, B"):
        texts(tmp_path, benchmark("x.csv", columns=LETTERS))


def test_a_short_question_is_looked_for_with_its_options_too(tmp_path: Path):
    (tmp_path / "x.csv").write_text(f"Which is prime?,4,5,6,B\n{LONG},54,55,56,B\n".replace(LONG, f'"{LONG}"'))
    found = questions(tmp_path, benchmark("x.csv", columns=LETTERS, options=("A", "B", "C")))
    assert [question.text for question in found] == ["Which is prime?", "Which is prime?\n4\n5\n6", LONG]
    assert found[1].id == "x.csv, row 1 with options"
    index = Index.of(found)
    assert index.hits("Which is prime?", "5")
    assert index.hits("Say, pupil. Which is prime? 4, 5, 6", "5")
    assert not index.hits("Say, pupil. Which is prime? 7, 8, 9", "7")


def test_questions_are_repaired_as_rows_are(tmp_path: Path):
    (tmp_path / "x.json").write_text(json.dumps([{"question": "How many\u200b  are 2\u00a0+ 2?\r\n"}]))
    assert texts(tmp_path, benchmark("x.json")) == ["How many  are 2 + 2?"]


def test_questions_without_a_word_are_counted(tmp_path: Path):
    (tmp_path / "x.json").write_text(json.dumps([{"question": "?!"}, *ROWS]))
    of = benchmark("x.json")
    counts, _ = write_questions(draft(tmp_path), [(of, [tmp_path / "x.json"])], [])
    assert counts == {"set": 3, "out": 3, WITHOUT_TOKENS: 1}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([{"problem": "?"}], r"x\.json, row 1: benchmark 'set': no field 'question'"),
        ([*ROWS, ["?"]], r"x\.json, row 3: benchmark 'set': not a JSON object"),
        ([{"question": None}], r"x\.json, row 1: benchmark 'set': field 'question' is not text \(it is null\)"),
    ],
)
def test_a_file_that_is_no_benchmark_is_an_error(tmp_path: Path, content: list[Any], said: str):
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"{said}.*; get the benchmark's own file"):
        texts(tmp_path, benchmark("x.json"))


@pytest.mark.parametrize(
    "content",
    [b"question\n\xff\n", gzip.compress(b"question\nWhat?\n" * 99)[:-9], b'question\n"' + b"x" * 140_000],
    ids=["Latin-1", "cut off", "no end of a quote"],
)
def test_a_damaged_table_is_an_error_of_a_line(tmp_path: Path, content: bytes):
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"benchmark 'set': '.*x\.csv' (is not CSV in UTF-8|cannot be read)") as caught:
        texts(tmp_path, benchmark("x.csv"))
    assert "\n" not in str(caught.value)


# Which files


def test_all_files_that_fit_are_taken(tmp_path: Path):
    for name in ("b/test.json", "a/test.json", "a/train.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("[]")
    config = DecontaminateConfig(root=str(tmp_path))
    found = files_of(dataclasses.replace(benchmark("*/test.*"), also=("none",)), config)
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a/test.json", "b/test.json"]


@pytest.mark.parametrize(
    ("root", "files", "said"),
    [
        ("", ("x.json",), r"decontaminate\.root is empty"),
        ("{tmp}", ("x.json", "y/*"), r"benchmark 'set': '.*' has no x\.json and no y/\*"),
        ("{tmp}/absent", ("x.json",), r"has no x\.json"),
    ],
)
def test_absent_files_are_an_error_that_names_both_remedies(tmp_path: Path, root: str, files: Sequence[str], said: str):
    config = DecontaminateConfig(root=root.format(tmp=tmp_path))
    with pytest.raises(DataError, match=said) as caught:
        files_of(benchmark(*files), config)
    assert "--decontaminate.root" in str(caught.value)
    assert "take 'set' out of the recipe's decontaminate.benchmarks" in str(caught.value)


def test_files_that_are_missing_are_done_without_only_if_that_is_asked_for(tmp_path: Path):
    (tmp_path / "a.json").write_text("[]")
    config = DecontaminateConfig(root=str(tmp_path))
    with pytest.raises(DataError, match=r"has no b\.json, go on with a\.json by --decontaminate\.partial True"):
        files_of(benchmark("a.json", "b.json"), config)
    assert files_of(benchmark("a.json", "b.json"), dataclasses.replace(config, partial=True)) == [tmp_path / "a.json"]


def test_a_pattern_that_cannot_be_one_is_an_error(tmp_path: Path):
    with pytest.raises((DataError, ConfigError), match=r"benchmark 'set': files = /x\.json.*below"):
        files_of(benchmark("/x.json"), DecontaminateConfig(root=str(tmp_path)))


# Held-out parts that are benchmarks


def test_held_out_questions_are_those_of_a_benchmark_each_once(tmp_path: Path):
    first = write_rows(tmp_path / "a", [("One?", "1"), ("Two?", "2"), ("One?", "uno")])
    second = write_rows(tmp_path / "b", [("", "A text of 3 words."), ("Two?", "due")])
    counts, _ = write_questions(folder := draft(tmp_path), [], [("college", [first, second])])
    found = list(questions_in(folder / "parquet"))
    assert [(question.benchmark, question.text) for question in found] == [
        ("college", "One?"),
        ("college", "Two?"),
        ("college", "A text of 3 words."),
    ]
    assert counts["college"] == 3
