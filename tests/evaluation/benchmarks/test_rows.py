"""Rows come out of every kind of file as they went in, and of a damaged file comes its fault."""

import gzip
import itertools
import json
from pathlib import Path

import pyarrow
import pytest

from dreamer_jax.evaluation.benchmarks.rows import find_file, read_rows, rows_of
from dreamer_jax.evaluation.requests import EvaluationError

ROWS = [{"q": "1 + 1?", "a": "2", "n": 1}, {"q": "π \u2028 «x»?", "a": 'a,\n"b"', "n": [2]}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
FIELDS = ("q", "a")


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def fault(path: Path) -> str:
    with pytest.raises(EvaluationError) as caught:
        rows_of(path, FIELDS)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
@pytest.mark.parametrize(
    "content",
    [
        LINES,
        LINES.replace("\n", "\r\n"),
        LINES.replace("\n", "\n \n\n"),
        LINES.rstrip("\n"),
        "\ufeff" + LINES,
        json.dumps(ROWS),
        "\ufeff\n" + json.dumps(ROWS, indent=2),
    ],
    ids=["lines", "crlf", "blank lines", "no last newline", "byte order mark", "array", "array over several lines"],
)
def test_json_is_read_as_lines_or_as_an_array_whatever_its_ending(tmp_path: Path, name: str, content: str) -> None:
    assert rows_of(written(tmp_path, name, content), FIELDS) == ROWS


def test_csv_has_no_header_and_its_cells_may_hold_commas_quotes_and_newlines(tmp_path: Path) -> None:
    path = written(tmp_path, "x.csv", '"1, 2 and\n""3""", 4\n\n"",b \n')
    assert rows_of(path, FIELDS) == [{"q": '1, 2 and\n"3"', "a": " 4"}, {"q": "", "a": "b "}]


def test_a_compressed_file_is_read_like_the_file_itself(tmp_path: Path) -> None:
    written(tmp_path, "a/x.jsonl.gz", gzip.compress(LINES.encode()))
    written(tmp_path, "b/x.jsonl.zst", pyarrow.compress(LINES.encode(), codec="zstd", asbytes=True))
    assert read_rows(tmp_path, ["a/x.jsonl"], FIELDS) == ROWS
    assert read_rows(tmp_path, ["b/x.jsonl"], FIELDS) == ROWS


def test_whether_a_file_is_compressed_is_told_by_its_content(tmp_path: Path) -> None:
    assert rows_of(written(tmp_path, "x.jsonl.gz", LINES), FIELDS) == ROWS
    assert rows_of(written(tmp_path, "x.jsonl", gzip.compress(LINES.encode())), FIELDS) == ROWS
    assert "Git LFS" in fault(written(tmp_path, "y.jsonl.gz", "version https://git-lfs.github.com/spec/v1\n"))


def test_places_are_tried_in_order(tmp_path: Path) -> None:
    later = written(tmp_path, "b.json", LINES)
    assert find_file(tmp_path, ["a.jsonl", "b.json"]) == later
    sooner = written(tmp_path, "a.jsonl.gz", LINES)
    assert find_file(tmp_path, ["a.jsonl", "b.json"]) == sooner


def test_a_missing_file_is_told_with_its_folder_all_places_and_where_to_get_it(tmp_path: Path) -> None:
    (tmp_path / "gsm8k" / "test.jsonl").mkdir(parents=True)  # a folder is no file
    with pytest.raises(EvaluationError) as caught:
        read_rows(tmp_path, ["gsm8k/test.jsonl", "gsm8k/test.json"], FIELDS)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "gsm8k/test.jsonl or gsm8k/test.json" in message
    assert "https://github.com/openai/grade-school-math" in message


GOOD = LINES.splitlines()[0]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.jsonl", "", "no rows"),
        ("x.jsonl", "\n \n", "no rows"),
        ("x.json", "[]", "no rows"),
        ("x.csv", "", "no rows"),
        ("x.jsonl", f"{GOOD}\n{GOOD[:-4]}\n", "line 2: not JSON"),
        ("x.jsonl", f"{GOOD}\n[1]\n", "line 2: not a JSON object, but list"),
        ("x.jsonl", f"{GOOD}\nnull\n", "line 2: not a JSON object, but NoneType"),
        ("x.jsonl", f'\n{GOOD}\n{{"q": "x"}}', "line 3: no field 'a'; it has 'q'"),
        ("x.jsonl", f'{GOOD}\n{{"q": "x", "a": 2}}', "line 2: field 'a' must be text, and is int"),
        ("x.jsonl", f'{GOOD}\n{{"q": "\\ud83d", "a": ""}}', "line 2: field 'q' has half a surrogate pair"),
        ("x.jsonl", f'{GOOD}\n{{"q": {"9" * 5000}}}', "line 2: JSON that cannot be read"),
        ("x.jsonl", f"{GOOD}\n{'[' * 200_000}", "line 2: JSON that cannot be read"),
        ("x.json", f"[{GOOD},\n{GOOD}", "not JSON"),
        ("x.json", f'[{GOOD}, "text"]', "row 2: not a JSON object, but str"),
        ("x.json", json.dumps(ROWS[0], indent=1), "line 1: not JSON"),
        ("x.csv", "q,a\n1,2,3\n", "row 2: 3 columns; there must be 2 columns (q, a)"),
        ("x.csv", 'q,a\n"1" 2,3\n', "row 2: not CSV"),
        ("x.csv", 'q,a\nb,"never closed', "row 2: not CSV"),
        ("x.txt", LINES, "told by its ending"),
        ("x.parquet", b"PAR1....", "told by its ending"),
        ("x.jsonl", b"PAR1....", "a Parquet file"),
        ("x.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        ("x.json", "\n<!DOCTYPE html><html><body>Sign in</body></html>", "a web page"),
        ("x.jsonl", gzip.compress(gzip.compress(b"{}")), "compressed by gzip"),
        ("x.jsonl", f"{GOOD}\n".encode() + b'{"q": "caf\xe9"}\n', "line 2: not UTF-8"),
        ("x.jsonl", LINES.encode("utf-16"), "UTF-16"),
        ("x.jsonl.gz", gzip.compress(LINES.encode() * 99)[:-9], "cannot be read"),
        ("x.jsonl.gz", b"\x1f\x8b" + bytes(99), "cannot be read"),
        ("x.jsonl.gz", gzip.compress(b"{}")[:10] + b"\x07" * 99, "cannot be read"),
        ("x.jsonl.zst", pyarrow.compress(LINES.encode() * 99, codec="zstd", asbytes=True)[:-9], "cannot be read"),
    ],
    ids=itertools.count(),
)
def test_a_damaged_file_is_told_with_the_row_and_the_fault(
    tmp_path: Path, name: str, content: str | bytes, said: str
) -> None:
    assert said in fault(written(tmp_path, name, content))


def test_a_file_that_vanishes_is_told_as_unreadable(tmp_path: Path) -> None:
    assert "No such file" in fault(tmp_path / "gone.jsonl")
