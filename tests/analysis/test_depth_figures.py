"""Figures over depth show what they are given, for any depth, and can be read."""

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text

from dreamer_jax.analysis.figures import depths
from dreamer_jax.analysis.figures.depths import (
    depth_attention,
    depth_attention_heads,
    exits,
    help_of_depth,
    logit_lens,
    removals,
    removed_entries,
    residual_stream,
    settling,
    trajectories,
    updates,
)
from dreamer_jax.figures import UNKNOWN, image

RISING = {"dr": np.array([1.0, 2.0, 3.0]), "dr_da": np.array([2.0, 3.0, 4.0])}


def maps(figure):
    """The values of all maps, NaN where they are masked."""
    return [ax.images[0].get_array().filled(np.nan) for ax in figure.axes if ax.images]


def curves(ax):
    """The values of all curves, without lines to compare with."""
    return [list(line.get_ydata()) for line in ax.lines if line.get_marker() != "None"]


def labels(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def uniform(L, N=1):
    visible = np.tri(L, dtype=bool)
    return np.repeat((visible / visible.sum(1, keepdims=True))[:, None], N, axis=1), visible


def draws(figure):
    figure.draw_without_rendering()
    return figure


def test_weights_are_shares_of_the_largest_of_their_depth_in_the_mean_over_heads():
    weight = np.array([[[1.0, 0.0], [1.0, 0.0]], [[0.5, 0.5], [0.1, 0.9]]])
    a, _, c = maps(depth_attention(weight, np.tri(2, dtype=bool), 3 * weight))
    np.testing.assert_allclose(a, [[1, np.nan], [0.3 / 0.7, 1]])
    np.testing.assert_allclose(c, a)


def test_the_norm_of_the_value_counts_in_the_third_panel_alone():
    weight, visible = uniform(2)
    a, b, c = maps(depth_attention(weight, visible, weight * [1.0, 4.0]))
    np.testing.assert_allclose(a[1], [1, 1])
    np.testing.assert_allclose(b[1], [1, 1])
    np.testing.assert_allclose(c[1], [0.25, 1])


@pytest.mark.parametrize("L", [1, 5, 64])
def test_uniform_attention_is_one_times_uniform_everywhere(L):
    weight, visible = uniform(L, N=2)
    for ratios in (maps(depth_attention(weight, visible, weight))[1], *maps(depth_attention_heads(weight, visible))):
        np.testing.assert_allclose(ratios[visible], 1)


def test_one_times_uniform_is_the_middle_of_the_scale_and_zero_has_a_colour():
    weight, visible = uniform(4)
    weight[3, 0] = [0.0, 0.0, 0.25, 0.75]
    [image] = depth_attention(weight, visible, weight).axes[1].images
    assert image.norm(1.0) == pytest.approx(0.5)
    assert image.norm(image.get_array())[3].tolist()[:2] == [0, 0]
    assert image.norm.vmax == 4


def test_entries_that_are_not_visible_are_unknown_whatever_their_weight():
    weight, visible = np.ones((4, 1, 4)), np.tri(4, dtype=bool)
    figure = depth_attention(weight, visible, weight)
    for values in maps(figure):
        assert (np.isnan(values) == ~visible).all()
    for ax in figure.axes[:3]:
        assert to_hex(ax.images[0].to_rgba(ax.images[0].get_array())[0, 3]) == UNKNOWN


def test_target_depths_go_down_and_source_depths_across_from_one_on():
    weight, visible = uniform(32)
    ax = depth_attention(weight, visible, weight, "latent").axes[0]
    assert [*ax.images[0].get_extent()] == [0.5, 32.5, 32.5, 0.5]
    assert [*ax.get_yticks()] == [*ax.get_xticks()] == [1, 8, 16, 24, 32]
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("target depth", "latent")


@pytest.mark.parametrize("N", [1, 5, 16])
def test_each_head_has_a_map_and_all_have_one_scale(N):
    weight, visible = uniform(4, N)
    weight[3, N - 1] = [1.0, 0.0, 0.0, 0.0]
    figure = depth_attention_heads(weight, visible)
    shown = maps(figure)
    assert len(shown) == N
    assert shown[-1][3].tolist() == [4, 0, 0, 0]
    assert len({ax.images[0].norm for ax in figure.axes if ax.images}) == 1


def test_more_heads_than_there_is_room_for_are_said_to_be_more():
    figure = depth_attention_heads(*uniform(2, 20))
    assert len(maps(figure)) == depths.HEADS
    assert figure.axes[0].get_title() == "head 1 of 20"


def test_the_residual_stream_is_drawn_over_depths_from_one_on():
    figure = residual_stream(RISING, {"dr": np.array([3.0, 2.0, 1.0])}, {"dr": np.array([0.5, -0.5])})
    left, middle, right = figure.axes
    assert curves(left) == [[1, 2, 3], [2, 3, 4]]
    assert [*left.lines[0].get_xdata()] == [1, 2, 3]
    assert curves(middle) == [[3, 2, 1]]
    assert curves(right) == [[0.5, -0.5]]
    assert labels(figure) == ["dr", "dr_da"]


def test_a_label_looks_the_same_in_every_panel():
    left, middle, _ = residual_stream(RISING, {"dr_da": np.ones(3)}, {}).axes
    assert left.lines[1].get_color() == middle.lines[0].get_color() != left.lines[0].get_color()


def test_one_curve_needs_no_legend():
    assert not updates({"ea": np.ones(4)}).legends


def test_values_far_apart_are_drawn_on_a_logarithmic_scale():
    near, far = ({"ea": np.array([1.0, highest])} for highest in (9.0, 11.0))
    assert [updates(update).axes[0].get_yscale() for update in (near, far)] == ["linear", "log"]


def test_the_logit_lens_has_a_panel_for_each_quantity():
    falling = {"dr": np.array([4.0, 0.1, 0.0])}
    figure = logit_lens({"dr": np.array([5.0, 3.0, 2.0])}, RISING, falling, {"dr": np.array([0.2, 0.6, 1.0])})
    assert [curves(ax)[0] for ax in figure.axes] == [[5, 3, 2], [1, 2, 3], [4, 0.1, 0], [0.2, 0.6, 1]]
    assert [ax.get_yscale() for ax in figure.axes] == ["linear", "linear", "log", "linear"]
    draws(figure)


def test_shares_that_improve_stay_and_worsen_are_stacked_in_this_order():
    figure = help_of_depth(np.array([[0.5, 0.2, 0.3], [0.1, 0.9, 0.0]]))
    heights = [[bar.get_height() for bar in bars] for bars in figure.axes[0].containers]
    bottoms = [[bar.get_y() for bar in bars] for bars in figure.axes[0].containers]
    np.testing.assert_allclose(heights, [[0.5, 0.1], [0.2, 0.9], [0.3, 0.0]])
    np.testing.assert_allclose(bottoms, [[0, 0], [0.5, 0.1], [0.7, 1.0]])
    assert labels(figure) == ["improves", "stays", "worsens"]


def test_settling_is_shown_per_depth_and_summed_up():
    left, right = settling({"dr": np.array([0.25, 0.5, 0.25])}).axes
    assert curves(left) == [[0.25, 0.5, 0.25]]
    assert curves(right) == [[0.25, 0.75, 1.0]]


def test_exits_are_sorted_by_depth_and_named_in_words():
    figure = exits({"latent": (np.array([9.0, 3.0]), np.array([2.0, 4.0])), "mine": (np.ones(1), np.ones(1))}, 1.5)
    [ax] = figure.axes
    assert [*ax.lines[0].get_xdata()] == [3, 9]
    assert curves(ax) == [[4, 2], [1]]
    assert [*ax.lines[-1].get_ydata()] == [1.5, 1.5]
    assert labels(figure) == ["latent difference", "mine", "last depth"]


def test_removals_are_changes_of_the_loss():
    figure = removals(2.0, np.array([3.0, 2.5]), {"sa": np.array([2.25, 2.0])}, {"sa": 6.0, "ea": 1.5})
    left, right = figure.axes
    assert curves(left) == [[1, 0.5], [0.25, 0]]
    assert [bar.get_width() for bar in right.patches] == [4, -0.5]
    assert [text.get_text() for text in right.texts] == ["4", "−0.5"]
    assert [text.get_text() for text in right.get_yticklabels()] == ["sa", "ea"]
    assert to_hex(right.patches[0].get_facecolor()) == left.lines[1].get_color()


def test_a_change_that_dwarfs_the_others_leaves_them_visible():
    loss = 2 + np.array([3.0, 0.01, -0.01, 0.02])
    assert removals(2.0, loss, {}, {}).axes[0].get_yscale() == "symlog"
    assert removals(2.0, loss[1:], {}, {}).axes[0].get_yscale() == "linear"


@pytest.mark.parametrize("largest", [0.02, 2.0])
def test_removed_entries_are_changes_on_a_scale_around_zero(largest):
    figure = removed_entries(2.0, np.array([[2.01, np.nan], [1.98, 2 + largest]]))
    [change] = maps(figure)
    np.testing.assert_allclose(change, [[0.01, np.nan], [-0.02, largest]])
    norm = figure.axes[0].images[0].norm
    assert norm(0.0) == pytest.approx(0.5)
    assert norm(-largest) == pytest.approx(0)
    assert norm(largest) == pytest.approx(1)


def test_trajectories_go_from_the_embedding_to_the_last_depth():
    points = np.arange(12.0).reshape(2, 3, 2)
    figure = trajectories(points, np.array([0.4, 0.25]), np.array([" a", "b"]))
    [ax] = figure.axes
    path, start, end = ax.lines[:3]
    assert np.array(path.get_data()).T.tolist() == points[0].tolist()
    assert np.array(start.get_data()).T.tolist() == points[0, :1].tolist()
    assert np.array(end.get_data()).T.tolist() == points[0, -1:].tolist()
    assert ax.get_xlabel() == "first principal component (40% of the variance)"
    assert [text.get_text() for text in ax.texts if "'" in text.get_text()] == ["' a'", "'b'"]


def test_names_of_tokens_are_in_the_order_of_the_ends_and_do_not_overlap():
    figure = draws(trajectories(np.random.default_rng(0).normal(size=(24, 3, 2)) * 1e-3, np.ones(2), ["x"] * 24))
    names = [text for text in figure.axes[0].texts if "x" in text.get_text()]
    boxes = [Text.get_window_extent(text) for text in names]  # an annotation's own takes in its arrow
    ends = [text.xy[1] for text in names]
    assert len(names) == 24
    assert ends == sorted(ends)
    assert all(below.y1 < above.y0 for below, above in pairwise(boxes))


def test_depths_are_written_at_some_points_between_the_ends():
    points = np.linspace(0, 1, 33)[None, :, None] * np.ones((1, 1, 2))
    texts = trajectories(points, np.ones(2), ["x"]).axes[0].texts
    assert [(text.get_text(), text.xy[0]) for text in texts if "x" not in text.get_text()] == [
        ("8", 0.25),
        ("16", 0.5),
        ("24", 0.75),
    ]


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("\n", r"'\n'"),
        (r"\n", r"'\\n'"),
        (" $x$", "' $x$'"),
        ("数", r"'\u6570'"),
        ("\ud800", r"'\ud800'"),
        ("é→", "'é→'"),
    ],
)
def test_texts_of_tokens_are_as_they_are_with_escapes_for_what_cannot_be_drawn(token, shown):
    [text] = draws(trajectories(np.ones((1, 2, 2)), np.ones(2), [token])).axes[0].texts
    assert text.get_text() == shown
    assert not text.get_parse_math()


@pytest.mark.parametrize(
    "names", [["$a$", "$b_"], ["_hidden", "数"], ["n" * 80 + "1", "n" * 80 + "2"], list("abcdefgh")]
)
def test_any_labels_are_drawn_within_the_page(names):
    figure = draws(settling({name: np.ones(2) / 2 for name in names}))
    [legend] = figure.legends
    box, page = legend.get_window_extent(), figure.bbox
    assert len(labels(figure)) == len(names)
    assert not any(text.get_parse_math() for text in legend.get_texts())
    assert min(box.x0, page.x1 - box.x1, page.y1 - box.y1) >= 0


def test_more_curves_than_styles_are_told_apart():
    lines = updates({str(i): np.ones(2) for i in range(12)}).axes[0].lines
    assert len({(line.get_color(), line.get_markerfacecolor()) for line in lines}) == 12


def all_figures(L, fill):
    """Every figure, of L depths and three entries, with one value everywhere."""
    deep, maps_of = {"a": np.full(L, fill)}, np.full((L, 1, 3), fill)
    visible = np.ones((L, 3), bool)
    yield depth_attention(maps_of, visible, maps_of)
    yield depth_attention_heads(maps_of, visible)
    yield residual_stream(deep, deep, {"a": np.full(L - 1, fill)})
    yield updates(deep)
    yield logit_lens(deep, deep, deep, deep)
    yield help_of_depth(np.full((L, 3), fill))
    yield settling(deep)
    yield exits({"latent": (np.full(2, fill), np.full(2, fill))}, fill)
    yield removals(fill, np.full(L, fill), deep, {"a": fill})
    yield removed_entries(fill, maps_of[:, 0])
    yield trajectories(np.full((2, L + 1, 2), fill), np.full(2, fill), ["a", "b"])


@pytest.mark.parametrize(("L", "fill"), [(1, np.nan), (2, 1.0), (64, 0.0)])
def test_values_that_say_nothing_are_drawn_all_the_same_in_text_that_can_be_read(L, fill):
    figures = [draws(figure) for figure in all_figures(L, fill)]
    assert len(figures) == 11
    for figure in figures:
        assert figure.get_figwidth() <= 7
        assert min(text.get_fontsize() for text in figure.findobj(Text)) >= 8


def test_nothing_at_all_is_drawn_as_empty_axes():
    nothing = np.zeros((0, 3, 2))
    for figure in (updates({}), removals(1.0, np.ones(2), {}, {}), trajectories(nothing, np.ones(2), [])):
        assert all(ax.get_xlabel() for ax in draws(figure).axes)


def test_a_removal_that_breaks_the_model_leaves_the_others_readable():
    figure = draws(removals(2.0, np.array([np.inf, 2.5]), {}, {"sa": np.inf, "ea": 3.0}))
    assert figure.axes[0].get_ylim()[1] < 1
    assert [bar.get_width() for bar in figure.axes[1].patches] == [0, 1]
    assert [text.get_text() for text in figure.axes[1].texts] == ["inf", "1"]
    draws(removed_entries(2.0, np.array([[np.inf, 2.5]])))


def test_an_entry_that_no_depth_sees_is_drawn():
    weight, hidden = np.zeros((2, 1, 3)), np.zeros((2, 3), bool)
    for figure in (depth_attention(weight, hidden, weight), depth_attention_heads(weight, hidden)):
        maps = [ax.images[0] for ax in draws(figure).axes if ax.images]
        assert maps
        assert all(np.ma.getmaskarray(image.get_array()).all() for image in maps)


def test_a_figure_is_the_same_bytes_every_time():
    first, second = (image(removed_entries(1.0, np.array([[1.5, np.nan]])), "svg") for _ in range(2))
    assert first == second


def test_the_module_does_not_import_matplotlib():
    code = "import sys, dreamer_jax.analysis.figures.depths; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
