"""Experts by the C++ kernels, with their derivatives.

The gradients of the weights are added in place to those of later uses of the weights that are handed on.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from dreamer_jax.kernels.interface import ExpertOrder
from dreamer_jax.kernels.native import calls
from dreamer_jax.kernels.plain.linear import through
from dreamer_jax.kernels.rows import sort
from dreamer_jax.sharding import vary_together


def linear(x: Array, scores: Array, w: Array, shared: Array | None, order: ExpertOrder) -> tuple[Array, Array]:
    """`Kernels.linear` in one call, which neither sorts nor weights in memory; its gradient needs no product again."""
    y, w = _linear(*_vary_together(x, scores, w, shared, order))
    return checkpoint_name(y, "products"), w


@jax.custom_vjp
def _linear(x, scores, w, shared, p):
    return calls.linear(x, scores, w, p.sizes, p.order), w


def _linear_forward(x, scores, w, shared, p):
    return _linear(x, scores, w, shared, p), (x, scores, w, shared, p)


def _linear_backward(residuals, cotangents):
    x, scores, w, shared, p = residuals
    d_y, d_w = cotangents
    d_x, d_scores, d_w = calls.linear_gradients(x, scores, w, d_y, d_w, p.sizes, p.order)
    if shared is None:
        return d_x, d_scores, d_w, None, None
    return d_x, d_scores - through(d_y, x, shared), d_w, jnp.zeros_like(shared), None


_linear.defvjp(_linear_forward, _linear_backward)


def _vary_together(*trees: Any) -> Any:
    leaves, structure = jax.tree.flatten(trees)
    return jax.tree.unflatten(structure, vary_together(*leaves))


def swiglu(x: Array, scores: Array, w_gate_up: Array, w_down: Array, order: ExpertOrder) -> tuple[Array, Array, Array]:
    """`Kernels.swiglu`; the kernels gather the tokens themselves."""
    active, scores = scores.shape[1], sort(scores.reshape(-1, 1), order)
    x, scores, w_gate_up, w_down, order = _vary_together(x, scores, w_gate_up, w_down, order)
    with jax.named_scope("experts"):
        return _swiglu(x, scores, w_gate_up, w_down, order.sizes, order, active)


@jax.named_scope("experts")
def sorted_swiglu(x: Array, scores: Array, w_gate_up: Array, w_down: Array, sizes: Array) -> Array:
    """`Kernels.sorted_swiglu`."""
    return _swiglu(*vary_together(x, scores, w_gate_up, w_down, sizes), None, 0)[0]


# The whole SwiGLU in one call; for gradients in two, so that remat can keep what lies between them. Sorted rows become
# sorted rows; or, with their order, tokens become tokens. The weights are handed on.


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _swiglu(x, scores, w_gate_up, w_down, sizes, p, active):
    y = calls.swiglu(x, scores, w_gate_up, w_down, sizes, _tokens(p, active))
    return _collected(y, p, active), w_gate_up, w_down


def _swiglu_forward(x, scores, w_gate_up, w_down, sizes, p, active):
    gate_up = calls.product(x, w_gate_up, sizes, _tokens(p, active))
    gate_up = checkpoint_name(gate_up, "products")
    y = _collected(calls.gated(gate_up, scores, w_down, sizes), p, active)
    return (y, w_gate_up, w_down), (x, scores, gate_up, w_gate_up, w_down, sizes, p)


def _swiglu_backward(active, residuals, cotangents):
    x, scores, gate_up, w_gate_up, w_down, sizes, p = residuals
    d_y, *d_weights = cotangents
    inputs = x, scores, gate_up, w_gate_up, w_down, d_y, *d_weights, sizes, _tokens(p, active)
    d_x, *others = calls.swiglu_gradients(*inputs)
    return _collected(d_x, p, active), *others, None, None


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _tokens(p: ExpertOrder | None, active: int) -> Array | None:
    return None if p is None else p.order // active


@jax.named_scope("combine")
def _collected(rows: Array, p: ExpertOrder | None, active: int) -> Array:
    return rows if p is None else calls.collect(rows, p.inverse, active)
