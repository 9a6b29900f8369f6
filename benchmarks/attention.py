"""The CPU's attention, `native` and `plain`, against a masked einsum and jax.nn.dot_product_attention.

Memory and time, forward and backward, of one row packed with documents of a given length. Past --dense-limit tokens the
two quadratic forms are only compiled, for their memory. XLA's figure leaves out the 100 KiB that `native` holds inside.

Run: python benchmarks/attention.py [--tokens 512 1024 2048 4096] (about a minute on two CPU cores)
"""

import argparse
import math
import time

import jax
import jax.numpy as jnp

from dreamer_jax.kernels.compute import implementation
from dreamer_jax.kernels.documents import causal_mask
from dreamer_jax.kernels.native import library


def masked_einsum(q, k, v, segment_ids):
    """Head by head, the query heads of a key/value head stacked along the rows of one matrix."""
    B, T, N, H = q.shape
    K, G = k.shape[2], N // k.shape[2]
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    rows = q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    scores = jnp.einsum("bkqh,bksh->bkqs", rows, k, preferred_element_type=jnp.float32) / math.sqrt(H)
    visible = jnp.tile(causal_mask(segment_ids), (1, G, 1))[:, None]
    p = jax.nn.softmax(scores, axis=-1, where=visible).astype(v.dtype)
    out = jnp.einsum("bkqs,bksh->bkqh", p, v, preferred_element_type=jnp.float32).reshape(B, K, G, T, H)
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)


def stock(q, k, v, segment_ids):
    return jax.nn.dot_product_attention(q, k, v, mask=causal_mask(segment_ids)[:, None])


FORMS = {
    "native": implementation("native").attend_sequence,
    "plain": implementation("plain").attend_sequence,
    "einsum": masked_einsum,
    "jax.nn": stock,
}


def inputs(tokens, document, dtype, heads, kv_heads, head_size):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((1, tokens, n, head_size) for n in (heads, kv_heads, kv_heads))
    segment_ids = 1 + jnp.arange(tokens, dtype=jnp.int32)[None] // document
    return *(jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)), segment_ids


def measure(form, arguments, runs):
    """Temporaries in MiB of the gradient and the best time in ms of `runs` after a first one (none if 0)."""

    def loss(q, k, v, segment_ids):
        return form(q, k, v, segment_ids).astype(jnp.float32).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arguments).compile()
    milliseconds = []
    for _ in range(1 + runs if runs else 0):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        milliseconds.append(1e3 * (time.perf_counter() - start))
    return compiled.memory_analysis().temp_size_in_bytes / 2**20, min(milliseconds[1:], default=float("nan"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--dense-limit", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=1)
    a = parser.parse_args()
    print(f"N {a.heads}, K {a.kv_heads}, H {a.head_size}, {jax.devices()[0].device_kind}; MiB and ms of the gradient\n")
    print("| dtype | T | document | " + " | ".join(FORMS) + " |\n" + "|---" * (3 + len(FORMS)) + "|")
    for dtype in (jnp.float32, jnp.bfloat16):
        for tokens in a.tokens:
            for document in (tokens, 256):
                x = inputs(tokens, document, dtype, a.heads, a.kv_heads, a.head_size)
                cells = []
                for name, form in FORMS.items():
                    if name == "native" and (dtype != jnp.float32 or library.missing()):
                        cells.append("")
                        continue
                    runs = a.runs if name in ("native", "plain") or tokens <= a.dense_limit else 0
                    mib, ms = measure(form, x, runs)
                    cells.append(f"{mib:.0f} MiB, {ms:.0f} ms" if runs else f"{mib:.0f} MiB, not run")
                print(f"| {dtype.__name__} | {tokens} | {document} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
