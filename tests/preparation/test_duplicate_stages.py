"""Over all sources: which of equal rows stays, that no cap is exceeded, and that nothing held out is trained on."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dreamer_jax.preparation import dedup
from dreamer_jax.preparation.duplicates import (
    BEYOND_CAP,
    CAUSES,
    HELD_OUT_ELSEWHERE,
    Claims,
    choose,
    find,
    key_shard,
    split_shard,
)
from dreamer_jax.preparation.stage import rows
from tests.preparation.conftest import ANSWERS, CAP, Run, draft, rows_of, shards, write_rows

pytestmark = pytest.mark.xdist_group("preparation")
SETTINGS = {"near": True, "threshold": 0.8, "answers": 2, "keys_at_once": 1000, "pairs_at_once": 1000}
PRIORITY = 1 << dedup.RANK_BITS
"""Ranks from here on are of the second source."""


# What the whole preparation does


def asked_of(run: Run) -> dict[int, int]:
    """The key of each row's question, by rank; of plain text that of the text."""
    tables = [pq.read_table(path) for path in shards(run.work, "keys", ending="canonical.parquet")]
    whole = pa.concat_tables(tables)
    keys = pa.compute.coalesce(whole["asked"], whole["pair"])
    return dict(zip(whole["rank"].to_pylist(), keys.to_pylist(), strict=True))


def test_no_question_that_is_held_out_in_any_source_is_trained_on_in_any(run: Run):
    asked = asked_of(run)
    trained, held_out = (
        {asked[row.rank] for row in rows_of(run.work, "unique", ending=f"{part}.parquet")}
        for part in ("train", "validation")
    )
    assert len(held_out) > 20
    assert not trained & held_out


def test_a_question_that_one_source_holds_out_is_dropped_where_it_is_not_held_out(run: Run):
    held_out = run.questions("unique", "chats", "validation.parquet")
    shared = set(held_out) & set(run.planted.shared)
    dropped = shared - set(run.questions("unique", "stories"))
    assert len(shared) > 5
    assert len(dropped) > 3
    record = json.loads((run.work / "unique/stories/00000.0000.json").read_text())
    assert record["counts"][HELD_OUT_ELSEWHERE] == len(dropped)  # all of them are in the first shard


def test_held_out_parts_are_about_as_large_as_asked(run: Run):
    for name, least, most in (("stories", 3, 25), ("chats", 20, 45), ("plain", 1, 10)):
        assert least <= len(run.questions("unique", name, "validation.parquet")) <= most


def test_no_cap_is_exceeded(run: Run):
    plain = len(rows_of(run.work, "unique", "plain"))
    assert CAP - 3 <= plain <= CAP
    asked = Counter(row.prompt for row in rows_of(run.work, "unique") if row.prompt)
    assert max(asked.values()) == asked[run.planted.asked_often] == ANSWERS


@pytest.mark.parametrize("kind", ["copied", "almost"])
def test_of_equal_rows_that_of_the_earlier_source_stays(run: Run, kind: str):
    repeated = set(getattr(run.planted, kind))
    stories, chats = (Counter(run.questions("unique", name)) for name in ("stories", "chats"))
    held_out = set(run.questions("unique", "chats", "validation.parquet"))
    for question in repeated - held_out:
        assert stories[question] == 1
        assert chats[question] == 0


@pytest.mark.parametrize(("kind", "planted"), [("exact", "copied"), ("near", "almost")])
def test_all_planted_duplicates_are_found_and_no_other_row(run: Run, kind: str, planted: str):
    found = pq.read_table(run.work / f"duplicates/{kind}.parquet").to_pydict()
    questions = {row.rank: row.prompt for row in rows_of(run.work, "clean")}
    assert sorted(questions[rank] for rank in found["rank"]) == sorted(getattr(run.planted, planted))
    for rank, keeper in zip(found["rank"], found["keeper"], strict=True):
        assert keeper < PRIORITY <= rank
        assert questions[keeper] == questions[rank]


def test_plain_text_is_neither_question_nor_answer(run: Run):
    left = rows_of(run.work, "unique", "plain")
    assert all(row.prompt == "" and row.response for row in left)
    assert len({row.rank for row in left}) == len({row.response for row in left}) == len(left)


# Each of the stages alone


def keyed(tmp_path: Path, name: str, pairs: list[tuple[str, str]], first: int = 0) -> tuple[Path, Path]:
    """The shard of some rows, and the folder of its keys."""
    shard = write_rows(tmp_path / f"{name}.parquet", pairs, first)
    folder = tmp_path / f"{name}.keys"
    folder.mkdir()
    key_shard(folder, shard, dedup.Rule())
    return shard, folder


def test_keys_are_in_the_order_of_the_rows(tmp_path: Path):
    shard, folder = keyed(tmp_path, "a", [(f"What is {n}?", f"It is {n}.") for n in range(300)])
    ranks = pq.read_table(folder / "canonical.parquet")["rank"].to_pylist()
    assert ranks == [row.rank for row in rows(shard)]


def test_what_one_cause_dropped_is_no_matter_of_the_next(tmp_path: Path):
    same = [("How many are 1 and 2?", "They are 3."), ("how many are 1 and 2", "they are 3")]
    others = [("How many are 1 and 2?", answer) for answer in ("3", "three", "It is 3.")]
    _, first = keyed(tmp_path, "a", same)
    _, second = keyed(tmp_path, "b", others, first=PRIORITY)
    canonical = [folder / "canonical.parquet" for folder in (first, second)]
    before: list[Path] = []
    found = {}
    for kind in ("exact", "near", "answers"):
        folder = draft(tmp_path)
        find(folder, kind, canonical, [path.with_name("bands.parquet") for path in canonical], before, SETTINGS)
        before.append(folder / "parquet")
        found[kind] = pq.read_table(before[-1])["rank"].to_pylist()
    assert found == {"exact": [1], "near": [], "answers": [PRIORITY + 1, PRIORITY + 2]}


def test_as_many_passes_as_memory_asks_for_find_the_same(tmp_path: Path):
    _, folder = keyed(tmp_path, "a", [(f"What is {n % 40}?", f"It is {n % 40}.") for n in range(80)])
    canonical, bands = [folder / "canonical.parquet"], [folder / "bands.parquet"]
    found = []
    for keys in (7, 1000):
        made = draft(tmp_path)
        find(made, "exact", canonical, bands, [], SETTINGS | {"keys_at_once": keys})
        found.append(pq.read_table(made / "parquet").to_pydict())
    assert found[0] == found[1] == {"rank": list(range(40, 80)), "keeper": list(range(40))}


def claims(tmp_path: Path, count: int, cap: int, held_out: float = 0.0, source: int = 0) -> Claims:
    """Of a source of many different questions, whose keys are its ranks."""
    ranks = np.arange(count, dtype=np.int64) + source * PRIORITY
    path = tmp_path / f"canonical-{source}-{count}.parquet"
    pq.write_table(pa.table({"rank": ranks, "asked": ranks.astype(np.uint64), "pair": ranks.astype(np.uint64)}), path)
    return Claims([path], held_out, cap)


def dropped_ranks(tmp_path: Path, ranks: list[int], name: str = "dropped") -> Path:
    path = tmp_path / name
    pq.write_table(pa.table({"rank": pa.array(ranks, pa.int64()), "keeper": pa.array(ranks, pa.int64())}), path)
    return path


def left_of(tmp_path: Path, count: int, kept: int | None, dropped: list[int] | None = None) -> Counter[str]:
    """The counts of a shard of which this is left."""
    shard = write_rows(tmp_path / f"shard-{count}", [("?", "!")] * count)
    [canonical] = claims(tmp_path, count, 0).canonical
    none = draft(tmp_path)
    choose(none, {}, [])
    of_exact = dropped_ranks(tmp_path, dropped or [], f"dropped-{len(dropped or [])}")
    counts, _ = split_shard(draft(tmp_path), shard, canonical, {"exact": of_exact}, none / "parquet", 0.0, kept)
    return counts


@pytest.mark.parametrize(("cap", "left"), [(1, 1), (10, 10), (189, 188), (499, 499), (500, 500), (501, 500)])
def test_a_cap_is_met_nearly_and_never_exceeded(tmp_path: Path, cap: int, left: int):
    """Two of the rows share a place in the random order: of these a cap takes both or none."""
    _, facts = choose(draft(tmp_path), {"a": claims(tmp_path, 500, cap)}, [])
    counts = left_of(tmp_path, 500, facts["kept"]["a"])
    assert (counts["train"], counts[BEYOND_CAP]) == (left, 500 - left)


def test_a_source_without_a_cap_keeps_all(tmp_path: Path):
    _, facts = choose(draft(tmp_path), {"a": claims(tmp_path, 50, 0)}, [])
    assert facts == {"kept": {}}
    assert left_of(tmp_path, 50, None)["train"] == 50


def test_duplicates_do_not_count_against_a_cap(tmp_path: Path):
    duplicates = list(range(0, 400, 2))
    _, facts = choose(draft(tmp_path), {"a": claims(tmp_path, 400, 150)}, [dropped_ranks(tmp_path, duplicates)])
    counts = left_of(tmp_path, 400, facts["kept"]["a"], duplicates)
    assert 147 <= counts["train"] <= 150
    assert counts[CAUSES["exact"]] == 200


def held_out_keys(folder: Path) -> list[int]:
    keys: list[int] = pq.read_table(folder / "parquet")["key"].to_pylist()
    return keys


def test_the_held_out_questions_of_a_smaller_part_are_among_those_of_a_larger(tmp_path: Path):
    found = []
    for part in (0.0, 0.1, 0.3):
        choose(folder := draft(tmp_path), {"a": claims(tmp_path, 2000, 0, part)}, [])
        found.append(set(held_out_keys(folder)))
    assert found[0] == set()
    assert found[1] < found[2]
    assert 140 < len(found[1]) < 260 < 500 < len(found[2]) < 700


def test_a_row_that_is_dropped_as_a_duplicate_holds_out_nothing(tmp_path: Path):
    gone = dropped_ranks(tmp_path, list(range(1000)))
    choose(folder := draft(tmp_path), {"a": claims(tmp_path, 1000, 0, 0.5)}, [gone])
    assert held_out_keys(folder) == []


def test_each_row_of_a_shard_has_one_fate(tmp_path: Path):
    source, other = claims(tmp_path, 200, 0, 0.2), Claims([], 0.0, 0)
    choose(folder := draft(tmp_path), {"a": source, "b": other}, [])
    shard = write_rows(tmp_path / "shard", [(f"{n}?", f"{n}!") for n in range(200)])
    dropped = {"exact": dropped_ranks(tmp_path, [3, 4], "e"), "near": dropped_ranks(tmp_path, [4, 5], "n")}
    held_out = set(held_out_keys(folder))
    parts = {}
    for part in (0.2, 0.0):
        made = draft(tmp_path)
        counts, _ = split_shard(made, shard, source.canonical[0], dropped, folder / "parquet", part, None)
        parts[part] = {name: {r.rank for r in rows(made / f"{name}.parquet")} for name in ("train", "validation")}
        assert counts["in"] == 200
        assert counts["out"] == sum(map(len, parts[part].values()))
        assert (counts[CAUSES["exact"]], counts[CAUSES["near"]]) == (2, 1)
    assert parts[0.2]["validation"] == held_out - {3, 4, 5}
    assert parts[0.0]["validation"] == set()
    assert parts[0.0]["train"] == parts[0.2]["train"] == set(range(200)) - held_out - {3, 4, 5}
    samples = json.loads((made / "samples.json").read_text())
    assert samples[CAUSES["near"]] == [{"question": "5?", "answer": "5!"}]
    assert len(samples[HELD_OUT_ELSEWHERE]) == 20
