"""Time and peak memory of an export for transformers, of a model with random weights.

python benchmarks/export.py --config configs/dr_da_2b.py --at /tmp/export

writes a checkpoint of the config into the folder unless there is one, exports it in a process of its own, and prints
what that took. The checkpoint has no state of the optimizer. It needs room on the disk for the weights twice, and
memory for them once, to make the checkpoint.
"""

import argparse
import dataclasses
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from dreamer_jax.config import Config, load
from dreamer_jax.convert.hf.weights import targets


def write_random(config: Config) -> None:
    """A run folder whose checkpoint has weights drawn by NumPy, which wants less memory for it than JAX."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from dreamer_jax.model.dreamer import Dreamer
    from dreamer_jax.model.parameters import taken_apart
    from dreamer_jax.training.checkpoint import Checkpoints, Position, write_run_files
    from dreamer_jax.training.step import TrainState

    random = np.random.default_rng(0)
    _, params, biases = taken_apart(nnx.eval_shape(lambda: Dreamer(config.model, nnx.Rngs(0))))

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        """Matrices around 0, about as large as at the start of a training; norms around 1."""
        numbers = random.random(shape, np.float32)
        numbers -= 0.5
        numbers *= 0.05
        return numbers if len(shape) > 1 else numbers + 1

    params, biases = jax.tree.map(lambda a: jnp.asarray(draw(a.shape)), (params, biases))
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(zero, params, biases, (), zero, zero)
    with Checkpoints(config.run_dir, config.checkpoint) as checkpoints:
        checkpoints.save(config, state, 0, Position(rows=0, data=None))
    write_run_files(config.run_dir, config, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--at", type=Path, required=True, help="folder for the checkpoint and the export")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--make", action="store_true", help="only write the checkpoint")
    given = parser.parse_args()
    config = dataclasses.replace(load(given.config), name="run", out=str(given.at))
    if given.make:
        write_random(config)
        return
    if not (config.run_dir / "config.json").is_file():
        again = [sys.executable, __file__, "--make", "--config", str(given.config), "--at", str(given.at)]
        subprocess.run(again, check=True)
        earlier = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        print(f"wrote the checkpoint (peak {earlier / 2**20:.1f} GiB); run this again to measure its export")
        return
    out = given.at / "export"
    shutil.rmtree(out, ignore_errors=True)
    door = [sys.executable, "-m", "dreamer_jax.convert", "--checkpoint", str(config.run_dir), "--to", "hf"]
    start = time.monotonic()
    subprocess.run([*door, "--out", str(out), "--dtype", given.dtype, "--no-parity"], check=True)
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    tensors = targets(config.model, given.dtype, merged=False)
    largest = max(tensors, key=lambda target: target.bytes)
    total = sum(target.bytes for target in tensors)
    print(f"{config.name}: {total / 1e9:.2f} GB in {seconds:.0f} s, {total / 1e6 / seconds:.0f} MB/s")
    print(f"largest tensor {largest.name}: {largest.bytes / 1e9:.2f} GB; peak memory {peak / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
