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


def _or_none(tokens: Int[Array, "R"] | None) -> Int[Array, "R"]:
    return jnp.zeros(0, jnp.int32) if tokens is None else tokens


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


def _call(
    function: str,
    shapes: Sequence[tuple[int, ...]],
    *arrays: Array,
    in_place: dict[int, int] | None = None,
    **attributes: np.float32,
) -> Sequence[Array]:
    """Call a kernel, whose results are float32; `in_place` gives the arrays whose memory results take over.

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
    results = [_result(shape, arrays[0]) for shape in shapes]
    return jax.ffi.ffi_call(f"dreamer_{function}", results, input_output_aliases=in_place)(*arrays, **attributes)


def _result(shape: tuple[int, ...], like: Array) -> jax.ShapeDtypeStruct:
    """A float32 result that, inside shard_map, varies over the mesh axes of `like`."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.axis_names:
        return jax.ShapeDtypeStruct(shape, jnp.float32)
    sharding = NamedSharding(mesh, PartitionSpec())
    varying = jax.typeof(like).manual_axis_type
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding, manual_axis_type=varying)
