"""Figures against sums written out by hand; records through crashes, resumption and numbers that JSON lacks."""

import io
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from dreamer_jax.config import Config, ConfigError, LogConfig, TrainConfig
from dreamer_jax.training.metrics import (
    Progress,
    Sinks,
    drop_later_records,
    gini,
    perplexity,
    router_report,
    scalars,
    speed_record,
    step_record,
    validation_record,
)


def gini_by_pairs(counts: np.ndarray) -> float:
    differences = [abs(float(a) - float(b)) for a in counts for b in counts]
    return float(np.mean(differences) / (2 * np.mean(counts)))


def test_gini_is_half_the_relative_mean_difference_of_pairs() -> None:
    counts = np.random.default_rng(0).integers(0, 1000, (4, 3, 17))
    expected = [[gini_by_pairs(row) for row in rows] for rows in counts]
    np.testing.assert_allclose(gini(counts), expected, rtol=1e-12)


def test_gini_of_even_single_and_absent_loads() -> None:
    assert gini(np.array([5, 5, 5, 5])) == 0
    assert gini(np.array([0, 0, 12, 0])) == 0.75
    assert gini(np.zeros(4, np.int32)) == 0


# Two depths of four experts: each depth uses half of them, together they use all.
COUNTS = np.array([[6, 2, 0, 0], [0, 0, 4, 4]], np.int32)
ENTROPY = np.array([8.0, 4.0], np.float32)
SHARED_BIAS = np.array([0.1, -0.2, 0.0, 0.3], np.float32)
OWN_BIAS = np.stack([SHARED_BIAS, 3 * SHARED_BIAS + 10])


def test_a_shared_router_is_judged_by_the_sum_over_depths() -> None:
    report = router_report(COUNTS, ENTROPY, 4, SHARED_BIAS, shared=True)
    assert report["gini"] == pytest.approx(gini_by_pairs(np.array([6, 2, 4, 4])))
    assert report["max_over_mean"] == 1.5
    assert report["unused"] == 0
    assert report["bias_range"] == pytest.approx(0.5)


def test_routers_of_their_own_are_judged_layer_by_layer() -> None:
    report = router_report(COUNTS, ENTROPY, 4, OWN_BIAS, shared=False)
    assert report["gini"] == pytest.approx((gini_by_pairs(COUNTS[0]) + gini_by_pairs(COUNTS[1])) / 2)
    assert report["max_over_mean"] == 2.5
    assert report["unused"] == 4
    assert report["bias_range"] == pytest.approx(1.5)


@pytest.mark.parametrize("shared", [False, True])
def test_depths_are_reported_one_by_one(shared: bool) -> None:
    report = router_report(COUNTS, ENTROPY, 4, SHARED_BIAS if shared else OWN_BIAS, shared)
    assert report["gini_per_depth"] == pytest.approx([gini_by_pairs(row) for row in COUNTS])
    assert report["max_over_mean_per_depth"] == [3.0, 2.0]
    assert report["unused_per_depth"] == [2.0, 2.0]
    assert report["entropy_per_depth"] == [2.0, 1.0]
    assert report["entropy"] == 1.5


def test_summed_counts_of_a_shared_router_do_not_overflow() -> None:
    counts = np.full((4, 2), 2**30, np.int32)
    report = router_report(counts, np.zeros(4, np.float32), 1, np.zeros(2, np.float32), shared=True)
    assert report["max_over_mean"] == 1.0


def example_record(loss: float = 2.0) -> dict[str, Any]:
    return step_record(
        loss=np.float32(loss),
        grad_norm=np.asarray(0.5, np.float32),
        learning_rate=1e-3,
        loss_tokens=3,
        tokens=4,
        skipped=1,
        square=np.array([4.0, 16.0], np.float32),
        routers={"ea": (COUNTS, ENTROPY), "sa": (COUNTS, ENTROPY)},
        biases={"ea": SHARED_BIAS, "sa": SHARED_BIAS},
        shared=True,
    )


def test_a_step_record_holds_what_people_read() -> None:
    record = example_record()
    assert record["train/loss"] == 2.0
    assert record["train/perplexity"] == pytest.approx(math.e**2)
    assert record["train/grad_norm"] == 0.5
    assert record["train/learning_rate"] == 1e-3
    assert record["train/loss_tokens"] == 3
    assert record["steps/skipped"] == 1
    assert record["residual/rms_per_depth"] == [1.0, 2.0]
    assert record["router/ea/gini"] == record["router/sa/gini"] > 0
    assert len(record["router/ea/gini_per_depth"]) == 2


def test_an_empty_batch_reports_zeros() -> None:
    nothing = np.zeros((2, 4), np.int32)
    report = router_report(nothing, np.zeros(2, np.float32), 0, SHARED_BIAS, shared=True)
    assert (report["gini"], report["max_over_mean"], report["entropy"], report["unused"]) == (0, 0, 0, 4)


def test_speed_is_measured_against_all_devices() -> None:
    record = speed_record(tokens=1000, seconds=2.0, flops_per_token=6e9, devices=2, peak=3e12, input_seconds=0.5)
    assert record == {
        "speed/tokens_per_second": 500.0,
        "speed/flops_per_second": 3e12,
        "speed/mfu": 0.5,
        "speed/input_share": 0.25,
    }
    assert "speed/mfu" not in speed_record(1, 1.0, 1.0, devices=1, peak=None, input_seconds=0.0)


def test_perplexity_overflows_to_infinity() -> None:
    assert perplexity(1e4) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_scalars_take_lists_apart_and_leave_out_what_is_not_finite() -> None:
    assert scalars({"a/b": [1.0, math.nan, 3.0], "c": 4.0, "d": math.inf}) == {"a/b/00": 1.0, "a/b/02": 3.0, "c": 4.0}


# Sinks.


def run_config(folder: Path, **log: Any) -> Config:
    return Config(name="run", out=str(folder), train=TrainConfig(steps=100), log=LogConfig(**log))


def records(folder: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (folder / "run" / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def write_steps(config: Config, first: int, last: int, *, resumed_from: int = 0, mark: float = 0.0) -> str:
    stream = io.StringIO()
    with Sinks(config, step=resumed_from, process=0, stream=stream) as sinks:
        for step in range(first, last + 1):
            sinks.advance(step)
            sinks.write(step, {"train/loss": mark + step})
    return stream.getvalue()


def test_a_resumed_run_leaves_one_record_a_step(tmp_path: Path) -> None:
    config = run_config(tmp_path, tensorboard=False)
    write_steps(config, 1, 7)
    write_steps(config, 5, 9, resumed_from=4, mark=100.0)
    assert [(r["step"], r["train/loss"]) for r in records(tmp_path)] == [
        *((step, float(step)) for step in (1, 2, 3, 4)),
        *((step, 100.0 + step) for step in (5, 6, 7, 8, 9)),
    ]


def test_a_new_run_in_an_old_folder_starts_over(tmp_path: Path) -> None:
    config = run_config(tmp_path, tensorboard=False)
    write_steps(config, 1, 3)
    write_steps(config, 1, 2)
    assert [r["step"] for r in records(tmp_path)] == [1, 2]


def test_a_line_torn_by_a_crash_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 2}\n{"step": 2, "a"')
    drop_later_records(path, 5)
    assert path.read_text() == '{"step": 1, "a": 2}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_a_crash_while_dropping_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 9}\n')

    def crash(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("dreamer_jax.training.metrics.os.fsync", crash)
    with pytest.raises(OSError, match="disk full"):
        drop_later_records(path, 1)
    assert path.read_text() == '{"step": 1}\n{"step": 9}\n'


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    with Sinks(run_config(tmp_path), step=0, process=0, stream=io.StringIO()) as sinks:
        sinks.write(1, {"a": math.nan, "b": [1.0, math.inf], "c": 2.0})
        sinks.write(2, example_record(loss=math.nan))
    first, second = records(tmp_path)
    assert first == {"step": 1, "a": None, "b": [1.0, None], "c": 2.0}
    assert second["train/loss"] is None


def test_records_are_on_disk_before_the_run_ends(tmp_path: Path) -> None:
    with Sinks(run_config(tmp_path, tensorboard=False), step=0, process=0, stream=io.StringIO()) as sinks:
        sinks.write(1, {"a": 1.0})
        assert len(records(tmp_path)) == 1


def test_only_process_zero_writes(tmp_path: Path) -> None:
    stream = io.StringIO()
    with Sinks(run_config(tmp_path, wandb=True), step=0, process=1, stream=stream) as sinks:
        sinks.advance(1)
        sinks.write(1, {"a": 1.0})
        sinks.say("hello")
    assert list(tmp_path.iterdir()) == []
    assert stream.getvalue() == ""


def test_everything_is_closed_when_the_run_fails(tmp_path: Path) -> None:
    def run() -> None:
        with Sinks(run_config(tmp_path), step=0, process=0, stream=io.StringIO()) as sinks:
            sinks.write(1, {"a": 1.0})
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run()
    assert len(records(tmp_path)) == 1
    assert [event for event in events(tmp_path) if event[0] == "a"] == [("a", 1, 1.0)]


# TensorBoard.


def event_messages(folder: Path) -> list[Any]:
    """Each record is an 8-byte length, 4 bytes of checksum, the message, and 4 bytes of checksum."""
    messages = []
    for path in sorted((folder / "run" / "tensorboard").iterdir()):
        data, start = path.read_bytes(), 0
        while start < len(data):
            length = int.from_bytes(data[start : start + 8], "little")
            messages.append(Event.FromString(data[start + 12 : start + 12 + length]))
            start += 16 + length
    return messages


def events(folder: Path) -> list[tuple[str, int, float]]:
    return [(v.tag, event.step, v.simple_value) for event in event_messages(folder) for v in event.summary.value]


def test_tensorboard_shows_each_depth_as_a_scalar(tmp_path: Path) -> None:
    with Sinks(run_config(tmp_path), step=0, process=0, stream=io.StringIO()) as sinks:
        sinks.write(3, {"train/loss": 2.5, "router/ea/gini_per_depth": [0.25, 0.5]})
    assert events(tmp_path) == [
        ("train/loss", 3, 2.5),
        ("router/ea/gini_per_depth/00", 3, 0.25),
        ("router/ea/gini_per_depth/01", 3, 0.5),
    ]


def test_tensorboard_voids_the_steps_that_are_taken_again(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    write_steps(config, 1, 7)
    write_steps(config, 5, 6, resumed_from=4)
    starts = [event.step for event in event_messages(tmp_path) if event.HasField("session_log")]
    assert starts[-1] == 5


def png(width: int, height: int, mode: str = "RGBA") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, "png")
    return file.getvalue()


def test_tensorboard_shows_images_and_the_records_file_does_not(tmp_path: Path) -> None:
    grey = png(7, 5, "L")
    with Sinks(run_config(tmp_path), step=0, process=0, stream=io.StringIO()) as sinks:
        sinks.show(3, {"figures/da": png(30, 20), "figures/load": grey})
    values = [(event.step, value) for event in event_messages(tmp_path) for value in event.summary.value]
    assert [(step, value.tag) for step, value in values] == [(3, "figures/da"), (3, "figures/load")]
    first, second = (value.image for _, value in values)
    assert (first.width, first.height, first.colorspace) == (30, 20, 4)
    assert (second.width, second.height, second.colorspace) == (7, 5, 1)
    assert second.encoded_image_string == grey
    assert records(tmp_path) == []


def test_a_sink_that_cannot_take_an_image_gets_no_more(tmp_path: Path, wandb_runs: list[Any]) -> None:
    stream = io.StringIO()
    with Sinks(run_config(tmp_path, wandb=True), step=0, process=0, stream=stream) as sinks:
        wandb_runs[0][1].full = True
        for step in (1, 2):
            sinks.show(step, {"figures/da": png(3, 2)})
            sinks.write(step, {"a": 1.0})
    assert stream.getvalue().count("cannot be written (disk full)") == 1
    assert [record["step"] for record in records(tmp_path)] == [1, 2]
    assert [event.step for event in event_messages(tmp_path) if event.summary.value] == [1, 1, 2, 2]


# Weights & Biases.


class FakeRun:
    def __init__(self, identity: str):
        self.id, self.logged, self.exit_code = identity, [], "running"
        self.full = False

    def log(self, values: dict[str, Any], step: int) -> None:
        if self.full:
            raise OSError("disk full")
        self.logged.append((step, values))

    def finish(self, exit_code: int | None = None) -> None:
        self.exit_code = exit_code


@pytest.fixture
def wandb_runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    runs: list[Any] = []

    def init(**arguments: Any) -> FakeRun:
        run = FakeRun(arguments["id"] or f"id{len(runs)}")
        runs.append((arguments, run))
        return run

    module = types.ModuleType("wandb")
    monkeypatch.setattr(module, "init", init, raising=False)
    monkeypatch.setattr(module, "Image", lambda picture: ("an image", picture.size), raising=False)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return runs


def test_wandb_gets_flat_numbers_and_the_config(tmp_path: Path, wandb_runs: list[Any]) -> None:
    config = run_config(tmp_path, wandb=True, project="dreams")
    with Sinks(config, step=0, process=0, stream=io.StringIO()) as sinks:
        sinks.write(1, {"a": 1.0, "b": [2.0, 3.0]})
    arguments, run = wandb_runs[0]
    assert (arguments["project"], arguments["name"], arguments["id"]) == ("dreams", "run", None)
    assert arguments["config"]["model"]["depth"] == config.model.depth
    assert run.logged == [(1, {"a": 1.0, "b/00": 2.0, "b/01": 3.0})]
    assert run.exit_code is None


def test_wandb_gets_images(tmp_path: Path, wandb_runs: list[Any]) -> None:
    with Sinks(run_config(tmp_path, wandb=True), step=0, process=0, stream=io.StringIO()) as sinks:
        sinks.show(2, {"figures/da": png(30, 20)})
    assert wandb_runs[0][1].logged == [(2, {"figures/da": ("an image", (30, 20))})]


def test_a_resumed_run_goes_on_in_its_wandb_run_and_a_new_one_does_not(tmp_path: Path, wandb_runs: list[Any]) -> None:
    config = run_config(tmp_path, wandb=True, tensorboard=False)
    for resumed_from in (0, 5, 0):
        write_steps(config, resumed_from + 1, resumed_from + 2, resumed_from=resumed_from)
    assert [run.id for _, run in wandb_runs] == ["id0", "id0", "id2"]


def test_wandb_hears_of_a_failed_run(tmp_path: Path, wandb_runs: list[Any]) -> None:
    with (
        pytest.raises(RuntimeError),
        Sinks(run_config(tmp_path, wandb=True, tensorboard=False), step=0, process=0, stream=io.StringIO()),
    ):
        raise RuntimeError
    assert wandb_runs[0][1].exit_code == 1


def test_a_missing_wandb_names_the_install_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with (
        pytest.raises(ConfigError, match=r"pip install 'dreamer-jax\[wandb\]'"),
        Sinks(run_config(tmp_path, wandb=True), step=0, process=0, stream=io.StringIO()),
    ):
        pass


# Progress.


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_figures_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLUMNS", "LINES"):  # in which the bar cuts off what is too long
        monkeypatch.setenv(name, "200")
    stream = Terminal()
    with Progress(100, 0, stream) as progress:
        progress.advance(10)
        progress.show(10, example_record() | {"speed/tokens_per_second": 12345.0, "validation/loss": 1.5})
        progress.show(11, {"train/loss": 1.25})
        progress.say("saved")
    text = stream.getvalue()
    assert "loss 1.250 val 1.500 grad 0.50" in text
    assert "tok/s 12,345" in text
    assert "skipped 1" in text
    assert "10/100" in text
    assert "\nsaved\n" in text or "\rsaved\n" in text


def test_a_terminal_shows_all_steps_of_a_resumed_run() -> None:
    stream = Terminal()
    with Progress(100, 50, stream) as progress:
        progress.advance(60)
        progress.show(60, {"train/loss": 1.0})
    assert "60/100" in stream.getvalue()


def test_a_log_file_gets_the_first_and_the_last_line_of_a_fast_run(tmp_path: Path) -> None:
    text = write_steps(run_config(tmp_path, tensorboard=False), 1, 100)
    lines = text.splitlines()
    assert len(lines) == 2
    assert "1/100" in lines[0]
    assert "100/100" in lines[1]
    assert "loss 100.000" in lines[1]
    assert "\r" not in text


def test_a_log_file_gets_a_line_now_and_then() -> None:
    stream = io.StringIO()
    with Progress(100, 0, stream, seconds_between_lines=0.0) as progress:
        for step in (1, 2, 3):
            progress.show(step, validation_record(1.0))
    assert len(stream.getvalue().splitlines()) == 3


def test_a_log_file_shows_all_steps_of_a_resumed_run(tmp_path: Path) -> None:
    text = write_steps(run_config(tmp_path, tensorboard=False), 51, 52, resumed_from=50)
    assert "52/100" in text
