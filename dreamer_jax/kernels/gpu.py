"""Operations on NVIDIA GPUs: tokamax's attention and grouped products, plain JAX for the rest.

tokamax is an optional dependency, imported when one of its kernels is first used.
"""

from functools import partial
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from dreamer_jax.kernels import products, rows
from dreamer_jax.kernels.documents import document_start, pad_tokens
from dreamer_jax.kernels.interface import Implementation
from dreamer_jax.kernels.plain import attention, depths, heads, routing
from dreamer_jax.kernels.products import Product
from dreamer_jax.kernels.unchecked import unchecked

MISSING = "kernels 'gpu' need tokamax: pip install 'dreamer-jax[gpu]', with Python 3.12 or newer"

PRODUCTS = ("mosaic", "triton")
"""Implementations of tokamax's grouped products; never its "xla", whose cost grows with the number of experts."""


# Attention: each query has the first key of its document as a lower bound.


def attend_sequence(q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
    """`Kernels.attend_sequence`: by tokamax in 16 bits, which NVIDIA's kernels want; else by plain JAX."""
    if q.dtype.itemsize != 2:
        return attention.attend_sequence(q, k, v, segment_ids)
    T = q.shape[1]
    q, k, v, segment_ids = (pad_tokens(x, 128) for x in (q, k, v, segment_ids))
    return _attend(q, k, v, document_start(segment_ids))[:, :T]


@jax.custom_vjp
def _attend(q, k, v, start):
    return unchecked(_with_residuals, q, k, v, start)[0]


def _attend_forward(q, k, v, start):
    # Named, for the remat policies: tokamax's own derivative hides from them what it keeps.
    out, residuals = checkpoint_name(unchecked(_with_residuals, q, k, v, start), "attention")
    return out, (q, k, v, start, out, residuals)


def _attend_backward(arrays, d_out):
    return *unchecked(_gradients, *arrays, d_out), None


_attend.defvjp(_attend_forward, _attend_backward)


def _with_residuals(q, k, v, start):
    kernel, bound = _attention_kernel(q, k, v, start)
    return kernel(*bound.args, **bound.kwargs | {"return_residuals": True})


def _gradients(q, k, v, start, out, residuals, d_out):
    kernel, bound = _attention_kernel(q, k, v, start)
    arguments = {name: value for name, value in bound.kwargs.items() if name != "return_residuals"}
    gradients = kernel.vjp(residuals, out, d_out, *bound.args, **arguments)
    return gradients["q"], gradients["k"], gradients["v"]


def _attention_kernel(q: Array, k: Array, v: Array, start: Array) -> tuple[Any, Any]:
    """The kernel of tokamax, and the arguments in the form that its derivative takes."""
    try:
        from tokamax._src.ops.attention import api, base  # its public function takes no such bound
    except ImportError as error:
        raise ImportError(MISSING) from error
    kernel = api.IMPLEMENTATIONS["mosaic_gpu"]
    mask = base.Mask(k_start=start[:, None], is_causal=True)
    return kernel, kernel.bind(q, k, v, mask=mask)


# Grouped products


def _product(product: Product, a: Array, b: Array, sizes: Array) -> Array:
    try:
        import tokamax
        from absl import flags
    except ImportError as error:
        raise ImportError(MISSING) from error
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
        implementation=PRODUCTS,
    )


GPU = Implementation(
    name="gpu",
    norm_and_rotate=heads.norm_and_rotate,
    fused_heads=heads.fused_heads,
    route=partial(routing.route, best=routing.best_by_passes),
    order=rows.order,
    linear=partial(products.linear, _product),
    swiglu=partial(products.swiglu, _product),
    sorted_swiglu=partial(products.sorted_swiglu, _product),
    attend_sequence=attend_sequence,
    attend_newest=attention.attend_newest,
    attend_depths=depths.attend_depths,
    expert_tile=128,
)
