"""Figures of routing show what they are given, at any size."""

import subprocess
import sys

import numpy as np
import pytest

from dreamer_jax.analysis.captures import AnalysisError
from dreamer_jax.analysis.experts import depth_given_expert, display_order, lorenz
from dreamer_jax.analysis.figures import experts as figures
from dreamer_jax.analysis.figures.experts import (
    Routings,
    coactivation,
    depths_of_experts,
    experts_of_depths,
    lorenz_curves,
    router_confidence,
    saturation,
    usage,
)
from dreamer_jax.figures import image

NOTHING = np.zeros((3, 4), np.int64)


def drawn(depths, experts, *, seed=0):
    """Counts with structure: experts prefer depths near one of their own."""
    rng = np.random.default_rng(seed)
    distance = np.arange(depths)[:, None] - rng.uniform(0, depths, experts)
    weights = np.exp(-((distance / rng.uniform(0.3, depths, experts)) ** 2)) + 1e-9
    return np.stack([rng.multinomial(5000, row / row.sum()) for row in weights])


def pairs(counts):
    of_all = counts.sum(axis=0)
    return np.outer(of_all, of_all) // 1000


def with_gaps():
    """One expert is never used, one depth has no selections."""
    counts = drawn(6, 10)
    counts[:, 4] = counts[2] = 0
    return counts


def image_of(figure):
    return figure.axes[0].images[0].get_array()


def labels_of(figure):
    """What the axes and their colour bars say."""
    return {label for ax in figure.axes for label in (ax.get_xlabel(), ax.get_ylabel()) if label}


def groups_of(figure):
    """Numbers above the map, with their places."""
    [above] = figure.axes[0].child_axes
    return {label.get_text(): place for label, place in zip(above.get_xticklabels(), above.get_xticks(), strict=True)}


def lines(ax, **of):
    """Lines that look so: `linestyle=":"`."""
    return [line for line in ax.lines if all(getattr(line, f"get_{name}")() == value for name, value in of.items())]


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_depths_of_experts_are_shown_in_display_order():
    counts = drawn(6, 10)
    shown = image_of(depths_of_experts(counts, seed=3))
    np.testing.assert_array_equal(shown, depth_given_expert(counts)[:, display_order(counts, seed=3)])


def test_depths_run_downwards_from_1():
    ax = depths_of_experts(drawn(32, 20)).axes[0]
    assert ax.get_ylim() == (32.5, 0.5)
    assert ax.get_yticks().tolist() == [1, 4, 8, 12, 16, 20, 24, 28, 32]


def test_groups_are_named_above_the_map_and_their_borders_marked():
    counts = np.zeros((4, 9), np.int64)
    counts[0, :3] = 10
    counts[:, 3:] = 5
    figure = depths_of_experts(counts)
    assert groups_of(figure) == {"1": 2, "4": 6.5}
    assert figure.axes[0].child_axes[0].get_xticks(minor=True).tolist() == [0.5, 3.5, 9.5]


def test_names_of_groups_keep_apart():
    places = sorted(groups_of(depths_of_experts(drawn(64, 300))).values())
    assert min(np.diff(places)) >= figures.GROUP_GAP * 300


def test_experts_of_depths_are_times_an_even_share_in_the_same_order():
    counts = np.array([[8, 0, 0, 0], [5, 5, 0, 10]])
    shown = image_of(experts_of_depths(counts))
    order = display_order(counts)
    np.testing.assert_allclose(shown, np.array([[4, 0.1, 0, 0.1], [1, 1, 0, 2]])[:, order])


def test_a_depth_without_selections_is_left_undefined():
    shown = image_of(experts_of_depths(with_gaps()))
    assert np.ma.getmaskarray(np.ma.masked_invalid(shown)).all(axis=1).tolist() == [False, False, True] + [False] * 3


def test_experts_that_were_never_selected_are_left_out_and_counted():
    figure = depths_of_experts(with_gaps())
    assert image_of(figure).shape == (6, 9)
    assert "experts, from special to general (1 of 10 never selected)" in labels_of(figure)


def test_experts_of_a_single_depth_are_not_said_to_be_special_or_general():
    figure = experts_of_depths(np.array([[3, 1, 0]]))
    assert "experts (1 of 3 never selected)" in labels_of(figure)
    assert not figure.axes[0].child_axes


def test_usage_has_a_map_for_each_dimension():
    figure = usage({"sa": np.array([[3, 1], [0, 0]]), "da": np.array([[1, 1], [4, 0]])})
    assert [ax.get_title() for ax in figure.axes[:2]] == ["sequence attention (SA)", "depth attention (DA)"]
    assert image_of(figure)[0].tolist() == [0.75, 0.25]
    assert np.isnan(np.ma.filled(image_of(figure)[1], np.nan)).all()


def test_a_pair_that_is_as_frequent_as_by_chance_has_a_lift_of_one():
    """Two of three experts are selected: by chance, a pair is 3/4 as frequent as the product of its shares."""
    counts = np.array([[320, 160, 160]])
    together = np.array([[320, 120, 480], [120, 160, 15], [480, 15, 160]])
    shown = np.asarray(image_of(coactivation(together, counts, 320)).filled(np.nan))
    assert np.isnan(shown.diagonal()).all()
    assert shown[0, 1:].tolist() == [1, 4]
    assert shown[1, 2] == 0.25


def test_routers_that_draw_at_random_have_a_lift_of_one():
    random, (E, A, tokens) = np.random.default_rng(0), (16, 2, 40_000)
    chosen = np.argsort(random.random((tokens, E)), axis=1)[:, :A]
    picked = np.zeros((tokens, E), np.int64)
    np.put_along_axis(picked, chosen, 1, axis=1)
    shown = image_of(coactivation(picked.T @ picked, picked.sum(axis=0, keepdims=True), tokens)).compressed()
    np.testing.assert_allclose(shown.mean(), 1, atol=0.02)


def test_pairs_that_were_never_seen_are_marked_as_such():
    counts = np.full((1, 3), 10)
    figure = coactivation(np.array([[10, 5, 0], [5, 10, 5], [0, 5, 10]]), counts, 15)
    [image] = figure.axes[0].images
    colour = image.to_rgba(image.get_array()[:1, 2:], bytes=True)[0, 0, :3]
    assert "#" + bytes(colour.tolist()).hex() == figures.NEVER
    assert figure.axes[1].get_legend().get_texts()[0].get_text() == "never\ntogether"


def test_without_such_pairs_there_is_no_legend():
    assert coactivation(np.full((3, 3), 5), np.full((1, 3), 10), 15).axes[1].get_legend() is None


def test_lorenz_curves_show_each_depth_all_together_and_the_mean_of_layers():
    dr, la = drawn(5, 40), drawn(3, 8, seed=1)
    figure = lorenz_curves([Routings("la", la, False), Routings("dr", dr, True)])
    ax = figure.axes[0]
    assert len(lines(ax, linewidth=0.8)) == 5 + 2  # depths, and even use of 40 and of 8 experts
    [together] = lines(ax, linestyle=":")
    shares, experts = lorenz(dr.sum(axis=0))
    np.testing.assert_allclose(together.get_xdata(), 100 * shares[1:])
    np.testing.assert_array_equal(together.get_ydata(), experts[1:])
    [mean] = lines(ax, linestyle="--")
    np.testing.assert_allclose(mean.get_xdata(), 100 * np.mean([lorenz(layer)[0] for layer in la], axis=0)[1:])
    assert ax.get_yscale() == "log"


def test_each_run_that_shares_experts_has_a_panel_with_the_layers_of_the_others():
    runs = [Routings("la", drawn(3, 8), False), *(Routings(name, drawn(4, 20), True) for name in ("a", "b", "c"))]
    panels = [ax for ax in lorenz_curves(runs).axes if ax.get_title()]
    assert [ax.get_title().split("\n")[0] for ax in panels] == ["a", "b", "c"]
    assert all(len(lines(ax, linestyle="--")) == 1 for ax in panels)


def test_gini_coefficients_are_named():
    la, dr = np.array([[3, 3, 3], [9, 0, 0], [0, 0, 0]]), np.array([[3, 0, 0, 0], [0, 3, 3, 3], [0, 0, 0, 0]])
    figure = lorenz_curves([Routings("la", la, False), Routings("dr", dr, True)])
    assert "la, mean of layers (Gini 0.333)" in legend_of(figure)
    assert figure.axes[0].get_title() == "dr\nGini 0.000, of one depth 0.25 to 0.75"


def test_a_curve_ends_where_experts_are_unused():
    [together] = lines(lorenz_curves([Routings("dr", np.array([[3, 1, 0]]), True)]).axes[0], linestyle=":")
    assert together.get_ydata().tolist() == [1, 2]


def test_a_panel_of_confidence_has_a_curve_for_each_router():
    figure = router_confidence({"EA": np.array([3.0, 2.0]), "SA": np.array([1.0, 1.5])}, {"SA": np.array([0.5, 0.6])})
    assert [[line.get_label() for line in ax.lines] for ax in figure.axes] == [["EA", "SA"], ["SA"]]
    assert figure.axes[0].lines[0].get_xdata().tolist() == [1, 2]
    assert figure.axes[0].lines[1].get_color() == figure.axes[1].lines[0].get_color()
    assert legend_of(figure) == ["EA", "SA"]


def test_long_names_are_shortened_in_legends():
    long = "first_" + "x" * 100 + "_last"
    [name] = legend_of(router_confidence({long: np.array([1.0])}, {}))
    assert len(name) <= figures.LABEL
    assert name.startswith("first_")
    assert name.endswith("_last")


def test_one_kind_of_confidence_is_one_panel():
    [ax] = router_confidence({}, {"EA": np.array([0.5])}).axes
    assert ax.get_ylabel() == "margin of the selection (logits)"


def test_saturation_has_a_curve_for_each_depth_and_their_mean():
    ax = saturation(np.array([100, 300]), np.array([[0.2, 0.6, np.nan], [1.0, 0.8, np.nan]])).axes[0]
    assert [line.get_ydata().tolist() for line in ax.lines[:2]] == [[20, 100], [60, 80]]
    [mean] = lines(ax, color="black")
    assert (mean.get_xdata().tolist(), mean.get_ydata().tolist()) == ([100, 300], [40, 90])


def test_axes_and_colour_bars_say_what_they_are():
    assert {"depth", "P(depth | expert)"} <= labels_of(depths_of_experts(drawn(4, 8)))
    assert "P(expert | depth),\ntimes an even share" in labels_of(experts_of_depths(drawn(4, 8)))
    assert {"attention expert", "P(expert | depth)"} <= labels_of(usage({"sa": drawn(4, 4)}))
    assert "selected together, times as often as by chance" in labels_of(
        coactivation(pairs(NOTHING + 9), NOTHING + 9, 27)
    )
    assert {"training step", "depth"} <= labels_of(saturation(np.array([1]), np.ones((1, 2))))


SIZES = {"with gaps": with_gaps(), "one of each": np.array([[3]])}


@pytest.mark.parametrize("size", SIZES)
def test_figures_of_any_size_are_drawn_in_print_size(size):
    counts = SIZES[size]
    for figure in (
        depths_of_experts(counts),
        experts_of_depths(counts),
        usage({"sa": counts, "da": counts}),
        coactivation(pairs(counts), counts, 1000),
        lorenz_curves([Routings("la" * 40, counts, False), Routings("dr" * 40, counts, True)]),
        router_confidence({"EA": np.ones(len(counts))}, {"EA": np.ones(len(counts))}),
        saturation(np.array([10]), np.ones((1, len(counts)))),
    ):
        figure.draw_without_rendering()
        assert figure.get_figwidth() <= 7
        assert min(text.get_fontsize() for text in figure.findobj(lambda a: hasattr(a, "get_fontsize"))) >= 8


def test_a_thousand_experts_are_drawn_without_a_warning():
    assert image(depths_of_experts(drawn(64, 1100)), "png", dpi=50.0).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "figure",
    [
        depths_of_experts,
        experts_of_depths,
        lambda counts: coactivation(np.zeros((4, 4), np.int64), counts, 1),
        lambda counts: lorenz_curves([Routings("dr", counts, True)]),
    ],
)
def test_without_any_selection_there_is_no_figure(figure):
    with pytest.raises(AnalysisError, match="no expert was selected"):
        figure(NOTHING)


def test_the_module_does_not_import_matplotlib():
    code = "import sys, dreamer_jax.analysis.figures.experts; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
