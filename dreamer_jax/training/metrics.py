"""From what a step reports to what people read: figures, records, and the sinks that records are written to.

A record maps flat names, "theme/figure", to a number or to one number per depth. It goes to metrics.jsonl, to
TensorBoard, to Weights & Biases if asked for, and in part to the progress line. TensorBoard and W&B take images, too.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, SupportsFloat, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, Num
from numpy.typing import ArrayLike
from tensorboardX import SummaryWriter
from tensorboardX.proto.summary_pb2 import Summary
from tqdm import tqdm

from dreamer_jax.config import Config, ConfigError
from dreamer_jax.files import open_without_links, write_whole

Record = dict[str, float | list[float]]
Write = Callable[[int, Record], None]
"""write(step, record)."""
Images = Mapping[str, bytes]
"""PNG files by flat names, "figures/da"."""
PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}
"""Channels of an image by the colour type that its PNG file names: grey, RGB, palette, grey and alpha, RGBA."""


@runtime_checkable
class Stream(Protocol):
    """Where progress is printed; stderr is one."""

    def write(self, text: str, /) -> int:
        """Write text; its length."""
        ...

    def flush(self) -> None:
        """Pass on what is buffered."""
        ...

    def isatty(self) -> bool:
        """Whether a person watches."""
        ...


# From figures to records.


def gini(counts: Num[np.ndarray, "*stack E"]) -> Float[np.ndarray, "*stack"]:
    """Gini coefficient along the last axis: 0 if all are equal (or all zero), (E - 1) / E if one has everything.

    The mean absolute difference between two experts, over twice their mean.
    """
    ordered = np.sort(counts.astype(np.float64), axis=-1)
    experts = ordered.shape[-1]
    rank = 2 * np.arange(1, experts + 1) - experts - 1
    return _ratio(np.sum(ordered * rank, axis=-1), experts * np.sum(ordered, axis=-1))


def router_report(
    counts: Int[np.ndarray, "L E"],
    entropy: Float[np.ndarray, "L"],
    tokens: int,
    bias: Float[np.ndarray, "*stack E"],
    shared: bool,
) -> Record:
    """How evenly one router kind spreads the load, for each depth and as a whole.

    Args:
        counts: selections of each expert at each depth.
        entropy: sums over tokens of the scores' entropy, in nats.
        tokens: non-padding tokens behind those sums.
        bias: b of Eq. 2; [E] if the depths share the router, [L, E] if each has its own.
        shared: whether depths share experts (DR). If so the whole is their counts added up, because an expert may
            be idle at one depth and busy at another. If not, it is the mean over layers; of unused experts, the sum.

    Returns:
        "gini", "max_over_mean" (load of the busiest expert over the mean), "unused" (experts without a token) and
        "entropy", each also as a list "..._per_depth"; and "bias_range", the widest max(b) - min(b).
    """
    whole = np.asarray(np.sum(counts, axis=0, keepdims=True, dtype=np.int64) if shared else counts)
    entropy_per_depth = entropy / max(tokens, 1)
    per_depth = {
        "gini_per_depth": gini(counts),
        "max_over_mean_per_depth": _max_over_mean(counts),
        "unused_per_depth": _unused(counts),
        "entropy_per_depth": entropy_per_depth,
    }
    return {
        "gini": float(np.mean(gini(whole))),
        "max_over_mean": float(np.mean(_max_over_mean(whole))),
        "unused": float(np.sum(_unused(whole))),
        "entropy": float(np.mean(entropy_per_depth)),
        "bias_range": float(np.max(np.ptp(bias, axis=-1))),
        **{name: [float(value) for value in values] for name, values in per_depth.items()},
    }


def step_record(
    *,
    loss: SupportsFloat,
    grad_norm: SupportsFloat,
    learning_rate: SupportsFloat,
    loss_tokens: int,
    tokens: int,
    skipped: int,
    square: Float[np.ndarray, "L"],
    routers: Mapping[str, tuple[np.ndarray, np.ndarray]],
    biases: Mapping[str, np.ndarray],
    shared: bool,
) -> Record:
    """The record of one optimizer step, from arrays on the host.

    Args:
        loss: mean cross-entropy in nats.
        grad_norm: global norm before clipping.
        learning_rate: of this step.
        loss_tokens: positions in the loss.
        tokens: non-padding tokens.
        skipped: steps skipped so far because of a non-finite loss or gradient.
        square: sums over tokens of the residual stream's mean square, per depth.
        routers: (counts [L, E], entropy [L]) by kind, as `router_report` takes them.
        biases: router biases by kind.
        shared: whether depths share their weights (DR).
    """
    record: Record = {
        "train/loss": float(loss),
        "train/perplexity": perplexity(loss),
        "train/grad_norm": float(grad_norm),
        "train/learning_rate": float(learning_rate),
        "train/loss_tokens": float(loss_tokens),
        "steps/skipped": float(skipped),
        "residual/rms_per_depth": [float(rms) for rms in np.sqrt(square / max(tokens, 1))],
    }
    for kind, (counts, entropy) in routers.items():
        report = router_report(counts, entropy, tokens, biases[kind], shared)
        record |= {f"router/{kind}/{name}": value for name, value in report.items()}
    return record


def depth_record(depth: int, losses: Mapping[int, Sequence[float]]) -> Record:
    """What the record of a step has beside others where the depth is random.

    Args:
        depth: of this step.
        losses: by depth, those of the steps since the last record, this one among them, in nats.
    """
    means = {f"train/loss_depth_{L}": float(np.mean(losses[L])) for L in sorted(losses)}
    return {"train/depth": float(depth), **means}


def validation_record(loss: SupportsFloat, by_depth: Mapping[int, float] | None = None) -> Record:
    """The record of one measurement of the held-out loss (nats), and of that at other depths."""
    record: Record = {"validation/loss": float(loss), "validation/perplexity": perplexity(loss)}
    return record | {f"validation/loss_depth_{L}": at_depth for L, at_depth in (by_depth or {}).items()}


def speed_record(
    tokens: int,
    seconds: float,
    flops_per_token: float,
    devices: int,
    peak: float | None,
    *,
    input_seconds: float,
) -> Record:
    """Speed over the steps since the last record.

    Args:
        tokens: non-padding tokens trained on, over all devices.
        seconds: wall time they took.
        flops_per_token: `accounting.flops.training_flops(...).total`, the mean over these tokens.
        devices: number of devices.
        peak: FLOP/s of one device; without it there is no "speed/mfu".
        input_seconds: part of the wall time in which the host waited for a batch. The step before runs meanwhile, so
            that the devices wait only where this nears the time of the steps.
    """
    tokens_per_second = tokens / seconds
    flops = tokens_per_second * flops_per_token
    record: Record = {"speed/tokens_per_second": tokens_per_second, "speed/flops_per_second": flops}
    record["speed/input_share"] = input_seconds / seconds
    if peak is not None:
        record["speed/mfu"] = flops / (devices * peak)
    return record


def perplexity(loss: SupportsFloat) -> float:
    """exp(loss); infinite where that overflows."""
    try:
        return math.exp(float(loss))
    except OverflowError:
        return math.inf


def scalars(record: Record) -> dict[str, float]:
    """The finite numbers of a record, lists taken apart into "name/00", "name/01", ... by depth."""
    flat: dict[str, float] = {}
    for name, value in record.items():
        flat |= {f"{name}/{l:02d}": v for l, v in enumerate(value)} if isinstance(value, list) else {name: value}
    return {name: value for name, value in flat.items() if math.isfinite(value)}


def _ratio(part: ArrayLike, whole: ArrayLike) -> np.ndarray:
    """The quotient, and 0 where nothing was counted."""
    part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def _max_over_mean(counts: Int[np.ndarray, "L E"]) -> np.ndarray:
    return _ratio(np.max(counts, axis=-1), np.mean(counts, axis=-1))


def _unused(counts: Int[np.ndarray, "L E"]) -> np.ndarray:
    return np.sum(counts == 0, axis=-1)


# Sinks.


class Sinks:
    """Where records go: a context manager that opens everything on process 0, and closes it however the run ends.

    `step` is the last step of the checkpoint that the run resumes from, 0 for a new run: what the folder holds of
    later steps is dropped, since those steps are taken again.
    """

    def __init__(self, config: Config, *, step: int, process: int, stream: Stream | None = None):
        """Nothing is opened yet. `process` is `jax.process_index()`, `stream` shows the progress (default: stderr)."""
        self._config, self._step, self._active = config, step, process == 0
        self._stream = stream
        self._sinks: list[Sink] = []
        self._progress: Progress | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Sinks":
        if not self._active:
            return self
        config, step, folder = self._config, self._step, self._config.run_dir
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:  # closes what is open already if the next does not open
            if config.log.wandb:
                self._sinks.append(stack.enter_context(wandb_sink(config, step)))
            self._sinks.append(stack.enter_context(json_lines_sink(folder / "metrics.jsonl", step)))
            if config.log.tensorboard:
                self._sinks.append(stack.enter_context(tensorboard_sink(folder / "tensorboard", step)))
            self._progress = stack.enter_context(Progress(config.train.steps, step, self._stream or sys.stderr))
            self._sinks.append(Sink(self._progress.show))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._stack.__exit__(kind, error, trace)

    def advance(self, step: int) -> None:
        """Move the progress on; cheap enough for every step."""
        if self._progress:
            self._progress.advance(step)

    def write(self, step: int, record: Record) -> None:
        """Send a record to every sink; one that cannot take it, on a full disk say, gets no more."""
        self._to_each(step, lambda sink: sink.write(step, record))

    def show(self, step: int, images: Images) -> None:
        """Send images to the sinks that take them; as `write`."""
        self._to_each(step, lambda sink: sink.show(step, images))

    def say(self, message: str) -> None:
        """Print a line beside the progress, without tearing it."""
        if self._progress:
            self._progress.say(message)

    def flush(self) -> None:
        """Hand everything that was written to the system, so that a kill does not lose it."""
        for sink in self._sinks:
            sink.flush()

    def _to_each(self, step: int, hand_over: "Callable[[Sink], None]") -> None:
        for sink in list(self._sinks):
            try:
                hand_over(sink)
            except OSError as error:
                self._sinks.remove(sink)
                self.say(f"step {step}: a record cannot be written ({error}); the run goes on without this report")


class Sink(NamedTuple):
    """One place that records go to."""

    write: Write
    show: Callable[[int, Images], None] = lambda step, images: None
    """show(step, images); most take numbers only."""
    flush: Callable[[], None] = lambda: None


@contextlib.contextmanager
def json_lines_sink(path: Path, step: int) -> Iterator[Sink]:
    """One JSON object a line. Numbers that are not finite become null: JSON has none, and readers give NaN for it."""
    drop_later_records(path, step)
    descriptor = open_without_links(path, os.O_WRONLY | os.O_APPEND)

    def write(step: int, record: Record) -> None:
        valid = {name: _null_unless_finite(value) for name, value in record.items()}
        os.write(descriptor, (json.dumps({"step": step, **valid}, allow_nan=False) + "\n").encode())

    try:
        yield Sink(write)
    finally:
        os.close(descriptor)


def drop_later_records(path: Path, step: int) -> None:
    """Keep a metrics file's records up to `step`, atomically; a line torn by a crash goes too."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line for line in lines if _step_of(line) <= step]
    write_whole(path, "".join(line + "\n" for line in kept))


@contextlib.contextmanager
def tensorboard_sink(folder: Path, step: int) -> Iterator[Sink]:
    """TensorBoard events: a list is one scalar a depth. What a crash left of later steps is voided."""
    with SummaryWriter(str(folder), purge_step=step + 1, flush_secs=30) as writer:

        def write(step: int, record: Record) -> None:
            # One event for the record: an event for each of its hundreds of scalars takes 10 times as long.
            values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars(record).items()]
            writer.file_writer.add_summary(Summary(value=values), step)

        def show(step: int, images: Images) -> None:
            values = [Summary.Value(tag=name, image=_summary_image(png)) for name, png in images.items()]
            writer.file_writer.add_summary(Summary(value=values), step)

        yield Sink(write, show, writer.flush)


def _summary_image(png: bytes) -> Any:
    width, height, _, kind = struct.unpack(">IIBB", png[16:26])  # the first fields of every PNG file
    return Summary.Image(width=width, height=height, colorspace=PNG_CHANNELS[kind], encoded_image_string=png)


@contextlib.contextmanager
def wandb_sink(config: Config, step: int) -> Iterator[Sink]:
    """Weights & Biases; a resumed run goes on in the same W&B run, whose id lies in the run's folder.

    W&B does not rewind: it ignores the steps between the checkpoint and a crash when they are taken again.
    """
    try:
        import wandb
    except ImportError as error:
        raise ConfigError("log.wandb: the package is not installed: pip install 'dreamer-jax[wandb]'") from error
    id_file = config.run_dir / "wandb_id"
    run: Any = wandb.init(
        project=config.log.project,
        name=config.name,
        id=id_file.read_text().strip() if step and id_file.is_file() else None,
        resume="allow",
        dir=str(config.run_dir),
        config=dataclasses.asdict(config),
    )

    def picture(png: bytes) -> Any:
        from PIL import Image  # late: few runs need it

        return wandb.Image(Image.open(io.BytesIO(png)))

    try:
        write_whole(id_file, run.id + "\n")
        yield Sink(
            lambda step, record: run.log(scalars(record), step=step),
            lambda step, images: run.log({name: picture(png) for name, png in images.items()}, step=step),
        )
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


class Progress:
    """The figures that people watch, with the time left: a bar in a terminal, elsewhere a line now and then."""

    def __init__(self, steps: int, step: int, stream: Stream, *, seconds_between_lines: float = 60.0):
        """From `step` on to `steps`."""
        self._steps, self._first, self._step, self._stream = steps, step, step, stream
        self._start, self._printed, self._pause = time.monotonic(), -math.inf, seconds_between_lines
        self._watched: Record = {}
        self._pending = False
        self._bar = None
        if stream.isatty():
            self._bar = tqdm(total=steps, initial=step, file=stream, unit="step", dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the bar, or print what no line has shown yet."""
        if self._bar is not None:
            self._bar.close()
        elif self._pending:
            self._print_line()

    def advance(self, step: int) -> None:
        """`step` steps are done."""
        if self._bar is not None:
            self._bar.update(step - self._step)
        self._step = step

    def show(self, step: int, record: Record) -> None:
        """Show the newest figures; those that this record lacks stay as they were."""
        self._watched |= record
        if self._bar is not None:
            self._bar.set_postfix_str(watched(self._watched))
            return
        self._step, self._pending = max(step, self._step), True
        if time.monotonic() - self._printed >= self._pause:
            self._print_line()

    def say(self, message: str) -> None:
        """Print a line of its own."""
        if self._bar is not None:
            self._bar.clear()
        print(message, file=self._stream, flush=True)
        if self._bar is not None:
            self._bar.refresh()

    def _print_line(self) -> None:
        self._printed, self._pending = time.monotonic(), False
        elapsed = self._printed - self._start
        line = tqdm.format_meter(
            self._step, self._steps, elapsed, ncols=0, unit="step", initial=self._first, postfix=watched(self._watched)
        )
        print(line.strip(), file=self._stream, flush=True)


def watched(record: Record) -> str:
    """The few figures of the progress line."""
    shown = {
        "loss": ("train/loss", "{:.3f}"),
        "val": ("validation/loss", "{:.3f}"),
        "grad": ("train/grad_norm", "{:.2f}"),
        "gini": ("router/ea/gini", "{:.3f}"),
        "tok/s": ("speed/tokens_per_second", "{:,.0f}"),
        "mfu": ("speed/mfu", "{:.1%}"),
        "skipped": ("steps/skipped", "{:.0f}"),
    }
    # Steps are skipped in a run that has a problem; the others need not say 0.
    present = {label: f.format(record[name]) for label, (name, f) in shown.items() if name in record}
    return " ".join(f"{label} {text}" for label, text in present.items() if (label, text) != ("skipped", "0"))


def _null_unless_finite(value: float | list[float]) -> Any:
    if isinstance(value, list):
        return [_null_unless_finite(v) for v in value]
    return value if math.isfinite(value) else None


def has_record(path: Path, step: int, name: str) -> bool:
    """Whether a metrics file has this figure of this step."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return any(name in line and _step_of(line) == step for line in lines)


def _step_of(line: str) -> float:
    """The step of a line of metrics; infinite if it cannot be read."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
