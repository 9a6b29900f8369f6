"""Maps along a training: the right ones at the right steps, and a training that does not notice them."""

import io
import json
from dataclasses import replace

import chex
import jax
import numpy as np
import pytest
from PIL import Image

from dreamer_jax import convert
from dreamer_jax import train as train_door
from dreamer_jax.analysis import live
from dreamer_jax.analysis.captures import AnalysisError
from dreamer_jax.config import CheckpointConfig, LogConfig
from dreamer_jax.figures import UNKNOWN
from tests.models import changed
from tests.training.shared import train
from tests.training.test_metrics import event_messages
from tests.training.toy import REFERENCE, toy_config

FAILING = 2
"""The call of `draw` that fails."""


class Drawing:
    """live_figures, with a note of what it was asked and a call that fails."""

    def __init__(self):
        self.calls = []

    def __call__(self, snapshot, rows, counts):
        weights = jax.device_get(convert.named_arrays(snapshot.model))
        maps = live.attention_maps(snapshot, rows)
        self.calls.append((weights, jax.device_get(rows), counts, maps))
        if len(self.calls) == FAILING:
            raise AnalysisError("no ink")
        return live.live_figures(snapshot, rows, counts)


def config_of(folder, figures_every):
    config = toy_config(folder, steps=6)  # its programs are those of other tests: compiled once for all
    log = LogConfig(every=1, figures_every=figures_every)
    kept = CheckpointConfig(every=100)
    return replace(config, name="run", out=str(folder), log=log, checkpoint=kept, kernels=REFERENCE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("live")


@pytest.fixture(scope="module")
def config(folder):
    return config_of(folder, figures_every=2)


@pytest.fixture(scope="module")
def drawing(config):
    """A run on eight devices whose figures are drawn; the program behind them is traced once, or it fails."""
    chex.clear_trace_counter()
    with pytest.MonkeyPatch.context() as patch:
        once = chex.assert_max_traces(live._sums.__wrapped__, n=1)
        patch.setattr(live, "_sums", jax.jit(once))
        drawing = Drawing()
        train(config, draw=drawing)
    return drawing


def records(folder):
    """All that the run measured but for its speed."""
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("speed/")} for line in lines]


def images(folder):
    """(step, tag) of the images in TensorBoard, and each as an array."""
    values = [(event.step, value) for event in event_messages(folder) for value in event.summary.value]
    return {(step, value.tag): value.image for step, value in values if value.HasField("image")}


def test_images_are_in_tensorboard_at_every_so_many_steps_but_where_drawing_failed(drawing, folder):
    found = images(folder)
    assert list(found) == [(step, f"figures/{name}") for step in (2, 6) for name in ("da", "load")]
    for image in found.values():
        drawn = Image.open(io.BytesIO(image.encoded_image_string))
        assert (drawn.format, drawn.mode, drawn.size) == ("PNG", "RGB", (image.width, image.height))
        assert image.colorspace == 3
        assert len(drawn.getcolors(2**20)) > 10


def test_a_map_shows_the_weights_that_an_inspection_of_the_same_rows_finds(drawing, config):
    weights, rows, _, maps = drawing.calls[0]
    assert rows.tokens.shape == (8, config.data.context)
    model = convert.build(config.model, weights)
    inspected = convert.inspect(model, rows.tokens, rows.positions, rows.segment_ids)
    expected = np.mean(np.asarray(inspected.capture.depth_attention)[:, rows.segment_ids > 0], axis=1)
    np.testing.assert_allclose(maps["da"].weight, expected, atol=1e-5)
    assert maps["da"].weighted_norm.shape == expected.shape
    assert np.array_equal(maps["da"].weighted_norm > 0, expected > 0)


def test_the_load_is_that_of_the_newest_step(drawing, folder):
    for step, (_, _, counts, _) in zip((2, 4, 6), drawing.calls, strict=True):
        [record] = [record for record in records(folder) if record["step"] == step and "train/loss" in record]
        busiest = counts["ea"].max(axis=1) / counts["ea"].mean(axis=1)
        np.testing.assert_allclose(busiest, record["router/ea/max_over_mean_per_depth"])


def test_training_does_not_notice_that_figures_are_drawn(drawing, folder, tmp_path):
    data = {"root": str(folder), "prepared": str(folder / "prepared")}
    train(changed(config_of(tmp_path, figures_every=0), data=data), draw=lambda *_: pytest.fail("nobody asked"))
    assert records(folder) == records(tmp_path)
    assert records(folder)[-1]["step"] == 6


def test_a_run_without_held_out_rows_or_maps_shows_its_load(drawing, config):
    _, rows, counts, _ = drawing.calls[0]
    assert list(live.live_figures(snapshot_of(config), None, counts)) == ["figures/load"]
    without = changed(config, model={"mixture": ("sa", "ea")})
    assert list(live.live_figures(snapshot_of(without), rows, counts)) == ["figures/load"]


def snapshot_of(config):
    """Of a model that must not be needed."""
    return live.Snapshot(config, None, None, config.run_dir, lambda: None)


def test_figures_are_drawn_if_they_are_asked_for_and_something_shows_them(tmp_path):
    config = config_of(tmp_path, figures_every=2)
    assert train_door.figures(config) is live.live_figures
    assert train_door.figures(changed(config, log={"figures_every": 0})) is None
    assert train_door.figures(changed(config, log={"tensorboard": False})) is None


def test_a_load_counts_in_even_shares_and_an_idle_depth_has_none():
    shares = live.load(np.array([[4, 4, 0, 0], [0, 0, 0, 0]]))
    np.testing.assert_array_equal(shares, [[2, 2, 0, 0], [np.nan] * 4])


def test_every_expert_has_its_pixels_and_depths_run_down():
    values = np.zeros((2, 300))
    values[1, 299] = 1
    values[0, 0] = np.nan
    drawn = Image.open(io.BytesIO(live.picture([live.Panel("", "expert", values)], live.OF_LARGEST)))
    pixels = np.asarray(drawn)[live.MARGIN : live.MARGIN + live.SIDE, live.MARGIN : live.MARGIN + 300]
    lowest, highest = live._pixels(np.array([[0.0, 1.0]]), 1.0)[0]
    unknown = [int(UNKNOWN[i : i + 2], 16) for i in (1, 3, 5)]
    assert pixels[0, 0].tolist() == unknown
    assert pixels[0, 299].tolist() == pixels[-1, 0].tolist() == lowest.tolist()
    assert pixels[-1, 299].tolist() == highest.tolist()
