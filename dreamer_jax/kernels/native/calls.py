"""The C++ kernels as JAX functions of float32 arrays, without derivatives; those are kernels of their own.

Each call is described by a signature such as "x[t I], scores[t], w[E I O], int sizes[E] -> y[t O]". A letter is the
same size in all arrays; "2F" is twice F, and "GK" a multiple of K, G times as large. A result with the name of an
argument takes over its memory.
"""

import functools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from dreamer_jax.kernels.native import library
from dreamer_jax.sharding import vary_together


def product(x: Array, w: Array, sizes: Array, tokens: Array | None) -> Array:
    """Every row times the matrix of its expert; rows of no expert come out as zeros.

    Rows are sorted by expert, `sizes` of each. With `tokens`, sorted row r is a copy of row tokens[r] of x.
    """
    x_rows, r = _gathered(tokens)
    signature = f"x[{x_rows} I], w[E I O], int sizes[E], int tokens[{r}] -> y[R O]"
    return _call("grouped_forward", signature, x, w, sizes, _or_none(tokens))[0]


def linear(x: Array, scores: Array, w: Array, sizes: Array, order: Array) -> Array:
    """Weighted linear experts, one for each token: score * (x W). `order` lists the tokens sorted by expert."""
    signature = "x[t I], scores[t], w[E I O], int sizes[E], int order[t] -> y[t O]"
    return _call("grouped_linear", signature, x, scores, w, sizes, order)[0]


def linear_gradients(
    x: Array, scores: Array, w: Array, d_y: Array, d_w: Array, sizes: Array, order: Array
) -> Sequence[Array]:
    """The gradients of `linear` for x, scores and w; that of w is added to `d_w`."""
    signature = (
        "x[t I], scores[t], w[E I O], d_y[t O], d_w[E I O], int sizes[E], int order[t]"
        " -> d_x[t I], d_scores[t], d_w[E I O]"
    )
    return _call("grouped_linear_gradients", signature, x, scores, w, d_y, d_w, sizes, order)


def swiglu(x: Array, scores: Array, w_gate_up: Array, w_down: Array, sizes: Array, tokens: Array | None) -> Array:
    """Send every row through its expert: (score * silu(x W_gate) * (x W_up)) W_down; for rows as in `product`."""
    x_rows, r = _gathered(tokens)
    signature = f"x[{x_rows} D], scores[R 1], w_gate_up[E D 2F], w_down[E F D], int sizes[E], int tokens[{r}] -> y[R D]"
    return _call("grouped_swiglu", signature, x, scores, w_gate_up, w_down, sizes, _or_none(tokens))[0]


def gated(gate_up: Array, scores: Array, w_down: Array, sizes: Array) -> Array:
    """The second half of `swiglu`, from gate_up = x [W_gate W_up]."""
    signature = "gate_up[R 2F], scores[R 1], w_down[E F D], int sizes[E] -> y[R D]"
    return _call("grouped_gated", signature, gate_up, scores, w_down, sizes)[0]


def swiglu_gradients(
    x: Array,
    scores: Array,
    gate_up: Array,
    w_gate_up: Array,
    w_down: Array,
    d_y: Array,
    d_w_gate_up: Array,
    d_w_down: Array,
    sizes: Array,
    tokens: Array | None,
) -> Sequence[Array]:
    """The gradients of `swiglu` for x (one for each sorted row), scores, w_gate_up and w_down.

    gate_up is x [W_gate W_up]; with `tokens`, d_y lies in the order of x, too. Those of the weights are added to
    `d_w_gate_up` and `d_w_down`.
    """
    x_rows, r = _gathered(tokens)
    signature = (
        f"x[{x_rows} D], scores[R 1], gate_up[R 2F], w_gate_up[E D 2F], w_down[E F D], d_y[{x_rows} D],"
        f" d_w_gate_up[E D 2F], d_w_down[E F D], int sizes[E], int tokens[{r}]"
        " -> d_x[R D], d_scores[R 1], d_w_gate_up[E D 2F], d_w_down[E F D]"
    )
    inputs = x, scores, gate_up, w_gate_up, w_down, d_y, d_w_gate_up, d_w_down, sizes, _or_none(tokens)
    return _call("grouped_swiglu_gradients", signature, *inputs)


def collect(rows: Array, inverse: Array, active: int) -> Array:
    """The sum of each token's rows; flat choice c of `active` for each token is found in row inverse[c]."""
    return _call("grouped_collect", f"rows[{active}t D], int inverse[{active}t] -> y[t D]", rows, inverse)[0]


def _gathered(tokens: Array | None) -> tuple[str, str]:
    """Sizes of x and of `tokens` in signatures: x is sorted already, or has t rows of which R sorted ones are made."""
    return ("R", "0") if tokens is None else ("t", "R")


def _or_none(tokens: Array | None) -> Array:
    return jnp.zeros(0, jnp.int32) if tokens is None else tokens


def route(query: Array, keys: Array, bias: Array, counted: Array, active: int) -> Sequence[Array]:
    """The experts that query . key / sqrt(R) + bias selects, best first.

    Returns:
        ids, their scores (sigmoid without bias), the selections of each expert by tokens whose `counted` is 1, and the
        entropy of each token's normalised scores over all experts.
    """
    if not 0 < active <= keys.shape[0]:
        raise ValueError(f"native kernel 'route' cannot select {active} of {keys.shape[0]} experts")
    signature = (
        "query[t R], keys[E R], bias[E], int counted[t]"
        f" -> int ids[t {active}], scores[t {active}], int counts[E], entropy[t]"
    )
    return _call("route", signature, query, keys, bias, counted)


def route_gradients(query: Array, keys: Array, ids: Array, scores: Array, d_scores: Array) -> Sequence[Array]:
    """The gradients of the scores of `route` for query and keys."""
    signature = "query[t R], keys[E R], int ids[t A], scores[t A], d_scores[t A] -> d_query[t R], d_keys[E R]"
    return _call("route_gradients", signature, query, keys, ids, scores, d_scores)


def order(ids: Array, experts: int) -> Sequence[Array]:
    """Choices [tokens, A] sorted by expert, stably: order, its inverse, and the choices of each expert."""
    size = ids.size
    signature = f"int ids[t A] -> int order[{size}], int inverse[{size}], int sizes[{experts}]"
    return _call("route_plan", signature, ids)


def attend(q: Array, k: Array, v: Array, start: Array) -> Sequence[Array]:
    """Causal attention: out, and the log-sum-exp. `start`: the first token of each one's document."""
    signature = "q[B T GK H], k[B T K H], v[B T K H], int start[B T] -> out[B T GK H], lse[B GK T]"
    return _call("attend_forward", signature, q, k, v, start)


def attend_gradients(
    q: Array, k: Array, v: Array, start: Array, out: Array, lse: Array, d_out: Array
) -> Sequence[Array]:
    """The gradients of `attend` for q, k and v."""
    signature = (
        "q[B T GK H], k[B T K H], v[B T K H], int start[B T], out[B T GK H], lse[B GK T], d_out[B T GK H]"
        " -> d_q[B T GK H], d_k[B T K H], d_v[B T K H]"
    )
    return _call("attend_backward", signature, q, k, v, start, out, lse, d_out)


def attend_cache(q: Array, k: Array, v: Array, l: Array, lengths: Array) -> Array:
    """Attention of each sequence's newest token over the first `lengths` rows of its cache at depth `l`."""
    signature = "q[B 1 GK H], k[L B K S H], v[L B K S H], int l[], int lengths[B] -> out[B 1 GK H]"
    return _call("attend_cache", signature, q, k, v, l, lengths)[0]


def attend_depths(q: Array, k: Array, v: Array, cached_k: Array, cached_v: Array, l: Array) -> Sequence[Array]:
    """Attention over a token's depths, the cached ones before `l` and its own.

    Returns:
        out, probabilities, and k and v again, in their own memory. Writing these to the cache comes after the
        kernel has read it, so that XLA need not copy the cache.
    """
    signature = (
        "q[B T GK H], k[B T K H], v[B T K H], cached_k[L B T K H], cached_v[L B T K H], int l[]"
        " -> out[B T GK H], p[B T GK L], k[B T K H], v[B T K H]"
    )
    return _call("depth_forward", signature, q, k, v, cached_k, cached_v, l)


def attend_depths_gradients(
    q: Array,
    k: Array,
    v: Array,
    cached_k: Array,
    cached_v: Array,
    l: Array,
    d_out: Array,
    d_p: Array,
    d_k: Array,
    d_v: Array,
    d_cached_k: Array,
    d_cached_v: Array,
) -> Sequence[Array]:
    """The gradients of `attend_depths` for q, k, v and the cache; those of all but q are added to those given."""
    signature = (
        "q[B T GK H], k[B T K H], v[B T K H], cached_k[L B T K H], cached_v[L B T K H], int l[],"
        " d_out[B T GK H], d_p[B T GK L], d_k[B T K H], d_v[B T K H], d_cached_k[L B T K H], d_cached_v[L B T K H]"
        " -> d_q[B T GK H], d_k[B T K H], d_v[B T K H], d_cached_k[L B T K H], d_cached_v[L B T K H]"
    )
    given = d_k, d_v, d_cached_k, d_cached_v
    return _call("depth_backward", signature, q, k, v, cached_k, cached_v, l, d_out, d_p, *given)


def norm_and_rotate(x: Array, weight: Array, cos: Array, sin: Array, epsilon: float) -> Array:
    """RMSNorm of every head [tokens, heads, H], then RoPE; cos and sin have one row, or one for each token."""
    signature = f"x[t N 2h], weight[2h], cos[{_angles(cos)} h], sin[{_angles(cos)} h] -> y[t N 2h]"
    return _call("heads_forward", signature, x, weight, cos, sin, epsilon=np.float32(epsilon))[0]


def norm_and_rotate_gradients(
    x: Array, weight: Array, cos: Array, sin: Array, d_y: Array, epsilon: float
) -> Sequence[Array]:
    """The gradients of `norm_and_rotate` for x and weight."""
    signature = (
        f"x[t N 2h], weight[2h], cos[{_angles(cos)} h], sin[{_angles(cos)} h], d_y[t N 2h] -> d_x[t N 2h], d_weight[2h]"
    )
    return _call("heads_backward", signature, x, weight, cos, sin, d_y, epsilon=np.float32(epsilon))


def fused_heads(
    fused: Array, q_weight: Array, k_weight: Array, cos: Array, sin: Array, kv_heads: int, epsilon: float
) -> Sequence[Array]:
    """Fused heads taken apart: q and k normalised and rotated, v as it is; the last 2 * `kv_heads` are k's and v's."""
    heads = fused.shape[1]
    if not 0 < 2 * kv_heads < heads:
        raise ValueError(f"native kernel 'fused_heads_forward': {heads} heads hold no {kv_heads} of keys and of values")
    signature = (
        f"fused[t {heads} 2h], q_weight[2h], k_weight[2h], cos[{_angles(cos)} h], sin[{_angles(cos)} h]"
        f" -> q[t {heads - 2 * kv_heads} 2h], k[t {kv_heads} 2h], v[t {kv_heads} 2h]"
    )
    inputs = fused, q_weight, k_weight, cos, sin
    return _call("fused_heads_forward", signature, *inputs, epsilon=np.float32(epsilon))


def fused_heads_gradients(
    fused: Array,
    q_weight: Array,
    k_weight: Array,
    cos: Array,
    sin: Array,
    d_q: Array,
    d_k: Array,
    d_v: Array,
    epsilon: float,
) -> Sequence[Array]:
    """The gradients of `fused_heads` for the heads and both weights."""
    heads = d_q.shape[1] + 2 * d_k.shape[1]
    signature = (
        f"fused[t {heads} 2h], q_weight[2h], k_weight[2h], cos[{_angles(cos)} h], sin[{_angles(cos)} h],"
        f" d_q[t N 2h], d_k[t K 2h], d_v[t K 2h] -> d_fused[t {heads} 2h], d_q_weight[2h], d_k_weight[2h]"
    )
    inputs = fused, q_weight, k_weight, cos, sin, d_q, d_k, d_v
    return _call("fused_heads_backward", signature, *inputs, epsilon=np.float32(epsilon))


def _angles(cos: Array) -> str:
    return "1" if cos.shape[0] == 1 else "t"


# How they are called


def _call(kernel: str, signature: str, *arrays: Array, **attributes: np.float32) -> Sequence[Array]:
    """Call a kernel.

    Raises:
        ImportError: there are no native kernels here.
        TypeError: an array of another type than the signature's.
        ValueError: an array of another shape than the signature's.
    """
    if reason := library.missing():
        raise ImportError(f"kernels 'native': {reason}\nUse 'plain' instead, or install g++ 12, clang 11 or newer.")
    inputs, outputs = _parsed(signature)
    sizes = _sizes(kernel, inputs, arrays)
    arrays = tuple(vary_together(*arrays))
    results = [_result(output, sizes, arrays[0]) for output in outputs]
    names = [given.name for given in inputs]
    aliases = {names.index(output.name): i for i, output in enumerate(outputs) if output.name in names}
    return jax.ffi.ffi_call(f"dreamer_{kernel}", results, input_output_aliases=aliases)(*arrays, **attributes)


class _Argument(NamedTuple):
    """An array in a signature: its type, its name, and its sizes as factors, such as ("2", "F")."""

    dtype: np.dtype
    name: str
    sizes: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        return f"{self.name}[{' '.join(''.join(size) for size in self.sizes)}]"


@functools.cache
def _parsed(signature: str) -> tuple[tuple[_Argument, ...], tuple[_Argument, ...]]:
    """Arguments and results."""

    def argument(integer: str, name: str, sizes: str) -> _Argument:
        factors = tuple(tuple(re.findall(r"\d+|[A-Za-z]", size)) for size in sizes.split())
        return _Argument(np.dtype(np.int32 if integer else np.float32), name, factors)

    inputs, outputs = signature.split(" -> ")
    found = [re.findall(r"(int )?(\w+)\[([^\]]*)\]", part) for part in (inputs, outputs)]
    return tuple(argument(*each) for each in found[0]), tuple(argument(*each) for each in found[1])


def _sizes(kernel: str, inputs: Sequence[_Argument], arrays: Sequence[Array]) -> dict[str, int]:
    """The size of each letter, from arrays that fit."""
    sizes: dict[str, int] = {}
    pairs = list(zip(inputs, arrays, strict=True))
    for expected, array in pairs:
        if array.dtype != expected.dtype:
            raise TypeError(
                f"native kernel '{kernel}': {expected.name} must be {expected.dtype}, not {array.dtype}; "
                "for other types than float32 use kernels 'plain'"
            )
    # Single letters first: they are what the products are made of.
    for single in (True, False):
        for expected, array in pairs:
            fits = len(expected.sizes) == array.ndim and all(
                _bind(sizes, factors, actual)
                for factors, actual in zip(expected.sizes, array.shape, strict=True)
                if (len(factors) == 1) == single
            )
            if not fits:
                known = ", ".join(f"{letter} = {size}" for letter, size in sizes.items())
                message = f"{expected.name} has shape {array.shape}, expected {expected} with {known}"
                raise ValueError(f"native kernel '{kernel}': {message}")
    return sizes


def _bind(sizes: dict[str, int], factors: tuple[str, ...], actual: int) -> bool:
    """Whether a size is the product of its factors; a letter without a size yet gets the one that makes it so."""
    unknown = [factor for factor in factors if not factor.isdigit() and factor not in sizes]
    known = math.prod(_value(sizes, factor) for factor in factors if factor not in unknown)
    if not unknown:
        return actual == known
    if known == 0 or actual % known:
        return False
    sizes[unknown[0]] = actual // known
    return True


def _value(sizes: dict[str, int], factor: str) -> int:
    return int(factor) if factor.isdigit() else sizes[factor]


def _result(output: _Argument, sizes: dict[str, int], like: Array) -> jax.ShapeDtypeStruct:
    """The type of a result that, inside shard_map, varies over the mesh axes of `like`."""
    shape = tuple(math.prod(_value(sizes, factor) for factor in factors) for factors in output.sizes)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.axis_names:
        return jax.ShapeDtypeStruct(shape, output.dtype)
    sharding = NamedSharding(mesh, PartitionSpec())
    varying = jax.typeof(like).manual_axis_type
    return jax.ShapeDtypeStruct(shape, output.dtype, sharding=sharding, manual_axis_type=varying)
