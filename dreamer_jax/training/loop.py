"""The training run: data, state, steps, figures, checkpoints; resumes by itself."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dreamer_jax import sharding
from dreamer_jax.accounting.flops import peak_flops, training_flops
from dreamer_jax.config import Config, ConfigError
from dreamer_jax.data.builder import Prepared, prepare, unigram_entropy
from dreamer_jax.data.loader import batches
from dreamer_jax.model.dreamer import Compute
from dreamer_jax.training import metrics
from dreamer_jax.training.checkpoint import Checkpoints, changed_keys, check_tokenizer, write_run_files
from dreamer_jax.training.metrics import Sinks
from dreamer_jax.training.preemption import Preemption, preemption
from dreamer_jax.training.step import StepResult, TrainState, init_state, make_evaluation, make_train_step


class TrainingDiverged(RuntimeError):
    """Too many steps in a row without a finite loss and gradient."""


class Summary(NamedTuple):
    """How a run ended."""

    config: Config
    step: int
    stopped_by: str | None
    """Name of the signal that ended it early."""
    train_loss: float | None
    validation_loss: float | None
    unigram_entropy: float
    """Nats per token that a model reaches which knows the frequencies of tokens and nothing else."""
    model: Any
    """The trained model (nnx module)."""
    prepared: Prepared


def train(config: Config) -> Summary:
    """Train to `train.steps`, from the newest checkpoint of the run folder if there is one.

    Raises:
        ConfigError: the config does not fit the devices, or differs in its model from the run's checkpoints.
        TrainingDiverged: `train.max_bad_steps` steps in a row had a non-finite loss or gradient.
    """
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.train.batch, config.train.microbatches, mesh)
    prepared = prepare(config, process_index=jax.process_index())
    graph, state = init_state(config, mesh)
    with Checkpoints(config.run_dir, config.checkpoint) as checkpoints, preemption() as asked:
        state, start = _resumed(config, checkpoints, state, prepared)
        if jax.process_index() == 0:
            write_run_files(config.run_dir, config, prepared.tokenizer)
        with Sinks(config, step=start, process=jax.process_index()) as sinks:
            run = _Run(config, mesh, graph, prepared, checkpoints, sinks, asked)
            state, step = run.steps(state, start)
            checkpoints.save(config, state, step)
            checkpoints.wait()
            stopped_by = asked.signal_name if step < config.train.steps else None
            recorded = metrics.has_record(config.run_dir / "metrics.jsonl", step, "validation/loss")
            validation = None if stopped_by else run.validate(state, step, record=not recorded)
    # One device: kernels do not run on arrays spread over several outside of shard_map.
    params, biases = sharding.on_one_device(mesh, (state.params, state.biases))
    model = nnx.merge(graph, params, biases)
    entropy = unigram_entropy(prepared)
    return Summary(config, step, stopped_by, run.last_loss, validation, entropy, model, prepared)


def _resumed(config: Config, checkpoints: Checkpoints, state: TrainState, prepared: Prepared) -> tuple[TrainState, int]:
    """The state to start from and the steps that it has behind it."""
    step = checkpoints.latest
    if step is None:
        return state, 0
    changed = changed_keys(checkpoints.config(step), config)
    if any(key.startswith("model.") for key in changed):
        raise ConfigError(
            f"{config.run_dir} holds checkpoints of another model (differs in {', '.join(changed)}); "
            f"give the run another --name, or delete the folder"
        )
    check_tokenizer(config.run_dir, prepared.tokenizer)
    note = f"; changed since it was written: {', '.join(changed)}" if changed else ""
    print(f"resuming from step {step} of {checkpoints.directory}{note}", flush=True)
    return checkpoints.restore(state, step), step


@dataclass
class _Run:
    """What the steps of a run share."""

    config: Config
    mesh: Mesh
    graph: Any
    prepared: Prepared
    checkpoints: Checkpoints
    sinks: Sinks
    asked: Preemption

    def __post_init__(self) -> None:
        compute = Compute.of(self.config, self.mesh)
        self.train_step = make_train_step(self.config, compute, self.mesh, self.graph)
        self.evaluation = make_evaluation(self.config, compute, self.mesh, self.graph)
        self.last_loss: float | None = None
        self.reporter = _Reporter(self.config, self.mesh.size)

    def steps(self, state: TrainState, start: int) -> tuple[TrainState, int]:
        """Take steps until the end or a signal; returns the state and the number of steps behind it.

        The next step is dispatched before the last one's figures are read, so that the device never waits for them.
        """
        pending: tuple[int, StepResult, Any] | None = None
        step = start
        for step, batch in enumerate(self.batches("train", start), start + 1):
            state, result = self.train_step(state, batch)
            # The step donates its state, so what the report needs of the new one is copied here.
            biases = jax.tree.map(lambda b: b.copy(), state.biases) if self._reports(step) else None
            if pending:
                self.read(*pending)
            pending = (step, result, biases)
            if self._saves(step) or self._validates(step):
                # A checkpoint comes after its own step's records, so that a resumed run's records have no gap.
                self.read(*pending)
                pending = None
            if self._validates(step):
                self.validate(state, step)
            if self._saves(step):
                self.checkpoints.save(self.config, state, step)
            if step == self.config.train.steps or self.asked.signal_name:
                break
        if pending:
            self.read(*pending)
        return state, step

    def read(self, step: int, result: StepResult, biases: Any) -> None:
        """Report a step whose figures are ready, and stop the run if it diverges."""
        self.reporter.count(int(result.figures.tokens))
        self.last_loss = float(result.loss)
        bad = int(result.bad_in_a_row)
        if bad >= self.config.train.max_bad_steps:
            raise TrainingDiverged(
                f"steps {step - bad + 1} to {step} had a non-finite loss or gradient and were skipped; the last good "
                f"checkpoint is step {self.checkpoints.latest}. Lower optimizer.learning_rate, or look at the data."
            )
        if bad:
            self.sinks.say(f"step {step}: non-finite loss or gradient, update skipped ({bad} in a row)")
        self.sinks.advance(step)
        if self._reports(step):
            self.sinks.write(step, self.reporter.record(result, biases))

    def validate(self, state: TrainState, step: int, *, record: bool = True) -> float | None:
        """Mean held-out loss; None where there are no held-out rows."""
        total, count = 0.0, 0.0
        started = time.monotonic()
        for batch in self.batches("validation", 0):
            loss, positions = self.evaluation(state.params, state.biases, batch)
            total, count = total + float(loss), count + float(positions)
        self.reporter.pause(time.monotonic() - started)
        if count == 0:
            return None
        if record:
            self.sinks.write(step, metrics.validation_record(total / count))
        return total / count

    def batches(self, split: Any, start: int) -> Iterator[dict[str, jax.Array]]:
        """Batches on the devices."""
        if split == "train" and start >= self.config.train.steps:
            return
        place = sharding.batch_sharding(self.mesh)
        rows = batches(
            self.prepared,
            self.config,
            split=split,
            start_step=start,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        for batch in rows:
            yield {name: jax.make_array_from_process_local_data(place, array) for name, array in batch.items()}

    def _reports(self, step: int) -> bool:
        return step % self.config.log.every == 0 or step in (1, self.config.train.steps)

    def _saves(self, step: int) -> bool:
        return step % self.config.checkpoint.every == 0 and step < self.config.train.steps

    def _validates(self, step: int) -> bool:
        every = self.config.train.validate_every
        return every > 0 and step % every == 0 and step < self.config.train.steps


class _Reporter:
    """Turns what steps report into records, with the speed since the last record."""

    def __init__(self, config: Config, devices: int):
        self.config, self.devices = config, devices
        self.flops = training_flops(config.model, config.data.context).total
        self.peak = peak_flops(jax.devices()[0].device_kind)
        self.tokens, self.started = 0, time.monotonic()

    def count(self, tokens: int) -> None:
        """A step on so many tokens is done."""
        self.tokens += tokens

    def pause(self, seconds: float) -> None:
        """Leave time spent on something else out of the speed."""
        self.started += seconds

    def record(self, result: StepResult, biases: nnx.State) -> metrics.Record:
        """The record of a step."""
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
            routers={kind: (np.asarray(r.counts), np.asarray(r.entropy)) for kind, r in figures.routers.items()},
            biases={str(path[1]): np.asarray(bias[...]) for path, bias in nnx.to_flat_state(biases)},
            shared=self.config.model.depth_recurrent,
        )
        seconds = max(time.monotonic() - self.started, 1e-9)
        record |= metrics.speed_record(self.tokens, seconds, self.flops, self.devices, self.peak)
        self.tokens, self.started = 0, time.monotonic()
        return record
