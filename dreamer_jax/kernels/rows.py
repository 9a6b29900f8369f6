"""Rows sorted by expert: how tokens get into that order and back.

    p = order(ids, experts)                 # sort the tokens' choices by expert
    rows = dispatch(x, p, active)           # [tokens, D] -> [R, D], R = tokens * A
    ...                                     # experts multiply their rows
    y = collect(rows, p, active)            # [R, D] -> [tokens, D], the sum of each token's rows

No capacity limit drops a token, and nothing here scatters floats: every gather has a gather as its gradient, so results
are the same from run to run.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dreamer_jax.kernels.interface import ExpertOrder


@jax.named_scope("dispatch")
def order(ids: Int[Array, "tokens A"], experts: int) -> ExpertOrder:
    """Sort the tokens' choices of experts, which lie in [0, experts), stably."""
    flat = ids.reshape(-1).astype(jnp.int32)
    choices = jnp.zeros_like(flat) + jnp.arange(flat.size, dtype=jnp.int32)
    ranked, order = lax.sort((flat, choices), num_keys=1, is_stable=True)
    inverse = jnp.zeros_like(order).at[order].set(choices, unique_indices=True, mode="promise_in_bounds")
    ends = jnp.searchsorted(ranked, jnp.arange(experts, dtype=jnp.int32), side="right").astype(jnp.int32)
    return ExpertOrder(order, inverse, jnp.diff(ends, prepend=jnp.zeros_like(ends[:1])))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def dispatch(x: Float[Array, "tokens D"], p: ExpertOrder, active: int) -> Float[Array, "R D"]:
    """Copy each token to the rows of the experts it chose. `active` is A; its gradient is `collect`."""
    with jax.named_scope("dispatch"):
        return _take(x, p.order // active)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def collect(y: Float[Array, "R D"], p: ExpertOrder, active: int) -> Float[Array, "tokens D"]:
    """Add up each token's A rows, in float32, rounded once to the dtype of `y`; its gradient is `dispatch`."""
    with jax.named_scope("combine"):
        choices = _take(y, p.inverse).reshape(-1, active, y.shape[-1])
        return choices.astype(jnp.float32).sum(axis=1).astype(y.dtype)


dispatch.defvjp(lambda x, p, active: (dispatch(x, p, active), p), lambda active, p, d: (collect(d, p, active), None))
collect.defvjp(lambda y, p, active: (collect(y, p, active), p), lambda active, p, d: (dispatch(d, p, active), None))


@jax.custom_vjp
def sort(choices: Float[Array, "R D"], p: ExpertOrder) -> Float[Array, "R D"]:
    """Bring one row for each choice, in token order, into sorted order."""
    with jax.named_scope("dispatch"):
        return _take(choices, p.order)


@jax.custom_vjp
def unsort(y: Float[Array, "R D"], p: ExpertOrder) -> Float[Array, "R D"]:
    """Bring the rows back to the order of the choices, which for A = 1 is that of the tokens."""
    with jax.named_scope("combine"):
        return _take(y, p.inverse)


sort.defvjp(lambda choices, p: (sort(choices, p), p), lambda p, d: (unsort(d, p), None))
unsort.defvjp(lambda y, p: (unsort(y, p), p), lambda p, d: (sort(d, p), None))


def _take(a: Array, rows: Array) -> Array:
    return a.at[rows].get(mode="promise_in_bounds")


def routed_swiglu(
    sorted_swiglu: Callable[..., Array],
    x: Float[Array, "tokens D"],
    scores: Float[Array, "tokens A"],
    w_gate_up: Float[Array, "E D G"],
    w_down: Float[Array, "E F D"],
    p: ExpertOrder,
) -> tuple[Float[Array, "tokens D"], Float[Array, "E D G"], Float[Array, "E F D"]]:
    """`swiglu` of the interface by way of its `sorted_swiglu`: dispatch, experts, collect."""
    active, scores = scores.shape[1], sort(scores.reshape(-1, 1), p)
    rows = sorted_swiglu(dispatch(x, p, active), scores, w_gate_up, w_down, p.sizes)
    return collect(rows, p, active), w_gate_up, w_down
