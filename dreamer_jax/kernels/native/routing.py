"""Routing by the C++ kernels: from queries and keys in one call, whose gradient touches the selected experts only."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from dreamer_jax.kernels.interface import ExpertOrder, Routed
from dreamer_jax.kernels.native import calls
from dreamer_jax.sharding import vary_together


def route(query: Array, keys: Array, bias: Array, counted: Array, active: int) -> Routed:
    """`Kernels.route`."""
    return _route(active, *vary_together(query, keys, bias, counted.astype(jnp.int32)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _route(active, query, keys, bias, counted):
    return Routed(*calls.route(query, keys, bias, counted, active))


def _route_forward(active, query, keys, bias, counted):
    ids, scores, counts, entropy = _route(active, query, keys, bias, counted)
    ids, scores = checkpoint_name((ids, scores), "routing")
    return Routed(ids, scores, counts, entropy), (query, keys, ids, scores)


def _route_backward(active, residuals, cotangents):
    query, keys, ids, scores = residuals
    return *calls.route_gradients(query, keys, ids, scores, cotangents.scores), None, None


_route.defvjp(_route_forward, _route_backward)


@jax.named_scope("dispatch")
def order(ids: Array, experts: int) -> ExpertOrder:
    """`Kernels.order`."""
    return _order(ids, experts)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _order(ids, experts):
    return ExpertOrder(*calls.order(ids, experts))


_order.defvjp(lambda ids, experts: (_order(ids, experts), None), lambda experts, _, d: (None,))
