"""The C++ kernels as JAX functions of float32 arrays, without derivatives; those are kernels of their own."""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dreamer_jax.native import library
from dreamer_jax.sharding import vary_together


def computes(dtype: DTypeLike) -> bool:
    """Whether there are kernels for this compute type on this machine."""
    return jnp.dtype(dtype) == jnp.float32 and library.missing() is None


def grouped_product(
    product: Literal["forward", "d_x", "d_w"],
    a: Float[Array, "rows I"],
    b: Float[Array, "..."],
    sizes: Int[Array, "E"],
    tokens: Int[Array, "R"] | None = None,
) -> Float[Array, "..."]:
    """One of the products of a linear map of every expert (grouped.cc); rows of no expert come out as zeros.

    Args:
        product: forward [R, I] x [E, I, O] -> [R, O], d_x [R, O] x [E, I, O] -> [R, I], or
            d_w [R, I] x [R, O] -> [E, I, O].
        a: rows sorted by expert.
        b: the experts' matrices, or for d_w rows.
        sizes: rows of each expert, int32.
        tokens: with "forward", sorted row r is a copy of row tokens[r] of `a`.
    """
    match product:
        case "forward":
            count = a.shape[0] if tokens is None else tokens.size
            return _call("grouped_forward", [(count, b.shape[2])], a, b, sizes, _or_none(tokens))[0]
        case "d_x":
            return _call("grouped_inputs_gradient", [(a.shape[0], b.shape[1])], a, b, sizes)[0]
        case "d_w":
            return _call("grouped_weights_gradient", [(sizes.shape[0], a.shape[1], b.shape[1])], a, b, sizes)[0]


def linear(
    x: Float[Array, "tokens I"],
    scores: Float[Array, "tokens"],
    w: Float[Array, "E I O"],
    sizes: Int[Array, "E"],
    order: Int[Array, "tokens"],
) -> Float[Array, "tokens O"]:
    """Weighted linear experts, one for each token: score * (x W). `order` lists the tokens sorted by expert."""
    return _call("grouped_linear", [(x.shape[0], w.shape[2])], x, scores, w, sizes, order)[0]


def linear_gradients(
    x: Float[Array, "tokens I"],
    scores: Float[Array, "tokens"],
    w: Float[Array, "E I O"],
    d_y: Float[Array, "tokens O"],
    d_w: Float[Array, "E I O"],
    sizes: Int[Array, "E"],
    order: Int[Array, "tokens"],
) -> Sequence[Array]:
    """The gradients of `linear` for x, scores and w; that of w is added to `d_w`, whose memory it takes over."""
    shapes = [a.shape for a in (x, scores, w)]
    return _call("grouped_linear_gradients", shapes, x, scores, w, d_y, d_w, sizes, order, in_place={4: 2})


def swiglu(
    x: Float[Array, "rows D"],
    scores: Float[Array, "R 1"],
    w_gate_up: Float[Array, "E D G"],
    w_down: Float[Array, "E F D"],
    sizes: Int[Array, "E"],
    tokens: Int[Array, "R"] | None = None,
) -> Float[Array, "R D"]:
    """Send every row through its expert: (score * silu(x W_gate) * (x W_up)) W_down.

    Rows are sorted by expert; with `tokens`, sorted row r is a copy of row tokens[r] of x.
    """
    shape = scores.shape[0], x.shape[1]
    return _call("grouped_swiglu", [shape], x, scores, w_gate_up, w_down, sizes, _or_none(tokens))[0]


def gated(
    gate_up: Float[Array, "R G"], scores: Float[Array, "R 1"], w_down: Float[Array, "E F D"], sizes: Int[Array, "E"]
) -> Float[Array, "R D"]:
    """The second half of `swiglu`, from gate_up = x [W_gate W_up]."""
    return _call("grouped_gated", [(gate_up.shape[0], w_down.shape[2])], gate_up, scores, w_down, sizes)[0]


def swiglu_gradients(
    x: Float[Array, "rows D"],
    scores: Float[Array, "R 1"],
    gate_up: Float[Array, "R G"],
    w_gate_up: Float[Array, "E D G"],
    w_down: Float[Array, "E F D"],
    d_y: Float[Array, "rows D"],
    d_w_gate_up: Float[Array, "E D G"],
    d_w_down: Float[Array, "E F D"],
    sizes: Int[Array, "E"],
    tokens: Int[Array, "R"] | None = None,
) -> Sequence[Array]:
    """The gradients of `swiglu` for x (one for each sorted row), scores, w_gate_up and w_down.

    gate_up is x [W_gate W_up]; with `tokens`, d_y lies in the order of x, too. Those of the weights are added to
    `d_w_gate_up` and `d_w_down`, whose memory they take over.
    """
    shapes = [(scores.shape[0], x.shape[1]), *(a.shape for a in (scores, w_gate_up, w_down))]
    inputs = x, scores, gate_up, w_gate_up, w_down, d_y, d_w_gate_up, d_w_down, sizes, _or_none(tokens)
    return _call("grouped_swiglu_gradients", shapes, *inputs, in_place={6: 2, 7: 3})


def collect(rows: Float[Array, "R D"], inverse: Int[Array, "R"], active: int) -> Float[Array, "tokens D"]:
    """The sum of each token's rows; flat choice c of `active` for each token is found in row inverse[c]."""
    return _call("grouped_collect", [(inverse.size // active, rows.shape[1])], rows, inverse)[0]


def _or_none(tokens: Int[Array, "R"] | None) -> Int[Array, "R"]:
    return jnp.zeros(0, jnp.int32) if tokens is None else tokens


def route(
    query: Float[Array, "tokens R"],
    keys: Float[Array, "E R"],
    bias: Float[Array, "E"],
    counted: Int[Array, "tokens"],
    active: int,
) -> Sequence[Array]:
    """The experts that query . key / sqrt(R) + bias selects, best first.

    Returns:
        ids [tokens, A] int32, their scores (sigmoid without bias) [tokens, A], the selections of each expert by tokens
        whose `counted` is 1 [E] int32, and the entropy of each token's normalised scores over all experts [tokens].
    """
    ids = jax.ShapeDtypeStruct((query.shape[0], active), jnp.int32)
    counts = jax.ShapeDtypeStruct(bias.shape, jnp.int32)
    return _call("route", [ids, ids.shape, counts, query.shape[:1]], query, keys, bias, counted)


def route_gradients(
    query: Float[Array, "tokens R"],
    keys: Float[Array, "E R"],
    ids: Int[Array, "tokens A"],
    scores: Float[Array, "tokens A"],
    d_scores: Float[Array, "tokens A"],
) -> Sequence[Array]:
    """The gradients of the scores of `route` for query and keys."""
    return _call("route_gradients", [query.shape, keys.shape], query, keys, ids, scores, d_scores)


def plan(ids: Int[Array, "tokens A"], experts: int) -> Sequence[Array]:
    """Choices sorted by expert, stably: order [tokens A], its inverse, and the choices of each expert [E], int32."""
    shapes = [(ids.size,), (ids.size,), (experts,)]
    return _call("route_plan", [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes], ids)


def attend(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], start: Int[Array, "B T"]
) -> Sequence[Array]:
    """Causal attention: out [B, T, N, H], log-sum-exp [B, N, T]. `start`: the first token of each one's document."""
    B, T, N, _ = q.shape
    return _call("attend_forward", [q.shape, (B, N, T)], q, k, v, start)


def attend_gradients(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    start: Int[Array, "B T"],
    out: Float[Array, "B T N H"],
    lse: Float[Array, "B N T"],
    d_out: Float[Array, "B T N H"],
) -> Sequence[Array]:
    """The gradients of `attend` for q, k and v."""
    return _call("attend_backward", [q.shape, k.shape, v.shape], q, k, v, start, out, lse, d_out)


def attend_cache(
    q: Float[Array, "B 1 N H"],
    k: Float[Array, "L B K S H"],
    v: Float[Array, "L B K S H"],
    l: Int[Array, ""],
    lengths: Int[Array, "B"],
) -> Float[Array, "B 1 N H"]:
    """Attention of each sequence's newest token over the first `lengths` rows of its cache at depth `l`."""
    return _call("attend_cache", [q.shape], q, k, v, l, lengths)[0]


def attend_depth(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    cached_k: Float[Array, "L B T K H"],
    cached_v: Float[Array, "L B T K H"],
    depth: Int[Array, ""],
) -> Sequence[Array]:
    """Attention over a token's depths, the cached ones before `depth` and its own.

    Returns:
        out [B, T, N, H], probabilities [B, T, N, L], and k and v in their own memory: what is made of these is made
        after the cache has been read, so that it can be written to without a copy.
    """
    shapes = [q.shape, (*q.shape[:3], cached_k.shape[0]), k.shape, v.shape]
    return _call("depth_forward", shapes, q, k, v, cached_k, cached_v, depth, in_place={1: 2, 2: 3})


def attend_depth_gradients(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    cached_k: Float[Array, "L B T K H"],
    cached_v: Float[Array, "L B T K H"],
    depth: Int[Array, ""],
    d_out: Float[Array, "B T N H"],
    d_probabilities: Float[Array, "B T N L"],
    d_k: Float[Array, "B T K H"],
    d_v: Float[Array, "B T K H"],
    d_cached_k: Float[Array, "L B T K H"],
    d_cached_v: Float[Array, "L B T K H"],
) -> Sequence[Array]:
    """The gradients of `attend_depth` for q, k, v and the cache.

    Those of all but q are added to `d_k`, `d_v`, `d_cached_k` and `d_cached_v`, whose memory they take over.
    """
    arrays = q, k, v, cached_k, cached_v
    given = d_k, d_v, d_cached_k, d_cached_v
    inputs = *arrays, depth, d_out, d_probabilities, *given
    return _call("depth_backward", [a.shape for a in arrays], *inputs, in_place={8: 1, 9: 2, 10: 3, 11: 4})


def norm_and_rotate(
    x: Float[Array, "tokens heads H"],
    weight: Float[Array, "H"],
    cos: Float[Array, "#tokens half"],
    sin: Float[Array, "#tokens half"],
    epsilon: float,
) -> Float[Array, "tokens heads H"]:
    """RMSNorm of every head, then RoPE."""
    return _call("heads_forward", [x.shape], x, weight, cos, sin, epsilon=np.float32(epsilon))[0]


def norm_and_rotate_gradients(
    x: Float[Array, "tokens heads H"],
    weight: Float[Array, "H"],
    cos: Float[Array, "#tokens half"],
    sin: Float[Array, "#tokens half"],
    d_y: Float[Array, "tokens heads H"],
    epsilon: float,
) -> Sequence[Array]:
    """The gradients of `norm_and_rotate` for x and weight."""
    return _call("heads_backward", [x.shape, weight.shape], x, weight, cos, sin, d_y, epsilon=np.float32(epsilon))


def fused_heads(
    fused: Float[Array, "tokens heads H"],
    q_weight: Float[Array, "H"],
    k_weight: Float[Array, "H"],
    cos: Float[Array, "#tokens half"],
    sin: Float[Array, "#tokens half"],
    kv_heads: int,
    epsilon: float,
) -> Sequence[Array]:
    """Fused heads taken apart: q and k normalised and rotated, v as it is; the last 2 * `kv_heads` are k's and v's."""
    tokens, heads, size = fused.shape
    kv = tokens, kv_heads, size
    shapes = [(tokens, heads - 2 * kv_heads, size), kv, kv]
    return _call("fused_heads_forward", shapes, fused, q_weight, k_weight, cos, sin, epsilon=np.float32(epsilon))


def fused_heads_gradients(
    fused: Float[Array, "tokens heads H"],
    q_weight: Float[Array, "H"],
    k_weight: Float[Array, "H"],
    cos: Float[Array, "#tokens half"],
    sin: Float[Array, "#tokens half"],
    d_q: Float[Array, "tokens N H"],
    d_k: Float[Array, "tokens K H"],
    d_v: Float[Array, "tokens K H"],
    epsilon: float,
) -> Sequence[Array]:
    """The gradients of `fused_heads` for the heads and both weights."""
    inputs = fused, q_weight, k_weight, cos, sin, d_q, d_k, d_v
    shapes = [a.shape for a in inputs[:3]]
    return _call("fused_heads_backward", shapes, *inputs, epsilon=np.float32(epsilon))


def _call(
    function: str,
    results: Sequence[tuple[int, ...] | jax.ShapeDtypeStruct],
    *arrays: Array,
    in_place: dict[int, int] | None = None,
    **attributes: np.float32,
) -> Sequence[Array]:
    """Call a kernel, whose results are float32 where only a shape is given.

    `in_place` gives the arrays whose memory results take over.

    Raises:
        ImportError: there are no native kernels here.
        TypeError: an array that is neither float32 nor int32.
    """
    if reason := library.missing():
        raise ImportError(f"backend 'native': {reason}\nUse 'blocks' instead, or install g++ 12, clang 11 or newer.")
    for array in arrays:
        if array.dtype not in (jnp.float32, jnp.int32):
            raise TypeError(f"the native kernels compute in float32, not in {array.dtype}: use backend 'blocks'")
    arrays = tuple(vary_together(*arrays))
    types = [_result(result, arrays[0]) for result in results]
    return jax.ffi.ffi_call(f"dreamer_{function}", types, input_output_aliases=in_place)(*arrays, **attributes)


def _result(result: tuple[int, ...] | jax.ShapeDtypeStruct, like: Array) -> jax.ShapeDtypeStruct:
    """The type of a result that, inside shard_map, varies over the mesh axes of `like`."""
    plain = jax.ShapeDtypeStruct(result, jnp.float32) if isinstance(result, tuple) else result
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.axis_names:
        return plain
    sharding = NamedSharding(mesh, PartitionSpec())
    varying = jax.typeof(like).manual_axis_type
    return jax.ShapeDtypeStruct(plain.shape, plain.dtype, sharding=sharding, manual_axis_type=varying)
