"""What the chunked cross-entropy saves over the plain one at the paper's vocabulary, in memory and time.

Run: python benchmarks/loss.py [--width 256] [--tokens 512 1024] (about a minute on two CPU cores)
"""

import argparse
import time

import jax
import jax.numpy as jnp

from dreamer_jax.training.loss import cross_entropy_sum

VOCABULARY = 128_256


def plain_cross_entropy_sum(hidden, lm_head, targets, weights):
    logits = jnp.einsum("btd,dv->btv", hidden, lm_head, preferred_element_type=jnp.float32)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return -(weights * jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]).sum()


def measure(loss, tokens, width, dtype, repeats):
    """Temporaries of value-and-gradient in MiB and the best of a few times in seconds."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (1, tokens, width), dtype)
    lm_head = 0.05 * jax.random.normal(keys[1], (width, VOCABULARY), dtype)
    targets = jax.random.randint(keys[2], (1, tokens), 0, VOCABULARY)
    inputs = hidden, lm_head, targets, jnp.ones((1, tokens))
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*inputs).compile()
    seconds = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*inputs))
        seconds.append(time.perf_counter() - start)
    return compiled.memory_analysis().temp_size_in_bytes / 2**20, min(seconds[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()
    print(f"value and gradient, V {VOCABULARY}, D {arguments.width}, {jax.devices()[0].device_kind}\n")
    print("| dtype | tokens | chunked MiB | plain MiB | chunked s | plain s |\n|---|---|---|---|---|---|")
    for dtype in (jnp.float32, jnp.bfloat16):
        for tokens in arguments.tokens:
            mib, seconds = measure(cross_entropy_sum, tokens, arguments.width, dtype, arguments.repeats)
            plain_mib, plain_s = measure(plain_cross_entropy_sum, tokens, arguments.width, dtype, arguments.repeats)
            print(
                f"| {dtype.__name__} | {tokens} | {mib:.0f} | {plain_mib:.0f} | {seconds:.2f} | {plain_s:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
