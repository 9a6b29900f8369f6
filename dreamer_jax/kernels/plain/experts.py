"""Experts of sorted rows in plain JAX: a loop over the blocks of rows that exist.

XLA's CPU dots are fast on tens of rows and slow in bfloat16 or batched over gathered weights. So the loop cuts the rows
of each expert into blocks, takes the expert's weights once per block, in float32, and computes all that they need. A
block with few live rows is computed at the least of a few heights (lax.switch) that holds them.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dreamer_jax.sharding import vary_together


@jax.named_scope("experts")
def grouped_matmul(x: Float[Array, "R I"], w: Float[Array, "E I O"], sizes: Int[Array, "E"]) -> Float[Array, "R O"]:
    """Multiply every row with the matrix of its expert; rows are sorted by expert, `sizes` of each.

    Products and gradients are accumulated in float32 and rounded once to the dtype of `x`.
    """
    x, w, sizes = vary_together(x, w, sizes)
    return _blocks(_matmul, _heights(x.shape[0], w.shape[0]), (x,), (w,), sizes)


@jax.named_scope("experts")
def sorted_swiglu(x: Array, scores: Array, w_gate_up: Array, w_down: Array, sizes: Array) -> Array:
    """`Kernels.sorted_swiglu`."""
    x, scores, w_gate_up, w_down, sizes = vary_together(x, scores, w_gate_up, w_down, sizes)
    return _blocks(_swiglu, _heights(x.shape[0], sizes.shape[0]), (x, scores), (w_gate_up, w_down), sizes)


def _matmul(x, w):
    return x @ w


def _swiglu(x, scores, w_gate_up, w_down):
    return (scores * gated(x @ w_gate_up)) @ w_down


def gated(gate_up: Float[Array, "R G"]) -> Float[Array, "R F"]:
    """The inner activation silu(gate) * up of [gate, up]."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


class _Block(NamedTuple):
    """One block of rows of one expert (scalars, or [blocks] arrays of them)."""

    expert: Array
    first: Array  # row of the sorted buffer
    live: Array  # rows that belong to the expert
    opens: Array  # whether it is the expert's first block


def _heights(rows: int, experts: int) -> tuple[int, ...]:
    """The heights at which blocks are computed; the last is the block size, about twice the mean group."""
    tallest = min(rows, 256, max(8, 1 << (2 * rows // experts - 1).bit_length()))
    step = max(32, tallest // 4)
    return (*range(step, tallest - step // 2, step), tallest)


def cut(sizes, rows: int, height: int) -> tuple[_Block, Array]:
    """All blocks in row order, padded to a static number, and how many there are."""
    blocks = (sizes + height - 1) // height
    ends = jnp.cumsum(blocks)
    at = jnp.arange(min(rows, rows // height + sizes.shape[0]), dtype=sizes.dtype)
    expert = jnp.minimum(jnp.searchsorted(ends, at, side="right"), sizes.shape[0] - 1).astype(sizes.dtype)
    offset = (at - (ends - blocks)[expert]) * height
    first = (jnp.cumsum(sizes) - sizes)[expert] + offset
    return _Block(expert, first, jnp.minimum(sizes[expert] - offset, height), offset == 0), ends[-1]


def _at_height(heights: tuple[int, ...], block: _Block, offset, f: Callable, *tall):
    """Apply `f` to the live rows of the arrays `tall`; its first result comes back at full height, zero elsewhere."""

    def branch(height: int, *tall):
        start = jnp.minimum(offset, heights[-1] - height)
        short, *others = f(*[lax.dynamic_slice_in_dim(a, start, height) for a in tall])
        full = jnp.zeros_like(short, shape=(heights[-1], short.shape[1]))
        return lax.dynamic_update_slice_in_dim(full, short, start, 0), *others

    too_low = sum(((block.live > height).astype(jnp.int32) for height in heights[:-1]), jnp.zeros_like(block.live))
    return lax.switch(too_low, [partial(branch, height) for height in heights], *tall)


def _window(block: _Block, rows: int, height: int):
    """Where a full block is cut from the buffer, and which of its rows are the block's (the last blocks overlap)."""
    start = jnp.minimum(block.first, rows - height)
    row = start + jnp.arange(height, dtype=start.dtype)
    return start, ((row >= block.first) & (row < block.first + block.live))[:, None]


def _read(a, start, mine):
    return jnp.where(mine, lax.dynamic_slice_in_dim(a, start, mine.shape[0]), 0).astype(jnp.float32)


def _write(a, values, start, mine):
    old = lax.dynamic_slice_in_dim(a, start, mine.shape[0])
    return lax.dynamic_update_slice_in_dim(a, jnp.where(mine, values.astype(a.dtype), old), start, 0)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocks(f: Callable, heights: tuple[int, ...], inputs: tuple, weights: tuple, sizes):
    """Rows through f(*inputs, *weights of their expert), which must work row by row and map zeros to zeros."""
    rows, height = inputs[0].shape[0], heights[-1]
    blocks, count = cut(sizes, rows, height)

    def body(i, y):
        block = jax.tree.map(lambda a: a[i], blocks)
        start, mine = _window(block, rows, height)
        w = [a[block.expert].astype(jnp.float32) for a in weights]
        tall = [_read(a, start, mine) for a in inputs]
        (out,) = _at_height(heights, block, block.first - start, lambda *a: (f(*a, *w),), *tall)
        return _write(y, out, start, mine)

    return lax.fori_loop(0, count, body, jnp.zeros_like(inputs[0], shape=(rows, weights[-1].shape[2])))


def _blocks_forward(f, heights, inputs, weights, sizes):
    return _blocks(f, heights, inputs, weights, sizes), (inputs, weights, sizes)


def _blocks_backward(f, heights, residuals, d_y):
    inputs, weights, sizes = residuals
    rows, height = inputs[0].shape[0], heights[-1]
    blocks, count = cut(sizes, rows, height)

    def gradients(w, d, *a):
        """Those of the inputs side by side (`_at_height` brings one array to full height), then the weights'."""
        found = jax.vjp(f, *a, *w)[1](d)
        return jnp.concatenate(found[: len(a)], axis=1), *found[len(a) :]

    def body(i, carry):
        d_inputs, d_weights, sums = carry
        block = jax.tree.map(lambda a: a[i], blocks)
        start, mine = _window(block, rows, height)
        w = [a[block.expert].astype(jnp.float32) for a in weights]
        tall = [_read(a, start, mine) for a in (d_y, *inputs)]
        d_block, *d_w = _at_height(heights, block, block.first - start, partial(gradients, w), *tall)
        # float32 sums over the blocks of one expert; rewriting the rounded sum costs less than reading it back
        sums = [jnp.where(block.opens, 0, old) + new for old, new in zip(sums, d_w, strict=True)]
        d_weights = [d.at[block.expert].set(s.astype(d.dtype)) for d, s in zip(d_weights, sums, strict=True)]
        parts = jnp.split(d_block, [a.shape[1] for a in inputs[:-1]], axis=1)
        d_inputs = [_write(d, part, start, mine) for d, part in zip(d_inputs, parts, strict=True)]
        return d_inputs, d_weights, sums

    sums = [jnp.zeros_like(a[0], dtype=jnp.float32) for a in weights]
    init = [jnp.zeros_like(a) for a in inputs], [jnp.zeros_like(a) for a in weights], sums
    d_inputs, d_weights, _ = lax.fori_loop(0, count, body, init)
    return tuple(d_inputs), tuple(d_weights), None


_blocks.defvjp(_blocks_forward, _blocks_backward)
