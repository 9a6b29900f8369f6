"""What is missing, broken or there twice is an error that names it."""

import json
import re

import pytest

from dreamer_jax.evaluation.comparison.results import read_items, read_runs
from tests.evaluation.comparison.folders import (
    evaluate,
    refused,
    task,
)


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    paths = [evaluate(tmp_path / seed, "dr", 1, {"gsm8k": task(4)}) for seed in ("one", "two")]
    assert [run.label for run in read_runs(paths)] == [str(path) for path in paths]


def test_a_run_that_was_not_evaluated_is_told_how(runs, tmp_path):
    path = tmp_path / "my run"
    path.mkdir()
    assert refused(runs[0], path) == (
        f"'{path}' has no evaluation; make it: python -m dreamer_jax.evaluate --checkpoint '{path}' --data ROOT --all"
    )
    assert refused(runs[0], tmp_path / "absent").startswith(f"'{tmp_path / 'absent'}' is not a folder")


def test_a_run_is_not_compared_with_itself(runs):
    assert "given twice" in refused(runs[0], runs[0])


@pytest.mark.parametrize(
    ("break_it", "cause"),
    [
        (lambda scores: scores.pop("tokens"), "tokens is missing"),
        (lambda scores: scores["tasks"]["gsm8k"].pop("prompts"), r"tasks\.gsm8k\.prompts is missing"),
        (lambda scores: scores["tasks"]["gsm8k"]["metrics"].clear(), r"tasks\.gsm8k\.metrics is empty"),
        (
            lambda scores: scores["tasks"]["gsm8k"]["metrics"]["robust"].pop("value"),
            r"metrics\.robust\.value is missing",
        ),
        (lambda scores: scores.update(format=2), "format 2 is not 1"),
    ],
)
def test_broken_scores_are_named(tmp_path, break_it, cause):
    path = evaluate(tmp_path, "la", 100, {"gsm8k": task(5)})
    file = path / "evaluation" / "100" / "scores.json"
    scores = json.loads(file.read_text())
    break_it(scores)
    file.write_text(json.dumps(scores))
    assert re.search(f"'{file}'.*{cause}", refused(path))
    file.write_text("{")
    assert f"'{file}' is not JSON" in refused(path)


@pytest.mark.parametrize(
    ("text", "cause"),
    [("{", "row 2 is not JSON"), ("[]", "row 2 is not an item"), ('{"task": "gsm8k"}', "row 2 is not an item")],
)
def test_a_broken_row_is_named(runs, text, cause):
    file = runs[0] / "evaluation" / "400" / "items.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], text, *lines[2:], ""]))
    assert f"'{file}', {cause}" in refused(*runs)
    file.write_text("\n".join([lines[0], *lines, ""]))
    assert f"'{file}', row 2: '0' of gsm8k is there twice" in refused(*runs)
    file.unlink()
    assert f"'{file}' is missing" in refused(*runs)


def test_two_evaluations_of_one_checkpoint_are_refused(tmp_path):
    evaluate(tmp_path, "la", 100, {"gsm8k": task(5)})
    path = evaluate(tmp_path, "la", 100, {"gsm8k": task(6)}, folder="copy")
    assert "one of two evaluations of step 100 at depth 16" in refused(path)


def test_an_evaluation_that_still_goes_on_has_the_items_of_its_finished_tasks(tmp_path):
    path = evaluate(tmp_path, "la", 100, {"gsm8k": task(5)}) / "evaluation" / "100"
    finished = read_items(path)
    with (path / "items.jsonl").open("a") as file:
        file.write('{"task": "math", "id": "0", "outcome": {}}\n{"task": "math", "id": "1", "outc')
    assert read_items(path) == finished
