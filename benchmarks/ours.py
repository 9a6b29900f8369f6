"""Contestant: the train step of this project. Started by benchmarks/train_step.py and benchmarks/profile_step.py."""

import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from contestant import HostMemory, serve
from sizes import configs

from dreamer_jax import sharding
from dreamer_jax.accounting.flops import training_flops
from dreamer_jax.accounting.params import parameters
from dreamer_jax.config import Config
from dreamer_jax.model.dreamer import Compute
from dreamer_jax.training.step import TrainState, init_state, make_train_step


def main() -> None:
    spec = json.loads(sys.argv[-1])
    config = configs(spec["size"])[spec["name"]]
    memory = HostMemory()
    step, state, batches, compile_seconds = warm_step(config, np.load(spec["rows"]))
    counts = None
    for batch in batches:
        state, result = step(state, batch)
        counts = result.figures.routers["ea"].counts
    about = {
        "compile_seconds": compile_seconds,
        "tokens": config.train.batch * config.data.context,
        "flops": training_flops(config.model, config.data.context).total,
        "parameters": parameters(config.model).total,
        "loss": float(result.loss),
        "imbalance": imbalance(np.asarray(counts), config.model.depth_recurrent),
        "matmul_flops": matmul_flops(jnp.dtype(config.train.dtype)),
    }
    memory.reset()

    def take() -> None:
        nonlocal state
        state, result = step(state, batches[-1])
        jax.block_until_ready((state, result))

    def peak_bytes() -> int:
        stats = jax.local_devices()[0].memory_stats()
        return int(stats["peak_bytes_in_use"]) if stats else memory.peak()

    serve(about, take, peak_bytes)


def warm_step(config: Config, rows: np.ndarray) -> tuple[Any, TrainState, list[Any], float]:
    """(compiled step, first state, batches on the device, seconds to trace and compile) on all devices."""
    sharding.use_cores(config)
    mesh = sharding.make_mesh(config.mesh)
    graph, state = init_state(config, mesh)
    batches = [_placed(mesh, part) for part in rows]
    jitted = make_train_step(config, Compute.of(config, mesh), mesh, graph)
    started = time.perf_counter()
    step = jitted.lower(state, batches[0]).compile()
    return step, state, batches, time.perf_counter() - started


def _placed(mesh: Any, tokens: np.ndarray) -> Any:
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    batch = {"tokens": tokens, "positions": positions, "segment_ids": np.ones_like(tokens)}
    return jax.device_put(batch | {"response_mask": np.ones(tokens.shape, bool)}, sharding.batch_sharding(mesh))


def imbalance(counts: np.ndarray, shared: bool) -> float:
    """Tokens of the busiest expert over the mean; the experts of a recurrent layer work at all depths."""
    counts = counts.sum(axis=0, keepdims=True) if shared else counts
    return float(np.mean(counts.max(axis=1) / counts.mean(axis=1)))


def matmul_flops(dtype: Any) -> float:
    """FLOP/s of one large matrix product, the best of five: what the machine can do with this library."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.float32).astype(dtype)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    best = np.inf
    for _ in range(5):
        started = time.perf_counter()
        product(a, a).block_until_ready()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


if __name__ == "__main__":
    main()
