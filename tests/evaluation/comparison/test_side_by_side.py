"""Runs are compared question by question, and only where they were asked the same."""

import json
import math

import pytest

from dreamer_jax.evaluation.comparison.record import record
from dreamer_jax.evaluation.requests import EvaluationError
from tests.evaluation.comparison.folders import (
    QUESTIONS,
    compared_paths,
    efficiencies,
    evaluate,
    perplexity,
    refused,
    task,
    train,
)


def test_data_efficiency_is_the_baselines_tokens_over_those_of_the_run(runs):
    # la has its 10 right at 400; dr at 200; dr_da has 12 at 100, its first checkpoint.
    assert efficiencies(compared_paths(*runs), "gsm8k") == {"la": "1.0", "dr": "2.0", "dr_da": "≥ 4.0"}
    # la has its 10 right at 200; dr halfway between 8 at 200 and 12 at 300; dr_da never, until 400.
    assert efficiencies(compared_paths(*runs), "math") == {"la": "1.0", "dr": "0.8", "dr_da": "< 0.5"}
    # The averages of la are best, 8, at 200 first; dr has 6, 9; dr_da 8 at once.
    assert efficiencies(compared_paths(*runs), "average")["dr"] == "1.2"


@pytest.mark.parametrize(("best", "text"), [(4, None), (5, None), (6, "2.0")])
def test_a_baseline_that_is_no_better_than_chance_sets_no_goal(tmp_path, best, text):
    baseline = train(tmp_path, "la", [3, 3, 3, best], [0, 0, 0, 0])
    comparison = compared_paths(baseline, train(tmp_path, "dr", [2, best, 8, 9], [0, 0, 0, 0]))
    assert efficiencies(comparison, "gsm8k") == {"la": text and "1.0", "dr": text}
    assert efficiencies(comparison, "math") == {"la": None, "dr": None}


def test_questions_are_compared_one_by_one(runs):
    differences = {(d["run"], d["task"]): d for d in record(compared_paths(*runs))["differences"]}
    gsm8k = differences["dr_da", "gsm8k"]
    assert gsm8k["value"] == pytest.approx(0.25)
    # 5 wins of 5: twice half of 1 / 32.
    assert gsm8k["p"] == pytest.approx(1 / 32)
    assert gsm8k["n"] == QUESTIONS
    assert gsm8k["correlation"] == pytest.approx(1 / math.sqrt(3))
    average = differences["dr_da", "average"]
    assert average["value"] == pytest.approx((0.25 + 0.1) / 2)


def test_questions_are_joined_by_id_and_not_by_place(runs):
    expected = record(compared_paths(*runs))["differences"]
    path = runs[1] / "evaluation" / "400" / "items.jsonl"
    path.write_text("\n".join(["", *path.read_text().splitlines()][::-1]))
    assert record(compared_paths(*runs))["differences"] == expected


def test_only_items_that_have_the_metric_are_compared(tmp_path):
    paths = []
    for run, right in (("la", 4), ("dr", 9)):
        entry, items = task(right)
        others = [{"id": f"cloze/{i}", "scores": {"cloze": 1.0}} for i in range(30)]
        paths.append(evaluate(tmp_path, run, 100, {"mathqa": (entry, [*items, *others])}))
    [difference] = record(compared_paths(*paths))["differences"]
    assert (difference["value"], difference["n"]) == (pytest.approx(0.25), QUESTIONS)


def test_other_questions_are_an_error_that_counts_them(runs):
    path = runs[1] / "evaluation" / "400" / "items.jsonl"
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([first.replace('"0"', '"new"'), *others, ""]))
    with pytest.raises(EvaluationError, match=r"gsm8k: questions are missing, 1 in '.*dr/.*' and 1 in '.*la/.*'"):
        compared_paths(*runs[:2])


def test_items_that_are_not_those_of_the_scores_are_an_error_that_counts_them(runs):
    path = runs[1] / "evaluation" / "400" / "items.jsonl"
    path.write_text("\n".join([*path.read_text().splitlines()[3:], ""]))
    assert f"'{path}': 17 items of gsm8k have a score 'robust', scores.json counts 20; remove" in refused(*runs)


def test_single_evaluations_can_be_compared_at_any_depth(tmp_path):
    for depth, right in ((16, 10), (32, 12)):
        evaluate(tmp_path, "dr", 100, {"gsm8k": task(right)}, depth=depth)
    folders = [tmp_path / "dr" / "evaluation" / name for name in ("100", "100-depth32")]
    [difference] = record(compared_paths(*folders))["differences"]
    assert difference["run"] == "dr (step 100, depth 32)"
    assert difference["value"] == pytest.approx(0.1)


def test_a_run_that_was_evaluated_at_other_depths_alone_is_told_how(runs, tmp_path):
    path = evaluate(tmp_path, "deep", 100, {"gsm8k": task(5)}, depth=32)
    assert "at the trained depth" in refused(runs[0], path)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"prompts": "b" * 64}, "the prompts differ"),
        ({"limit": 20}, "the limits of questions differ"),
        ({"metric": "exact"}, "the metrics differ"),
    ],
)
def test_what_was_asked_or_scored_otherwise_is_not_compared(tmp_path, changes, cause):
    one = evaluate(tmp_path, "la", 100, {"gsm8k": task(5)})
    other = evaluate(tmp_path, "dr", 100, {"gsm8k": task(5, **changes)})
    message = refused(one, other)
    assert cause in message
    assert f"'{other / 'evaluation' / '100'}'" in message


def test_an_older_checkpoint_that_was_asked_otherwise_is_found_too(tmp_path):
    evaluate(tmp_path, "la", 100, {"gsm8k": task(5, prompts="old")})
    assert "the prompts differ" in refused(evaluate(tmp_path, "la", 200, {"gsm8k": task(5)}))


def test_a_task_that_some_run_lacks_is_left_out_and_told(tmp_path):
    one = evaluate(tmp_path, "la", 100, {"gsm8k": task(5), "math": task(5)})
    comparison = compared_paths(one, evaluate(tmp_path, "dr", 100, {"gsm8k": task(5)}))
    assert [column.title for column in comparison.columns] == ["gsm8k"]
    assert comparison.notes == ("math is left out: some run has none of it. Not evaluated: dr (step 100).",)


def test_guessing_gives_nothing_where_chance_is_not_told(tmp_path):
    entry, items = task(5)
    entry["metrics"]["robust"]["chance"] = None
    path = evaluate(tmp_path, "la", 100, {"gsm8k": (entry, items), "math": task(5)})
    assert [column.chance for column in compared_paths(path).columns] == [None, 0.25, 0.125]


def test_runs_without_a_common_task_are_refused(tmp_path):
    one, other = (evaluate(tmp_path, name, 1, {name: task(5)}) for name in ("gsm8k", "math"))
    assert refused(one, other).startswith("no task has been evaluated for all runs ('gsm8k': gsm8k; 'math': math)")


def test_limits_and_unequal_training_are_noted(tmp_path):
    one = evaluate(tmp_path, "la", 100, {"gsm8k": task(5, limit=20)})
    notes = compared_paths(one, evaluate(tmp_path, "dr", 300, {"gsm8k": task(5, limit=20)})).notes
    assert notes == (
        "Limited to the first 20 questions of each part: gsm8k.",
        "The last checkpoints have seen different numbers of training tokens: la 100M, dr 300M.",
    )


def test_an_item_without_the_score_is_named(runs):
    file = runs[1] / "evaluation" / "400" / "items.jsonl"
    file.write_text(file.read_text().replace("tokens", "other"))
    assert f"'{file}': an item has no score 'tokens'" in refused(*runs)


def test_evaluations_with_another_context_or_stride_are_not_compared(tmp_path):
    path = evaluate(tmp_path, "a", 1, {"ppl": perplexity(6.0)})
    other = evaluate(tmp_path, "b", 1, {"ppl": perplexity(6.0)})
    file = other / "evaluation" / "1" / "scores.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"context": 8, "stride": 1}))
    with pytest.raises(EvaluationError, match="ppl cannot be compared, for context and stride differ"):
        compared_paths(path, other)
