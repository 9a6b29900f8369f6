"""What do checksums add to a restore, to the compilation beside which they are compared, and to a save?

    python benchmarks/checkpoint.py [--config configs/tiny.py] [--rounds 5] [--model.width 512 ...]

Saves a state of a config (parameters and moments, random numbers). Then, several times and by turns with and without
the comparison: restores it, compiles the training step, confirms the comparison. The files stay in the system's memory:
from a disk or a bucket, a restore takes longer.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp

from dreamer_jax.config import MeshConfig, load
from dreamer_jax.data.batch import Batch
from dreamer_jax.kernels.compute import Compute
from dreamer_jax.sharding import make_mesh
from dreamer_jax.training.checkpoint import Checkpoints, Position, _split
from dreamer_jax.training.checksums import checksums
from dreamer_jax.training.step import init_state, make_train_step

STAGES = "restore", "compilation", "confirmation"
COMPARED, UNCOMPARED = "", ", nothing compared"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(__file__).parents[1] / "configs" / "tiny.py")
    parser.add_argument("--rounds", type=int, default=5)
    args, overrides = parser.parse_known_args()
    config = load(args.config, overrides)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    graph, state = init_state(config, mesh)
    state = jax.tree.map(filled, state)
    batch = Batch(*[jax.ShapeDtypeStruct((config.train.batch, config.data.context), jnp.int32)] * len(Batch._fields))
    size = sum(a.nbytes for a in jax.tree.leaves(state))
    seconds: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder, Checkpoints(Path(folder), config.checkpoint) as checkpoints:
        seconds["save"].append(timed(lambda: save(checkpoints, config, state)))
        for turn in range(args.rounds + 1):  # the first one warms up
            seconds["checksums alone"].append(timed(lambda: [checksums(arrays) for arrays in _split(state)]))
            for how in (COMPARED, UNCOMPARED) if turn % 2 else (UNCOMPARED, COMPARED):
                with mock.patch.object(Checkpoints, "_checksums", return_value={}) if how else nullcontext():
                    seconds["restore" + how].append(timed(lambda: checkpoints.restore(state, 0)))
                    step = make_train_step(config, Compute.of(config, mesh), mesh, graph)
                    seconds["compilation" + how].append(timed(lambda step=step: step.lower(state, batch).compile()))
                    seconds["confirmation" + how].append(timed(checkpoints.confirm))
    middle = {what: statistics.median(values[1:] or values) for what, values in seconds.items()}
    print(f"{size / 2**20:,.0f} MiB, {len(jax.tree.leaves(state))} arrays, {args.rounds} rounds, medians")
    for what, value in middle.items():
        print(f"{what}: {value * 1e3:,.1f} ms")
    restore = middle["restore" + UNCOMPARED]
    added = sum(middle[what + COMPARED] - middle[what + UNCOMPARED] for what in STAGES)
    print(f"checksums alone over restore: {middle['checksums alone'] / restore:.1%}")
    print(f"waited for at the end, over restore: {middle['confirmation'] / restore:.1%}")
    print(f"added to restore, compilation and confirmation: {added * 1e3:,.1f} ms, {added / restore:.1%} of a restore")


def filled(array):
    """Random numbers in place of what is not trained: zeros would be packed to nothing."""
    return jax.random.normal(jax.random.key(array.size), array.shape, array.dtype) if array.ndim > 1 else array


def save(checkpoints, config, state):
    checkpoints.save(config, state, 0, Position(rows=0, data=None))
    checkpoints.wait()


def timed(act) -> float:
    started = time.perf_counter()
    jax.block_until_ready(act())
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
