"""The manifest: every row is accounted for, nothing in it is of the machine, and it says what a training sees."""

import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dreamer_jax.preparation.manifest import loaded, table
from dreamer_jax.preparation.work import VERSIONS
from tests.preparation.conftest import CONTEXT, Run, rows_of

pytestmark = pytest.mark.xdist_group("preparation")
SOURCES = ("stories", "chats", "plain")
ORDER = ("read", "strip", "clean", "unique", "decontaminate", "documents", "packing")


@pytest.fixture(scope="module")
def manifest(run: Run) -> dict[str, Any]:
    return loaded(run.out)


def dropped(counts: Mapping[str, int]) -> int:
    return sum(count for cause, count in counts.items() if cause.startswith("dropped: "))


@pytest.mark.parametrize("source", SOURCES)
def test_every_row_that_came_in_went_out_or_was_dropped_for_a_cause(manifest: dict[str, Any], source: str):
    stages = manifest["sources"][source]["stages"]
    for name in [*ORDER[1:], "documents held out", "packing held out"]:
        assert stages[name]["in"] == stages[name].get("out", 0) + dropped(stages[name]), name
    read = stages["read"]
    assert read["in"] == read["out"]
    assert read["rows of files"] == read["in"] + read.get("not kept: verified", 0)


@pytest.mark.parametrize("source", SOURCES)
def test_what_one_stage_gives_the_next_one_gets(manifest: dict[str, Any], source: str):
    stages = manifest["sources"][source]["stages"]
    for name, following in itertools.pairwise(ORDER):
        given = stages[name]["train" if name == "unique" else "out"]
        assert stages[following]["in"] == given, following
    assert stages["documents held out"]["in"] == stages["unique"]["validation"]


def test_planted_faults_are_counted_in_their_stages(manifest: dict[str, Any], run: Run):
    stories, chats, plain = (manifest["sources"][name]["stages"] for name in SOURCES)
    assert stories["read"]["not kept: verified"] == 7
    assert stories["clean"]["dropped: a placeholder for an answer"] == 1
    assert stories["unique"]["dropped: enough answers to its question"] == 2
    assert chats["strip"]["marked traces cut"] == 75
    assert chats["strip"]["dropped: a trace without an end"] == 3
    assert chats["strip"]["dropped: a proof question without a proof"] == 1
    assert (chats["unique"]["dropped: duplicate"], chats["unique"]["dropped: near duplicate"]) == (5, 5)
    assert plain["clean"]["dropped: empty question or answer"] == 1
    long = sum(stories[f"packing{part}"].get("dropped: longer than the context", 0) for part in ("", " held out"))
    assert long == 4


def test_totals_and_shares_are_those_of_what_was_written(manifest: dict[str, Any], run: Run):
    report = json.loads((run.out / "report.json").read_text())
    parts = manifest["sources"]
    assert list(parts) == list(SOURCES)
    for name, part in parts.items():
        train = report["sources"][name]["train"]
        assert (part["training_documents"], part["training_tokens"]) == (train["documents"], train["tokens"])
        assert part["stages"]["packing"]["out"] == part["training_documents"]
        assert part["stages"]["packing"]["tokens"] == part["training_tokens"]
    totals = manifest["totals"]
    for key in ("rows_in", "training_documents", "training_tokens"):
        assert totals[key] == sum(part[key] for part in parts.values())
    assert (totals["vocab"], totals["context"]) == (500, CONTEXT)
    rows = {name: report["sources"][name]["train"]["rows"] for name in SOURCES}
    whole = 2 * rows["stories"] + rows["chats"] + rows["plain"]
    assert parts["stories"]["share_of_rows"] == pytest.approx(2 * rows["stories"] / whole)
    assert sum(part["share_of_rows"] for part in parts.values()) == pytest.approx(1)


def test_epochs_are_those_of_the_planned_training(manifest: dict[str, Any]):
    """A set that is repeated twice comes about twice as often, as rows are nearly full."""
    for part in manifest["sources"].values():
        assert part["epochs"] == pytest.approx(part["share_of_rows"] * 1_000_000 / part["training_tokens"])
    epochs = {name: part["epochs"] for name, part in manifest["sources"].items()}
    assert 1.6 < epochs["stories"] / epochs["chats"] < 2.4


def test_licences_and_what_they_allow_are_said(manifest: dict[str, Any]):
    stories, chats, plain = (manifest["sources"][name] for name in SOURCES)
    assert (stories["licence"], stories["commercial"], stories["gated"]) == ("MIT", True, False)
    assert (chats["licence"], chats["commercial"], plain["gated"]) == ("CC-BY-NC", False, True)
    assert plain["hub"] == "someone/plain"


def test_files_are_known_by_their_digests(manifest: dict[str, Any], run: Run):
    read = {name: digest for part in manifest["sources"].values() for name, digest in part["read"].items()}
    assert list(read) == ["stories/train.jsonl", "chats/data.json.gz", "plain/train-00000.parquet"]
    written = {name: file["sha256"] for name, file in manifest["files"].items()}
    for folder, files in ((Path(run.recipe.root), read), (run.out, written)):
        for name, digest in files.items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def test_nothing_of_the_machine_and_no_time_is_in_it(run: Run):
    text = (run.out / "manifest.json").read_text() + (run.out / "report.json").read_text()
    assert run.recipe.root not in text
    assert str(run.out) not in text
    assert not re.search(r'"/|\b20\d\d-\d\d-\d\d|\d\d:\d\d:\d\d', text)
    assert "workers" not in text


def test_the_recipe_and_the_versions_are_in_it(manifest: dict[str, Any]):
    recipe = manifest["recipe"]
    assert [source["name"] for source in recipe["sources"]] == list(SOURCES)
    assert recipe["tokens"]["tokenizer"] == "train"
    assert recipe["decontaminate"]["benchmarks"][0]["name"] == "shelves"
    assert recipe["work"] == {"shard_rows": 50}
    assert all(re.match(r"\d+\.\d+", version) for version in manifest["versions"].values())
    assert {"python", "daft", "ftfy", "dreamer-jax"} <= set(manifest["versions"])


def test_the_stages_over_all_sources_are_counted_once(manifest: dict[str, Any]):
    stages = manifest["over_all_sources"]
    assert {kind: counts["out"] for kind, counts in stages["duplicates"].items()} == {
        "exact": 5,
        "near": 5,
        "answers": 2,
    }
    assert stages["questions"]["all"]["shelves"] == 16
    assert stages["tokenizer"]["all"]["rows of plain"] == manifest["sources"]["plain"]["stages"]["decontaminate"]["out"]
    assert set(stages) < set(VERSIONS)


# Leaks


def hits(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.out / "decontamination.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["verbatim", "in capitals", "embedded"])
def test_planted_leaks_are_in_no_training_row_and_reported(run: Run, kind: str):
    leaked = set(run.planted.leaked[kind]) & set(run.questions("unique", "stories", "train.parquet"))
    assert len(leaked) >= 2  # of four, some of which may be held out
    assert leaked.isdisjoint(run.questions("decontaminate", "stories"))
    reported = {hit["prompt"]: hit for hit in hits(run) if hit["prompt"] in leaked}
    assert set(reported) == leaked
    for hit in reported.values():
        assert (hit["source"], hit["benchmark"]) == ("stories", "shelves")
        assert hit["rule"] == ("contained" if kind == "embedded" else "whole prompt")
        assert hit["question"].casefold() in hit["prompt"].casefold()
        assert hit["question_id"].startswith("shelves.jsonl.gz, row ")


def test_a_question_with_other_numbers_is_no_leak(run: Run):
    trained = set(run.questions("decontaminate", "stories"))
    assert set(run.planted.harmless) & set(run.questions("unique", "stories", "train.parquet")) <= trained
    assert set(run.planted.harmless) & trained


def test_the_held_out_questions_of_a_source_that_is_a_benchmark_are_in_no_training_text(run: Run):
    held_out = run.questions("unique", "chats", "validation.parquet")
    texts = [f"{row.prompt}\n{row.response}" for row in rows_of(run.work, "decontaminate", ending="parquet")]
    assert not [question for question in held_out if any(question in text for text in texts)]
    of_plain = [hit for hit in hits(run) if hit["source"] == "plain"]
    assert len(of_plain) >= 1
    assert {(hit["benchmark"], hit["part"]) for hit in of_plain} == {("chats", "response")}


# For a person


def test_the_table_has_a_line_for_each_source(manifest: dict[str, Any]):
    header, *lines = table(manifest).splitlines()
    assert header.split()[:2] == ["source", "licence"]
    assert [line.split()[0] for line in lines] == list(SOURCES)
    assert len({len(line) for line in [header, *lines]}) == 1
    chats = lines[1].split()
    assert chats[3:5] == ["89", "-4"]
    part = manifest["sources"]["chats"]
    assert chats[-3:] == [str(part["training_documents"]), f"{part['training_tokens']:,}", f"{part['epochs']:.2f}"]


def test_the_table_of_a_plan_without_a_budget_has_no_epochs(manifest: dict[str, Any]):
    parts = {name: {k: v for k, v in part.items() if k != "epochs"} for name, part in manifest["sources"].items()}
    lines = table({"sources": parts}).splitlines()
    assert lines[1].split()[-1] == f"{parts['stories']['training_tokens']:,}"
