"""The loop over depths, differentiable in memory linear in depth; for DR (shared weights) and LA (stacked).

Reverse mode through a plain `lax.scan` that carries the depth cache stores the whole cache at every depth: O(L^2)
memory. Here the loop is differentiated as one unit. The forward pass keeps each depth's residuals and the *final*
cache. A body that ignores cache rows >= l computes the same from the final cache as from the one it saw, so the
backward pass hands the final cache to every depth and accumulates its cotangent in the carry.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

from dreamer_jax.kernels.compute import Remat
from dreamer_jax.kernels.interface import Implementation, Kernels

Body = Callable[..., tuple[jax.Array, PyTree, PyTree, PyTree]]
"""body(kernels, shared, own, constants, x, cache, carried, l) -> (x of the next depth, cache row of depth l, carried,
aux)."""


def depth_scan(
    body: Body,
    kernels: Implementation,
    shared: PyTree,
    stacked: PyTree,
    constants: PyTree,
    x: jax.Array,
    row: PyTree,
    carried: PyTree = None,
    *,
    depth: int,
    remat: Remat,
) -> tuple[jax.Array, PyTree, PyTree]:
    """Apply `body` at depths 0 .. depth-1 and return (x of the last depth, carried, aux stacked over depths).

    Args:
        body: one depth. It must not read cache rows >= l, and must not close over traced arrays.
        kernels: computes the body's operations.
        shared: weights of all depths (DR); the gradient is summed in their dtype.
        stacked: weights with leading axis `depth` (LA); `body` gets its own slice.
        constants: arrays without gradient (positions, router biases).
        x: the residual stream before depth 0.
        row: a pytree of arrays like one depth's row of the cache; the cache has `depth` such rows, zero at first.
        carried: what goes from depth to depth beside x (caches and states of generation).
        depth: L.
        remat: what the backward pass recomputes (`train.remat`); never what is named "routing".

    No gradient flows through carried and aux.
    """
    one_depth = _handing_on(body, kernels)
    run = _remat(one_depth, remat)
    empty = jax.tree.map(lambda e: jnp.stack([jnp.zeros_like(e)] * depth), row)
    indices = jnp.arange(depth)

    @jax.custom_vjp
    def scan(shared: PyTree, stacked: PyTree, constants: PyTree, x: jax.Array, carried: PyTree) -> Any:
        def step(carry: Any, inputs: Any) -> Any:
            x, cache, carried = carry
            l, own = inputs
            (x, row, _), (carried, aux) = one_depth(shared, own, constants, x, cache, carried, l)
            return (x, _put(cache, row, l), carried), aux

        (x, _, carried), aux = lax.scan(step, (x, empty, carried), (indices, stacked))
        return x, carried, aux

    def forward(shared: PyTree, stacked: PyTree, constants: PyTree, x: jax.Array, carried: PyTree) -> Any:
        def step(carry: Any, inputs: Any) -> Any:
            x, cache, carried = carry
            l, own = inputs

            def at_depth(*arguments: Any) -> Any:
                return run(*arguments, carried, l)

            (x, row, _), vjp, (carried, aux) = jax.vjp(at_depth, shared, own, constants, x, cache, has_aux=True)
            return (x, _put(cache, row, l), carried), (aux, _without_common_arguments(vjp))

        (x, cache, carried), (aux, vjps) = lax.scan(step, (x, empty, carried), (indices, stacked))
        return (x, carried, aux), (shared, stacked, constants, cache, vjps)

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
        return d_shared, d_stacked, None, dx, None

    scan.defvjp(forward, backward)
    return scan(shared, stacked, constants, x, carried)


def _handing_on(body: Body, kernels: Implementation) -> Callable[..., Any]:
    """The body, with the shared weights and the cache among its results, as its kernels have handed them on.

    These go to the next depth. Through them the gradient of later depths reaches an operation of this one, which can
    add its own to that in place.
    """

    def one_depth(shared: PyTree, own: PyTree, constants: PyTree, x: jax.Array, cache: PyTree, *others: Any) -> Any:
        books = Kernels(kernels)
        x, row, carried, aux = body(books, shared, own, constants, x, cache, *others)
        latest = books.handed_on.latest
        return (x, latest(row), latest((shared, cache))), (carried, lax.stop_gradient(aux))

    return one_depth


def _remat(body: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
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
# out before the scan would stack a copy for each depth, and put back in the backward pass. JAX documents that one may:
# https://docs.jax.dev/en/latest/301/vjp-objects.html. Releases after 0.10 can leave them out by themselves
# (`saveable_args` of `jax.vjp`).
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
