"""Operations on TPUs: splash attention and megablox's grouped products, which come with JAX; plain JAX for the rest."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jaxtyping import Array

from dreamer_jax.kernels import products, rows
from dreamer_jax.kernels.documents import pad_tokens
from dreamer_jax.kernels.interface import Implementation
from dreamer_jax.kernels.plain import attention, depths, heads, routing
from dreamer_jax.kernels.products import Product
from dreamer_jax.kernels.unchecked import unchecked
from dreamer_jax.sharding import axes_of

TILE = 128
"""What the kernels' sizes must be multiples of."""


# Attention


def attend_sequence(q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
    """`Kernels.attend_sequence`; inside a shard_map the kernel and its derivative are called unchecked."""
    if not axes_of(q):
        return _splash(q, k, v, segment_ids)

    @jax.custom_vjp
    def attend(q, k, v, ids):
        return unchecked(_splash, q, k, v, ids)

    def forward(q, k, v, ids):
        return unchecked(lambda q, k, v, ids: jax.vjp(lambda q, k, v: _splash(q, k, v, ids), q, k, v), q, k, v, ids)

    def backward(pull_back, d_out):
        return *unchecked(lambda pull_back, d_out: pull_back(d_out), pull_back, d_out), None

    attend.defvjp(forward, backward)
    return attend(q, k, v, segment_ids)


def _splash(q: Array, k: Array, v: Array, segment_ids: Array, interpret: bool = False) -> Array:
    """Pad T and H to whole tiles; zeros in H change no score."""
    B, T, N, H = q.shape
    K = k.shape[2]
    segments = pad_tokens(segment_ids, TILE)
    kernel = _splash_kernel(segments.shape[1], N // K, interpret)

    def heads_first(x):  # [B, T, N, H] -> [B, N, T, H]
        x = jnp.pad(pad_tokens(x, TILE), [(0, 0), (0, 0), (0, 0), (0, -H % TILE)])
        return x.transpose(0, 2, 1, 3)

    def attend_row(q, k, v, ids):
        return jax.vmap(kernel, in_axes=(0, 0, 0, None))(q, k, v, splash.SegmentIds(ids, ids))

    query = heads_first(q / math.sqrt(H))
    query = query.reshape(B, K, N // K, *query.shape[2:])
    out = jax.vmap(attend_row)(query, heads_first(k), heads_first(v), segments)
    return out.reshape(B, N, *out.shape[3:])[:, :, :T, :H].transpose(0, 2, 1, 3).astype(q.dtype)


def _splash_kernel(T, group, interpret):
    b = max(size for size in (128, 256, 512) if T % size == 0)
    sizes = splash.BlockSizes(b, b, b, b, b, b, block_q_dq=b, block_kv_dq=b)
    mask = splash.MultiHeadMask([splash.CausalMask((T, T))] * group)
    return splash.make_splash_mqa_single_device(
        mask, block_sizes=sizes, interpret=interpret, residual_checkpoint_name="attention"
    )


# Grouped products


def _product(product: Product, a: Array, b: Array, sizes: Array) -> Array:
    """Compiled for TPUs and interpreted elsewhere, decided at lowering: programs for absent TPUs compile, too."""
    rows = a.shape[0]
    a = jnp.pad(a, ((0, -rows % TILE), (0, 0)))
    if product == "d_w":
        a, b = a.T, jnp.pad(b, ((0, -rows % TILE), (0, 0)))

    def run(a, b, sizes, interpret: bool):
        tiling = TILE, _tile(a.shape[0 if product == "d_w" else 1]), _tile(b.shape[1 if product != "forward" else 2])
        if product == "d_w":
            return tgmm(a, b, sizes, a.dtype, tiling, interpret=interpret)
        return gmm(a, b, sizes, a.dtype, tiling, transpose_rhs=product == "d_x", interpret=interpret)[:rows]

    branches = {"tpu": partial(run, interpret=False), "default": partial(run, interpret=True)}
    return lax.platform_dependent(a, b, sizes, **branches)


def _tile(width: int) -> int:
    """The widest of the kernel's tiles that a width fills: wide tiles read the weights of a small expert at once."""
    return next((tile for tile in (512, 256) if width % tile == 0), TILE)


TPU = Implementation(
    name="tpu",
    norm_and_rotate=heads.norm_and_rotate,
    fused_heads=heads.fused_heads,
    route=routing.route,
    order=rows.order,
    linear=partial(products.linear, _product),
    swiglu=partial(products.swiglu, _product),
    sorted_swiglu=partial(products.sorted_swiglu, _product),
    attend_sequence=attend_sequence,
    attend_newest=attention.attend_newest,
    attend_depths=depths.attend_depths,
    expert_tile=TILE,
)
