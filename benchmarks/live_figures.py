"""How much of a training's time do the figures along it take?

    python benchmarks/live_figures.py [--config configs/tiny.py] [--rounds 9] [--log.figures_every 80 ...]

Steps on random tokens, and after each round of three steps one drawing as training has it: the forward pass on a row
for each device, and the images. What compiles is left out. Prints the median seconds of a step and of a drawing, and
the time of a drawing over that of the steps between two drawings (`log.figures_every`), in percent.
"""

import argparse
import statistics
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from dreamer_jax.analysis.live import attention_maps, live_figures
from dreamer_jax.config import load
from dreamer_jax.data.batch import Batch
from dreamer_jax.kernels.compute import Compute
from dreamer_jax.kernels.native.huge_pages import restart_with_huge_pages
from dreamer_jax.sharding import batch_sharding, make_mesh
from dreamer_jax.training.loop import Snapshot
from dreamer_jax.training.step import init_state, make_train_step

STEPS = 3
"""In a round."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(__file__).parents[1] / "configs" / "tiny.py")
    parser.add_argument("--rounds", type=int, default=9)
    args, overrides = parser.parse_known_args()
    config = load(args.config, overrides)
    mesh = make_mesh(config.mesh)
    graph, state = init_state(config, mesh)
    train_step = make_train_step(config, Compute.of(config, mesh), mesh, graph)
    batch, few = (random_rows(config, mesh, rows) for rows in (config.train.batch, mesh.size))
    seconds: dict[str, list[float]] = {"step": [], "forward pass": [], "drawing": []}
    for _ in range(args.rounds + 1):  # the first one compiles
        for _ in range(STEPS):
            started = time.perf_counter()
            state, result = jax.block_until_ready(train_step(state, batch))
            seconds["step"].append(time.perf_counter() - started)
        started = time.perf_counter()
        model = nnx.merge(graph, state.params, state.biases)
        snapshot = Snapshot(config, model, mesh, config.run_dir, lambda: None)
        counts = jax.device_get({name: router.counts for name, router in result.figures.routers.items()})
        images = live_figures(snapshot, few, counts)
        seconds["drawing"].append(time.perf_counter() - started)
        started = time.perf_counter()
        attention_maps(snapshot, few)
        seconds["forward pass"].append(time.perf_counter() - started)
    step, forward, drawing = (
        statistics.median(values[len(values) // (args.rounds + 1) :]) for values in seconds.values()
    )
    every, size = config.log.figures_every, sum(map(len, images.values()))
    print(f"{config.name}, {mesh.size} x {mesh.devices.flat[0].device_kind}: {', '.join(images)}, {size:,} bytes")
    print(f"step {1e3 * step:,.1f} ms, drawing {1e3 * drawing:,.1f} ms, of which forward pass {1e3 * forward:,.1f} ms")
    if every:
        print(f"log.figures_every = {every}: {drawing / (every * step):.2%} of the time of the steps")


def random_rows(config, mesh, rows: int) -> Batch:
    """Each is one document."""
    shape = rows, config.data.context
    tokens = np.random.default_rng(rows).integers(0, config.model.vocab, shape, dtype=np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    batch = Batch(tokens, positions, np.ones(shape, np.int32), np.ones(shape, bool))
    return jax.device_put(batch, batch_sharding(mesh))


if __name__ == "__main__":
    restart_with_huge_pages()  # as training does
    main()
