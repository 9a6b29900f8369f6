"""What do checksums add to a restore and to a save?

    python benchmarks/checkpoint.py [--config configs/tiny.py] [--rounds 5] [--model.width 512 ...]

Saves a state of a config (parameters and moments, random numbers) and restores it several times, in turns with the
checksums of the restored arrays alone. The files stay in the system's memory: from a disk or a bucket, a restore takes
longer.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import jax

from dreamer_jax.config import MeshConfig, load
from dreamer_jax.sharding import make_mesh
from dreamer_jax.training.checkpoint import Checkpoints, Position, _split
from dreamer_jax.training.checksums import checksums
from dreamer_jax.training.step import init_state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(__file__).parents[1] / "configs" / "tiny.py")
    parser.add_argument("--rounds", type=int, default=5)
    args, overrides = parser.parse_known_args()
    config = load(args.config, overrides)
    _, state = init_state(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    state = jax.tree.map(filled, state)
    size = sum(a.nbytes for a in jax.tree.leaves(state))
    seconds: dict[str, list[float]] = {"restore": [], "checksums": [], "save": []}
    with tempfile.TemporaryDirectory() as folder, Checkpoints(Path(folder), config.checkpoint) as checkpoints:
        for step in range(args.rounds + 1):  # the first compiles the sums
            seconds["save"].append(timed(lambda step=step: save(checkpoints, config, state, step)))
            seconds["restore"].append(timed(lambda step=step: checkpoints.restore(state, step)))
            seconds["checksums"].append(timed(lambda: [checksums(arrays) for arrays in _split(state)]))
    middle = {what: statistics.median(values[1:]) for what, values in seconds.items()}
    print(f"{size / 2**20:,.0f} MiB, {len(jax.tree.leaves(state))} arrays, {args.rounds} rounds, medians")
    for what, value in middle.items():
        print(
            f"{what}: {value * 1e3:,.0f} ms ({size / 2**30 / value:.2f} GiB/s), first {seconds[what][0] * 1e3:,.0f} ms"
        )
    print(f"checksums over restore: {middle['checksums'] / middle['restore']:.1%}")


def filled(array):
    """Random numbers in place of what is not trained: zeros would be packed to nothing."""
    return jax.random.normal(jax.random.key(array.size), array.shape, array.dtype) if array.ndim > 1 else array


def save(checkpoints, config, state, step):
    checkpoints.save(config, state, step, Position(rows=0, data=None))
    checkpoints.wait()


def timed(act) -> float:
    started = time.perf_counter()
    jax.block_until_ready(act())
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
