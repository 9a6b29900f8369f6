"""The training run: data, state, steps, figures, checkpoints; resumes by itself."""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dreamer_jax import sharding
from dreamer_jax.accounting.flops import training_flops
from dreamer_jax.accounting.hardware import peak_flops
from dreamer_jax.config import Config, ConfigError, check_run_path, random_depths
from dreamer_jax.data.batch import Batch
from dreamer_jax.data.builder import prepare
from dreamer_jax.data.loader import batches
from dreamer_jax.data.prepared import Prepared
from dreamer_jax.distributed import DistributedError, Group
from dreamer_jax.errors import DreamerError
from dreamer_jax.kernels.compute import Compute
from dreamer_jax.model.dreamer import RouterFigures
from dreamer_jax.model.parameters import RouterBias
from dreamer_jax.training import metrics
from dreamer_jax.training.checkpoint import (
    CheckpointError,
    Checkpoints,
    Damage,
    Position,
    changed_keys,
    check_tokenizer,
    write_run_files,
)
from dreamer_jax.training.depths import announcement, at_depth, depth_of, validated_depths
from dreamer_jax.training.metrics import Sinks
from dreamer_jax.training.preemption import Agreement, preemption
from dreamer_jax.training.rows import held_rows, place_rows
from dreamer_jax.training.run_folder import claimed
from dreamer_jax.training.step import (
    StepResult,
    TrainState,
    abstract_state,
    init_state,
    make_evaluation,
    make_train_step,
)

OF_THE_MODEL = ("data.special_tokens", "data.prompt_template", "data.response_template")
"""Keys of the model outside of its section: the form of the documents that it reads and writes."""


class TrainingDiverged(DreamerError, RuntimeError):
    """Too many steps in a row without a finite loss and gradient."""


class Summary(NamedTuple):
    """How a run ended."""

    config: Config
    step: int
    stopped_by: str | None
    """Name of the signal that ended it early, whichever process it came to."""
    train_loss: float | None
    validation_loss: float | None
    unigram_entropy: float
    """Nats per token that a model reaches which knows the frequencies of tokens and nothing else."""
    model: Any
    """The trained model (nnx module)."""
    prepared: Prepared


class Snapshot(NamedTuple):
    """A model in the middle of its training."""

    config: Config
    model: Any
    """The model (nnx module), on the mesh; the next step overwrites it."""
    mesh: Mesh
    tokenizer: Path
    """The tokenizer's file."""
    beat: Callable[[], None]
    """To be called now and then: a sign of life."""


Look = Callable[[Snapshot], metrics.Record]
"""Figures of a snapshot, for the run's records; every process calls it."""
Draw = Callable[[Snapshot, Batch | None, Mapping[str, np.ndarray]], metrics.Images]
"""Images of a snapshot: draw(snapshot, rows, counts). Every process calls it; those of process 0 are written.

The rows are held-out ones, one on each device, or None where there are none. The counts [L, E] are, by router, how
often the newest step selected each expert.
"""


def train(config: Config, group: Group | None = None, look: Look | None = None, draw: Draw | None = None) -> Summary:
    """Train to `train.steps`, from the newest checkpoint of the run folder if there is one.

    Args:
        config: the run.
        group: the processes that take part, each of which calls this; process 0 prints and writes records.
        look: what `train.evaluate_every` calls.
        draw: what `log.figures_every` calls.

    Raises:
        ConfigError: the config does not fit the devices, or differs in its model from the run's checkpoints.
        TrainingDiverged: `train.max_bad_steps` steps in a row had a non-finite loss or gradient.
    """
    group = group or Group()
    if jax.process_count() != group.count:
        raise DistributedError(
            "JAX has several processes: call train inside of `with distributed.joined(...) as group`"
        )
    check_run_path(config)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.train.batch, config.train.microbatches, mesh)
    prepared = _prepared(config, group)
    group.beat("the initialisation", slow=True)
    with (
        claimed(config.run_dir, group),
        Checkpoints(config.run_dir, config.checkpoint) as checkpoints,
        preemption() as asked,
    ):
        # To be restored, a state needs neither to be drawn nor the files that it was made of.
        graph, state = (init_state if checkpoints.latest is None else abstract_state)(config, mesh)
        state, start = _resumed(config, checkpoints, state, prepared, group)
        if group.index == 0:
            write_run_files(config.run_dir, config, prepared.tokenizer)
        with Sinks(config, step=start.step, process=group.index) as sinks:
            stop = Agreement(asked, mesh)
            run = _Run(config, mesh, graph, prepared, checkpoints, sinks, stop, group, start, look, draw)
            state, step = run.steps(state)
            stopped_by = (asked.signal_name or "a signal to another process") if step < config.train.steps else None
            validation = None if stopped_by else run.finished(state, step)
            run.save(state, step)
            group.beat("writing the last checkpoint", slow=True)
            checkpoints.wait()
            if not stopped_by:
                checkpoints.prune()
                if look and config.train.evaluate_every and step > start.step:
                    run.evaluate(state, step)
    # One device: kernels do not run on arrays spread over several outside of shard_map.
    params, biases = sharding.on_one_device(mesh, (state.params, state.biases))
    model = nnx.merge(graph, params, biases)
    entropy = prepared.unigram_entropy
    return Summary(config, step, stopped_by, run.last_loss, validation, entropy, model, prepared)


def _prepared(config: Config, group: Group) -> Prepared:
    """The data, which process 0 prepares while the others wait."""
    prepared = prepare(config) if group.index == 0 else None
    group.told("the data are prepared")
    return prepared or prepare(config, process_index=group.index)


class _Start(NamedTuple):
    """Where a run begins."""

    step: int
    rows: int
    """Rows of the mixture that are behind it."""


def _resumed(
    config: Config, checkpoints: Checkpoints, state: TrainState, prepared: Prepared, group: Group
) -> tuple[TrainState, _Start]:
    """The state to start from, and what it has behind it."""
    step = checkpoints.latest
    first = group.told("newest checkpoint", str(step))
    if first != str(step):
        raise CheckpointError(
            f"the newest checkpoint of {checkpoints.directory} is {step} here and {first} for process 0: the folder "
            f"must be on a file system that all processes share"
        )
    if step is None:
        return state, _Start(0, 0)
    try:
        return _restored(config, checkpoints, state, step, prepared, group)
    except Damage as damage:
        raise _with_a_way_on(damage, checkpoints, step, group) from damage


def _with_a_way_on(damage: Damage, checkpoints: Checkpoints, step: int, group: Group) -> CheckpointError:
    whole = checkpoints.newest_whole(step) if group.count == 1 else None
    folder = checkpoints.directory / str(step)
    then = "start again" if whole is None else f"go on from step {whole}, which is whole"
    return CheckpointError(
        f"{damage}\nto {then}, move it away and give the same command again:\n  mv '{folder}' '{folder}.damaged'"
    )


def _restored(
    config: Config, checkpoints: Checkpoints, state: TrainState, step: int, prepared: Prepared, group: Group
) -> tuple[TrainState, _Start]:
    changed, position = changed_keys(checkpoints.config(step), config), checkpoints.position(step)
    other_model = of_the_model(changed)
    if other_model:
        raise ConfigError(
            f"{config.run_dir} holds checkpoints of another model (differs in {', '.join(other_model)}); "
            f"give the run another --name, or delete the folder"
        )
    if not group.index:
        check_tokenizer(config.run_dir, prepared.tokenizer)
        note = f"; changed since it was written: {', '.join(changed)}" if changed else ""
        if position.data not in (None, prepared.key):
            note += f"; the data are others than before ({position.data}, now {prepared.key})"
        print(f"resuming from step {step} of {checkpoints.directory}{note}", flush=True)
    restored = checkpoints.restore(state, step)
    # What is saved is good; a count of bad steps in old checkpoints would end the run at its first.
    good = jnp.zeros_like(restored.bad_in_a_row)
    return restored._replace(bad_in_a_row=good), _Start(step, position.rows)


def of_the_model(changed: Sequence[str]) -> list[str]:
    """Those of the changed keys with which a checkpoint's weights would be another model."""
    return [key for key in changed if key.startswith("model.") or key in OF_THE_MODEL]


@dataclass
class _Run:
    """What the steps of a run share."""

    config: Config
    mesh: Mesh
    graph: Any
    prepared: Prepared
    checkpoints: Checkpoints
    sinks: Sinks
    agreement: Agreement
    group: Group
    start: _Start
    look: Look | None = None
    draw: Draw | None = None

    def __post_init__(self) -> None:
        compute = Compute.of(self.config, self.mesh)
        self.make_step = functools.partial(make_train_step, self.config, compute, self.mesh, self.graph)
        self.make_evaluation = functools.partial(make_evaluation, self.config, compute, self.mesh, self.graph)
        self.step_programs: dict[int, Any] = {}
        self.evaluation_programs: dict[int, Any] = {}
        self.last_loss: float | None = None
        self.last_read, self.bad = self.start.step, 0
        self.reporter = _Reporter(self.config, self.mesh.size)
        self.place = sharding.batch_sharding(self.mesh)
        self.held = held_rows(self.place, self.config.train.batch)

    def steps(self, state: TrainState) -> tuple[TrainState, int]:
        """Take steps until the end or a signal; returns the state and the number of steps behind it.

        The next step is dispatched before the last one's figures are read, so that the device never waits for them.
        """
        pending: tuple[int, StepResult, Any] | None = None
        step = start = self.start.step
        if depths := announcement(self.config):
            self.sinks.say(depths)
        self.group.beat(f"step {start + 1}", slow=True)
        for step, batch in enumerate(self.timed(self.batches("train")), start + 1):
            state, result = self.train_step(step, state, batch)
            # The step donates its state, so what the report needs of the new one is copied here.
            biases = jax.tree.map(lambda b: b.copy(), state.biases) if self._reports(step) else None
            if pending:
                self.read(*pending)
                self.check_divergence(state)
            pending = (step, result, biases)
            if self._saves(step) or self._validates(step) or self._evaluates(step) or self._draws(step):
                # A checkpoint comes after its own step's records, so that a resumed run's records have no gap.
                self.read(*pending)
                self.check_divergence(state)
                pending = None
            if self._validates(step):
                self.validate(state, step)
            if self._draws(step):
                self.illustrate(state, step, result)
            if self._saves(step):
                self.save(state, step)
            if self.agreement.stop() or step == self.config.train.steps:
                break
            if self._evaluates(step):
                self.evaluate(state, step)
        if pending:
            self.read(*pending)
            self.check_divergence(state)
        self.confirm()
        return state, step

    def train_step(self, step: int, state: TrainState, batch: Batch) -> tuple[TrainState, StepResult]:
        """One step at its depth; the first of each depth compiles its program."""
        depth = depth_of(self.config, step)
        if depth not in self.step_programs:
            self.group.beat(f"step {step}", slow=True)
            if in_between := bool(self.step_programs):
                jax.block_until_ready(state)  # the step before counts in the speed, compiling does not
            started = time.monotonic()
            self.step_programs[depth] = self.compiled(self.make_step(depth), state, batch)
            if in_between:
                seconds = time.monotonic() - started
                self.reporter.pause(seconds)
                self.sinks.say(f"step {step} is the first at depth {depth}: compiled in {seconds:.1f} s")
        taken: tuple[TrainState, StepResult] = self.step_programs[depth](state, batch)
        return taken

    def held_out_loss(self, depth: int, state: TrainState, batch: Batch) -> tuple[float, float]:
        """(summed loss, number of loss positions) of a batch at a depth."""
        arguments = state.params, state.biases, batch
        if depth not in self.evaluation_programs:
            self.evaluation_programs[depth] = self.compiled(self.make_evaluation(depth), *arguments)
        loss, positions = self.evaluation_programs[depth](*arguments)
        return float(loss), float(positions)

    def compiled(self, program: Any, *arguments: Any) -> Any:
        """The program for such arguments, compiled in every process before any of them runs it.

        Compilation takes minutes, not the same in all processes, and a collective on CPU waits 30 s for its peers. All
        processes draw the same depth for a step, so they meet here at the same steps.
        """
        executable = program.lower(*arguments).compile()
        self.group.meet("compiled")
        self.confirm()
        return executable

    def confirm(self) -> None:
        """Make sure that the checkpoint was whole, before the first program runs: a step overwrites its state.

        Raises:
            CheckpointError: it was not; the message says how to go on.
        """
        try:
            self.checkpoints.confirm()
        except Damage as damage:
            raise _with_a_way_on(damage, self.checkpoints, self.start.step, self.group) from damage

    def save(self, state: TrainState, step: int) -> None:
        """Start to write a checkpoint, unless the last step was bad."""
        if self.bad:
            self.sinks.say(f"step {step}: not saved, because its loss or gradient is not finite")
            return
        self.group.beat(f"the checkpoint of step {step}", slow=True)
        self.sinks.flush()  # records are not to fall behind the state that goes on from here
        rows = self.start.rows + (step - self.start.step) * self.config.train.batch
        self.checkpoints.save(self.config, state, step, Position(rows, self.prepared.key))
        self.group.beat(f"step {step + 1}")

    def finished(self, state: TrainState, step: int) -> float | None:
        """The held-out loss of a run that has taken all steps.

        Raises:
            TrainingDiverged: the last step's loss, or this one, is not finite.
        """
        recorded = metrics.has_record(self.config.run_dir / "metrics.jsonl", step, "validation/loss")
        loss = self.validate(state, step, record=not recorded)
        if self.bad or not math.isfinite(loss or 0.0):
            raise self.diverged(state, step)
        return loss

    def check_divergence(self, state: TrainState) -> None:
        """Raise TrainingDiverged after too many bad steps in a row."""
        if self.bad >= self.config.train.max_bad_steps:
            raise self.diverged(state, self.last_read)

    def diverged(self, state: TrainState, step: int) -> TrainingDiverged:
        """The error, after a look at what the weights before the first bad step are worth.

        A checkpoint of them whose held-out loss is not finite is none to go on from: an older one takes its place.
        """
        first_bad = step - self.bad + 1
        latest, held_out = self.checkpoints.latest, self.validate(state, step, record=False)
        older = [saved for saved in self.checkpoints.steps if latest is not None and saved < latest]
        poisoned = latest is not None and latest >= first_bad - 1 and not math.isfinite(held_out or 0.0)
        if latest is not None and poisoned and older:
            self.checkpoints.drop(latest)
            latest = older[-1]
        what = f"steps {first_bad} to {step} had a non-finite loss or gradient and were skipped"
        if not self.bad:
            what = f"the held-out loss after step {step} is not finite"
        if latest is None or (poisoned and not older):
            return TrainingDiverged(
                f"{what}; no good checkpoint is there. Lower optimizer.learning_rate, or look at the data, and give "
                f"the run another --name"
            )
        return TrainingDiverged(
            f"{what}; the last good checkpoint is step {latest}. Lower optimizer.learning_rate, or look at the data: "
            f"the same command goes on from there."
        )

    def read(self, step: int, result: StepResult, biases: Any) -> None:
        """Report a step whose figures are ready."""
        depth, self.last_loss = depth_of(self.config, step), float(result.loss)
        self.reporter.count(int(result.figures.tokens), depth, self.last_loss)
        self.group.beat(f"step {step + 1}")
        self.last_read, self.bad = step, int(result.bad_in_a_row)
        if self.bad:
            self.sinks.say(f"step {step}: non-finite loss or gradient, update skipped ({self.bad} in a row)")
        self.sinks.advance(step)
        if self._reports(step):
            self.sinks.write(step, self.reporter.record(result, biases, depth))

    def validate(self, state: TrainState, step: int, *, record: bool = True) -> float | None:
        """Mean held-out loss at the trained depth; None where there are no held-out rows.

        A record of it has the loss at other depths, too, where steps run at random ones.
        """
        trained = self.config.model.depth
        totals, count = dict.fromkeys(validated_depths(self.config) if record else (trained,), 0.0), 0.0
        started = time.monotonic()
        self.group.beat(f"the validation of step {step}", slow=True)
        for batch in self.batches("validation"):
            positions = 0.0
            for depth in totals:
                loss, positions = self.held_out_loss(depth, state, batch)
                totals[depth] += loss
            count += positions
        self.reporter.pause(time.monotonic() - started)
        self.group.beat(f"step {step + 1}")
        if count == 0:
            return None
        means = {depth: total / count for depth, total in totals.items()}
        if record:
            by_depth = means if len(means) > 1 else {}
            self.sinks.write(step, metrics.validation_record(means[trained], by_depth))
        return means[trained]

    def evaluate(self, state: TrainState, step: int) -> None:
        """Let benchmarks look at the model."""
        assert self.look
        with self.aside(state, step, "evaluation", "not evaluated") as snapshot:
            self.sinks.write(step, self.look(snapshot))

    def illustrate(self, state: TrainState, step: int, result: StepResult) -> None:
        """Let figures be drawn of the model, and of how this step used its experts."""
        assert self.draw
        rows = self.few_rows  # out here: a process that cannot read them must not go on while others wait for it
        with self.aside(state, step, "figures", "no figures") as snapshot:
            counts = jax.device_get({name: router.counts for name, router in result.figures.routers.items()})
            self.sinks.show(step, self.draw(snapshot, rows, counts))

    @contextlib.contextmanager
    def aside(self, state: TrainState, step: int, what: str, failed: str) -> Iterator[Snapshot]:
        """The model, for something whose time does not count as training.

        What keeps it from being done does not end the training.
        """
        started = time.monotonic()

        def beat() -> None:
            self.group.beat(f"the {what} of step {step}", slow=True)

        beat()
        model = nnx.merge(self.graph, state.params, state.biases)
        try:
            yield Snapshot(self.config, model, self.mesh, self.prepared.tokenizer, beat)
        except (DreamerError, jax.errors.JaxRuntimeError) as error:  # such as no memory for another copy of the weights
            self.sinks.say(f"step {step}: {failed}: {error}")
        self.reporter.pause(time.monotonic() - started)
        self.group.beat(f"step {step + 1}")

    @functools.cached_property
    def few_rows(self) -> Batch | None:
        """The first held-out rows, one on each device; None where there are none."""
        count = self.mesh.size
        few = replace(self.config, train=replace(self.config.train, batch=count, microbatches=1, validation_batches=1))
        held = held_rows(self.place, count)
        batch = next(batches(self.prepared, few, split="validation", held=held), None)
        return None if batch is None else place_rows(self.place, count, held, batch)

    def batches(self, split: Any) -> Iterator[Batch]:
        """Batches on the devices."""
        if split == "train" and self.start.step >= self.config.train.steps:
            return
        first = self.start.rows if split == "train" else 0
        for batch in batches(self.prepared, self.config, split=split, start_row=first, held=self.held):
            yield place_rows(self.place, self.config.train.batch, self.held, batch)

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, with the time that it takes to get them counted."""
        while True:
            started = time.monotonic()
            batch = next(batches, None)
            self.reporter.input_seconds += time.monotonic() - started
            if batch is None:
                return
            yield batch

    def _reports(self, step: int) -> bool:
        return step % self.config.log.every == 0 or step in (1, self.config.train.steps)

    def _saves(self, step: int) -> bool:
        return step % self.config.checkpoint.every == 0 and step < self.config.train.steps

    def _evaluates(self, step: int) -> bool:
        every = self.config.train.evaluate_every
        return self.look is not None and every > 0 and step % every == 0

    def _draws(self, step: int) -> bool:
        every = self.config.log.figures_every
        return self.draw is not None and every > 0 and step % every == 0

    def _validates(self, step: int) -> bool:
        every = self.config.train.validate_every
        return every > 0 and step % every == 0 and step < self.config.train.steps


class _Reporter:
    """Turns what steps report into records, with the speed since the last record."""

    def __init__(self, config: Config, devices: int):
        self.config, self.devices = config, devices
        self.peak = peak_flops(jax.devices()[0].device_kind)
        self.flops_per_token = functools.cache(self._flops_per_token)
        self.start_again()

    def start_again(self) -> None:
        """Forget the steps of the last record."""
        self.tokens, self.flops, self.input_seconds, self.started = 0, 0.0, 0.0, time.monotonic()
        self.losses: dict[int, list[float]] = {}

    def count(self, tokens: int, depth: int, loss: float) -> None:
        """A step on so many tokens at this depth is done."""
        self.tokens += tokens
        self.flops += tokens * self.flops_per_token(depth)
        self.losses.setdefault(depth, []).append(loss)

    def _flops_per_token(self, depth: int) -> float:
        return training_flops(at_depth(self.config.model, depth), self.config.data.context).total

    def pause(self, seconds: float) -> None:
        """Leave time spent on something else out of the speed."""
        self.started += seconds

    def record(self, result: StepResult, biases: nnx.State, depth: int) -> metrics.Record:
        """The record of a step at this depth."""
        result, biases = jax.device_get((result, biases))
        figures = result.figures
        record = metrics.step_record(
            loss=result.loss,
            grad_norm=result.gradient_norm,
            learning_rate=result.learning_rate,
            loss_tokens=int(result.loss_tokens),
            tokens=int(figures.tokens),
            skipped=int(result.skipped),
            square=np.asarray(figures.square),
            routers={name: self._own_depths(name, router, depth) for name, router in figures.routers.items()},
            biases={
                str(path[1]): np.asarray(bias[...])
                for path, bias in nnx.to_flat_state(biases)
                if isinstance(bias, RouterBias)
            },
            shared=self.config.model.depth_recurrent,
        )
        if random_depths(self.config.train.depths):
            record |= metrics.depth_record(depth, self.losses)
        seconds, flops = max(time.monotonic() - self.started, 1e-9), self.flops / max(self.tokens, 1)
        record |= metrics.speed_record(
            self.tokens, seconds, flops, self.devices, self.peak, input_seconds=self.input_seconds
        )
        self.start_again()
        return record

    def _own_depths(self, name: str, router: RouterFigures, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """Counts and entropies at the depths, of so many, at which the dimension runs."""
        depths = np.array(self.config.model.depths_of(name, depth))
        return np.asarray(router.counts)[depths], np.asarray(router.entropy)[depths]
