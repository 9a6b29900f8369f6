"""What is done is done, what is not is never taken for it, and the same rows give the same bytes."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dreamer_jax.preparation import stage
from dreamer_jax.preparation.stage import (
    ROWS,
    SAMPLE_LENGTH,
    SAMPLES,
    Executor,
    Record,
    Row,
    Samples,
    Task,
    done,
    finished,
    key_of,
    perform,
    read,
    rows,
    write,
)

PAIRS = [Row(n, f"question {n}", f"answer {n}") for n in range(5)]
Run = Callable[..., tuple[Counter[str], dict[str, Any]]]


def write_pairs(draft: Path, log: Path, count: int) -> tuple[Counter[str], dict[str, Any]]:
    """A task that makes two shards and says in a file that it ran."""
    with log.open("a") as file:
        file.write("ran\n")
    write(draft / "a.parquet", PAIRS[:count])
    write(draft / "b.parquet", PAIRS[count:])
    return Counter({"out": count}), {"count": count}


def break_off(draft: Path, log: Path, count: int) -> tuple[Counter[str], dict[str, Any]]:
    """A task that fails after it has made its files."""
    write_pairs(draft, log, count)
    raise KeyboardInterrupt


def a_task(tmp_path: Path, key: str = "k", run: Run = write_pairs, count: int = 2, name: str = "set/00000") -> Task:
    return Task("read", name, key, run, (tmp_path / "log", count))


def carry_out(tmp_path: Path, *tasks: Task) -> dict[str, Record]:
    return done(tmp_path / "work", tasks, Executor("local", 1))


def times_run(tmp_path: Path) -> int:
    log = tmp_path / "log"
    return len(log.read_text().split()) if log.exists() else 0


def visible(work: Path) -> list[str]:
    """Names of the files that later stages could find."""
    found = (path.relative_to(work) for path in work.rglob("*") if path.is_file())
    return sorted(str(path) for path in found if not any(part.startswith(".") for part in path.parts))


# Done and not done


def test_a_task_leaves_its_files_and_a_record_of_them(tmp_path: Path):
    record = carry_out(tmp_path, a_task(tmp_path))["set/00000"]
    folder = tmp_path / "work/read/set"
    assert visible(folder) == ["00000.a.parquet", "00000.b.parquet", "00000.json"]
    assert record == Record(**json.loads((folder / "00000.json").read_text()))
    assert (record.key, record.counts, record.facts) == ("k", {"out": 2}, {"count": 2})
    assert list(record.files) == ["00000.a.parquet", "00000.b.parquet"]
    assert record.files["00000.a.parquet"]["bytes"] == (folder / "00000.a.parquet").stat().st_size
    assert list(rows(folder / "00000.a.parquet")) == PAIRS[:2]


def test_what_is_done_is_not_done_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    first = carry_out(tmp_path, a_task(tmp_path))
    assert carry_out(tmp_path, a_task(tmp_path)) == first
    assert times_run(tmp_path) == 1
    assert capsys.readouterr().out == "read: 1 of 1 done already\n"


def test_another_key_does_a_task_again(tmp_path: Path):
    carry_out(tmp_path, a_task(tmp_path))
    record = carry_out(tmp_path, a_task(tmp_path, key="other", count=3))["set/00000"]
    assert times_run(tmp_path) == 2
    assert record.counts == {"out": 3}
    assert list(rows(tmp_path / "work/read/set/00000.a.parquet")) == PAIRS[:3]


def test_only_the_missing_tasks_are_done_and_records_come_in_the_order_of_the_tasks(tmp_path: Path):
    names = ["b", "c", "a"]
    carry_out(tmp_path, a_task(tmp_path, name="a"))
    assert list(carry_out(tmp_path, *(a_task(tmp_path, name=name) for name in names))) == names
    assert times_run(tmp_path) == 3


@pytest.mark.parametrize("damage", ["longer", "missing"])
def test_a_file_that_is_not_as_it_was_written_is_made_again(tmp_path: Path, damage: str):
    task = a_task(tmp_path)
    carry_out(tmp_path, task)
    path = tmp_path / "work/read/set/00000.b.parquet"
    content = path.read_bytes()
    path.unlink() if damage == "missing" else path.write_bytes(content + b"x")
    assert finished(tmp_path / "work", "read", "set/00000", "k") is None
    carry_out(tmp_path, task)
    assert times_run(tmp_path) == 2
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"key": "k"}', b"\xff"], ids=repr)
def test_a_record_that_cannot_be_read_is_none(tmp_path: Path, content: bytes):
    carry_out(tmp_path, a_task(tmp_path))
    (tmp_path / "work/read/set/00000.json").write_bytes(content)
    assert finished(tmp_path / "work", "read", "set/00000") is None


def test_a_key_tells_values_apart_and_knows_the_same_ones():
    assert key_of("read", {"a": 1, "b": 2}) == key_of("read", {"b": 2, "a": 1})
    assert len({key_of("read", 1), key_of("read", "1"), key_of("read", 1, None), key_of("strip", 1)}) == 4


# Killed


def test_a_task_that_fails_leaves_nothing_under_a_final_name(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        carry_out(tmp_path, a_task(tmp_path, run=break_off))
    assert visible(tmp_path / "work") == []
    assert list(carry_out(tmp_path, a_task(tmp_path))) == ["set/00000"]


def test_a_task_that_fails_between_its_files_has_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    carry_out(tmp_path, a_task(tmp_path, key="earlier"))

    def killed(path: Path) -> dict[str, Any]:
        if path.name == "b.parquet":
            raise KeyboardInterrupt
        return {"bytes": path.stat().st_size, "sha256": "digest"}

    with monkeypatch.context() as during:
        during.setattr(stage, "fingerprint", killed)
        with pytest.raises(KeyboardInterrupt):
            carry_out(tmp_path, a_task(tmp_path, count=4))
    assert "00000.json" not in visible(tmp_path / "work/read/set")  # nor that of the files before
    carry_out(tmp_path, a_task(tmp_path, count=4))
    assert list(rows(tmp_path / "work/read/set/00000.b.parquet")) == PAIRS[4:]


def test_a_finished_task_is_the_same_wherever_it_is_done(tmp_path: Path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        carry_out(tmp_path / name, a_task(tmp_path / name))
    for path in (tmp_path / "here/work").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "there" / path.relative_to(tmp_path / "here")).read_bytes()


# Shards and samples


def test_rows_come_back_as_they_were_written(tmp_path: Path):
    some = [Row(2**50, "", "π ∑\n\0"), Row(3, "ein \t Satz", "x" * 100_000)]
    assert write(tmp_path / "x.parquet", some) == 2
    assert list(rows(tmp_path / "x.parquet")) == some
    assert pq.read_schema(tmp_path / "x.parquet") == ROWS


def test_more_rows_than_are_held_at_once_keep_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stage, "BATCH_ROWS", 2)
    assert write(tmp_path / "x.parquet", iter(PAIRS)) == 5
    assert pq.read_metadata(tmp_path / "x.parquet").num_row_groups == 3
    assert list(rows(tmp_path / "x.parquet")) == PAIRS
    assert [len(batch["rank"]) for batch in read(tmp_path / "x.parquet", ["rank"])] == [2, 2, 1]


def test_no_rows_are_a_shard_too(tmp_path: Path):
    assert write(tmp_path / "x.parquet", []) == 0
    assert list(rows(tmp_path / "x.parquet")) == []


def test_the_same_rows_give_the_same_bytes(tmp_path: Path):
    for name in ("x", "y"):
        write(tmp_path / name, iter(PAIRS))
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_rows_of_another_schema_are_written_by_it(tmp_path: Path):
    write(tmp_path / "x", [(1,), (2**64 - 1,)], pa.schema([("key", pa.uint64())]))
    assert [batch["key"] for batch in read(tmp_path / "x")] == [[1, 2**64 - 1]]


def test_samples_are_few_and_short(tmp_path: Path):
    samples = Samples()
    for number in range(3 * SAMPLES):
        samples.add("dropped", text=f"{number} {'x' * 10_000} end")
    samples.add("kept", text="half a pair \ud800")
    samples.write(tmp_path)
    found = json.loads((tmp_path / "samples.json").read_text())
    texts = [sample["text"] for sample in found["dropped"]]
    assert len(texts) == SAMPLES
    assert all(len(text) <= SAMPLE_LENGTH + 10 for text in texts)
    assert texts[1].startswith("1 x")
    assert texts[1].endswith("x end")
    assert found["kept"] == [{"text": "half a pair \\ud800"}]


def test_samples_are_no_file_of_the_record(tmp_path: Path):
    def run(draft: Path) -> tuple[Counter[str], dict[str, Any]]:
        Samples().write(draft)
        write(draft / "parquet", PAIRS)
        return Counter(), {}

    _, record = perform(tmp_path, Task("clean", "set/0", "k", run, ()))
    assert list(record.files) == ["0.parquet"]
    assert (tmp_path / "clean/set/0.samples.json").exists()
