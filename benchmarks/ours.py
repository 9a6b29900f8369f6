"""Contestant: this project, training or decoding. Started by train_step.py, decode.py and profile_step.py."""

import functools
import json
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from contestant import HostMemory, serve
from decode import Request, Way, in_batches, serve_ways
from flax import nnx
from sizes import configs

from dreamer_jax import sharding
from dreamer_jax.accounting.flops import training_flops
from dreamer_jax.accounting.params import parameters
from dreamer_jax.config import Config
from dreamer_jax.data.batch import Batch
from dreamer_jax.dimensions.base import Weight
from dreamer_jax.inference.decoder import Decoder, make_decoder, rows_for
from dreamer_jax.inference.engine import Engine, Prompt, rows_needed
from dreamer_jax.kernels.compute import Compute
from dreamer_jax.kernels.cores import use_cores
from dreamer_jax.model.dreamer import Dreamer
from dreamer_jax.training.step import TrainState, init_state, make_train_step


def main() -> None:
    spec = json.loads(sys.argv[-1])
    config = configs(spec["size"])[spec["name"]]
    (answer if "queue" in spec else decode if spec.get("batch") else train)(config, spec)


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
    memory = HostMemory()
    rows, most = rows_for(spec["longest"]), spec["longest"] - spec["prompt"]
    prompts = [Prompt(row, most) for row in prompt_rows(spec)]
    decoder = make_decoder(Dreamer(config.model, nnx.Rngs(0)), Compute.of(config))
    engine = Engine(decoder, slots=len(prompts), rows=rows, group=len(prompts))
    engine._insert(deque(engine._checked(number, prompt) for number, prompt in enumerate(prompts)))
    about = {"tokens": len(prompts), "weight_bytes": weight_bytes(config, len(prompts)), "copy": copy_speed()}
    cache_bytes = sum(a.nbytes for a in jax.tree.leaves(engine._state.memories))

    def take() -> None:
        _, latest = engine._step()
        latest.block_until_ready()

    take()
    serve(about | {"cache_bytes": cache_bytes}, take, memory.peak)


def answer(config: Config, spec: dict[str, Any]) -> None:
    """Answer the whole queue, in one way after the other; weights as initialised."""
    requests: list[Request] = json.loads(Path(spec["queue"]).read_text())
    decoder = make_decoder(Dreamer(config.model, nnx.Rngs(0)), Compute.of(config))
    ways: dict[str, Way] = {}
    for slots in spec["slots"]:
        ways[f"{slots} refilled"] = functools.partial(refilled, counted_engine(decoder, requests, slots))
        engine = counted_engine(decoder, together(requests, slots), slots, group=slots)
        ways[f"{slots} in batches"] = functools.partial(batched, engine)
    serve_ways(ways, requests)


def refilled(engine: "CountedEngine", requests: list[Request]) -> float:
    """Answer all; the share of slot-steps that made a token."""
    return answered(engine, requests, requests)


def batched(engine: "CountedEngine", requests: list[Request]) -> float:
    """Answer in batches that wait for their longest; the share of slot-steps that made a wanted token."""
    return answered(engine, together(requests, engine.slots), requests)


def together(requests: list[Request], slots: int) -> list[Request]:
    """All answers of a batch as long as its longest."""
    return [(tokens, max(most for _, most in batch)) for batch in in_batches(requests, slots) for tokens, _ in batch]


def answered(engine: "CountedEngine", asked: list[Request], wanted: list[Request]) -> float:
    engine.steps = 0
    made = {answer.number: len(answer.tokens) for answer in engine.answers(Prompt(*request) for request in asked)}
    assert made == {number: most for number, (_, most) in enumerate(asked)}
    # The first token of each comes with its prompt.
    return sum(most - 1 for _, most in wanted) / (engine.slots * engine.steps)


def counted_engine(decoder: Decoder, requests: list[Request], slots: int, group: int | None = None) -> "CountedEngine":
    """With room for any of the requests."""
    rows = max(rows_needed(Prompt(*request)) for request in requests)
    return CountedEngine(decoder, slots=slots, rows=rows, group=group)


class CountedEngine(Engine):
    """Counts its steps."""

    steps = 0

    def _step(self) -> Any:
        self.steps += 1
        return super()._step()


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
