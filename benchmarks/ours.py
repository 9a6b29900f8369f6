"""Contestant: this project, training or decoding. Started by train_step.py, decode.py and profile_step.py."""

import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from contestant import HostMemory, serve
from flax import nnx
from sizes import configs

from dreamer_jax import sharding
from dreamer_jax.accounting.flops import training_flops
from dreamer_jax.accounting.params import parameters
from dreamer_jax.config import Config
from dreamer_jax.data.batch import Batch
from dreamer_jax.dimensions.base import Weight
from dreamer_jax.inference import engine
from dreamer_jax.inference.sample import Sampling, sequence_keys
from dreamer_jax.kernels.compute import Compute
from dreamer_jax.kernels.cores import use_cores
from dreamer_jax.model.dreamer import Dreamer
from dreamer_jax.training.step import TrainState, init_state, make_train_step


def main() -> None:
    spec = json.loads(sys.argv[-1])
    config = configs(spec["size"])[spec["name"]]
    (decode if spec.get("batch") else train)(config, spec)


def train(config: Config, spec: dict[str, Any]) -> None:
    """Warm up on all rows, then take steps on the last."""
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


def decode(config: Config, spec: dict[str, Any]) -> None:
    """Read prompts, then decode a token of each row at every step, greedily; weights as initialised."""
    model, compute, memory = Dreamer(config.model, nnx.Rngs(0)), Compute.of(config), HostMemory()
    decoder, sampling = engine.make_decoder(model, compute), Sampling(0.0, 1.0)
    prompts = jnp.asarray(prompt_rows(spec))
    lengths = jnp.full(len(prompts), prompts.shape[1], jnp.int32)
    keys, rows = sequence_keys(0, len(prompts)), engine.rows_for(spec["longest"])
    caches, tokens = engine._first(decoder, sampling, rows, prompts, lengths, keys)
    positions = lengths
    about = {"tokens": len(prompts), "weight_bytes": weight_bytes(config, len(prompts)), "copy": copy_speed()}
    cache_bytes = sum(a.nbytes for a in jax.tree.leaves(caches))

    def take() -> None:
        nonlocal caches, tokens, positions
        caches, tokens = engine._next(decoder, sampling, caches, tokens, positions, keys)
        positions = positions + 1
        tokens.block_until_ready()

    take()
    serve(about | {"cache_bytes": cache_bytes}, take, memory.peak)


def prompt_rows(spec: dict[str, Any]) -> np.ndarray:
    """[batch, prompt] tokens."""
    rows = np.load(spec["rows"]).reshape(-1, np.load(spec["rows"]).shape[-1])
    return np.resize(rows[:, : spec["prompt"]], (spec["batch"], spec["prompt"]))


def weight_bytes(config: Config, batch: int) -> int:
    """Weights that one decoded token of each row reads, if rows choose different experts as long as there are any."""
    model, size = config.model, jnp.dtype(config.train.dtype).itemsize

    def read(weight: Weight) -> int:
        return weight.size if weight.active is None else min(batch * weight.active, weight.size)

    layers = sum(
        len(model.depths_of(name)) * sum(read(w) for w in section.weights(model, merged=True) if w.multiplies)
        for name, section in model.dimensions.items()
    )
    return size * (layers + model.width * model.vocab)


def copy_speed() -> float:
    """Bytes per second of an update in place of a large array, read and written."""
    a = jnp.ones(2**26, jnp.float32)
    add = jax.jit(lambda a: a + 1, donate_argnums=0)
    a = add(a).block_until_ready()
    best = np.inf
    for _ in range(5):
        started = time.perf_counter()
        a = add(a).block_until_ready()
        best = min(best, time.perf_counter() - started)
    return 2 * a.nbytes / best


def warm_step(config: Config, rows: np.ndarray) -> tuple[Any, TrainState, list[Any], float]:
    """(compiled step, first state, batches on the device, seconds to trace and compile) on all devices."""
    use_cores(config)
    mesh = sharding.make_mesh(config.mesh)
    graph, state = init_state(config, mesh)
    batches = [_placed(mesh, part) for part in rows]
    jitted = make_train_step(config, Compute.of(config, mesh), mesh, graph)
    started = time.perf_counter()
    step = jitted.lower(state, batches[0]).compile()
    return step, state, batches, time.perf_counter() - started


def _placed(mesh: Any, tokens: np.ndarray) -> Any:
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    batch = Batch(tokens, positions, np.ones_like(tokens), np.ones(tokens.shape, bool))
    return jax.device_put(batch, sharding.batch_sharding(mesh))


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
