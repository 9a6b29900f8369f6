"""Rows come out of every kind of file as they went in, and damage is told with its place."""

import bz2
import gzip
import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from dreamer_jax.data import rows
from dreamer_jax.data.files import DataError
from dreamer_jax.data.rows import Fault, Number, rows_of, unpacked

ROWS: list[dict[str, Any]] = [{"q": "1 + 1?", "a": "2"}, {"q": "π \u2028 «x»?", "a": [{"b": None, "c": True}]}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
NAMED = "data source 'x'"


def zstd(content: bytes) -> bytes:
    return bytes(pyarrow.compress(content, codec="zstd", asbytes=True))


def parquet(**columns: Any) -> bytes:
    written = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), written)
    return written.getvalue()


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "x"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path) -> list[tuple[str, Any]]:
    return list(rows_of(path, NAMED))


def error(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{NAMED}: '{path}'")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd])
@pytest.mark.parametrize(
    ("content", "places"),
    [
        (LINES, ["line 1", "line 2"]),
        (LINES.replace("\n", "\r\n \n\n"), ["line 1", "line 4"]),
        ("\ufeff" + LINES.rstrip("\n"), ["line 1", "line 2"]),
        (json.dumps(ROWS), ["row 1", "row 2"]),
        ("\ufeff\n " + json.dumps(ROWS, indent=2, ensure_ascii=False) + "\n", ["row 1", "row 2"]),
    ],
    ids=["lines", "windows and blank lines", "byte order mark", "array", "array over several lines"],
)
def test_json_is_read_whatever_its_layout_and_packing(tmp_path: Path, content: str, places: list[str], pack: Any):
    path = written(tmp_path, pack(content.encode()))
    assert read(path) == [(f"{path}, {place}", row) for place, row in zip(places, ROWS, strict=True)]


@pytest.mark.parametrize("text", [json.dumps(ROWS[1], indent=2), '{"q": 1,\n "a":\n[]}\n'])
def test_an_object_over_several_lines_is_one_row(tmp_path: Path, text: str):
    path = written(tmp_path, "\ufeff" + text)
    [(place, row)] = read(path)
    assert place == f"{path}, row 1"
    assert json.dumps(row).replace('"1"', "1") == json.dumps(json.loads(text))


def test_several_objects_over_several_lines_are_refused_with_the_mend(tmp_path: Path):
    assert "jq -c ." in error(written(tmp_path, json.dumps(ROWS[0], indent=2) * 2))


def test_a_broken_first_line_does_not_make_one_row_of_all_lines(tmp_path: Path):
    (_, fault), (_, row) = read(written(tmp_path, '{"q": "cut,\n' + LINES.splitlines()[0]))
    assert isinstance(fault, Fault)
    assert row == ROWS[0]


@pytest.mark.parametrize("spelling", ["42", "3.50", "1e400", "-0", "7" * 5000])
def test_numbers_of_json_keep_their_spelling(tmp_path: Path, spelling: str):
    [(_, line)] = read(written(tmp_path, f'{{"a": {spelling}}}'))
    [(_, element)] = read(written(tmp_path, f'[{{"a": {spelling}}}]'))
    assert line == element == {"a": spelling}
    assert isinstance(line["a"], Number)


def test_an_array_is_the_same_however_it_is_cut_into_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    content = json.dumps([*ROWS, {"n": '\\"]},[é'}, 12345], ensure_ascii=False)
    path = written(tmp_path, content.replace(", ", " ,\n ").replace("é", "\\u00e9") + " \n")
    expected = [*ROWS, {"n": '\\"]},[é'}, Fault("not a JSON object", "a number")]
    for chunk in range(1, 40):
        monkeypatch.setattr(rows, "CHUNK", chunk)
        assert [row for _, row in read(path)] == expected


def test_damage_is_not_taken_for_a_row_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rows, "ROW_BYTES", 1 << 18)
    path = written(tmp_path, '[{"q": x}, "' + "a" * (1 << 20) + '"]')
    assert "row 1: not JSON (Expecting value) at character 8 of the file" in error(path)


def test_of_an_array_no_more_than_a_window_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rows, "CHUNK", 100)
    windows: list[int] = []
    parse = rows._Text.value

    def watched(text: rows._Text) -> Any:
        windows.append(len(text._window))
        return parse(text)

    monkeypatch.setattr(rows._Text, "value", watched)
    assert len(read(written(tmp_path, json.dumps([{"q": n} for n in range(1000)])))) == 1000
    assert max(windows) < 300


def test_an_element_that_is_no_object_is_a_fault_of_its_own(tmp_path: Path):
    found = read(written(tmp_path, '[{"q": 1}, [2], "three", 4, null, {"q": 5}]'))
    assert [row for _, row in found[1:5]] == [
        Fault("not a JSON object", kind) for kind in ("a list", "a text", "a number", "null")
    ]
    assert found[5][1] == {"q": "5"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'[{"q": 1}, {"q": 2', "row 2: not JSON (Expecting ',' delimiter) at character 19 of the file"),
        (b'[{"q": 1}, {"q: 2}]', "row 2: not JSON (Unterminated string starting) at character 13 of the file"),
        (b'[{"q": 1} {"q": 2}]', "row 2: not JSON (expecting ',') at character 11 of the file"),
        (b'[{"q": 1},]', "row 2: not JSON (Expecting value) at character 11 of the file"),
        (b'[{"q": 1}', "row 2: not JSON (expecting ',') at character 10 of the file"),
        (b'[{"q": 1}]\n[2]', "more after the array's end at character 12 of the file"),
        (b'["\xc3\xa9", "\xff"]', "row 1: not UTF-8 text at character 8 of the file"),
        (b'[{"q": "\x00"}]', "row 1: not JSON (Invalid control character) at character 9 of the file"),
        (b'[{"q": ' + b"[" * 100_000, "row 1: JSON that is nested too deep at character 2 of the file"),
    ],
)
def test_a_damaged_element_ends_the_array_with_its_character(tmp_path: Path, content: bytes, said: str):
    assert said in error(written(tmp_path, content))


def test_the_elements_in_front_of_damage_are_read(tmp_path: Path):
    found = rows_of(written(tmp_path, '[{"q": 1}, {"q": 2}, oops]'), NAMED)
    assert [next(found)[1], next(found)[1]] == [{"q": "1"}, {"q": "2"}]
    with pytest.raises(DataError, match="row 3"):
        next(found)


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_a_packed_file_that_is_cut_off_is_an_error_when_its_end_is_reached(tmp_path: Path, pack: Any):
    content = pack("".join(f'{{"q": {n}}}\n' for n in range(20_000)).encode())
    found = rows_of(written(tmp_path, content[: len(content) * 9 // 10]), NAMED)
    assert next(found)[1] == {"q": "0"}
    with pytest.raises(DataError, match="cut off or damaged: fetch it again"):
        list(found)


@pytest.mark.parametrize(
    "content", ['{"q": "%s"}', '[{"q": "%s"}]', '{\n"q": "%s"}'], ids=["line", "element", "object"]
)
def test_a_row_that_is_too_long_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str):
    monkeypatch.setattr(rows, "ROW_BYTES", 1 << 20)
    [(_, row)] = read(written(tmp_path, content % ("a" * 1_000_000)))
    assert len(row["q"]) == 1_000_000
    path = written(tmp_path, content % ("a" * 2_000_000))
    assert "longer than 1 MiB" in (error(path) if content.startswith("[") else str(read(path)[0][1]))


def test_the_rows_after_a_line_that_is_too_long_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rows, "ROW_BYTES", 100)
    path = written(tmp_path, '{"q": "%s"}\n{"q": ""}' % ("a" * 1000))
    assert [place.rpartition(", ")[2] for place, _ in read(path)] == ["line 1", "line 2"]
    assert read(path)[1][1] == {"q": ""}


COLUMNS = {
    "q": ["1?", "2?", None],
    "n": [1, -2, 3],
    "turns": [[{"from": "user", "value": "x"}], [], None],
    "ok": [[True, None], [], [False]],
}


def test_parquet_gives_pythons_values_nested_ones_too(tmp_path: Path):
    path = written(tmp_path, parquet(**COLUMNS))
    assert read(path) == [
        (f"{path}, row {n + 1}", {name: values[n] for name, values in COLUMNS.items()}) for n in range(3)
    ]


def test_parquet_rows_are_numbered_through_all_groups_and_batches(tmp_path: Path):
    path = tmp_path / "x"
    table = pyarrow.table({"n": list(range(5000))})
    pyarrow.parquet.write_table(table, path, row_group_size=1700)
    assert read(path) == [(f"{path}, row {n + 1}", {"n": n}) for n in range(5000)]


def test_of_a_parquet_file_of_one_group_a_part_is_held(tmp_path: Path):
    path = written(tmp_path, parquet(q=[os.urandom(500).hex() for _ in range(10_000)]))
    before = pyarrow.total_allocated_bytes()
    held = [pyarrow.total_allocated_bytes() - before for _ in rows_of(path, NAMED)]
    assert max(held) < 0.75 * path.stat().st_size


def test_one_value_that_python_cannot_hold_spoils_its_row_alone(tmp_path: Path):
    texts = pyarrow.Array.from_buffers(
        pyarrow.string(), 3, [None, *pyarrow.array([b"a", b"\xff", b"c"], pyarrow.binary()).buffers()[1:]]
    )
    times = pyarrow.array([0, 0, 2**62], pyarrow.timestamp("ms"))
    found = [row for _, row in read(written(tmp_path, parquet(q=texts, t=times)))]
    assert found[0]["q"] == "a"
    assert found[1] == Fault("not UTF-8 text", "")
    assert found[2].cause == "a value that Python cannot hold"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a Git LFS pointer.*git lfs pull"),
        (gzip.compress(b"<!DOCTYPE html>\n<html>"), "a web page"),
        (zstd(gzip.compress(b"{}")), "compressed by gzip"),
        (LINES.encode("utf-16"), "text in UTF-16"),
        (bz2.compress(b"{}"), "compressed by bzip2"),
        (b"\x1f\x8b\x08\x00", "cannot be read .*fetch it again"),
        (gzip.compress(b"{}")[:10] + b"\x07" * 99, "cannot be read .*fetch it again"),
        (zstd(b"{}") + b"more", "cannot be read .*fetch it again"),
        (b"PAR1....", "Parquet file that is damaged .*fetch it again"),
        (parquet(**COLUMNS)[:-9], "Parquet file that is damaged"),
    ],
    ids=range(10),
)
def test_a_file_that_cannot_be_read_is_told_with_cause_and_mend(tmp_path: Path, content: bytes, said: str):
    path = written(tmp_path, content)
    with pytest.raises(DataError, match=rf"^{NAMED}: '{path}' .*{said}"):
        read(path)
    error(path)


def test_what_is_unpacked_is_told_by_content_and_several_packets_are_one(tmp_path: Path):
    for content in (b"plain", gzip.compress(b"pl") + gzip.compress(b"ain"), zstd(b"pl") + zstd(b"ain")):
        with unpacked(written(tmp_path, content)) as stream:
            assert stream.read() == b"plain"
