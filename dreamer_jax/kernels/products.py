"""Experts of sorted rows by a library of grouped products, with their derivatives: for GPUs and TPUs.

A library is a function of a product's name, two arrays and the rows of each expert. It offers the three products of a
linear map and its gradient:

    forward  [R, I] x [E, I, O] -> [R, O]     d_x  [R, O] x [E, I, O] -> [R, I]     d_w  [R, I] x [R, O] -> [E, I, O]

What it leaves in rows that no expert owns is undefined.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dreamer_jax.kernels.interface import ExpertOrder
from dreamer_jax.kernels.plain.experts import gated
from dreamer_jax.kernels.plain.linear import routed_linear
from dreamer_jax.kernels.rows import routed_swiglu
from dreamer_jax.kernels.unchecked import unchecked
from dreamer_jax.sharding import vary_together

Product = Literal["forward", "d_x", "d_w"]
Library = Callable[[Product, Array, Array, Array], Array]


def linear(
    library: Library, x: Array, scores: Array, w: Array, shared: Array | None, order: ExpertOrder
) -> tuple[Array, Array]:
    """`Kernels.linear`."""
    return routed_linear(partial(grouped_matmul, library), x, scores, w, shared, order)


def swiglu(
    library: Library, x: Array, scores: Array, w_gate_up: Array, w_down: Array, order: ExpertOrder
) -> tuple[Array, Array, Array]:
    """`Kernels.swiglu`."""
    return routed_swiglu(partial(sorted_swiglu, library, all_owned=True), x, scores, w_gate_up, w_down, order)


@jax.named_scope("experts")
def sorted_swiglu(
    library: Library,
    x: Array,
    scores: Array,
    w_gate_up: Array,
    w_down: Array,
    sizes: Array,
    *,
    all_owned: bool = False,
) -> Array:
    """`Kernels.sorted_swiglu`; `all_owned` says that every row has an expert, and none need to be cleared."""
    owned = jnp.arange(x.shape[0], dtype=sizes.dtype) < jnp.sum(sizes)

    def cleared(rows: Array) -> Array:
        """Garbage in rows that no expert owns must not reach a sum, in the gradients neither."""
        return rows if all_owned else jnp.where(owned[:, None], rows, 0)

    x, scores = cleared(x), cleared(scores)
    gate_up = checkpoint_name(grouped_matmul(library, x, w_gate_up, sizes), "products")
    hidden = (gated(cleared(gate_up.astype(jnp.float32))) * scores).astype(x.dtype)
    return cleared(grouped_matmul(library, hidden, w_down, sizes))


@jax.named_scope("experts")
def grouped_matmul(
    library: Library, x: Float[Array, "R I"], w: Float[Array, "E I O"], sizes: Int[Array, "E"]
) -> Float[Array, "R O"]:
    """Multiply every row with the matrix of its expert; what comes out for rows past the sum of `sizes` is undefined.

    Products and gradients are accumulated in float32 and rounded once to the dtype of `x`.
    """
    return _multiply(library, *vary_together(x, w, sizes))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(library: Library, x, w, sizes):
    return unchecked(partial(library, "forward"), x, w, sizes)


def _multiply_forward(library, x, w, sizes):
    return _multiply(library, x, w, sizes), (x, w, sizes)


def _multiply_backward(library, residuals, d_y):
    x, w, sizes = residuals
    d_x = unchecked(partial(library, "d_x"), d_y, w, sizes)
    return d_x, unchecked(partial(library, "d_w"), x, d_y, sizes), None


_multiply.defvjp(_multiply_forward, _multiply_backward)
