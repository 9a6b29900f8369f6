"""Panels show the scores of a comparison in the units of their axes."""

import pytest

from dreamer_jax.evaluation.comparison.panels import accuracy_panels, depth_panels
from dreamer_jax.evaluation.comparison.results import read_runs
from tests.evaluation.comparison.folders import compared_paths, evaluate, perplexity, task


def test_accuracies_and_chance_are_in_percent(runs):
    gsm8k, math, average = accuracy_panels(compared_paths(*runs))
    assert [panel.title for panel in (gsm8k, math, average)] == ["gsm8k", "math", "average"]
    assert gsm8k.curves[0].value == pytest.approx((20, 30, 40, 50))
    assert gsm8k.curves[0].x == (100e6, 200e6, 300e6, 400e6)
    assert (gsm8k.chance, average.chance) == (25, 25)


def test_a_saving_is_from_the_tokens_of_the_baselines_best_to_those_at_which_a_run_has_it(runs):
    gsm8k, math, _ = accuracy_panels(compared_paths(*runs))
    assert gsm8k.goal == pytest.approx(50)
    assert [(s.curve, s.start, s.end, s.text) for s in gsm8k.savings] == [
        (1, 400e6, 200e6, "2.0×"),
        (2, 400e6, 100e6, "≥ 4.0×"),
    ]
    assert [s.curve for s in math.savings] == [1]


def test_a_baseline_of_one_checkpoint_sets_no_goal(tmp_path):
    [panel] = accuracy_panels(compared_paths(evaluate(tmp_path, "la", 100, {"gsm8k": task(5)})))
    assert (panel.goal, panel.savings) == (None, ())


def test_perplexity_by_depth_stands_as_it_is(tmp_path):
    for depth, value in ((16, 6.0), (8, 9.0)):
        path = evaluate(tmp_path, "dr", 400, {"gsm8k": task(depth), "ppl": perplexity(value)}, depth=depth)
    gsm8k, ppl = depth_panels(read_runs([path]))
    assert (ppl.unit, ppl.chance, ppl.curves[0].x, ppl.curves[0].value) == ("perplexity", None, (8, 16), (9, 6))
    assert (gsm8k.unit, gsm8k.chance, gsm8k.curves[0].marked) == ("accuracy (%)", 25, 16)


def test_a_task_of_one_depth_has_no_panel_by_depth(tmp_path):
    evaluate(tmp_path, "dr", 400, {"gsm8k": task(5), "math": task(5)})
    path = evaluate(tmp_path, "dr", 400, {"gsm8k": task(4)}, depth=8)
    assert [panel.title for panel in depth_panels(read_runs([path]))] == ["gsm8k"]
