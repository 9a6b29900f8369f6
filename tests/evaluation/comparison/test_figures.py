"""Figures show what they are given, and are the same files every time."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest

from dreamer_jax.evaluation.comparison import figures
from dreamer_jax.evaluation.comparison.figures import Curve, Panel, Saving, against_depth, figure_3
from dreamer_jax.figures import save


def curve(label, value, x=None, marked=None):
    x = x or tuple(10e9 * (i + 1) for i in range(len(value)))
    return Curve(label, tuple(x), tuple(value), tuple(v - 2 for v in value), tuple(v + 3 for v in value), marked)


def panel(title="gsm8k"):
    curves = (curve("la", [10.0, 30.0, 25.0, 40.0]), curve("dr", [20.0, 40.0, 45.0, 44.0]), curve("dr_da", [30.0]))
    return Panel(title, "accuracy (%)", curves, 40.0, (Saving(1, 40e9, 20e9, "2.0×"),))


def texts(ax):
    return [text.get_text() for text in ax.texts]


def lines(ax):
    """The lines of the running best: those with a line and a marker."""
    return [line for line in ax.lines if line.get_linestyle() != "None" and line.get_marker() != "None"]


def test_a_panel_stands_for_each_task():
    figure = figure_3([panel("gsm8k"), panel("math"), panel("average")])
    assert [ax.get_title() for ax in figure.axes] == ["gsm8k", "math", "average"]
    assert figure.axes[0].get_ylabel() == "accuracy (%)"
    assert figure.get_supxlabel() == "training tokens (billions)"


@pytest.mark.parametrize("count", range(1, 8))
def test_no_empty_panel_is_left(count):
    assert len(figure_3([panel()] * count).axes) == count


def test_the_line_is_the_running_best_and_points_are_the_checkpoints():
    ax = figure_3([panel()]).axes[0]
    assert list(lines(ax)[0].get_ydata()) == [10, 30, 30, 40]
    assert list(lines(ax)[0].get_xdata()) == [10, 20, 30, 40]
    points = [line for line in ax.lines if line.get_linestyle() == "None"]
    assert list(points[0].get_ydata()) == [10, 30, 25, 40]
    assert list(lines(ax)[0].get_markevery()) == [0, 1, 3]
    assert list(lines(ax)[1].get_ydata()) == [20, 40, 45, 45]


def test_the_band_is_the_interval_of_the_best_so_far():
    ax = figure_3([panel()]).axes[0]
    band = ax.collections[0].get_paths()[0].vertices
    assert {y for x, y in band if x == 30} == {28, 33}


def test_runs_differ_in_colour_line_and_marker():
    ax = figure_3([panel()]).axes[0]
    styles = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines(ax)]
    assert all(len(set(kind)) == 3 for kind in zip(*styles, strict=True))


def test_an_arrow_goes_from_the_tokens_of_the_baseline_to_those_of_the_run():
    ax = figure_3([panel()]).axes[0]
    assert "2.0×" in texts(ax)
    [arrow] = [text for text in ax.texts if getattr(text, "arrow_patch", None)]
    assert (arrow.xyann[0], arrow.xy[0]) == (40, 20)
    assert arrow.xy[1] < 40


def test_more_arrows_than_there_is_room_for_are_left_out():
    savings = tuple(Saving(i % 3, 40e9, 20e9, "2.0×") for i in range(figures.ARROWS + 1))
    assert not texts(figure_3([replace(panel(), savings=savings)]).axes[0])


def test_the_baselines_best_is_a_line_across_in_its_colour():
    ax = figure_3([replace(panel(), baseline=2)]).axes[0]
    [across] = [line for line in ax.lines if list(line.get_xdata()) == [0, 1]]
    assert list(across.get_ydata()) == [40, 40]
    assert across.get_color() == lines(ax)[2].get_color()


@pytest.mark.parametrize("figure_of", [figure_3, against_depth])
def test_chance_is_a_line_across_that_the_legend_names(figure_of):
    figure = figure_of([replace(panel(), goal=None, chance=25.0), panel("average")])
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    [chance] = [line for line in figure.axes[0].lines if list(line.get_xdata()) == [0, 1]]
    assert list(chance.get_ydata()) == [25, 25]
    assert not [line for line in figure.axes[1].lines if list(line.get_ydata()) == [25, 25]]
    assert labels == ["la", "dr", "dr_da", "chance"]


def test_without_chance_the_legend_names_the_runs_alone():
    assert [text.get_text() for text in figure_3([panel()]).legends[0].get_texts()] == ["la", "dr", "dr_da"]


def test_a_curve_without_points_or_bounds_is_drawn_as_far_as_it_goes(tmp_path):
    endless = Curve("one", (1.0,), (50.0,), (-math.inf,), (math.inf,))
    figure = figure_3([Panel("task", "accuracy (%)", (Curve("none", (), (), (), ()), endless))])
    assert all(path.stat().st_size for path in save(figure, tmp_path / "a"))
    bars = [segment for c in figure.axes[0].collections if hasattr(c, "get_segments") for segment in c.get_segments()]
    assert bars[-1].tolist() == [[1, 50], [1, 50]]


def test_long_names_are_shortened_in_the_middle():
    long = "first_" + "x" * 100 + "_last"
    [legend] = figure_3([Panel("task", "accuracy (%)", (curve(long, [1.0]),))]).legends
    [label] = [text.get_text() for text in legend.get_texts()]
    assert len(label) <= figures.LABEL
    assert label.startswith("first_")
    assert label.endswith("_last")


@pytest.mark.parametrize(("runs", "name"), [(6, "run"), (3, "a_name_of_some_length"), (2, "n" * 80)])
@pytest.mark.parametrize("panels", [1, 2, 3])
def test_the_legend_stays_within_the_figure(runs, name, panels):
    curves = tuple(curve(f"{name}_{i}", [1.0, 2.0]) for i in range(runs))
    figure = figure_3([Panel("task", "accuracy (%)", curves)] * panels)
    figure.draw_without_rendering()
    [legend] = figure.legends
    box, page = legend.get_window_extent(), figure.bbox
    assert box.x0 >= 0
    assert box.x1 <= page.x1
    assert box.y1 <= page.y1


def test_all_text_can_be_read_in_print():
    figure = figure_3([panel(), panel()])
    figure.draw_without_rendering()
    assert figure.get_figwidth() <= 7
    assert min(text.get_fontsize() for text in figure.findobj(lambda a: hasattr(a, "get_fontsize"))) >= 8


def test_the_trained_depth_is_marked():
    by_depth = curve("dr", [10.0, 40.0, 20.0], x=(8.0, 16.0, 32.0), marked=16.0)
    ax = against_depth([Panel("gsm8k", "accuracy (%)", (by_depth,))]).axes[0]
    assert list(ax.get_xticks()) == [8, 16, 32]
    [ring] = [line for line in ax.lines if line.get_fillstyle() == "none"]
    assert (list(ring.get_xdata()), list(ring.get_ydata())) == ([16], [40])


def test_perplexities_far_apart_are_drawn_on_a_logarithmic_scale():
    near, far = curve("dr", [6.0, 9.0], x=(8.0, 16.0)), curve("dr", [900.0, 9.0], x=(8.0, 16.0))
    figure = against_depth([Panel("ppl", "perplexity", (near,)), Panel("ppl", "perplexity", (far,))])
    assert [ax.get_yscale() for ax in figure.axes] == ["linear", "log"]


def test_a_figure_is_saved_as_the_same_bytes_every_time(tmp_path):
    first, second = (save(figure_3([panel()]), tmp_path / name) for name in ("a", "b"))
    assert [path.name for path in first] == ["a.png", "a.svg"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert b"<dc:date>" not in first[1].read_bytes()


def test_a_name_with_a_dot_keeps_it(tmp_path):
    assert [path.name for path in save(figure_3([panel()]), tmp_path / "lr0.1")] == ["lr0.1.png", "lr0.1.svg"]


def test_the_module_does_not_import_matplotlib():
    code = "import sys, dreamer_jax.evaluation.comparison.compare; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
