"""What do many small experts cost over one dense layer of equal FLOPs?

    python benchmarks/grouped_matmul.py [--tokens 4096] [--runs 3]

Times the CPU's implementations against one dense product of equal FLOPs, forward and forward + backward, in interleaved
runs, and prints the medians and their ratios to the dense form's. Groups are drawn at random: "even" from equal
experts, "skewed" from experts of exponentially distributed popularity. "decode" is one token: its forward time must not
grow with E (its gradient, as large as the weights, is no part of decoding). About 3 GB and a minute on two cores.
"""

import argparse
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dreamer_jax.kernels.compute import implementation

D, F, ACTIVE = 256, 128, 8
IMPLEMENTATIONS = ("native", "plain")


def group_sizes(rng, rows, experts, skewed=False):
    popularity = rng.exponential(size=experts) if skewed else np.ones(experts)
    return jnp.asarray(rng.multinomial(rows, popularity / popularity.sum()), jnp.int32)


def swiglu(x, w_gate_up, w_down, sizes, name):
    scores = jnp.ones((x.shape[0], 1), jnp.float32)
    return implementation(name).sorted_swiglu(x, scores, w_gate_up, w_down, sizes)


def dense_swiglu(x, w_gate_up, w_down, sizes):
    gate, up = jnp.split(x @ w_gate_up[0], 2, axis=1)
    return (jax.nn.silu(gate) * up) @ w_down[0]


def linear(x, w, ids, name):
    run = implementation(name)
    return run.linear(x, jnp.ones(x.shape[0], jnp.float32), w, None, run.order(ids, w.shape[0]))[0]


def dense_linear(x, w, ids):
    return x @ w[0]


def forward_and_backward(f):
    def both(*args):
        *arrays, integers = args
        y, vjp = jax.vjp(lambda *arrays: f(*arrays, integers), *arrays)
        return vjp(y)

    return both


def interleaved_medians(programs, args, runs):
    """Seconds of each program: one warm-up each, then all in turn, `runs` times."""
    seconds = {name: [] for name in programs}
    for run in range(runs + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*args))
            if run:
                seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(s)) for name, s in seconds.items()}


def compare(title, dense, ours, args, runs, passes=(lambda f: f, forward_and_backward)):
    """Print one line: the time of the dense form and of our implementations, with their ratios to it, for each pass."""
    cells = []
    for wrap in passes:
        forms = {"dense": dense} | {name: partial(ours, name=name) for name in IMPLEMENTATIONS}
        whole, *parts = interleaved_medians({name: jax.jit(wrap(f)) for name, f in forms.items()}, args, runs).values()
        cells.append(f"{whole * 1e3:8.1f}" + "".join(f" {part * 1e3:8.1f} ({part / whole:4.2f})" for part in parts))
    print(f"{title:34} {'   '.join(cells)}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    normal = partial(lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32) * shape[-2] ** -0.5))

    head = f"{'dense':>8}" + "".join(f" {name:>8} {'ratio':>6}" for name in IMPLEMENTATIONS)
    print(f"{'milliseconds':34} {'forward':^{len(head)}}   {'forward + backward':^{len(head)}}")
    print(f"{'':34} {head}   {head}")
    rows = options.tokens * ACTIVE
    for experts in (64, 512):
        weights = normal(experts, D, 2 * F), normal(experts, F, D)
        for skewed in (False, True):
            args = (normal(rows, D), *weights, group_sizes(rng, rows, experts, skewed))
            title = f"SwiGLU A={ACTIVE} E={experts} {'skewed' if skewed else 'even'}"
            compare(title, dense_swiglu, swiglu, args, options.runs)
        args = (normal(ACTIVE, D), *weights, group_sizes(rng, ACTIVE, experts))
        compare(
            f"SwiGLU A={ACTIVE} E={experts} decode", dense_swiglu, swiglu, args, options.runs, passes=(lambda f: f,)
        )
    for skewed in (False, True):
        ids = np.repeat(np.arange(16, dtype=np.int32), group_sizes(rng, options.tokens, 16, skewed))
        args = normal(options.tokens, D), normal(16, D, 512), jnp.asarray(rng.permutation(ids)[:, None])
        title = f"attention MoE A=1 E=16 {'skewed' if skewed else 'even'}"
        compare(title, dense_linear, linear, args, options.runs)


if __name__ == "__main__":
    main()
