"""The reference equals loops in NumPy's float64 with gradients written out."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.checks import assert_near, cotangents, gradients, kernels
from tests.kernels.examples import documents, experts, heads

REFERENCE = kernels("reference")


def attention_by_hand(q, k, v, visible, d_out):
    """out, (d_q, d_k, d_v), one query at a time; query t of row b sees the keys visible[b, t]."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    out, d_q, d_k, d_v = (np.zeros_like(x) for x in (q, q, k, v))
    B, T, N, H = q.shape
    for b, t, n in np.ndindex(B, T, N):
        seen, head = np.flatnonzero(visible[b, t]), n * k.shape[2] // N
        if seen.size:
            keys, values, d = k[b, seen, head], v[b, seen, head], d_out[b, t, n]
            scores = keys @ q[b, t, n] / np.sqrt(H)
            p = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
            d_scores = p * (values @ d - p @ values @ d) / np.sqrt(H)
            out[b, t, n], d_q[b, t, n] = p @ values, d_scores @ keys
            d_k[b, seen, head] += np.outer(d_scores, q[b, t, n])
            d_v[b, seen, head] += np.outer(p, d)
    return out, (d_q, d_k, d_v)


def swiglu_by_hand(x, scores, w_gate_up, w_down, d_y, sizes):
    """y and the gradients of SwiGLU of each expert on its own slice of rows."""
    x, scores, w_gate_up, w_down, d_y = (np.asarray(a, np.float64) for a in (x, scores, w_gate_up, w_down, d_y))
    f, at = w_down.shape[1], 0
    y, d_x, d_scores, d_gate_up, d_down = (np.zeros_like(a) for a in (x, x, scores, w_gate_up, w_down))
    for e, n in enumerate(np.asarray(sizes)):
        rows, at = slice(at, at + n), at + n
        gate, up = x[rows] @ w_gate_up[e, :, :f], x[rows] @ w_gate_up[e, :, f:]
        sigmoid = 1 / (1 + np.exp(-gate))
        hidden = gate * sigmoid * up
        unweighted = hidden @ w_down[e]
        y[rows] = scores[rows] * unweighted
        d_scores[rows] = (d_y[rows] * unweighted).sum(axis=1, keepdims=True)
        d_unweighted = scores[rows] * d_y[rows]
        d_hidden = d_unweighted @ w_down[e].T
        d_gate = d_hidden * up * sigmoid * (1 + gate * (1 - sigmoid))
        d_both = np.concatenate([d_gate, d_hidden * gate * sigmoid], axis=1)
        d_x[rows], d_gate_up[e], d_down[e] = d_both @ w_gate_up[e].T, x[rows].T @ d_both, hidden.T @ d_unweighted
    return y, (d_x, d_scores, d_gate_up, d_down)


def packed(segment_ids):
    row, ids = np.arange(segment_ids.shape[1]), np.asarray(segment_ids)
    return (ids[:, :, None] == ids[:, None, :]) & (row[:, None] >= row[None, :])


@pytest.mark.parametrize(("N", "K"), [(1, 1), (4, 2), (3, 1)])
def test_packed_attention(N, K):
    q, k, v = heads(2, 37, N, K, 8)
    ids = documents(2, 37, 6, 10)
    got = gradients(lambda *x: REFERENCE.attend_sequence(*x, ids), q, k, v)
    assert_near(got, attention_by_hand(q, k, v, packed(ids), cotangents(q)))


def test_attention_over_a_cache():
    q, k, v = heads(3, 1, 4, 2, 8)[0], *(heads(3 * 5, 9, 1, 2, 8, seed=i)[1] for i in (1, 2))
    caches = (x.reshape(5, 3, 9, 2, 8).swapaxes(2, 3) for x in (k, v))
    lengths = jnp.array([0, 4, 9], jnp.int32)
    got = REFERENCE.attend_newest(q, *caches, jnp.int32(3), lengths)
    visible = np.arange(9)[None, None] < np.asarray(lengths)[:, None, None]
    k, v = (x.reshape(5, 3, 9, 2, 8)[3] for x in (k, v))
    assert_near(got, attention_by_hand(q, k, v, visible, q)[0])


@pytest.mark.parametrize("visible", [None, jnp.array([True, False, True, False, True])])
def test_attention_over_depths(visible):
    L, B, T, N, K, H, l = 5, 2, 3, 4, 2, 8, 3
    q, k, v = heads(B, T, N, K, H)
    cached_k, cached_v = (heads(L * B, T, 1, K, H, seed=i)[1].reshape(L, B, T, K, H) for i in (1, 2))
    got = gradients(lambda *x: REFERENCE.attend_depths(*x, jnp.int32(l), visible)[0], q, k, v, cached_k, cached_v)
    seen = (np.arange(L) < l) & (True if visible is None else np.asarray(visible))
    seen[l] = True

    def rows(own, cache):
        return np.asarray(cache.at[l].set(own)).reshape(L, B * T, K, H).transpose(1, 0, 2, 3)

    per_token = (B * T, 1, N, H)
    visible_rows = np.broadcast_to(seen, (B * T, 1, L))
    d_out = cotangents(q).reshape(per_token)
    out, (d_q, *d_kv) = attention_by_hand(
        q.reshape(per_token), rows(k, cached_k), rows(v, cached_v), visible_rows, d_out
    )
    d_kv = [d.transpose(1, 0, 2, 3).reshape(L, B, T, K, H) for d in d_kv]
    own = [d[l].copy() for d in d_kv]
    for d in d_kv:
        d[l] = 0
    assert_near(got, (out.reshape(q.shape), (d_q.reshape(q.shape), *own, *d_kv)))


def test_experts_of_sorted_rows():
    *arrays, d_y, sizes = experts([0, 13, 0, 0, 90, 1, 30, 0], rows=140)
    arrays[0] = jnp.where((jnp.arange(140) < 134)[:, None], arrays[0], jnp.nan)
    got = gradients(lambda *x: REFERENCE.sorted_swiglu(*x, sizes), *arrays)
    assert_near(got, swiglu_by_hand(*arrays, cotangents(d_y), sizes))
