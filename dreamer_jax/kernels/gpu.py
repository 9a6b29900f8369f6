"""Operations on NVIDIA GPUs: tokamax's attention and grouped products, plain JAX for the rest.

tokamax is an optional dependency, imported when one of its kernels is first used.
"""

import functools
import logging
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from dreamer_jax.kernels import blocks, products, rows
from dreamer_jax.kernels.documents import document_start, pad_tokens
from dreamer_jax.kernels.interface import Implementation
from dreamer_jax.kernels.plain import attention, depths, heads, routing
from dreamer_jax.kernels.products import Product
from dreamer_jax.kernels.unchecked import unchecked

MISSING = "kernels 'gpu' need tokamax: pip install 'dreamer-jax[gpu]', with Python 3.12 or newer"


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

_TILES: dict[Product, dict[str, int]] = {
    "forward": {"block_m": 128, "block_n": 128, "block_k": 64, "num_stages": 3},
    "d_x": {"block_m": 128, "block_n": 128, "block_k": 64, "num_stages": 3},
    "d_w": {"block_m": 64, "block_n": 256, "block_k": 64, "num_stages": 4},
}
"""On Hopper, where tokamax's own choices are slower and, for `d_w`, wrong; see gradient_of_weights_holds."""
_TRIED_ROWS, _ROUNDING = 32768, 2**-6
_ROW_TILE = 128
"""The gradient of the weights wants its rows in whole tiles."""


def _product(product: Product, a: Array, b: Array, sizes: Array) -> Array:
    """By tokamax in 16 bits, where it has this product for this GPU and has it right; else in blocks of rows."""
    if a.dtype.itemsize != 2:
        return blocks.product(product, a, b, sizes)
    try:
        if product != "d_w" or gradient_of_weights_holds():
            return _by_tokamax(product, a, b, sizes)
    except NotImplementedError:  # GPUs older than Hopper have the forward product only
        pass
    return blocks.product(product, a, b, sizes)


def _by_tokamax(product: Product, a: Array, b: Array, sizes: Array) -> Array:
    kernel = _product_kernel(product)
    contract: dict[Product, tuple[list[int], list[int]]] = {"forward": ([1], [1]), "d_x": ([1], [2]), "d_w": ([0], [0])}
    dimensions = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(contract[product], ([], [])),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[] if product == "d_w" else [0],
    )
    if product == "d_w":
        a, b = (jnp.pad(x, ((0, -x.shape[0] % _ROW_TILE), (0, 0))) for x in (a, b))
    return kernel(a, b, group_sizes=sizes, ragged_dot_dimension_numbers=dimensions, preferred_element_type=a.dtype)


def _product_kernel(product: Product) -> Any:
    """The kernel of tokamax, with our tiles on Hopper."""
    try:
        from absl import flags
        from tokamax._src import gpu_utils
        from tokamax._src.ops.ragged_dot import api, pallas_mosaic_gpu_common
    except ImportError as error:
        raise ImportError(MISSING) from error
    if not flags.FLAGS.is_parsed():  # else tokamax would parse our command line and stop at the first option of ours
        flags.FLAGS.mark_as_parsed()
    logging.getLogger("absl").addFilter(_no_autotuning_cache)
    kernel = api.IMPLEMENTATIONS["mosaic_gpu"]
    if not gpu_utils.is_sm90():
        return kernel
    minor = pallas_mosaic_gpu_common.MatmulDimension.M
    tiles = pallas_mosaic_gpu_common.Config(**_TILES[product], split_k=1, persistent=False, grid_minor_dim=minor)
    return kernel.replace(config=tiles)


@functools.cache
def gradient_of_weights_holds() -> bool:
    """Whether tokamax's gradient of the experts' weights is right on this GPU; tried once, on a few thousand rows.

    That of tokamax 0.0.17 has a race: on an H200, most tiles, its own among them, give entries that are off by up to
    two fifths of the largest, and others at the next call. Which tiles are right may change with any library.
    """
    if jax.local_devices()[0].platform != "gpu":  # compiling for a GPU that is absent
        return True
    with ThreadPoolExecutor(1) as thread:  # which is not in the middle of tracing something, as this one is
        error = thread.submit(_error_of_weight_gradient).result()
    holds = error <= _ROUNDING
    if not holds:
        warnings.warn(
            f"tokamax's gradient of the experts' weights is off by {error:.0e} of the largest on this GPU: computed in "
            "blocks of rows instead, which is slower",
            stacklevel=2,
        )
    return holds


def _error_of_weight_gradient() -> float:
    """The largest difference from plain JAX, over the largest entry, of the worst of three calls."""
    sizes = jnp.asarray(np.random.default_rng(0).multinomial(_TRIED_ROWS, np.full(64, 1 / 64)), jnp.int32)
    keys = jax.random.split(jax.random.key(0))
    x, d_y = (jax.random.normal(key, (_TRIED_ROWS, 512), jnp.bfloat16) for key in keys)
    wanted = jax.jit(partial(blocks.product, "d_w"))(x, d_y, sizes).astype(jnp.float32)
    run = jax.jit(partial(_by_tokamax, "d_w"))
    errors = [jnp.max(jnp.abs(run(x, d_y, sizes).astype(jnp.float32) - wanted)) for _ in range(3)]
    return float(jnp.max(jnp.stack(errors)) / jnp.max(jnp.abs(wanted)))


def _no_autotuning_cache(record: logging.LogRecord) -> bool:
    """Tokamax warns of every shape that it has no measured configuration for."""
    return not record.getMessage().startswith("Autotuning cache miss")


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
