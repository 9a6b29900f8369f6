"""Attention over the sequence and over the cache of a generated one, in plain JAX.

The sequence form is flash attention: a row's keys are visited block by block with a running softmax, so memory is
linear in T; the backward pass rebuilds the probabilities from q, k and the log-sum-exp. Query head i reads key/value
head i // (N / K), scores are divided by sqrt(H), and the softmax is in float32.

Arrays of one row (one batch element) have the shapes q, out [C, K, G c, H] and k, v [C, K, c, H]: C blocks of c tokens,
G = N / K, and the G query heads of a key/value head stacked along the rows of one matrix.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from dreamer_jax.kernels.documents import pad_tokens

BLOCK = 64
"""Tokens of a query or key block: the scores of a block pair should fit a core's second cache."""


def attend_newest(q: Array, k: Array, v: Array, l: Array, lengths: Array) -> Array:
    """`Kernels.attend_newest`."""
    B, T, N, H = q.shape
    K, S = k.shape[2:4]
    visible = lengths[:, None] - jnp.arange(T - 1, -1, -1)[None, :]  # rows that token t sees
    seen = jnp.arange(S)[None, None, :] < visible[:, :, None]
    seen = jnp.broadcast_to(seen[:, None, None], (B, K, N // K, T, S)).reshape(B, K, -1, S)
    # Keys and values stand head by head, as the products read them: otherwise XLA reorders the cache for every token.
    k, v = (lax.dynamic_index_in_dim(c, l, 0, keepdims=False) for c in (k, v))
    rows = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    scores = jnp.einsum("bkqh,bksh->bkqs", rows, k, preferred_element_type=jnp.float32) / math.sqrt(H)
    probabilities = jax.nn.softmax(scores, axis=-1, where=seen).astype(v.dtype)
    out = jnp.einsum("bkqs,bksh->bkqh", probabilities, v, preferred_element_type=jnp.float32)
    return out.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(q.dtype)


def attend_sequence(q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
    """`Kernels.attend_sequence`."""
    B, T, N, H = q.shape
    K = k.shape[2]
    c = min(BLOCK, T)

    def split(x):  # [B, T, K G, H] -> [B, C, K, G c, H]
        x = pad_tokens(x, c).reshape(B, -1, c, K, x.shape[2] // K, H)
        return x.transpose(0, 1, 3, 4, 2, 5).reshape(B, x.shape[1], K, -1, H)

    out = _attend_rows(split(q), split(k), split(v), pad_tokens(segment_ids, c).reshape(B, -1, c))
    out = out.reshape(B, -1, K, N // K, c, H).transpose(0, 1, 4, 2, 3, 5)
    return out.reshape(B, -1, N, H)[:, :T]


@jax.custom_vjp
def _attend_rows(q, k, v, segments):
    return lax.map(lambda row: _row_forward(*row)[0], (q, k, v, segments))


def _attend_rows_forward(q, k, v, segments):
    # What selective remat keeps: with it, the backward pass does not attend a second time.
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
