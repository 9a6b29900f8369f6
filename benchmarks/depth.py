"""How memory, compile time and step time grow with depth: the depth scan against what it replaces.

    python benchmarks/depth.py [--depths 8 16 32 64] [--unrolled-up-to 16]

For DR+DA at each depth, of the loss's gradient with respect to all weights: temporary bytes from XLA's compiled memory
analysis, compile seconds, and seconds of a step (median of 3).

    scan        dreamer_jax.model.recurrence.depth_scan, with each remat policy
    plain       a differentiated lax.scan with the cache in its carry; "checkpoint": with jax.checkpoint on its body
    unrolled    a Python loop, which takes minutes to compile beyond depth 16

Gradients are compared with the unrolled loop's, and beyond its depths with those of the plain scan with checkpoints.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from dreamer_jax.config import (
    DepthAttentionConfig,
    ExpertAttentionConfig,
    ModelConfig,
    RouterConfig,
    SequenceAttentionConfig,
)
from dreamer_jax.kernels.compute import Compute
from dreamer_jax.model import dreamer, recurrence
from dreamer_jax.model.dreamer import Dreamer
from dreamer_jax.model.parameters import RouterBias
from dreamer_jax.training.loss import cross_entropy_sum, next_token_targets

ROWS, CONTEXT = 2, 256


def config_of(depth: int) -> ModelConfig:
    return ModelConfig(
        depth=depth,
        width=128,
        vocab=512,
        sa=SequenceAttentionConfig(query_heads=2, kv_heads=1, head_size=64),
        da=DepthAttentionConfig(head_size=128),
        ea=ExpertAttentionConfig(experts=16, active_experts=2, expert_width=64),
        router=RouterConfig(size=32, attention_experts=4),
    )


def plain_scan(checkpointed: bool):
    """A drop-in for depth_scan that leaves differentiation to JAX."""

    def scan(body, kernels, shared, stacked, constants, x, row, carried, *, depth, remat):
        one_depth = recurrence._handing_on(body, kernels)
        run = recurrence._remat(one_depth, "full") if checkpointed else one_depth

        def step(carry, inputs):
            x, cache, carried = carry
            l, own = inputs
            (x, new, _), (carried, aux) = run(shared, own, constants, x, cache, carried, l)
            return (x, recurrence._put(cache, new, l), carried), aux

        cache = jax.tree.map(lambda e: jnp.stack([jnp.zeros_like(e)] * depth), row)
        (x, _, carried), aux = lax.scan(step, (x, cache, carried), (jnp.arange(depth), stacked))
        return x, carried, aux

    return scan


def unrolled(body, kernels, shared, stacked, constants, x, row, carried, *, depth, remat):
    one_depth = recurrence._handing_on(body, kernels)
    cache = jax.tree.map(lambda e: jnp.stack([jnp.zeros_like(e)] * depth), row)
    auxs = []
    for l in range(depth):
        own = jax.tree.map(lambda a, l=l: a[l], stacked)
        (x, new, _), (carried, aux) = one_depth(shared, own, constants, x, cache, carried, jnp.asarray(l))
        cache = recurrence._put(cache, new, jnp.asarray(l))
        auxs.append(aux)
    return x, carried, jax.tree.map(lambda *a: jnp.stack(a), *auxs)


FORMS = {
    "scan, remat full": (recurrence.depth_scan, "full"),
    "scan, selective": (recurrence.depth_scan, "selective"),
    "scan, remat none": (recurrence.depth_scan, "none"),
    "plain": (plain_scan(False), "none"),
    "plain, checkpoint": (plain_scan(True), "none"),
    "unrolled": (unrolled, "none"),
}


def gradient_function(config: ModelConfig, remat: str):
    graph, params, biases = nnx.split(Dreamer(config, nnx.Rngs(0)), nnx.Param, RouterBias)
    tokens = jax.random.randint(jax.random.key(1), (ROWS, CONTEXT), 0, config.vocab)
    positions = jnp.tile(jnp.arange(CONTEXT), (ROWS, 1))
    segments = jnp.ones_like(tokens)
    targets, weights = next_token_targets(tokens, segments)

    def loss(params):
        model = nnx.merge(graph, params, biases)
        hidden = model(tokens, positions, segments, Compute(remat=remat)).hidden
        return cross_entropy_sum(hidden, model.lm_head[...], targets, weights) / jnp.sum(weights)

    return jax.jit(jax.grad(loss)), params


def measure(depth: int, form: str):
    dreamer.depth_scan, remat = FORMS[form]
    function, params = gradient_function(config_of(depth), remat)
    lowered = function.lower(params)
    started = time.perf_counter()
    compiled = lowered.compile()
    compile_seconds = time.perf_counter() - started
    gradient = jax.block_until_ready(compiled(params))
    times = []
    for _ in range(3):
        started = time.perf_counter()
        jax.block_until_ready(compiled(params))
        times.append(time.perf_counter() - started)
    return compiled.memory_analysis().temp_size_in_bytes, compile_seconds, statistics.median(times), gradient


def error(actual, expected) -> float:
    """Largest difference relative to the largest entry of each gradient."""
    errors = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)), actual, expected)
    return float(max(jax.tree.leaves(errors)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--unrolled-up-to", type=int, default=16, help="greatest depth of the unrolled loop")
    arguments = parser.parse_args()
    print(f"DR+DA, {ROWS} x {CONTEXT} tokens, float32, {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(f"{'form':<20}{'depth':>6}{'temporaries MiB':>17}{'compile s':>11}{'step s':>9}{'gradient error':>16}")
    figures = {}
    for depth in arguments.depths:
        reference = None
        for form in reversed(FORMS):
            if form == "unrolled" and depth > arguments.unrolled_up_to:
                continue
            size, compile_seconds, step_seconds, gradient = measure(depth, form)
            reference = gradient if reference is None else reference
            figures[form, depth] = size, compile_seconds
            row = (
                f"{size / 2**20:>17.1f}{compile_seconds:>11.1f}{step_seconds:>9.3f}{error(gradient, reference):>16.1e}"
            )
            print(f"{form:<20}{depth:>6}{row}", flush=True)
    first, *_, half, last = arguments.depths
    for form in FORMS:
        if (form, last) in figures:
            memory = figures[form, last][0] / figures[form, half][0]
            seconds = figures[form, last][1] / figures[form, first][1]
            print(f"{form:<20} bytes({last})/bytes({half}) = {memory:.2f}", end=", ")
            print(f"compile({last})/compile({first}) = {seconds:.2f}")


if __name__ == "__main__":
    main()
