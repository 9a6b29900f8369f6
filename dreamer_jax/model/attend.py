"""Softmax attention over the sequence, over the cache of a generated sequence, and over the depths of one token.

The sequence form has one meaning and several backends: `blocks` is plain JAX (flash attention in linear memory, made
for CPUs), `cudnn` and `tokamax` are NVIDIA kernels, `splash` is the TPU kernel, and `dense` writes the T x T matrix out.
In all of them query head i reads key/value head i // (N / K), scores are divided by sqrt(H), and the softmax is float32.
"""

import functools
import math
from typing import Literal, assert_never

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

AttentionBackend = Literal["blocks", "cudnn", "tokamax", "splash", "dense"]

# Tokens of a query or key block of the `blocks` backend.
BLOCK = 128


def default_backend(platform: str) -> AttentionBackend:
    """The fastest backend that needs no extra package on a JAX platform ("cpu", "gpu" or "tpu")."""
    backends: dict[str, AttentionBackend] = {"gpu": "cudnn", "cuda": "cudnn", "tpu": "splash"}
    return backends.get(platform, "blocks")


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
    if backend == "blocks":
        return _attend_blocks(q, k, v, segment_ids)
    if backend == "cudnn":
        return _attend_cudnn(q, k, v, segment_ids)
    if backend == "tokamax":
        return _attend_tokamax(q, k, v, segment_ids)
    if backend == "splash":
        return _attend_splash(q, k, v, segment_ids)
    if backend == "dense":
        return attend_cache(q, k, v, causal_mask(segment_ids))
    assert_never(backend)


def causal_mask(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """True where query t (first T) may see key s (second T): s <= t, in the same document."""
    same_document = segment_ids[:, :, None] == segment_ids[:, None, :]
    return jnp.tril(same_document)


def attend_cache(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    visible: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """Attention of T queries over the entries of a cache that are visible to each; nothing visible gives zeros."""
    B, T, N, H = q.shape
    grouped = q.reshape(B, T, k.shape[2], -1, H)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32) / math.sqrt(H)
    probabilities = jax.nn.softmax(scores, axis=-1, where=visible[:, None, None])
    out = jnp.einsum("bkgts,bskh->btkgh", probabilities.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.reshape(B, T, N, H).astype(q.dtype)


# ---- blocks: flash attention in plain JAX. A row's keys are visited block by block with a running softmax, so memory is
# ---- linear in T; the backward pass rebuilds the probabilities from q, k and the log-sum-exp. Arrays of one row (one
# ---- batch element) have the shapes q, out [C, K, G c, H], k, v [C, K, c, H]: C blocks of c tokens, G = N / K, and the
# ---- G query heads of a key/value head stacked along the rows of one matrix.


def _attend_blocks(q, k, v, segment_ids):
    B, T, N, H = q.shape
    K = k.shape[2]
    c = min(BLOCK, T)
    padding = -T % c

    def pad(x):  # padded keys lie after every real query, and padded queries receive no cotangent
        return jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))

    def split(x):  # [B, T, K G, H] -> [B, C, K, G c, H]
        x = pad(x).reshape(B, -1, c, K, x.shape[2] // K, H)
        return x.transpose(0, 1, 3, 4, 2, 5).reshape(B, x.shape[1], K, -1, H)

    out = _attend_rows(split(q), split(k), split(v), pad(segment_ids).reshape(B, -1, c))
    out = out.reshape(B, -1, K, N // K, c, H).transpose(0, 1, 4, 2, 3, 5)
    return out.reshape(B, T + padding, N, H)[:, :T]


@jax.custom_vjp
def _attend_rows(q, k, v, segments):
    return lax.map(lambda row: _row_forward(*row)[0], (q, k, v, segments))


def _attend_rows_forward(q, k, v, segments):
    out, lse = lax.map(lambda row: _row_forward(*row), (q, k, v, segments))
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


# ---- depth attention


def attend_depth(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    cached_k: Float[Array, "L B T K H"],
    cached_v: Float[Array, "L B T K H"],
    depth: Int[Array, ""],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N L"]]:
    """Attention of one token over its own depths (Algorithm 1): the cached ones before `depth`, and (k, v) of `depth`.

    Rows >= depth of the cache are ignored whatever they hold. Also returns the float32 probabilities by depth: column
    `depth` is the token's own entry, the columns after it are zero. The cache is only read, never copied, so a loop
    over depths that keeps it differentiates in memory linear in L.
    """
    B, T, N, H = q.shape
    out, probabilities = _attend_depth(q.reshape(B, T, k.shape[2], -1, H), k, v, cached_k, cached_v, depth)
    L = probabilities.shape[0]
    return out.reshape(B, T, N, H), jnp.moveaxis(probabilities, 0, -1).reshape(B, T, N, L)


# A product and a sum, not an einsum: one query per matrix is no work for a matmul, and these fuse with their neighbours.
# Shapes: queries [.., K, G, H], keys [.., K, H], scores [.., K, G], all products in float32.


def _dot(queries, keys):
    return (queries.astype(jnp.float32) * keys[..., None, :].astype(jnp.float32)).sum(axis=-1)


def _spread(scores, keys):
    return scores[..., None] * keys[..., None, :].astype(jnp.float32)


def _gather_group(scores, queries):
    return (scores[..., None] * queries.astype(jnp.float32)).sum(axis=-2)


def _by_depth(past, own, depth):
    """[L, ...]: `past` in the rows before `depth`, `own` in row `depth`, zero after."""
    row = jnp.arange(past.shape[0]).reshape(-1, *[1] * own.ndim)
    return jnp.where(row < depth, past, jnp.where(row == depth, own[None], 0))


def _before(x, depth):
    return jnp.where(jnp.arange(x.shape[0]).reshape(-1, *[1] * (x.ndim - 1)) < depth, x, 0)


@jax.custom_vjp
def _attend_depth(q, k, v, cached_k, cached_v, depth):
    scores = _by_depth(_dot(q[None], cached_k), _dot(q, k), depth) / math.sqrt(q.shape[-1])
    reached = jnp.arange(scores.shape[0]).reshape(-1, 1, 1, 1, 1) <= depth
    p = lax.optimization_barrier(jax.nn.softmax(lax.optimization_barrier(scores), axis=0, where=reached))
    out = _before(_spread(p, cached_v), depth).sum(axis=0) + _spread(p[depth], v)
    return out.astype(q.dtype), p


def _attend_depth_forward(q, k, v, cached_k, cached_v, depth):
    out, p = _attend_depth(q, k, v, cached_k, cached_v, depth)
    return (out, p), (q, k, v, cached_k, cached_v, depth, p)


def _attend_depth_backward(residuals, cotangents):
    q, k, v, cached_k, cached_v, depth, p = residuals
    d_out, d_p = cotangents
    d_p = lax.optimization_barrier(d_p + _by_depth(_dot(d_out[None], cached_v), _dot(d_out, v), depth))
    d_scores = p * (d_p - (p * d_p).sum(axis=0, keepdims=True)) / math.sqrt(q.shape[-1])
    d_scores = lax.optimization_barrier(d_scores)
    d_q = _before(_spread(d_scores, cached_k), depth).sum(axis=0) + _spread(d_scores[depth], k)
    d_k, d_v = _gather_group(d_scores[depth], q), _gather_group(p[depth], d_out)
    d_cached_k = _before(_gather_group(d_scores, q[None]), depth)
    d_cached_v = _before(_gather_group(p, d_out[None]), depth)
    cast = (d_q, q), (d_k, k), (d_v, v), (d_cached_k, cached_k), (d_cached_v, cached_v)
    return *(gradient.astype(primal.dtype) for gradient, primal in cast), None


_attend_depth.defvjp(_attend_depth_forward, _attend_depth_backward)
