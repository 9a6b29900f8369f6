"""Intervals hold what they promise, and data efficiency is what the paper says."""

import math

import numpy as np
import pytest

from dreamer_jax.evaluation.comparison.statistics import (
    Efficiency,
    Estimate,
    average,
    average_difference,
    data_efficiency,
    mean_interval,
    paired_difference,
    paired_rate_difference,
    running_best,
)
from dreamer_jax.evaluation.requests import EvaluationError

SIMULATIONS = 1500


def coverage(intervals, truth):
    return np.mean([low <= truth <= high for low, high in intervals])


def test_an_accuracy_has_wilsons_interval():
    # Newcombe (1998), table I: 81 of 263 by the score method.
    estimate = mean_interval([1.0] * 81 + [0.0] * 182)
    assert estimate.value == pytest.approx(81 / 263)
    assert (round(estimate.low, 4), round(estimate.high, 4), estimate.n) == (0.2553, 0.3662, 263)


def test_all_right_is_not_certainty():
    # Wilson's bound at p = 1 is n / (n + z^2).
    assert mean_interval([1.0] * 10) == pytest.approx((1.0, 10 / (10 + 1.959964**2), 1.0, 10))
    assert mean_interval([0.0] * 10) == pytest.approx((0.0, 0.0, 1 - 10 / (10 + 1.959964**2), 10))


def test_one_question_says_little():
    value, low, high, n = mean_interval([1])
    assert (value, high, n) == (1.0, 1.0, 1)
    assert low == pytest.approx(1 / (1 + 1.959964**2))


def test_graded_scores_have_the_normal_interval():
    # Mean 0.5, variance (0.25^2 + 0.25^2) / 3 with n - 1.
    half = 1.959964 * math.sqrt(0.125 / 3 / 4)
    assert mean_interval([0.25, 0.5, 0.5, 0.75]) == pytest.approx((0.5, 0.5 - half, 0.5 + half, 4))


def test_equal_grades_are_no_certainty_either():
    assert mean_interval([0.5] * 20) == pytest.approx(mean_interval([0, 1] * 10))


def test_one_number_of_unknown_range_has_no_bounds():
    assert mean_interval([321.0]) == (321.0, -math.inf, math.inf, 1)


def test_no_scores_have_no_mean():
    with pytest.raises(EvaluationError, match="no scores"):
        mean_interval([])
    with pytest.raises(EvaluationError, match="no tasks"):
        average([])


@pytest.mark.parametrize(("p", "n"), [(0.3, 50), (0.5, 400), (0.05, 500)])
def test_the_interval_of_an_accuracy_covers_the_truth(p, n):
    rng = np.random.default_rng(0)
    intervals = (mean_interval(rng.random(n) < p)[1:3] for _ in range(SIMULATIONS))
    assert 0.93 <= coverage(intervals, p) <= 0.97


def test_the_interval_of_graded_scores_covers_the_truth():
    rng = np.random.default_rng(1)
    intervals = (mean_interval(rng.beta(2, 3, 80))[1:3] for _ in range(SIMULATIONS))
    assert 0.93 <= coverage(intervals, 0.4) <= 0.97


def test_the_interval_of_an_average_of_tasks_covers_the_truth():
    rng, tasks = np.random.default_rng(2), ((0.2, 60), (0.5, 100), (0.9, 80))
    averages = (average([mean_interval(rng.random(n) < p) for p, n in tasks]) for _ in range(SIMULATIONS))
    assert 0.93 <= coverage((a[1:3] for a in averages), 1.6 / 3) <= 0.97


def test_the_average_of_tasks_adds_their_variances():
    tasks = [Estimate(0.4, 0.37, 0.44, 100), Estimate(0.6, 0.56, 0.63, 50)]
    assert average(tasks) == pytest.approx((0.5, 0.475, 0.525, 150))


def answers(rng, n, p, q):
    """Of two models with accuracies p and q that share the luck of half the questions."""
    luck = rng.random((3, n))
    shared = rng.random(n) < 0.5
    return (np.where(shared, luck[0], luck[i]) < level for i, level in ((1, p), (2, q)))


@pytest.mark.parametrize(("p", "q", "n"), [(0.5, 0.5, 200), (0.45, 0.3, 100), (0.9, 0.85, 300)])
def test_the_interval_of_a_paired_difference_covers_the_truth(p, q, n):
    rng = np.random.default_rng(3)
    found = [paired_difference(*answers(rng, n, p, q)) for _ in range(SIMULATIONS)]
    assert 0.93 <= coverage(((d.low, d.high) for d in found), p - q) <= 0.97


def test_models_that_are_equally_good_seldom_seem_different():
    rng = np.random.default_rng(4)
    small = np.mean([paired_difference(*answers(rng, 200, 0.4, 0.4)).p < 0.05 for _ in range(SIMULATIONS)])
    assert 0.03 <= small <= 0.07


def test_graded_pairs_have_the_variance_of_their_differences():
    rng = np.random.default_rng(5)
    a = rng.random(50)
    b = 0.7 * a + 0.3 * rng.random(50)
    found = paired_difference(a, b)
    error = np.std(a - b, ddof=1) / math.sqrt(50)
    assert found.value == pytest.approx(np.mean(a - b))
    assert (found.high - found.low) / 2 == pytest.approx(1.959964 * error)
    assert found.p == pytest.approx(math.erfc(abs(np.mean(a - b)) / error / math.sqrt(2)))
    assert found.correlation == pytest.approx(np.corrcoef(a, b)[0, 1])


def test_answers_in_pairs_have_newcombes_interval():
    # Newcombe (1998, statistics in medicine 17, 2635), table III, method 10: e, f, g, h = 36, 12, 2, 0.
    a = [1] * 36 + [1] * 12 + [0] * 2
    b = [1] * 36 + [0] * 12 + [1] * 2
    found = paired_difference(a, b)
    assert found.value == pytest.approx(0.2)
    assert (round(found.low, 4), round(found.high, 4)) == (0.0569, 0.3404)


def test_the_p_value_counts_the_questions_that_one_model_wins():
    # 5 wins and 1 loss: twice (P(0 of 6) + P(1 of 6) / 2) = 2 (1 + 3) / 64.
    a, b = [1] * 5 + [0] + [1] * 10, [0] * 5 + [1] + [1] * 10
    assert paired_difference(a, b).p == pytest.approx(8 / 64)


def test_shared_difficulty_makes_a_comparison_sharper():
    rng = np.random.default_rng(6)
    hard = rng.random(1000)
    a, b = hard + rng.normal(0, 0.1, 1000) < 0.5, hard + rng.normal(0, 0.1, 1000) < 0.45
    paired, alone = paired_difference(a, b), paired_difference(a, rng.permutation(b))
    assert paired.correlation is not None
    assert paired.correlation > 0.5
    assert paired.high - paired.low < 0.75 * (alone.high - alone.low)


def test_the_same_answers_are_no_proof_of_equal_models():
    found = paired_difference([1, 0] * 10, [1, 0] * 10)
    assert (found.value, found.p, found.correlation) == (0.0, 1.0, pytest.approx(1.0))
    # The correlation counts as (100 - 20 / 2) / 100.
    alone = mean_interval([1, 0] * 10)
    assert found.high == pytest.approx(math.sqrt(2 * (1 - 0.9)) * (alone.high - alone.value))
    assert found.low == pytest.approx(-found.high)


def test_one_model_right_and_one_wrong_on_three_questions_is_weak_evidence():
    found = paired_difference([1, 1, 1], [0, 0, 0])
    assert found.correlation is None
    assert found.p == pytest.approx(1 / 8)
    assert 0 < found.low < 0.5
    assert found.high == 1.0


def test_pairs_need_both_models():
    with pytest.raises(EvaluationError, match="3 and 2"):
        paired_difference([1, 1, 1], [1, 0])
    with pytest.raises(EvaluationError, match="0 and 0"):
        paired_difference([], [])


def test_the_average_difference_is_that_of_independent_tasks():
    rng = np.random.default_rng(7)
    tasks = [paired_difference(rng.random(60), rng.random(60)) for _ in range(3)]
    found = average_difference(tasks)
    errors = [(d.high - d.low) / 2 for d in tasks]
    assert found.value == pytest.approx(np.mean([d.value for d in tasks]))
    assert (found.high - found.low) / 2 == pytest.approx(math.hypot(*errors) / 3)
    assert (found.p < 0.05) == (found.low > 0 or found.high < 0)


def test_a_difference_of_rates_weighs_documents_by_their_size():
    found = paired_rate_difference([10.0, 60.0], [9.0, 52.0], [10, 20])
    # 9 / 30; residuals 1 - 3 and 8 - 6; n / (n - 1) = 2.
    assert found.value == pytest.approx(0.3)
    assert found.high - found.value == pytest.approx(1.959964 * math.sqrt(2 * 8) / 30)


def test_the_interval_of_a_difference_of_rates_covers_the_truth():
    rng, truth, covered = np.random.default_rng(8), 0.05, []
    for _ in range(SIMULATIONS):
        size = rng.integers(50, 500, 120)
        hard = rng.normal(2, 0.5, 120)
        a = size * (hard + truth + rng.normal(0, 0.1, 120))
        found = paired_rate_difference(a, size * hard, size)
        covered.append(found.low <= truth <= found.high)
    assert 0.93 <= np.mean(covered) <= 0.97


def test_one_document_bounds_no_rate():
    found = paired_rate_difference([3.0], [2.0], [10])
    assert (found.low, found.high, found.p) == (-math.inf, math.inf, 1.0)
    assert found.value == pytest.approx(0.1)


def test_documents_need_sizes():
    with pytest.raises(EvaluationError, match="as many sizes"):
        paired_rate_difference([1.0, 2.0], [1.0, 2.0], [1])
    with pytest.raises(EvaluationError, match="not all 0"):
        paired_rate_difference([1.0], [1.0], [0])


def test_the_running_best_keeps_the_first_of_equals():
    assert running_best([0.1, 0.3, 0.2, 0.3, 0.4]) == [0, 1, 1, 1, 4]


def efficiency(baseline, scores, every=10.0):
    """With a checkpoint every ten tokens."""
    grid = [every * (i + 1) for i in range(max(len(baseline), len(scores)))]
    return data_efficiency(grid[: len(baseline)], baseline, grid[: len(scores)], scores)


def test_a_run_that_needs_half_the_tokens_has_an_efficiency_of_two():
    assert efficiency([0.1, 0.2, 0.3, 0.4], [0.2, 0.4, 0.5, 0.6]) == Efficiency(2.0, 2.0, 4.0)


def test_between_checkpoints_the_score_rises_in_a_straight_line():
    # 0.4 is a quarter of the way from 0.3 at 20 to 0.7 at 30.
    found = efficiency([0.1, 0.2, 0.3, 0.4], [0.2, 0.3, 0.7, 0.7])
    assert found == pytest.approx((40 / 22.5, 40 / 30, 40 / 20))


def test_the_line_starts_from_the_running_best_and_not_from_a_dip():
    # From 0.3, the best until 20 tokens, to 0.5 at 30.
    found = efficiency([0.1, 0.4], [0.3, 0.1, 0.5])
    assert found.value == pytest.approx(20 / 25)


def test_the_baseline_needs_the_tokens_of_its_first_best_checkpoint():
    assert efficiency([0.1, 0.4, 0.2, 0.4], [0.1, 0.2, 0.3, 0.4]).value == pytest.approx(20 / 40)


def test_a_later_loss_of_the_score_does_not_matter():
    assert efficiency([0.1, 0.2, 0.3, 0.4], [0.2, 0.4, 0.1, 0.1]).value == pytest.approx(2.0)


def test_a_score_that_the_first_checkpoint_has_gives_a_lower_bound():
    found = efficiency([0.1, 0.2, 0.3, 0.4], [0.5, 0.6])
    assert found == Efficiency(None, 4.0, math.inf)
    assert str(found) == "≥ 4.0"


def test_a_score_that_is_never_reached_gives_an_upper_bound():
    found = efficiency([0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.39])
    assert found == Efficiency(None, 0.0, 1.0)
    assert str(found) == "< 1.0"


def test_a_run_that_ended_too_early_is_given_no_number():
    assert str(efficiency([0.1, 0.2, 0.3, 0.4], [0.1, 0.2])) == "not reached"


def test_bounds_are_rounded_to_the_safe_side():
    assert str(Efficiency(None, 1.19, math.inf)) == "≥ 1.1"
    assert str(Efficiency(None, 0.0, 0.81)) == "< 0.9"
    assert str(Efficiency(None, 0.0, 0.8)) == "< 0.8"


def test_one_checkpoint_gives_no_efficiency():
    assert efficiency([0.4], [0.1, 0.5]) is None
    assert efficiency([0.1, 0.4], [0.5]) is None


def test_a_score_before_training_is_not_worth_any_tokens():
    assert data_efficiency([0, 10], [0.3, 0.2], [0, 10], [0.1, 0.4]) is None
    assert data_efficiency([0, 10], [0.1, 0.2], [0, 10], [0.3, 0.4]) is None
    assert data_efficiency([0, 10], [0.1, 0.2], [0, 10], [0.0, 0.4]) == Efficiency(2.0, 1.0, math.inf)


def test_rounding_in_the_last_digit_does_not_hide_that_a_score_is_reached():
    assert efficiency([0.1, 0.1 + 0.2], [0.1, 0.3]).value == pytest.approx(1.0)
