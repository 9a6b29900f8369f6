"""One process of a run of several: `python -m tests.training.worker FOLDER NAME[:FAULT] ...`.

Trains the toy once for each NAME, one after another. FAULT comes to process 1 ("behead": 0)
before the batch of step FAULT_STEP.
"""

import dataclasses
import functools
import os
import signal
import sys
import time
from pathlib import Path

from dreamer_jax.config import Config, DistributedConfig
from dreamer_jax.distributed import joined
from tests.training.toy import REFERENCE, toy_config, with_model

FAULT_STEP = 4
HANG_SECONDS = 6
LAST = ("kill", "behead", "fail", "hang")


def config_of(folder: Path, name: str) -> Config:
    patience = DistributedConfig(hang_s=HANG_SECONDS) if name == "hang" else DistributedConfig()
    # Attention over depths, which each device computes by itself, would only take longer to compile.
    config = with_model(toy_config(folder, remat="none"), mixture=("sa", "ea"))
    return dataclasses.replace(config, name=name, kernels=REFERENCE, distributed=patience)


def strike(fault: str) -> None:
    print("now", flush=True)
    match fault:
        case "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        case "kill" | "behead":
            os.kill(os.getpid(), signal.SIGKILL)
        case "fail":
            raise ValueError("the disk is on fire")
        case "hang":
            time.sleep(1e6)


def stand_in(mesh):
    """A state and a step in place of the model's, which compile in no time; the loss is a sum over all devices."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from dreamer_jax.model.dreamer import Figures
    from dreamer_jax.sharding import replicated
    from dreamer_jax.training.step import StepResult, TrainState

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def init():
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, nnx.State({"w": nnx.Param(jnp.zeros(8))}), nnx.State({}), (), zero, zero)

    @jax.jit
    def step(state, batch):
        zero, loss = jnp.zeros((), jnp.int32), jnp.sum(batch.tokens).astype(jnp.float32)
        figures = Figures({}, jnp.zeros(2), jnp.ones((), jnp.int32))
        return state, StepResult(loss, loss, loss, loss, figures, zero, zero)

    return init(), step


def once(make):
    """Compile once for several runs, which differ in their names alone."""
    made = []

    def shared(*arguments):
        made.extend(() if made else [make(*arguments)])
        return made[0]

    return shared


def copied(init_state):
    """Make the first state once, and give copies of it, since steps donate theirs."""
    init_state = once(init_state)

    def copy(*arguments):
        import jax

        graph, state = init_state(*arguments)
        return graph, jax.tree.map(lambda array: array.copy(), state)

    return copy


def main() -> None:
    folder, jobs = Path(sys.argv[1]), [job.partition(":")[::2] for job in sys.argv[2:]]
    with joined(config_of(folder, jobs[0][0]).distributed) as group:
        from dreamer_jax.training import loop

        loop.init_state, loop.make_train_step = copied(loop.init_state), once(loop.make_train_step)
        loop.make_evaluation = once(loop.make_evaluation)
        batches, fault = loop.batches, ""

        def faulty_batches(*arguments, split, start_row=0, **keywords):
            stream = batches(*arguments, split=split, start_row=start_row, **keywords)
            for step, batch in enumerate(stream, start_row // arguments[1].train.batch + 1):
                if fault and split == "train" and group.index == struck and step == FAULT_STEP:
                    strike(fault)
                yield batch

        loop.batches = faulty_batches
        if jobs[0][1] in LAST:
            loop.init_state = lambda _, mesh: (None, stand_in(mesh)[0])
            loop.make_train_step = lambda _config, _compute, mesh, *_others: stand_in(mesh)[1]
        for job in jobs:
            name, fault = job
            struck = 0 if fault == "behead" else 1
            summary = loop.train(config_of(folder, name), group)
            print(f"{name} ended at step {summary.step} by {summary.stopped_by}", flush=True)


if __name__ == "__main__":
    main()
