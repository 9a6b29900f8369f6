"""The loop over depths, differentiable in memory linear in depth; for DR (shared weights) and LA (stacked).

Reverse mode through a plain `lax.scan` that carries the depth cache stores the whole cache at every depth: O(L^2)
memory. Here the loop is differentiated as one unit. The forward pass keeps each depth's residuals and the *final*
cache. A body that ignores cache rows >= l computes the same from the final cache as from the one it saw, so the
backward pass hands the final cache to every depth and accumulates its cotangent in the carry.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

Remat = Literal["none", "full", "selective", "products"]

Body = Callable[[PyTree, PyTree, PyTree, jax.Array, PyTree, jax.Array], tuple[jax.Array, PyTree, PyTree, PyTree]]
"""body(shared, own, constants, x, cache, l) -> (x of the next depth, cache entry of depth l, aux, (shared, cache)).

The shared weights and the cache come back unchanged. Through them the gradient of later depths reaches an operation
that hands them on, which can add its own to that in place.
"""


def depth_scan(
    body: Body,
    shared: PyTree,
    stacked: PyTree,
    constants: PyTree,
    x: jax.Array,
    entry: PyTree,
    *,
    depth: int,
    remat: Remat,
) -> tuple[jax.Array, PyTree]:
    """Apply `body` at depths 0 .. depth-1 and return (x of the last depth, aux stacked over depths).

    Args:
        body: one depth. It must not read cache rows >= l, and must not close over traced arrays.
        shared: weights of all depths (DR); the gradient is summed in their dtype.
        stacked: weights with leading axis `depth` (LA); `body` gets its own slice.
        constants: arrays without gradient (positions, router biases).
        x: the residual stream before depth 0.
        entry: a pytree of arrays like one depth's cache entry; the cache has `depth` such rows, zero at first.
        depth: L.
        remat: what the backward pass recomputes (`train.remat`); never what is named "routing".

    No gradient flows through aux.
    """
    run: Callable[..., Any] = _remat(body, remat)
    empty = jax.tree.map(lambda e: jnp.stack([jnp.zeros_like(e)] * depth), entry)
    indices = jnp.arange(depth)

    @jax.custom_vjp
    def scan(shared: PyTree, stacked: PyTree, constants: PyTree, x: jax.Array) -> tuple[jax.Array, PyTree]:
        def step(carry: Any, inputs: Any) -> Any:
            x, cache = carry
            l, own = inputs
            x, entry, aux, _ = body(shared, own, constants, x, cache, l)
            return (x, _put(cache, entry, l)), aux

        (x, _), aux = lax.scan(step, (x, empty), (indices, stacked))
        return x, aux

    def forward(shared: PyTree, stacked: PyTree, constants: PyTree, x: jax.Array) -> Any:
        def step(carry: Any, inputs: Any) -> Any:
            x, cache = carry
            l, own = inputs

            def at_depth(*args: Any) -> Any:
                x, entry, aux, handed_on = run(*args, l)
                return (x, entry, handed_on), aux

            (x, entry, _), vjp, aux = jax.vjp(at_depth, shared, own, constants, x, cache, has_aux=True)
            return (x, _put(cache, entry, l)), (aux, _without_common_arguments(vjp))

        (x, cache), (aux, vjps) = lax.scan(step, (x, empty), (indices, stacked))
        return (x, aux), (shared, stacked, constants, cache, vjps)

    def backward(residuals: Any, cotangents: Any) -> Any:
        shared, stacked, constants, cache, vjps = residuals

        def step(carry: Any, inputs: Any) -> Any:
            d_shared, dx, d_cache = carry
            l, own, vjp = inputs
            vjp = _with_common_arguments(vjp, shared, own, constants, cache)
            d_shared, d_own, _, dx, d_cache = vjp((dx, _take(d_cache, l), (d_shared, d_cache)))
            return (d_shared, dx, d_cache), d_own

        start = (jax.tree.map(jnp.zeros_like, shared), cotangents[0], jax.tree.map(jnp.zeros_like, cache))
        (d_shared, dx, _), d_stacked = lax.scan(step, start, (indices, stacked, vjps), reverse=True)
        return d_shared, d_stacked, None, dx

    scan.defvjp(forward, backward)
    return scan(shared, stacked, constants, x)


def _remat(body: Body, remat: Remat) -> Body:
    """The body with its residuals chosen; inside a scan there is nothing that CSE could undo."""
    if remat == "none":
        return body
    names = {
        "full": ("routing",),
        "selective": ("routing", "attention"),
        "products": ("routing", "attention", "products"),
    }[remat]
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    return jax.checkpoint(body, policy=policy, prevent_cse=False)


# Positions of `shared`, `own`, `constants` and `cache` among the arguments of the differentiated body. `jax.vjp` keeps
# the arguments that it needs as residuals apart from the others (`args_res`): what all depths have in common is taken
# out before the scan would stack a copy for each depth, and put back in the backward pass.
_COMMON = (0, 1, 2, 4)


def _without_common_arguments(vjp: Any) -> Any:
    for i in _COMMON:
        vjp.args_res[i] = None
    return vjp


def _with_common_arguments(vjp: Any, *values: PyTree) -> Any:
    for i, value in zip(_COMMON, values, strict=True):
        vjp.args_res[i] = value
    return vjp


def _put(cache: PyTree, entry: PyTree, l: jax.Array) -> PyTree:
    return jax.tree.map(lambda c, e: lax.dynamic_update_index_in_dim(c, e, l, 0), cache, entry)


def _take(cache: PyTree, l: jax.Array) -> PyTree:
    return jax.tree.map(lambda c: lax.dynamic_index_in_dim(c, l, 0, keepdims=False), cache)
