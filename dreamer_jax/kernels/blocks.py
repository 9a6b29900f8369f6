"""Grouped products in plain JAX for accelerators: batches of blocks of rows, each block with its expert's matrix.

For what tokamax's kernels do not take. The block loop of kernels/plain takes one block at a time, which leaves a GPU
idle; here as many blocks are multiplied at a time as copies of their matrices fit into a quarter of a gigabyte.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dreamer_jax.kernels.plain.experts import cut
from dreamer_jax.kernels.products import Product

HEIGHT = 128
BATCH_BYTES = 2**28


def product(product: Product, a: Array, b: Array, sizes: Int[Array, "E"]) -> Array:
    """One of the three products of products.py, summed in float32; rows that no expert owns are zero."""
    if product == "d_w":
        return _gradient(a, b, sizes)
    return _rows(a, b if product == "forward" else b.swapaxes(1, 2), sizes)


def _rows(x: Float[Array, "R I"], w: Float[Array, "E I O"], sizes: Int[Array, "E"]) -> Float[Array, "R O"]:
    experts, rows, batches = _batches(x.shape[0], sizes, w.shape[1] * w.shape[2])

    def body(i, y):
        out = jnp.einsum("nri,nio->nro", _taken(x, rows[i]), w[experts[i]], preferred_element_type=jnp.float32)
        return y.at[rows[i]].set(out.astype(x.dtype), mode="drop")

    return lax.fori_loop(0, batches, body, jnp.zeros_like(x, shape=(x.shape[0], w.shape[2])))


def _gradient(x: Float[Array, "R I"], d_y: Float[Array, "R O"], sizes: Int[Array, "E"]) -> Float[Array, "E I O"]:
    shape = sizes.shape[0], x.shape[1], d_y.shape[1]
    experts, rows, batches = _batches(x.shape[0], sizes, shape[1] * shape[2])

    def body(i, d_w):
        parts = _taken(x, rows[i]), _taken(d_y, rows[i])
        return d_w.at[experts[i]].add(jnp.einsum("nri,nro->nio", *parts, preferred_element_type=jnp.float32))

    return lax.fori_loop(0, batches, body, jnp.zeros_like(x, shape=shape, dtype=jnp.float32)).astype(x.dtype)


def _batches(rows: int, sizes: Array, matrix: int) -> tuple[Array, Array, Array]:
    """By batch: the expert of each block, and its rows (`rows`, past the end, for none); and how many batches exist."""
    blocks, count = cut(sizes, rows, HEIGHT)
    total = blocks.expert.shape[0]
    batch = max(1, min(total, BATCH_BYTES // (4 * matrix)))
    within = jnp.arange(HEIGHT, dtype=sizes.dtype)[None, :]
    exists = (jnp.arange(total, dtype=sizes.dtype) < count)[:, None]
    found = jnp.where(exists & (within < blocks.live[:, None]), blocks.first[:, None] + within, rows)
    missing = -total % batch
    experts = jnp.pad(blocks.expert, (0, missing)).reshape(-1, batch)
    found = jnp.pad(found, ((0, missing), (0, 0)), constant_values=rows).reshape(-1, batch, HEIGHT)
    return experts, found, (count + batch - 1) // batch


def _taken(a: Float[Array, "R width"], rows: Int[Array, "blocks H"]) -> Float[Array, "blocks H width"]:
    return a.at[rows].get(mode="fill", fill_value=0)
