"""The stages that look at one row at a time: what they leave, what they count, and what they keep to be looked at."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dreamer_jax.preparation.benchmarks import QUESTIONS
from dreamer_jax.preparation.clean import Limits, Repair, Rule
from dreamer_jax.preparation.decontaminate import Question
from dreamer_jax.preparation.filters import (
    CONTAMINATED,
    HITS,
    Done,
    clean_shard,
    decontaminate_shard,
    strip_shard,
)
from dreamer_jax.preparation.reasoning import UNPROVED, How
from dreamer_jax.preparation.stage import read, rows, write
from tests.preparation.conftest import draft, write_rows

SHELVES = "How many of the 701 shelves does the apple librarian fill in a week?"


def outcome(folder: Path, done: Done) -> tuple[list[tuple[str, str]], Counter[str], dict[str, Any]]:
    """Texts of the rows that are left, the counts, and the samples. The characters of the rows are compared here."""
    counts, facts = done
    assert facts == {}
    samples = json.loads((folder / "samples.json").read_text())
    left = [row[1:] for row in rows(folder / "parquet")]
    assert counts.pop("characters", 0) == sum(len(text) for pair in left for text in pair)
    return left, counts, samples


def strip(tmp_path: Path, traces: str, *pairs: tuple[str, str]) -> Any:
    shard = write_rows(tmp_path / "shard", pairs)
    return outcome(folder := draft(tmp_path), strip_shard(folder, shard, traces))


def clean(tmp_path: Path, limits: Limits, *pairs: tuple[str, str]) -> Any:
    shard = write_rows(tmp_path / "shard", pairs)
    return outcome(folder := draft(tmp_path), clean_shard(folder, shard, limits))


# Traces


def test_traces_are_cut_counted_and_shown(tmp_path: Path):
    left, counts, samples = strip(tmp_path, "think", ("1?", "<think>hm</think>\nOne."), ("2?", "Two."))
    assert left == [("1?", "One."), ("2?", "Two.")]
    assert counts == {"in": 2, "out": 2, How.BLOCKS: 1, How.UNTOUCHED: 1, "characters cut": 2}
    assert samples == {How.BLOCKS: [{"question": "1?", "cut": "hm", "left": "One."}]}


def test_a_trace_without_an_end_drops_its_row(tmp_path: Path):
    left, counts, samples = strip(tmp_path, "think", ("1?", "<think>hm"), ("2?", "Two."))
    assert left == [("2?", "Two.")]
    assert (counts["in"], counts["out"], counts[How.UNCLOSED]) == (2, 1, 1)
    assert samples[How.UNCLOSED][0]["question"] == "1?"


@pytest.mark.parametrize(
    ("traces", "response", "left"),
    [
        ("none", "<think>hm</think> One.", "<think>hm</think> One."),
        ("deepmath", "hm </think> One.", "One."),
        ("deepmath", "hm, of which no end is marked", None),
        (
            "open_thoughts",
            "<|begin_of_thought|>hm<|end_of_thought|><|begin_of_solution|>One.<|end_of_solution|>",
            "One.",
        ),
    ],
)
def test_each_source_has_its_marks(tmp_path: Path, traces: str, response: str, left: str | None):
    assert strip(tmp_path, traces, ("1?", response))[0] == ([] if left is None else [("1?", left)])


@pytest.mark.parametrize("traces", ["none", "think"])
def test_a_proof_question_without_a_proof_goes_whatever_the_marks(tmp_path: Path, traces: str):
    left, counts, samples = strip(tmp_path, traces, ("Prove that 2 is even.", "It is even."), ("2?", "Two."))
    assert left == [("2?", "Two.")]
    assert counts[UNPROVED] == 1
    assert samples[UNPROVED] == [{"question": "Prove that 2 is even.", "answer": "It is even."}]


# Cleaning


def test_rows_are_repaired_and_the_change_is_shown(tmp_path: Path):
    left, counts, samples = clean(tmp_path, Limits(), ("What?", "x" * 100 + "\u200bOne.\r\n"), ("2?", "Two."))
    assert left == [("What?", "x" * 100 + "One."), ("2?", "Two.")]
    assert counts == {"in": 2, "out": 2, Repair.INVISIBLE: 1, Repair.SPACE: 1}
    [sample] = samples[Repair.INVISIBLE]
    assert (sample["before"], sample["after"]) == (repr("x" * 40 + "\u200bOne.\r\n"), repr("x" * 40 + "One."))


def test_each_rule_counts_and_shows_what_it_drops(tmp_path: Path):
    pairs = (("", "One."), ("2?", "n/a"), ("3?", "Three."), ("4?", "Fo\ufffdur"), ("5?", "x" * 80))
    left, counts, samples = clean(tmp_path, Limits(response=50), *pairs)
    assert left == [("3?", "Three.")]
    dropped = {f"dropped: {rule}": 1 for rule in (Rule.EMPTY, Rule.MISSING, Rule.MOJIBAKE, Rule.OVERSIZED)}
    assert counts == {"in": 5, "out": 1, **dropped}
    assert set(samples) == set(dropped)
    assert samples[f"dropped: {Rule.OVERSIZED}"][0]["because"] == "the answer has 80 characters"


def test_plain_text_needs_no_question(tmp_path: Path):
    assert clean(tmp_path, Limits(question=False), ("", "A text."))[0] == [("", "A text.")]


def test_ranks_stay_with_their_rows(tmp_path: Path):
    shard = write_rows(tmp_path / "shard", [("1?", ""), ("2?", "Two.")], first=70)
    clean_shard(folder := draft(tmp_path), shard, Limits())
    assert [row.rank for row in rows(folder / "parquet")] == [71]
    strip_shard(folder := draft(tmp_path), shard, "think")
    assert [row.rank for row in rows(folder / "parquet")] == [71]  # nothing is left of an empty answer


# Questions of benchmarks


def decontaminate(tmp_path: Path, questions: list[Question], *pairs: tuple[str, str]) -> Any:
    shard = write_rows(tmp_path / "shard", pairs)
    write(tmp_path / "questions", questions, QUESTIONS)
    folder = draft(tmp_path)
    digest = str(questions)
    left = outcome(folder, decontaminate_shard(folder, shard, tmp_path / "questions", digest))
    hits = [
        dict(zip(batch, values, strict=True))
        for batch in read(folder / "hits")
        for values in zip(*batch.values(), strict=True)
    ]
    return (*left, hits)


def test_a_row_with_a_question_of_a_benchmark_goes_and_the_hit_says_which(tmp_path: Path):
    pairs = (("1?", "One."), (SHELVES.upper(), "40."), ("Tell me.", f"They asked: {SHELVES} He said 40."))
    left, counts, samples, hits = decontaminate(tmp_path, [Question("shelves", "row 1", SHELVES)], *pairs)
    assert left == [("1?", "One.")]
    assert counts == {"in": 3, "out": 1, CONTAMINATED: 2, "shelves, whole prompt": 1, "shelves, contained": 1}
    assert [list(hit) for hit in hits] == [HITS.names] * 2
    found = {"benchmark": "shelves", "question_id": "row 1", "overlap": 1.0, "question": SHELVES}
    whole = {"rank": 1, "rule": "whole prompt", "part": "prompt", "prompt": SHELVES.upper(), "response": "40."}
    assert hits[0] == found | whole
    assert (hits[1]["rank"], hits[1]["rule"], hits[1]["part"]) == (2, "contained", "response")
    assert samples["shelves, contained"][0]["overlap"] == "1.00 of it"


def test_a_row_with_two_questions_is_dropped_once_and_hit_twice(tmp_path: Path):
    two = [Question("a", "1", SHELVES), Question("b", "2", SHELVES.replace("701", "702"))]
    left, counts, _, hits = decontaminate(tmp_path, two, (" ".join(q.text for q in two), "40."))
    assert left == []
    assert counts[CONTAMINATED] == 1
    assert [hit["benchmark"] for hit in hits] == ["a", "b"]


def test_other_numbers_are_another_question(tmp_path: Path):
    other = SHELVES.replace("701", "702")
    left, counts, _, hits = decontaminate(tmp_path, [Question("shelves", "1", SHELVES)], (other, "41."))
    assert left == [(other, "41.")]
    assert (counts[CONTAMINATED], hits) == (0, [])


def test_other_questions_in_the_same_file_are_looked_for_anew(tmp_path: Path):
    for text in (SHELVES, SHELVES.replace("701", "702")):
        _, counts, _, _ = decontaminate(tmp_path, [Question("shelves", "1", text)], (text, "40."))
        assert counts[CONTAMINATED] == 1
