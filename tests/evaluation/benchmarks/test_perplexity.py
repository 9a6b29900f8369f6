"""Texts are read as they stand, and their likelihood is summed over documents before it is divided."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dreamer_jax.data.template import Template
from dreamer_jax.evaluation.benchmarks.perplexity import NO_TEXT, PerplexityTask, perplexity
from dreamer_jax.evaluation.requests import EvaluationError, Generated, Item, Read, Reading


def texts(root: Path, name: str, *rows: Any) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
    return path


def test_a_text_is_read_as_it_stands(tmp_path: Path) -> None:
    path = texts(tmp_path, "some.jsonl", {"text": "  1 + 1\n= 2 π\n"}, {"text": "b", "instruction": "c", "output": "d"})
    assert PerplexityTask((path,)).questions(tmp_path).items == [
        Item("some.jsonl/0", Read("  1 + 1\n= 2 π\n"), group="some.jsonl"),
        Item("some.jsonl/1", Read("b"), group="some.jsonl"),
    ]


def test_an_instruction_and_its_output_are_read_in_the_layout_of_training(tmp_path: Path) -> None:
    path = texts(tmp_path, "some.jsonl", {"instruction": " 1 + 1?\n", "output": "2 \n"})
    assert PerplexityTask((path,)).questions(tmp_path).items[0].request == Read("Question: 1 + 1?\nAnswer: 2")
    of_run = PerplexityTask((path,)).questions(tmp_path, Template("Q: {text}", "\nA: {text}."))
    assert of_run.items[0].request == Read("Q: 1 + 1?\nA: 2.")


def test_rows_without_a_text_are_left_out_and_counted_and_the_others_keep_their_ids(tmp_path: Path) -> None:
    rows = [{"text": ""}, {"text": None}, {"txt": "a"}, {"text": " \n"}, {"text": "\ud83d"}, {"output": "b"}]
    rows += [{"instruction": "a", "output": " "}]
    path = texts(tmp_path, "some.jsonl", *rows, {"text": "a"})
    found = PerplexityTask((path,)).questions(tmp_path)
    assert [item.id for item in found.items] == ["some.jsonl/7"]
    assert found.notes == {NO_TEXT: 7}


def test_a_file_of_other_rows_is_told_what_it_has_and_what_it_needs(tmp_path: Path) -> None:
    path = texts(tmp_path, "some.jsonl", {"question": "a", "answer": "b"})
    with pytest.raises(EvaluationError, match=r"some.jsonl': no row has a text; the first has 'question', 'answer'"):
        PerplexityTask((path,)).questions(tmp_path)


def test_without_named_files_the_papers_held_out_texts_go_first_and_then_all_in_ppl(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"neither maths_college/validation.jsonl nor a .jsonl file in ppl"):
        PerplexityTask().questions(tmp_path)
    places = [f"ppl/{name}.jsonl" for name in "abcdefgh"] + ["ppl/i.jsonl.gz", "ppl/in/a.jsonl"]
    for place in places[::-3] + places:  # in no order that a folder may list them in by chance
        texts(tmp_path, place, {"text": place})
    texts(tmp_path, "ppl/SOURCE.json", {"text": "no"})
    assert [item.id for item in PerplexityTask().questions(tmp_path).items] == [f"{place}/0" for place in places]
    texts(tmp_path, "maths_college/validation.jsonl.gz", {"text": "c"})
    assert [item.id for item in PerplexityTask().questions(tmp_path).items] == ["maths_college/validation.jsonl/0"]


def test_two_named_files_of_one_name_are_refused(tmp_path: Path) -> None:
    paths = tuple(texts(tmp_path, f"{folder}/some.jsonl", {"text": "a"}) for folder in "ab")
    with pytest.raises(EvaluationError, match="same name"):
        PerplexityTask(paths).questions(tmp_path)


def test_a_documents_scores_are_its_nats_tokens_and_bytes_in_utf_8() -> None:
    verdict = next(PerplexityTask().verdicts([Item("a", Read("π = 3"))], [Reading(2.5, 4)]))
    assert verdict.scores == {"nats": 2.5, "tokens": 4.0, "bytes": 6.0}


def test_a_likelihood_that_is_no_number_stops_the_evaluation_and_another_outcome_is_a_bug() -> None:
    items = [Item("a/0", Read("a"))]
    with pytest.raises(EvaluationError, match="a/0: the log-likelihood is not a number"):
        list(PerplexityTask().verdicts(items, [Reading(math.nan, 1)]))
    with pytest.raises(TypeError, match="a/0"):
        list(PerplexityTask().verdicts(items, [Generated("a", 1, True)]))


def test_sums_are_divided_and_not_ratios_averaged() -> None:
    found = perplexity([1.0, 30.0], [1.0, 9.0], [2.0, 60.0])
    assert found["nats_per_token"].value == pytest.approx(3.1)
    assert found["perplexity"].value == pytest.approx(math.exp(3.1))
    assert found["nats_per_byte"].value == pytest.approx(0.5)
    assert found["bits_per_byte"].value == pytest.approx(0.5 / math.log(2))
    assert list(found) == list(PerplexityTask().metrics)


def test_documents_that_are_all_predicted_alike_leave_no_doubt() -> None:
    found = perplexity([2.0, 4.0, 6.0], [1.0, 2.0, 3.0], [4.0, 8.0, 12.0])
    assert found["nats_per_token"][:3] == pytest.approx((2.0, 2.0, 2.0))
    assert found["perplexity"][:3] == pytest.approx((math.exp(2.0),) * 3)


def test_one_document_says_nothing_of_others() -> None:
    found = perplexity([2.0], [1.0], [4.0])
    assert found["nats_per_token"] == (2.0, 0.0, math.inf, 1)
    assert found["perplexity"] == (math.exp(2.0), 1.0, math.inf, 1)


def test_a_broken_model_has_an_infinite_perplexity_and_no_crash() -> None:
    assert perplexity([1e6, 1e6], [1.0, 1.0], [1.0, 1.0])["perplexity"].value == math.inf


def test_no_documents_and_no_tokens_are_refused() -> None:
    for nats, sizes in (([], []), ([0.0, 0.0], [0.0, 0.0])):
        with pytest.raises(EvaluationError):
            perplexity(nats, sizes, sizes)


def test_intervals_over_documents_hold_the_truth_95_percent_of_the_time() -> None:
    random = np.random.default_rng(0)
    held = []
    for _ in range(1000):
        tokens = random.integers(10, 200, 60).astype(float)
        nats = tokens * random.gamma(9.0, 2.0 / 9.0, 60)  # each document has a difficulty of its own, 2 on average
        found = perplexity(nats.tolist(), tokens.tolist(), (4 * tokens).tolist())
        held.append([found["perplexity"].low < math.exp(2) < found["perplexity"].high])
        held[-1].append(found["nats_per_byte"].low < 0.5 < found["nats_per_byte"].high)
    assert np.mean(held, axis=0) == pytest.approx(0.95, abs=0.025)
