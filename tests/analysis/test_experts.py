"""Routing in numbers: against distributions whose numbers are known."""

import numpy as np
import pytest

from dreamer_jax.analysis.captures import AnalysisError, Captures
from dreamer_jax.analysis.experts import (
    COUNTS,
    NONE,
    depth_given_expert,
    display_order,
    diversity,
    expert_given_depth,
    experts_for,
    lorenz,
    paper_numbers,
    top_depths,
)
from dreamer_jax.training.metrics import gini
from tests.analysis.planted_captures import planted

E = 12
UNIFORM = np.full(E, 7)
ALONE = np.array([0, 0, 50] + [0] * (E - 3))
RISING = np.arange(1, E + 1)
WITH_GAPS = np.array([[8, 0, 0, 1], [2, 0, 0, 3], [0, 0, 0, 0]])
"""Expert 1 and 2 are unused, depth 2 has no selections."""


def table():
    """10 depths and 20 experts of 900 selections each, the last unused: each of the paper's numbers can be counted."""
    counts = np.zeros((10, 20), np.int64)
    for depths, experts in (
        ([9], [0, 1]),
        ([7, 8], [2]),
        ([5], [3]),
        ([0], [4]),
        (range(10), range(5, 15)),
        ([0, 1, 2], range(15, 19)),
    ):
        counts[np.ix_(list(depths), list(experts))] = 900 // len(depths)
    return counts


def of(counts, variant="DR+DA", run=""):
    return Captures({COUNTS: counts}, planted(variant, run=run).about)


def ours(captures, baseline=None):
    return [row.ours for row in paper_numbers(captures, baseline)]


def test_uniform_routing_has_a_gini_of_zero():
    assert gini(UNIFORM) == 0


def test_one_expert_that_has_all_gives_the_highest_gini():
    assert gini(ALONE) == pytest.approx((E - 1) / E)


def test_experts_with_1_to_E_selections_have_the_gini_of_the_closed_form():
    assert gini(RISING) == pytest.approx((E - 1) / (3 * E))


def test_the_lorenz_curve_of_uniform_routing_is_a_straight_line():
    shares, experts = lorenz(UNIFORM)
    assert experts.tolist() == list(range(E + 1))
    np.testing.assert_allclose(shares, experts / E)


def test_the_lorenz_curve_of_one_expert_that_has_all_is_full_from_the_first_on():
    assert lorenz(ALONE)[0].tolist() == [0] + [1] * E


def test_the_lorenz_curve_starts_with_the_busiest_expert():
    shares, k = lorenz(RISING)
    np.testing.assert_allclose(shares, k * (2 * E - k + 1) / (E * (E + 1)))


def test_the_area_between_the_lorenz_curve_and_even_use_is_the_gini():
    shares, experts = lorenz(RISING)
    assert 2 * np.trapezoid(shares, experts / E) - 1 == pytest.approx(gini(RISING))


def test_the_lorenz_curve_without_selections_stays_at_zero():
    assert lorenz(np.zeros(3, np.int64))[0].tolist() == [0, 0, 0, 0]


def test_depths_of_an_expert_sum_to_one_and_are_zero_if_it_is_unused():
    assert depth_given_expert(WITH_GAPS).tolist() == [[0.8, 0, 0, 0.25], [0.2, 0, 0, 0.75], [0, 0, 0, 0]]


def test_experts_of_a_depth_sum_to_one_and_are_zero_if_it_selected_none():
    np.testing.assert_allclose(expert_given_depth(WITH_GAPS).sum(axis=1), [1, 1, 0])
    assert expert_given_depth(WITH_GAPS)[1].tolist() == [0.4, 0, 0, 0.6]


def test_top_depths_are_the_fewest_that_reach_the_share():
    counts = np.array([[95, 50, 30, 0], [5, 45, 30, 0], [0, 5, 40, 0]])
    assert top_depths(counts).tolist() == [1, 2, 3, 0]
    assert top_depths(counts, 0.5).tolist() == [1, 1, 2, 0]


@pytest.mark.parametrize("each", [1, 3, 10**13])
@pytest.mark.parametrize(("share", "needed"), [(0.1, 10), (0.55, 55), (0.57, 57), (0.7, 70), (0.9, 90)])
def test_a_sum_that_equals_the_share_exactly_is_enough(each, share, needed):
    assert experts_for(np.full(100, each), share) == needed


def test_experts_for_counts_the_busiest_first_along_the_last_axis():
    counts = np.array([[[1, 90, 9], [30, 30, 40]], [[0, 0, 0], [0, 0, 1]]])
    assert experts_for(counts).tolist() == [[1, 3], [0, 1]]


def test_all_that_were_selected_are_needed_for_all_routings():
    assert experts_for(np.array([5, 0, 1, 0]), share=1.0) == 2


def test_the_display_order_goes_from_special_to_general_and_by_depth_within_a_group():
    counts = np.zeros((4, 6), np.int64)
    counts[:, 0] = 5
    counts[3, 1] = counts[0, 2] = counts[1, 4] = 20
    counts[1:3, 5] = 10
    assert display_order(counts).tolist() == [2, 4, 1, 5, 0]


def test_the_display_order_samples_depths_by_their_share():
    order = display_order(np.array([[75] * 400, [25] * 400]))
    [first_of_depth_2] = np.flatnonzero(np.diff(order) < 0) + 1
    assert 270 < first_of_depth_2 < 330


def test_the_display_order_is_that_of_its_seed():
    counts = np.random.default_rng(0).integers(0, 9, (4, 30))
    assert display_order(counts, seed=3).tolist() == display_order(counts, seed=3).tolist()
    assert display_order(counts, seed=3).tolist() != display_order(counts, seed=4).tolist()


def test_a_depth_that_uses_four_times_the_experts_of_a_layer_has_a_diversity_of_four():
    dr = np.zeros((2, 100), np.int64)
    dr[0, :40], dr[1, 60:80] = 5, 7
    la = np.full((4, 10), 3)
    assert diversity(dr, la).tolist() == [4, 2]


def test_the_baseline_is_the_mean_over_its_layers():
    la = np.array([[1, 1, 1, 1], [4, 0, 0, 0], [0, 0, 0, 0]])
    assert diversity(np.full((1, 10), 1), la).tolist() == [9 / 2.5]


def test_without_a_baseline_an_even_la_with_as_many_experts_stands_in():
    np.testing.assert_allclose(diversity(np.full((4, 40), 2)), 36 / 9)


def test_a_depth_without_selections_has_no_diversity():
    assert diversity(WITH_GAPS)[2] == 0


def test_a_baseline_that_selected_nothing_is_an_error():
    with pytest.raises(AnalysisError, match="analyze it on at least one sequence"):
        diversity(UNIFORM[None], np.zeros((2, 4), np.int64))


def test_each_of_the_papers_numbers_is_counted():
    assert ours(of(table())) == [
        "21 %",  # experts 0 to 3 of the 19 that are used
        "5 %",  # expert 4
        "depth 10 of 10 (2 experts)",
        "74 %",  # 10 serve all depths, 4 serve three of ten
        "1.3×",  # 12 at depth 1 and 9 at depth 10
        "0.050",  # one expert of 20 has nothing
        "5.0× to 6.7×",  # 9 and 12 over 0.9 * 20 / 10
    ]


def test_experts_per_depth_are_compared_with_those_of_the_baseline():
    row = paper_numbers(of(table()), of(np.full((10, 5), 3), "LA", run="la_small"))[-1]
    assert row.ours == "1.8× to 2.4×"
    assert "'la_small'" in row.note


def test_a_baseline_without_experts_is_as_none():
    bare = Captures({}, planted("LA").about)
    assert paper_numbers(of(table()), bare) == paper_numbers(of(table()), None)


def test_the_papers_numbers_stand_beside_ours():
    rows = paper_numbers(of(table()), None)
    papers = ["about 22 %", "almost none", "the last", "about 50 %", "up to 5×", "0.075", "2× to 11×"]
    assert [row.paper for row in rows] == papers
    assert all(row.note and "{" not in row.note for row in rows)


def test_a_model_without_specialists_has_no_depth_that_owns_most():
    assert ours(of(np.full((4, 8), 5)))[:3] == ["0 %", "0 %", NONE]


@pytest.mark.parametrize(
    ("captures", "reason"),
    [
        (of(table(), "LA"), "each layer has its own experts"),
        (of(table()[:1]), "the model ran one depth"),
        (of(WITH_GAPS), "a depth has no selections"),
        (Captures({}, planted("DR").about), "the model has no expert attention"),
    ],
)
def test_where_a_number_makes_no_sense_the_note_says_why(captures, reason):
    rows = paper_numbers(captures, None)
    assert {(row.ours, row.note) for row in rows} == {(NONE, reason)}
    assert [row[:2] for row in rows] == [row[:2] for row in paper_numbers(of(table()), None)]
