"""Matrix products over rows sorted by expert, for hundreds of small experts.

A mixture of experts sends every token to A of E experts. The way through this file is the way of a token:

    p = plan(ids, experts)                                      # sort the tokens' choices by expert
    rows = dispatch(x, p, active)                               # [tokens, D] -> [R, D], R = tokens * A
    rows = grouped_swiglu(rows, scores, w_gate_up, w_down, p.sizes, backend=...)
    x = collect(rows, p, active)                                # [R, D] -> [tokens, D], the sum of each token's rows

`routed_swiglu` is the last three in one.

No capacity limit drops a token, and nothing here scatters floats: every gather has a gather as its gradient, so results
are the same from run to run. Backends differ in how they multiply, not in what they compute:

    native     C++ kernels for CPUs, float32 (dreamer_jax/native)
    blocks     a loop over blocks of rows that belong to one expert; plain JAX, for CPUs without a compiler, any dtype
    tokamax    tokamax's ragged products: Mosaic or Triton kernels on NVIDIA GPUs, Mosaic on TPUs (optional dependency)
    megablox   JAX's own Pallas kernels for TPUs, interpreted (slowly) where there is no TPU
    dense      every expert on every row in float32: the reference for tests
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dreamer_jax.native import kernels as native
from dreamer_jax.sharding import vary_together

Backend = Literal["native", "blocks", "tokamax", "megablox", "dense"]


class Plan(NamedTuple):
    """The order in which the tokens' choices are processed: sorted by expert, ties in token order.

    Attributes:
        order: sorted row r holds flat choice `order[r]`, which is choice `order[r] % A` of token `order[r] // A`.
        inverse: flat choice c is found in sorted row `inverse[c]`.
        sizes: rows of each expert; they sum to R.
    """

    order: Int[Array, "R"]
    inverse: Int[Array, "R"]
    sizes: Int[Array, "E"]


@jax.named_scope("dispatch")
def plan(ids: Int[Array, "tokens A"], experts: int, *, native_kernel: bool = False) -> Plan:
    """Sort the tokens' choices of experts, stably.

    Args:
        ids: expert of each choice, in [0, experts).
        experts: E.
        native_kernel: count them with the CPU's kernel instead.
    """
    if native_kernel:
        return _native_plan(ids, experts)
    flat = ids.reshape(-1).astype(jnp.int32)
    choices = jnp.zeros_like(flat) + jnp.arange(flat.size, dtype=jnp.int32)
    ranked, order = lax.sort((flat, choices), num_keys=1, is_stable=True)
    inverse = jnp.zeros_like(order).at[order].set(choices, unique_indices=True, mode="promise_in_bounds")
    ends = jnp.searchsorted(ranked, jnp.arange(experts, dtype=jnp.int32), side="right").astype(jnp.int32)
    return Plan(order, inverse, jnp.diff(ends, prepend=jnp.zeros_like(ends[:1])))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _native_plan(ids, experts):
    return Plan(*native.plan(ids, experts))


_native_plan.defvjp(lambda ids, experts: (_native_plan(ids, experts), None), lambda experts, _, d: (None,))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def dispatch(x: Float[Array, "tokens D"], p: Plan, active: int) -> Float[Array, "R D"]:
    """Copy each token to the rows of the experts it chose. `active` is A; its gradient is `collect`."""
    with jax.named_scope("dispatch"):
        return _take(x, p.order // active)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def collect(y: Float[Array, "R D"], p: Plan, active: int) -> Float[Array, "tokens D"]:
    """Add up each token's A rows, in float32, rounded once to the dtype of `y`; its gradient is `dispatch`."""
    with jax.named_scope("combine"):
        choices = _take(y, p.inverse).reshape(-1, active, y.shape[-1])
        return choices.astype(jnp.float32).sum(axis=1).astype(y.dtype)


dispatch.defvjp(lambda x, p, active: (dispatch(x, p, active), p), lambda active, p, d: (collect(d, p, active), None))
collect.defvjp(lambda y, p, active: (collect(y, p, active), p), lambda active, p, d: (dispatch(d, p, active), None))


@jax.custom_vjp
def sort(choices: Float[Array, "R D"], p: Plan) -> Float[Array, "R D"]:
    """Bring one row for each choice, in token order, into sorted order."""
    with jax.named_scope("dispatch"):
        return _take(choices, p.order)


@jax.custom_vjp
def unsort(y: Float[Array, "R D"], p: Plan) -> Float[Array, "R D"]:
    """Bring the rows back to the order of the choices, which for A = 1 is that of the tokens."""
    with jax.named_scope("combine"):
        return _take(y, p.inverse)


sort.defvjp(lambda choices, p: (sort(choices, p), p), lambda p, d: (unsort(d, p), None))
unsort.defvjp(lambda y, p: (unsort(y, p), p), lambda p, d: (sort(d, p), None))


def _take(a, rows):
    return a.at[rows].get(mode="promise_in_bounds")


def default_backend(platform: str, dtype: DTypeLike) -> Backend:
    """The fastest backend of a JAX platform ("cpu", "gpu", "cuda" or "tpu") for a compute type.

    Raises:
        ValueError: the platform has none.
    """
    match platform:
        case "cpu":
            return "native" if native.computes(dtype) else "blocks"
        case "gpu" | "cuda":
            return "tokamax"
        case "tpu":
            return "megablox"
    raise ValueError(f"no grouped matmul for platform {platform!r}; known: cpu, gpu, cuda, tpu")


def pad_experts_for(
    backend: Backend, w_gate_up: Float[Array, "E D G"], w_down: Float[Array, "E F D"]
) -> tuple[Float[Array, "E D H"], Float[Array, "E I D"]]:
    """Widen the experts with zeros to the tile of the kernels: F becomes a multiple of 128. Exact for SwiGLU.

    Call it once per step and outside the depth loop: it copies the weights. `blocks` and `dense` need none.

    Args:
        backend: which kernels will run.
        w_gate_up: [E, D, 2F], the gate's F columns and then the F columns of up; each half is padded by itself.
        w_down: [E, F, D].
    """
    extra = -w_down.shape[1] % 128
    if backend not in ("tokamax", "megablox") or not extra:
        return w_gate_up, w_down
    halves = [jnp.pad(half, ((0, 0), (0, 0), (0, extra))) for half in jnp.split(w_gate_up, 2, axis=2)]
    return jnp.concatenate(halves, axis=2), jnp.pad(w_down, ((0, 0), (0, extra), (0, 0)))


@jax.named_scope("experts")
def grouped_matmul(
    x: Float[Array, "R I"], w: Float[Array, "E I O"], sizes: Int[Array, "E"], *, backend: Backend
) -> Float[Array, "R O"]:
    """Multiply every row with the matrix of its expert.

    Args:
        x: rows sorted by expert.
        w: one matrix per expert.
        sizes: rows of each expert. Rows past their sum belong to none: what comes out for them is undefined.
        backend: see the top of this file.

    Returns:
        The products in the dtype of `x`, accumulated in float32, as are the gradients.

    Raises:
        ImportError: backend "tokamax" without tokamax.
    """
    x, w, sizes = vary_together(x, w, sizes)
    if backend == "dense":
        return _dense_matmul(x, w, sizes)
    if backend == "blocks":
        return _blocks(_matmul, _heights(x.shape[0], w.shape[0]), (x,), (w,), sizes)
    return _kernel(x, w, sizes, backend)


@jax.named_scope("experts")
def grouped_swiglu(
    x: Float[Array, "R D"],
    scores: Float[Array, "R 1"],
    w_gate_up: Float[Array, "E D G"],
    w_down: Float[Array, "E F D"],
    sizes: Int[Array, "E"],
    *,
    backend: Backend,
    all_owned: bool = False,
) -> Float[Array, "R D"]:
    """Send every row through the SwiGLU of its expert, weighted: (score * silu(x W_gate) * (x W_up)) W_down.

    The score multiplies the inner activation, so that no gradient needs the result.

    Args:
        x: rows sorted by expert.
        scores: weight of each row, float32.
        w_gate_up: [E, D, 2F], the gate's F columns and then the F columns of up.
        w_down: [E, F, D].
        sizes: rows of each expert. Rows past their sum belong to none: they come out as zeros.
        backend: see the top of this file.
        all_owned: there are no such rows, and none need to be cleared.

    Raises:
        ImportError: backend "tokamax" without tokamax.
    """
    if backend in ("native", "blocks"):
        x, scores, w_gate_up, w_down, sizes = vary_together(x, scores, w_gate_up, w_down, sizes)
    if backend == "native":
        return _native_swiglu(x, scores, w_gate_up, w_down, sizes, None, 0)[0]
    if backend == "blocks":
        return _blocks(_swiglu, _heights(x.shape[0], sizes.shape[0]), (x, scores), (w_gate_up, w_down), sizes)
    owned = jnp.arange(x.shape[0], dtype=sizes.dtype) < jnp.sum(sizes)

    def cleared(rows: Array) -> Array:
        """Kernels leave garbage in rows that no expert owns. It must not reach a sum, in the gradients neither."""
        return rows if all_owned else jnp.where(owned[:, None], rows, 0)

    x, scores = cleared(x), cleared(scores)
    gate_up = checkpoint_name(grouped_matmul(x, w_gate_up, sizes, backend=backend), "products")
    hidden = (_gate(cleared(gate_up.astype(jnp.float32))) * scores).astype(x.dtype)
    return cleared(grouped_matmul(hidden, w_down, sizes, backend=backend))


def routed_swiglu(
    x: Float[Array, "tokens D"],
    scores: Float[Array, "tokens A"],
    w_gate_up: Float[Array, "E D G"],
    w_down: Float[Array, "E F D"],
    p: Plan,
    *,
    backend: Backend,
) -> tuple[Float[Array, "tokens D"], Float[Array, "E D G"], Float[Array, "E F D"]]:
    """Send every token through the SwiGLUs of its A experts, weighted, and add up: dispatch, experts, collect.

    The experts' weights come back unchanged. Where the caller uses these from now on, `native` adds its gradient of
    them to that of later uses, in place (recurrence.py).
    """
    active, scores = scores.shape[1], sort(scores.reshape(-1, 1), p)
    if backend == "native":  # its kernels gather the tokens themselves
        inputs = vary_together(x, scores, w_gate_up, w_down, *p)
        with jax.named_scope("experts"):
            return _native_swiglu(*inputs[:4], inputs[-1], Plan(*inputs[4:]), active)
    rows = dispatch(x, p, active)
    rows = grouped_swiglu(rows, scores, w_gate_up, w_down, p.sizes, backend=backend, all_owned=True)
    return collect(rows, p, active), w_gate_up, w_down


def _matmul(x, w):
    return x @ w


def _swiglu(x, scores, w_gate_up, w_down):
    return (scores * _gate(x @ w_gate_up)) @ w_down


def _gate(gate_up):
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


# dense: the reference


def _dense_matmul(x, w, sizes):
    """Every expert on every row, in float32; O(E) times the work."""
    expert = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(x.shape[0]), side="right")
    chosen = jax.nn.one_hot(expert, w.shape[0], dtype=jnp.float32)
    products = jnp.einsum("ri,eio->reo", x.astype(jnp.float32), w.astype(jnp.float32), precision="highest")
    return (products * chosen[:, :, None]).sum(axis=1).astype(x.dtype)


# blocks: a loop over the blocks of rows that exist
#
# XLA's CPU dots are fast on tens of rows and slow in bfloat16 or batched over gathered weights. So the loop cuts the
# rows of each expert into blocks, takes the expert's weights once per block, in float32, and computes all that they
# need. A block with few live rows is computed at the least of a few heights (lax.switch) that holds them.


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


def _cut(sizes, rows: int, height: int) -> tuple[_Block, Array]:
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
    blocks, count = _cut(sizes, rows, height)

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
    blocks, count = _cut(sizes, rows, height)

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


# native: the whole SwiGLU in one call; for gradients in two, so that remat can keep what lies between them


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _native_swiglu(x, scores, w_gate_up, w_down, sizes, p, active):
    """Sorted rows to sorted rows; or with their plan `p`, tokens to tokens. And the weights, handed on."""
    y = native.swiglu(x, scores, w_gate_up, w_down, sizes, _tokens(p, active))
    return _collected(y, p, active), w_gate_up, w_down


def _native_swiglu_forward(x, scores, w_gate_up, w_down, sizes, p, active):
    gate_up = native.grouped_product("forward", x, w_gate_up, sizes, _tokens(p, active))
    gate_up = checkpoint_name(gate_up, "products")
    y = _collected(native.gated(gate_up, scores, w_down, sizes), p, active)
    return (y, w_gate_up, w_down), (x, scores, gate_up, w_gate_up, w_down, sizes, p)


def _native_swiglu_backward(active, residuals, cotangents):
    x, scores, gate_up, w_gate_up, w_down, sizes, p = residuals
    d_y, *d_weights = cotangents
    inputs = x, scores, gate_up, w_gate_up, w_down, d_y, *d_weights, sizes, _tokens(p, active)
    d_x, *others = native.swiglu_gradients(*inputs)
    return _collected(d_x, p, active), *others, None, None


_native_swiglu.defvjp(_native_swiglu_forward, _native_swiglu_backward)


def _tokens(p: Plan | None, active: int) -> Array | None:
    return None if p is None else p.order // active


@jax.named_scope("combine")
def _collected(rows, p: Plan | None, active: int):
    return rows if p is None else native.collect(rows, p.inverse, active)


# native, tokamax and megablox: kernels
#
# A kernel library offers the three products of a linear map and its gradient:
#   forward  [R, I] x [E, I, O] -> [R, O]     d_x  [R, O] x [E, I, O] -> [R, I]     d_w  [R, I] x [R, O] -> [E, I, O]


Product = Literal["forward", "d_x", "d_w"]
TOKAMAX_IMPLEMENTATIONS = ("mosaic", "triton")  # never its "xla", whose cost grows with the number of experts


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _kernel(x, w, sizes, backend: Backend):
    return _product(backend, "forward")(x, w, sizes)


def _kernel_forward(x, w, sizes, backend):
    return _kernel(x, w, sizes, backend), (x, w, sizes)


def _kernel_backward(backend, residuals, d_y):
    x, w, sizes = residuals
    return _product(backend, "d_x")(d_y, w, sizes), _product(backend, "d_w")(x, d_y, sizes), None


_kernel.defvjp(_kernel_forward, _kernel_backward)


def _product(backend: Backend, product: Product) -> Callable[..., Array]:
    if backend == "native":
        return partial(native.grouped_product, product)
    return partial(_unchecked, partial({"tokamax": _tokamax, "megablox": _megablox}[backend], product))


def _unchecked(f: Callable[..., Array], *args):
    """Call kernels, which neither declare the mesh axes their results vary over nor keep to strict promotion."""

    def standard(*args):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return f(*args)

    if not jax.sharding.get_abstract_mesh().manual_axes:
        return standard(*args)
    spec = PartitionSpec()
    inner = jax.shard_map(standard, in_specs=(spec,) * len(args), out_specs=spec, axis_names=set(), check_vma=False)
    return vary_together(inner(*args), *args)[0]


def _tokamax(product: Product, a, b, sizes):
    try:
        import tokamax
        from absl import flags
    except ImportError as error:
        message = "backend 'tokamax' needs tokamax: pip install 'dreamer-jax[gpu]' (or [tpu]), Python 3.12 or newer"
        raise ImportError(message) from error
    if not flags.FLAGS.is_parsed():  # else tokamax would parse our command line and stop at the first option of ours
        flags.FLAGS.mark_as_parsed()
    contract: dict[Product, tuple[list[int], list[int]]] = {"forward": ([1], [1]), "d_x": ([1], [2]), "d_w": ([0], [0])}
    dimensions = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(contract[product], ([], [])),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[] if product == "d_w" else [0],
    )
    return tokamax.ragged_dot_general(
        a,
        b,
        group_sizes=sizes,
        ragged_dot_dimension_numbers=dimensions,
        preferred_element_type=a.dtype,
        implementation=TOKAMAX_IMPLEMENTATIONS,
    )


def _megablox(product: Product, a, b, sizes):
    """Compiled for TPUs and interpreted elsewhere, decided at lowering: programs for absent TPUs compile, too."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

    rows, tile = a.shape[0], 128
    a = jnp.pad(a, ((0, -rows % tile), (0, 0)))
    if product == "d_w":
        a, b = a.T, jnp.pad(b, ((0, -rows % tile), (0, 0)))

    def run(a, b, sizes, interpret: bool):
        tiling = tile, _tile(a.shape[0 if product == "d_w" else 1]), _tile(b.shape[1 if product != "forward" else 2])
        if product == "d_w":
            return tgmm(a, b, sizes, a.dtype, tiling, interpret=interpret)
        return gmm(a, b, sizes, a.dtype, tiling, transpose_rhs=product == "d_x", interpret=interpret)[:rows]

    branches = {"tpu": partial(run, interpret=False), "default": partial(run, interpret=True)}
    return lax.platform_dependent(a, b, sizes, **branches)


def _tile(width: int) -> int:
    """The widest of the kernel's tiles that a width fills: wide tiles read the weights of a small expert at once."""
    return next((tile for tile in (512, 256) if width % tile == 0), 128)
