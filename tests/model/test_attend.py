"""Every form of attention equals a slow one written for a single query in float64, in values and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dreamer_jax.model import attend
from dreamer_jax.model.attend import attend_cache, attend_depth, attend_sequence, default_backend

TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 1e-2}


def attend_query_by_query(q, k, v, visible):
    """The oracle in numpy float64. visible[b, t]: the key positions that query t of row b may see."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    B, T, N, H = q.shape
    for b, t, n in np.ndindex(B, T, N):
        seen = np.flatnonzero(visible[b, t])
        if seen.size:
            head = n // (N // k.shape[2])
            scores = k[b, seen, head] @ q[b, t, n] / np.sqrt(H)
            p = np.exp(scores - scores.max())
            out[b, t, n] = p @ v[b, seen, head] / p.sum()
    return out


def dense(q, k, v, visible):
    """The differentiable oracle, itself held to the one above."""
    group = q.shape[2] // k.shape[2]
    q, k, v = q.astype(jnp.float32), *(jnp.repeat(x.astype(jnp.float32), group, axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / q.shape[-1] ** 0.5
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(visible[:, None], scores, -1e30), axis=-1), v)


def packed(segment_ids):
    row = np.arange(segment_ids.shape[1])
    ids = np.asarray(segment_ids)
    return (ids[:, :, None] == ids[:, None, :]) & (row[:, None] >= row[None, :])


def documents(B, T, mean_length, padding, seed=0):
    r = np.random.default_rng(seed)
    ids = 1 + np.cumsum(r.random((B, T)) < 1 / mean_length, axis=1)
    ids[:, T - padding :] = 0
    return jnp.array(ids, jnp.int32)


def example(B, T, N, K, H, dtype=jnp.float32, seed=0):
    r = np.random.default_rng(seed)
    return tuple(jnp.array(r.normal(size=(B, T, heads, H)), dtype) for heads in (N, K, K))


def gradients(function, *x):
    """Value and gradients of a weighted sum, so that every output has a cotangent of its own."""

    def scalar(*x):
        out = function(*x).astype(jnp.float32)
        return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum(), out

    grads, out = jax.jit(jax.grad(scalar, argnums=tuple(range(len(x))), has_aux=True))(*x)
    return out, *grads


def assert_near(got, wanted, tolerance):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    assert np.linalg.norm(got - wanted) <= tolerance * np.linalg.norm(wanted)


def test_the_two_oracles_agree():
    q, k, v = example(2, 13, 4, 2, 8)
    visible = packed(documents(2, 13, 4, 2))
    np.testing.assert_allclose(dense(q, k, v, visible), attend_query_by_query(q, k, v, visible), atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("backend", ["blocks", "dense"])
@pytest.mark.parametrize(
    ("T", "mean_length", "padding"), [(1, 9, 0), (8, 99, 0), (16, 5, 3), (37, 99, 0), (37, 6, 10), (37, 1, 0)]
)
def test_packed_attention_equals_the_oracle(monkeypatch, backend, dtype, T, mean_length, padding):
    monkeypatch.setattr(attend, "BLOCK", 8)
    q, k, v = example(2, T, 4, 2, 8, dtype)
    ids = documents(2, T, mean_length, padding)
    got = gradients(partial(attend_sequence, segment_ids=ids, backend=backend), q, k, v)
    wanted = gradients(partial(dense, visible=packed(ids)), q, k, v)
    for g, w, x in zip(got, wanted, (q, q, k, v), strict=True):
        assert_near(g, w, TOLERANCE[dtype])
        assert g.dtype == x.dtype or g is got[0]


@pytest.mark.parametrize(("N", "K"), [(1, 1), (4, 4), (6, 2), (3, 1)])
def test_blocks_group_the_query_heads(monkeypatch, N, K):
    monkeypatch.setattr(attend, "BLOCK", 8)
    q, k, v = example(1, 20, N, K, 16)
    ids = documents(1, 20, 8, 0)
    out = attend_sequence(q, k, v, ids, backend="blocks")
    assert_near(out, attend_query_by_query(q, k, v, packed(ids)), 2e-6)


def test_blocks_of_the_default_size_equal_the_oracle():
    q, k, v = example(1, 3 * attend.BLOCK - 5, 2, 1, 8)
    ids = documents(1, q.shape[1], attend.BLOCK, 40)
    got = gradients(partial(attend_sequence, segment_ids=ids, backend="blocks"), q, k, v)
    for g, w in zip(got, gradients(partial(dense, visible=packed(ids)), q, k, v), strict=True):
        assert_near(g, w, 2e-6)


def test_the_splash_kernel_equals_the_oracle(monkeypatch):
    monkeypatch.setattr(attend, "_attend_splash", partial(attend._attend_splash, interpret=True))
    q, k, v = example(2, 150, 4, 2, 32)
    ids = documents(2, 150, 40, 10)
    got = gradients(partial(attend_sequence, segment_ids=ids, backend="splash"), q, k, v)
    for g, w in zip(got, gradients(partial(dense, visible=packed(ids)), q, k, v), strict=True):
        assert_near(g, w, 2e-6)


@pytest.mark.parametrize("backend", ["blocks", "splash"])
def test_eight_devices_equal_one(monkeypatch, backend):
    monkeypatch.setattr(attend, "BLOCK", 16)
    monkeypatch.setattr(attend, "_attend_splash", partial(attend._attend_splash, interpret=True))
    q, k, v = example(8, 40, 2, 1, 16)
    ids = documents(8, 40, 15, 5)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(q, k, v, ids):
        out, pull_back = jax.vjp(partial(attend_sequence, segment_ids=ids, backend=backend), q, k, v)
        return out, *pull_back(jnp.cos(out))

    got = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data")))(q, k, v, ids)
    out, pull_back = jax.vjp(partial(dense, visible=packed(ids)), q, k, v)
    for g, w in zip(got, (out, *pull_back(jnp.cos(out))), strict=True):
        assert_near(g, w, 2e-6)


@pytest.mark.parametrize("backend", ["blocks", "dense"])
def test_the_future_and_other_documents_have_no_influence(monkeypatch, backend):
    monkeypatch.setattr(attend, "BLOCK", 8)
    q, k, v = example(1, 30, 2, 2, 8)
    ids = jnp.array([[1] * 11 + [2] * 12 + [0] * 7], jnp.int32)
    hidden_from_15 = (jnp.arange(30) < 11) | (jnp.arange(30) > 15)
    function = partial(attend_sequence, segment_ids=ids, backend=backend)
    noise = jnp.where(hidden_from_15[None, :, None, None], 1e3, 0.0)
    np.testing.assert_array_equal(function(q, k, v)[:, 15], function(q, k + noise, v + noise)[:, 15])
    d_k, d_v = jax.grad(lambda k, v: function(q, k, v)[:, 15].sum(), argnums=(0, 1))(k, v)
    for gradient in (d_k, d_v):
        np.testing.assert_array_equal((gradient != 0).any(axis=(0, 2, 3)), ~hidden_from_15)


@pytest.mark.parametrize("backend", ["blocks", "dense"])
def test_rows_of_padding_and_large_scores_stay_finite(backend):
    q, k, v = example(2, 12, 2, 1, 8)
    ids = jnp.array([[0] * 12, [1] * 6 + [0] * 6], jnp.int32)
    for x in gradients(partial(attend_sequence, segment_ids=ids, backend=backend), q * 1e4, k, v):
        assert jnp.isfinite(x).all()


def test_blocks_start_at_the_first_block_of_their_documents():
    ids = jnp.array([[1, 1, 1, 1], [1, 1, 2, 2], [3, 3, 3, 3], [3, 4, 4, 0], [0, 0, 0, 0]], jnp.int32)
    np.testing.assert_array_equal(attend._first_live_block(ids), [0, 0, 2, 2, 3])


def test_unsorted_segment_ids_are_still_told_apart(monkeypatch):
    monkeypatch.setattr(attend, "BLOCK", 4)
    q, k, v = example(2, 23, 2, 1, 8)
    ids = jnp.array(np.random.default_rng(1).integers(0, 4, size=(2, 23)), jnp.int32)
    out = attend_sequence(q, k, v, ids, backend="blocks")
    assert_near(out, attend_query_by_query(q, k, v, packed(ids)), 2e-6)


def test_blocks_take_memory_linear_in_the_sequence():
    def temporaries(T):
        x = [jax.ShapeDtypeStruct((1, T, heads, 32), jnp.float32) for heads in (4, 4, 4)]
        loss = lambda q, k, v: attend_sequence(q, k, v, jnp.ones((1, T), jnp.int32), backend="blocks").sum()  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*x).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(4096) < 2.2 * temporaries(2048)


def test_each_platform_has_a_backend():
    assert [default_backend(platform) for platform in ("cpu", "gpu", "tpu")] == ["blocks", "cudnn", "splash"]


def test_tokamax_missing_is_an_error_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokamax", None)
    q, k, v = example(1, 4, 1, 1, 8)
    with pytest.raises(ImportError, match=r"dreamer-jax\[gpu\]"):
        attend_sequence(q, k, v, jnp.ones((1, 4), jnp.int32), backend="tokamax")


def test_the_first_token_of_each_document_is_found():
    ids = jnp.array([[1, 1, 2, 2, 2, 3, 0, 0], [5, 5, 5, 5, 0, 0, 0, 0]])
    wanted = [[0, 0, 2, 2, 2, 5, 6, 6], [0, 0, 0, 0, 4, 4, 4, 4]]
    np.testing.assert_array_equal(attend._document_start(ids), wanted)


# ---- cache


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_queries_see_the_visible_entries_of_the_cache(dtype):
    q, k, v = example(2, 3, 4, 2, 8, dtype)[0], *example(2, 9, 1, 2, 8, dtype, seed=1)[1:]
    visible = jnp.array(np.random.default_rng(2).random((2, 3, 9)) < 0.4).at[0, 1].set(False)
    out = attend_cache(q, k, v, visible)
    assert_near(out, attend_query_by_query(q, k, v, visible), TOLERANCE[dtype])
    assert (out[0, 1] == 0).all()


# ---- depth


def depth_example(L, N, K, dtype=jnp.float32, B=2, T=3, H=8):
    q, k, v = example(B, T, N, K, H, dtype)
    cached_k, cached_v = (example(L, B * T, K, K, H, dtype, seed)[0].reshape(L, B, T, K, H) for seed in (1, 2))
    return q, k, v, cached_k, cached_v


def depth_oracle(q, k, v, cached_k, cached_v, depth):
    """Each token is a row of its own whose sequence is its depths up to and including `depth`."""
    B, T, N, H = q.shape
    entries = [
        jnp.concatenate([past[:depth], own[None]]).reshape(depth + 1, B * T, -1, H).transpose(1, 0, 2, 3)
        for past, own in ((cached_k, k), (cached_v, v))
    ]
    return dense(q.reshape(B * T, 1, N, H), *entries, np.ones((B * T, 1, depth + 1), bool)).reshape(B, T, N, H)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (2, 2), (4, 2), (4, 1)])
@pytest.mark.parametrize("depth", [0, 2, 4])
def test_depth_attention_equals_attention_over_the_depths_so_far(dtype, N, K, depth):
    x = depth_example(5, N, K, dtype)
    got = gradients(lambda *x: attend_depth(*x, jnp.int32(depth))[0], *x)
    wanted = gradients(lambda *x: depth_oracle(*x, depth), *x)
    for g, w, name in zip(got, wanted, ("out", "q", "k", "v", "cached_k", "cached_v"), strict=True):
        scale = TOLERANCE[dtype] * max(np.linalg.norm(np.asarray(w, np.float64)), 1e-1)
        assert np.linalg.norm(np.asarray(g, np.float64) - np.asarray(w, np.float64)) <= scale, name


@pytest.mark.parametrize(("N", "K"), [(1, 1), (4, 2)])
def test_depth_probabilities_are_those_of_the_softmax(N, K):
    L, depth = 5, 3
    q, k, v, cached_k, cached_v = depth_example(L, N, K)
    one_hot = jnp.broadcast_to(jnp.eye(L, 8)[:, None, None, None], cached_v.shape)  # values that name their depth
    out, p = attend_depth(q, k, one_hot[depth], cached_k, one_hot, jnp.int32(depth))
    assert p.shape == (*q.shape[:3], L)
    assert p.dtype == jnp.float32
    np.testing.assert_allclose(p, out[..., :L], atol=1e-6)
    np.testing.assert_allclose(p.sum(axis=-1), 1, atol=1e-6)
    assert (p[..., depth + 1 :] == 0).all()


def test_gradients_flow_through_the_probabilities():
    x = depth_example(4, 2, 1)
    weights = jnp.cos(jnp.arange(4.0))
    depth = 2

    def plain(q, k, v, cached_k, cached_v):
        keys = jnp.concatenate([cached_k[:depth], k[None]])[:, :, :, 0]
        p = jax.nn.softmax(jnp.einsum("btnh,lbth->btnl", q, keys) / q.shape[-1] ** 0.5, axis=-1)
        return jnp.einsum("btnl,l->btn", p, weights[: depth + 1])

    got = gradients(lambda *x: jnp.einsum("btnl,l->btn", attend_depth(*x, jnp.int32(depth))[1], weights), *x)
    for g, w in zip(got, gradients(plain, *x), strict=True):
        np.testing.assert_allclose(g, w, atol=1e-6)


def test_rows_of_the_cache_from_depth_on_are_ignored():
    q, k, v, cached_k, cached_v = depth_example(5, 2, 1)
    depth = 2
    later = jnp.arange(5).reshape(5, 1, 1, 1, 1) >= depth
    outputs = [
        gradients(lambda *x: attend_depth(*x, jnp.int32(depth))[0], q, k, v, *caches)
        for caches in ((cached_k, cached_v), [jnp.where(later, 1e9, c) for c in (cached_k, cached_v)])
    ]
    for a, b in zip(*outputs, strict=True):
        np.testing.assert_array_equal(a, b)
    for d_cache in outputs[0][-2:]:
        assert (d_cache[depth:] == 0).all()
        assert (d_cache[:depth] != 0).any(axis=(1, 2, 3, 4)).all()


def test_depth_attention_runs_in_a_scan_on_eight_devices():
    x = depth_example(3, 2, 1, B=8)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def over_depths(q, k, v, cached_k, cached_v):
        def step(total, depth):
            return total + attend_depth(q, k, v, cached_k, cached_v, depth)[0], None

        return jax.lax.scan(step, jnp.zeros_like(q), jnp.arange(3))[0]

    def local(*x):
        out, pull_back = jax.vjp(over_depths, *x)
        return pull_back(jnp.cos(out))

    specs = (P("data"),) * 3 + (P(None, "data"),) * 2
    got = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs))(*x)
    out, pull_back = jax.vjp(lambda *x: sum(depth_oracle(*x, depth) for depth in range(3)), *x)
    for g, w in zip(got, pull_back(jnp.cos(out)), strict=True):
        np.testing.assert_allclose(g, w, atol=1e-5)
