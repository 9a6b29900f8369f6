"""Softmax attention over the sequence, over the cache of a generated sequence, and over the depths of one token.

The sequence form has one meaning and several backends: `native` is a C++ kernel for CPUs in float32, `blocks` is plain
JAX (flash attention in linear memory, for CPUs without a C++ compiler), `cudnn` and `tokamax` are NVIDIA kernels,
`splash` is the TPU kernel, `dense` writes the T x T matrix out. In all of them query head i reads key/value head
i // (N / K), scores are divided by sqrt(H), and the softmax is in float32.
"""

import math
from typing import Literal, assert_never

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from dreamer_jax.native import kernels as native
from dreamer_jax.sharding import axes_of

AttentionBackend = Literal["native", "blocks", "cudnn", "tokamax", "splash", "dense"]

# Tokens of a query or key block of the `blocks` backend: the scores of a block pair should fit a core's second cache.
BLOCK = 64


def default_backend(platform: str, dtype: DTypeLike) -> AttentionBackend:
    """The backend for a JAX platform ("cpu", "gpu" or "tpu") and compute type; NVIDIA's kernels want 16 bits."""
    if platform == "tpu":
        return "splash"
    if platform in ("gpu", "cuda") and jnp.dtype(dtype).itemsize == 2:
        return "tokamax"
    return "native" if platform == "cpu" and native.computes(dtype) else "blocks"


def attend_sequence(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    *,
    backend: AttentionBackend,
) -> Float[Array, "B T N H"]:
    """Causal attention within each document of packed rows.

    Token t sees the tokens s <= t of its row with the same segment id. The tokens of a document are contiguous; padding
    (segment id 0) attends to itself, so that no row of the softmax is empty.
    """
    if backend == "native":
        return _attend_native(q, k, v, _document_start(segment_ids))
    if backend == "blocks":
        return _attend_blocks(q, k, v, segment_ids)
    if backend == "cudnn":
        return _call_kernel(_attend_cudnn, q, k, v, segment_ids)
    if backend == "tokamax":
        return _attend_tokamax(q, k, v, segment_ids)
    if backend == "splash":
        return _call_kernel(_attend_splash, q, k, v, segment_ids)
    if backend == "dense":
        return attend_cache(q, k.swapaxes(1, 2), v.swapaxes(1, 2), causal_mask(segment_ids))
    assert_never(backend)


def causal_mask(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """True where query t (first T) may see key s (second T): s <= t, in the same document."""
    same_document = segment_ids[:, :, None] == segment_ids[:, None, :]
    return jnp.tril(same_document)


def attend_cache(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    visible: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """Attention of T queries over the entries of a cache that are visible to each; nothing visible gives zeros.

    Keys and values stand head by head, as the products read them: otherwise XLA reorders the cache for every token.
    """
    B, T, N, H = q.shape
    K = k.shape[1]
    rows = q.reshape(B, T, K, -1, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    scores = jnp.einsum("bkqh,bksh->bkqs", rows, k, preferred_element_type=jnp.float32) / math.sqrt(H)
    seen = jnp.tile(visible, (1, N // K, 1))[:, None]
    probabilities = jax.nn.softmax(scores, axis=-1, where=seen).astype(v.dtype)
    out = jnp.einsum("bkqs,bksh->bkqh", probabilities, v, preferred_element_type=jnp.float32)
    out = out.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4)
    return out.reshape(B, T, N, H).astype(q.dtype)


def attend_newest(
    q: Float[Array, "B 1 N H"],
    k: Float[Array, "L B K S H"],
    v: Float[Array, "L B K S H"],
    l: Int[Array, ""],
    lengths: Int[Array, "B"],
    *,
    backend: AttentionBackend,
) -> Float[Array, "B 1 N H"]:
    """Attention of each sequence's newest token over the first `lengths` rows of its cache at depth `l`."""
    if backend == "native":
        return native.attend_cache(q, k, v, l, lengths)
    visible = jnp.arange(k.shape[3])[None, :] < lengths[:, None]
    k, v = (lax.dynamic_index_in_dim(c, l, 0, keepdims=False) for c in (k, v))
    return attend_cache(q, k, v, visible[:, None, :])


def _pad_tokens(x, multiple):
    """Fill axis 1 up to a multiple: the new keys lie after every query, the new queries receive no cotangent."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % multiple)] + [(0, 0)] * (x.ndim - 2))


# ---- native: a C++ kernel


@jax.custom_vjp
def _attend_native(q, k, v, start):
    return native.attend(q, k, v, start)[0]


def _attend_native_forward(q, k, v, start):
    out, lse = checkpoint_name(native.attend(q, k, v, start), "attention")  # as in `_attend_rows_forward`
    return out, (q, k, v, start, out, lse)


def _attend_native_backward(residuals, d_out):
    q, k, v, start, out, lse = residuals
    return *native.attend_gradients(q, k, v, start, out, lse, d_out), None


_attend_native.defvjp(_attend_native_forward, _attend_native_backward)


# ---- blocks: flash attention in plain JAX. A row's keys are visited block by block with a running softmax, so memory
# ---- is linear in T; the backward pass rebuilds the probabilities from q, k and the log-sum-exp. Arrays of one row
# ---- (one batch element) have the shapes q, out [C, K, G c, H] and k, v [C, K, c, H]: C blocks of c tokens, G = N / K,
# ---- and the G query heads of a key/value head stacked along the rows of one matrix.


def _attend_blocks(q, k, v, segment_ids):
    B, T, N, H = q.shape
    K = k.shape[2]
    c = min(BLOCK, T)

    def split(x):  # [B, T, K G, H] -> [B, C, K, G c, H]
        x = _pad_tokens(x, c).reshape(B, -1, c, K, x.shape[2] // K, H)
        return x.transpose(0, 1, 3, 4, 2, 5).reshape(B, x.shape[1], K, -1, H)

    out = _attend_rows(split(q), split(k), split(v), _pad_tokens(segment_ids, c).reshape(B, -1, c))
    out = out.reshape(B, -1, K, N // K, c, H).transpose(0, 1, 4, 2, 3, 5)
    return out.reshape(B, -1, N, H)[:, :T]


@jax.custom_vjp
def _attend_rows(q, k, v, segments):
    return lax.map(lambda row: _row_forward(*row)[0], (q, k, v, segments))


def _attend_rows_forward(q, k, v, segments):
    # What selective remat keeps (recurrence.py): with it, the backward pass does not attend a second time.
    out, lse = checkpoint_name(lax.map(lambda row: _row_forward(*row), (q, k, v, segments)), "attention")
    return out, (q, k, v, segments, out, lse)


def _attend_rows_backward(residuals, d_out):
    d_q, d_k, d_v = lax.map(lambda row: _row_backward(*row), (*residuals, d_out))
    return d_q, d_k, d_v, None


_attend_rows.defvjp(_attend_rows_forward, _attend_rows_backward)


def _first_live_block(segments):
    """For each query block, the first key block whose range of segment ids meets its own: those before hold none of its
    documents. [C, c] -> [C]."""
    ids = jnp.where(segments == 0, jnp.iinfo(segments.dtype).max, segments)  # padding comes last, and so do its ids
    low, high = ids.min(axis=1), ids.max(axis=1)
    return jnp.argmax((low[None, :] <= high[:, None]) & (low[:, None] <= high[None, :]), axis=1)


def _block_scores(q, k, segments, i, j):
    """Scaled scores of query block i against key block j, -inf where hidden: [K, G c, c] in float32."""
    K, rows, H = q.shape
    c = k.shape[1]
    scores = jnp.einsum("kqh,ksh->kqs", q, k) / math.sqrt(H)
    token = jnp.arange(c)
    causal = (i * c + token)[:, None] >= (j * c + token)[None, :]
    visible = causal & (segments[i][:, None] == segments[j][None, :])
    return jnp.where(visible, scores.reshape(K, rows // c, c, c), -jnp.inf).reshape(K, rows, c)


def _row_forward(q, k, v, segments):
    dtype = q.dtype
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    first = _first_live_block(segments)

    def query_block(i):
        def key_block(step, state):  # from the diagonal backwards: the maximum is finite from the first block on
            out, high, total = state
            j = i - step
            scores = _block_scores(q[i], k[j], segments, i, j)
            new_high = jnp.maximum(high, scores.max(axis=-1))
            p = jnp.exp(scores - new_high[..., None])
            shrink = jnp.exp(high - new_high)
            out = out * shrink[..., None] + jnp.einsum("kqs,ksh->kqh", p, v[j])
            return out, new_high, total * shrink + p.sum(axis=-1)

        nothing = jnp.zeros_like(q[0]), jnp.full_like(q[0, :, :, 0], -jnp.inf), jnp.zeros_like(q[0, :, :, 0])
        out, high, total = lax.fori_loop(0, i - first[i] + 1, key_block, nothing)
        return (out / total[..., None]).astype(dtype), high + jnp.log(total)

    return lax.map(query_block, jnp.arange(q.shape[0]))


def _row_backward(q, k, v, segments, out, lse, d_out):
    dtype = q.dtype
    q, k, v, out, d_out = (x.astype(jnp.float32) for x in (q, k, v, out, d_out))
    first = _first_live_block(segments)
    scale = 1 / math.sqrt(q.shape[-1])
    delta = (out * d_out).sum(axis=-1)

    def add_at(x, j, update):
        return lax.dynamic_update_index_in_dim(x, x[j] + update, j, 0)

    def query_block(d_kv, i):
        def key_block(step, state):
            d_q, d_k, d_v = state
            j = i - step
            p = jnp.exp(_block_scores(q[i], k[j], segments, i, j) - lse[i][..., None])
            d_p = jnp.einsum("kqh,ksh->kqs", d_out[i], v[j])
            d_scores = p * (d_p - delta[i][..., None]) * scale
            d_k = add_at(d_k, j, jnp.einsum("kqs,kqh->ksh", d_scores, q[i]))
            d_v = add_at(d_v, j, jnp.einsum("kqs,kqh->ksh", p, d_out[i]))
            return d_q + jnp.einsum("kqs,ksh->kqh", d_scores, k[j]), d_k, d_v

        d_q, d_k, d_v = lax.fori_loop(0, i - first[i] + 1, key_block, (jnp.zeros_like(q[0]), *d_kv))
        return (d_k, d_v), d_q.astype(dtype)

    (d_k, d_v), d_q = lax.scan(query_block, (jnp.zeros_like(k), jnp.zeros_like(v)), jnp.arange(q.shape[0]))
    return d_q, d_k.astype(dtype), d_v.astype(dtype)


# ---- kernels of the accelerators


def _unchecked(function, *arguments):
    """Call what knows nothing of varying axes from inside a shard_map that checks them; elsewhere call it as it is.

    It runs in an inner, unchecked shard_map over no axis; multiplying by one there drops the axes from an array's type,
    and what comes out is marked as varying again.
    """
    axes = axes_of(jax.tree.leaves(arguments)[0])
    if not axes:
        return function(*arguments)
    enter = jax.shard_map(
        lambda *x: function(*jax.tree.map(lambda leaf: leaf * 1, x)),
        in_specs=P(),
        out_specs=P(),
        axis_names=set(),
        check_vma=False,
    )
    return jax.tree.map(lambda x: lax.pcast(x, axes, to="varying"), enter(*arguments))


def _call_kernel(kernel, q, k, v, segment_ids):
    """Call a kernel, and its derivative, unchecked."""
    if not axes_of(q):
        return kernel(q, k, v, segment_ids)

    @jax.custom_vjp
    def call(q, k, v, ids):
        return _unchecked(kernel, q, k, v, ids)

    def forward(q, k, v, ids):
        return _unchecked(lambda q, k, v, ids: jax.vjp(lambda *x: kernel(*x, ids), q, k, v), q, k, v, ids)

    def backward(pull_back, d_out):
        return *_unchecked(lambda pull_back, d_out: pull_back(d_out), pull_back, d_out), None

    call.defvjp(forward, backward)
    return call(q, k, v, segment_ids)


def _attend_cudnn(q, k, v, segment_ids):
    """The flash attention of cuDNN: bfloat16 or float16, H <= 256 and a multiple of 8, even T.

    The documents are a [B, 1, T, T] bias here; `tokamax` needs no mask in memory.
    """
    mask = causal_mask(segment_ids)[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")


def _attend_tokamax(q, k, v, segment_ids):
    """Flash attention of tokamax for NVIDIA: each query has the first key of its document as a lower bound."""
    T = q.shape[1]
    q, k, v, segment_ids = (_pad_tokens(x, 128) for x in (q, k, v, segment_ids))
    return _tokamax(q, k, v, _document_start(segment_ids))[:, :T]


@jax.custom_vjp
def _tokamax(q, k, v, start):
    return _unchecked(_tokamax_forward, q, k, v, start)[0]


def _tokamax_with_residuals(q, k, v, start):
    # Named, for the remat policies: tokamax's own derivative hides from them what it keeps.
    out, residuals = checkpoint_name(_unchecked(_tokamax_forward, q, k, v, start), "attention")
    return out, (q, k, v, start, out, residuals)


def _tokamax_gradients(arrays, d_out):
    return *_unchecked(_tokamax_backward, *arrays, d_out), None


_tokamax.defvjp(_tokamax_with_residuals, _tokamax_gradients)


def _tokamax_forward(q, k, v, start):
    kernel, bound = _tokamax_kernel(q, k, v, start)
    return kernel(*bound.args, **bound.kwargs | {"return_residuals": True})


def _tokamax_backward(q, k, v, start, out, residuals, d_out):
    kernel, bound = _tokamax_kernel(q, k, v, start)
    arguments = {name: value for name, value in bound.kwargs.items() if name != "return_residuals"}
    gradients = kernel.vjp(residuals, out, d_out, *bound.args, **arguments)
    return gradients["q"], gradients["k"], gradients["v"]


def _tokamax_kernel(q, k, v, start):
    """The kernel for the type of q, and the arguments in the form that its derivative takes."""
    try:
        from tokamax._src.ops.attention import api, base  # its public function takes no such bound
    except ImportError as error:
        message = "attention backend 'tokamax' needs the extra dreamer-jax[gpu], and Python 3.12 or newer"
        raise ImportError(message) from error
    kernel = api.IMPLEMENTATIONS["triton" if q.dtype == jnp.float32 else "mosaic_gpu"]
    mask = base.Mask(k_start=start[:, None], is_causal=True)
    return kernel, kernel.bind(q, k, v, mask=mask)


def _document_start(segment_ids):
    """Index of the first token of each token's document: [B, T]."""
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    token = jnp.arange(1, segment_ids.shape[1], dtype=jnp.int32)
    return lax.cummax(jnp.pad(jnp.where(changes, token[None], 0), [(0, 0), (1, 0)]), axis=1)


def _attend_splash(q, k, v, segment_ids, interpret=False):
    """The TPU's splash attention: T and H are padded to multiples of 128, the kernel's tile."""
    B, T, N, H = q.shape
    K = k.shape[2]
    segments = _pad_tokens(segment_ids, 128)
    kernel = _splash_kernel(segments.shape[1], N // K, interpret)

    def heads_first(x):  # [B, T, N, H] -> [B, N, T, H]; zeros in H change no score
        x = jnp.pad(_pad_tokens(x, 128), [(0, 0), (0, 0), (0, 0), (0, -H % 128)])
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


# ---- depth attention


def attend_depth(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    cached_k: Float[Array, "L B T K H"],
    cached_v: Float[Array, "L B T K H"],
    depth: Int[Array, ""],
    *,
    native_kernel: bool = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N L"], tuple[Array, Array, Array, Array]]:
    """Attention of one token over its own depths (Algorithm 1): the cached ones before `depth`, and (k, v) of `depth`.

    Rows >= depth of the cache are ignored, whatever finite values they hold. Also returns the float32 probabilities by
    depth: column `depth` is the token's own entry, the columns after it are zero. The cache is only read, never updated
    or cast here, so a loop over depths that keeps it differentiates in memory linear in L.

    Last come k, v, cached_k and cached_v, unchanged. Where the caller uses these from now on, the CPU's kernel adds its
    gradient of them to that of later uses, in place.
    """
    if native_kernel:
        out, p, *handed_on = _attend_depth_native(q, k, v, cached_k, cached_v, depth)
        return out, p, tuple(handed_on)
    B, T, N, H = q.shape
    out, probabilities = _attend_depth(q.reshape(B, T, k.shape[2], -1, H), k, v, cached_k, cached_v, depth)
    p = jnp.moveaxis(probabilities, 0, -1).reshape(B, T, N, probabilities.shape[0])
    return out.reshape(B, T, N, H), p, (k, v, cached_k, cached_v)


@jax.custom_vjp
def _attend_depth_native(q, k, v, cached_k, cached_v, depth):
    return *native.attend_depth(q, k, v, cached_k, cached_v, depth), cached_k, cached_v


def _attend_depth_native_forward(*arrays):
    out, *others = _attend_depth_native(*arrays)
    # The backward pass makes the probabilities again: kept, they would grow with the square of the depth.
    return (checkpoint_name(out, "attention"), *others), arrays


def _attend_depth_native_backward(arrays, cotangents):
    return *native.attend_depth_gradients(*arrays, *cotangents), None


_attend_depth_native.defvjp(_attend_depth_native_forward, _attend_depth_native_backward)


# Queries of one token are grouped by key/value head: q, out [B, T, K, G, H]; scores, probabilities p [L, B, T, K, G].


def _by_depth(past, own, depth):
    """[L, ...]: `past` in the rows before `depth`, `own` in row `depth`, zero after."""
    row = jnp.arange(past.shape[0]).reshape(-1, *[1] * own.ndim)
    return jnp.where(row < depth, past, jnp.where(row == depth, own[None], 0))


def _before(x, depth):
    return jnp.where(jnp.arange(x.shape[0]).reshape(-1, *[1] * (x.ndim - 1)) < depth, x, 0)


def _score(q, k, cached_k, depth):
    """Products of the token's q with the key of each depth, zero after `depth`: [L, B, T, K, G]."""
    past = jnp.einsum("btkgh,lbtkh->lbtkg", q, cached_k, preferred_element_type=jnp.float32)
    own = jnp.einsum("btkgh,btkh->btkg", q, k, preferred_element_type=jnp.float32)
    return _by_depth(past, own, depth)


def _mix(weights, v, cached_v, depth):
    """Sum over depths of weights [L, B, T, K, G] times values: [B, T, K, G, H] in float32."""
    weights = weights.astype(v.dtype)
    past, own = _before(weights, depth), weights[depth]
    mixed = jnp.einsum("lbtkg,lbtkh->btkgh", past, cached_v, preferred_element_type=jnp.float32)
    return mixed + own[..., None].astype(jnp.float32) * v[..., None, :].astype(jnp.float32)


def _spread(weights, x):
    """Sum over a group of weights [..., K, G] times x [..., K, G, H]: [..., K, H] in float32. An elementwise product (G
    is 1 or small), so that it fuses with the addition to the cache's accumulated gradient."""
    return (weights[..., None] * x.astype(jnp.float32)).sum(axis=-2)


@jax.custom_vjp
def _attend_depth(q, k, v, cached_k, cached_v, depth):
    scores = _score(q, k, cached_k, depth) / math.sqrt(q.shape[-1])
    reached = jnp.arange(scores.shape[0]).reshape(-1, 1, 1, 1, 1) <= depth
    p = jax.nn.softmax(scores, axis=0, where=reached)
    return _mix(p, v, cached_v, depth).astype(q.dtype), p


def _attend_depth_forward(q, k, v, cached_k, cached_v, depth):
    out, p = _attend_depth(q, k, v, cached_k, cached_v, depth)
    return (out, p), (q, k, v, cached_k, cached_v, depth, p)


def _attend_depth_backward(residuals, cotangents):
    q, k, v, cached_k, cached_v, depth, p = residuals
    d_out, d_p = cotangents
    d_p = d_p + _score(d_out, v, cached_v, depth)
    d_scores = p * (d_p - (p * d_p).sum(axis=0, keepdims=True)) / math.sqrt(q.shape[-1])
    d_q = _mix(d_scores, k, cached_k, depth)
    d_k, d_v = _spread(d_scores[depth], q), _spread(p[depth], d_out)
    d_cached_k, d_cached_v = _spread(_before(d_scores, depth), q[None]), _spread(_before(p, depth), d_out[None])
    gradients = d_q, d_k, d_v, d_cached_k, d_cached_v
    return *(d_x.astype(x.dtype) for d_x, x in zip(gradients, residuals, strict=False)), None


_attend_depth.defvjp(_attend_depth_forward, _attend_depth_backward)
