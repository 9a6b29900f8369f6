"""Every form of attention equals a slow one written for a single query, in values and gradients."""

import sys
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dreamer_jax.model import attend
from dreamer_jax.model.attend import attend_cache, attend_depth, attend_newest, attend_sequence, default_backend
from dreamer_jax.native import library
from tests.native import BACKENDS, needs_compiler

jit_attend = jax.jit(attend_sequence, static_argnames="backend")
TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 1e-2}


def oracle(q, k, v, visible, d_out=None):
    """[out, d_q, d_k, d_v], one query at a time in numpy float64; query t of row b sees the keys visible[b, t]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    d_out = cotangent(q.shape) if d_out is None else d_out
    out, d_q, d_k, d_v = (np.zeros_like(x) for x in (q, q, k, v))
    B, T, N, H = q.shape
    for b, t, n in np.ndindex(B, T, N):
        seen = np.flatnonzero(visible[b, t])
        if seen.size:
            keys, values, d = k[b, seen, n * k.shape[2] // N], v[b, seen, n * k.shape[2] // N], d_out[b, t, n]
            scores = keys @ q[b, t, n] / np.sqrt(H)
            p = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
            d_scores = p * (values @ d - p @ values @ d) / np.sqrt(H)
            out[b, t, n], d_q[b, t, n] = p @ values, d_scores @ keys
            d_k[b, seen, n * k.shape[2] // N] += np.outer(d_scores, q[b, t, n])
            d_v[b, seen, n * k.shape[2] // N] += np.outer(p, d)
    return out, d_q, d_k, d_v


def cotangent(shape):
    return np.cos(np.arange(np.prod(shape))).reshape(shape)


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
    """[out, d_x...] for the cotangent of the oracle."""

    def run(*x):
        out, pull_back = jax.vjp(function, *x)
        return out, *pull_back(jnp.array(cotangent(out.shape), out.dtype))

    return jax.jit(run)(*x)


def assert_near(got, wanted, tolerance=2e-6):
    for number, (g, w) in enumerate(zip(got, wanted, strict=True)):
        error = np.linalg.norm(np.asarray(g, np.float64) - w)
        assert error <= tolerance * max(np.linalg.norm(w), 1), number


@pytest.mark.parametrize(
    ("backend", "dtype", "T", "mean_length", "padding"),
    [
        ("blocks", jnp.float32, 1, 9, 0),
        ("blocks", jnp.float32, 16, 99, 0),
        ("blocks", jnp.float32, 37, 6, 10),
        ("blocks", jnp.bfloat16, 37, 12, 3),
        pytest.param("native", jnp.float32, 1, 9, 0, marks=needs_compiler),
        pytest.param("native", jnp.float32, 37, 6, 10, marks=needs_compiler),
        pytest.param("native", jnp.float32, 197, 60, 20, marks=needs_compiler),
        pytest.param("native", jnp.float32, 300, 999, 0, marks=needs_compiler),
        ("dense", jnp.float32, 37, 6, 10),
        ("dense", jnp.bfloat16, 37, 12, 3),
    ],
)
def test_packed_attention_equals_the_oracle(monkeypatch, backend, dtype, T, mean_length, padding):
    monkeypatch.setattr(attend, "BLOCK", 8)
    q, k, v = example(2, T, 4, 2, 8, dtype)
    ids = documents(2, T, mean_length, padding)
    got = gradients(partial(attend_sequence, segment_ids=ids, backend=backend), q, k, v)
    assert all(g.dtype == dtype for g in got)
    assert_near(got, oracle(q, k, v, packed(ids)), TOLERANCE[dtype])


@pytest.mark.parametrize(("N", "K"), [(1, 1), (6, 2), (3, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_query_heads_are_grouped(monkeypatch, N, K, backend):
    monkeypatch.setattr(attend, "BLOCK", 8)
    q, k, v = example(1, 20, N, K, 16)
    ids = documents(1, 20, 8, 0)
    got = gradients(partial(attend_sequence, segment_ids=ids, backend=backend), q, k, v)
    assert_near(got, oracle(q, k, v, packed(ids)))


def test_blocks_of_the_default_size_equal_the_oracle():
    q, k, v = example(1, 3 * attend.BLOCK - 5, 2, 1, 8)
    ids = documents(1, q.shape[1], attend.BLOCK, 40)
    got = gradients(partial(attend_sequence, segment_ids=ids, backend="blocks"), q, k, v)
    assert_near(got, oracle(q, k, v, packed(ids)))


@pytest.mark.parametrize("backend", [*BACKENDS, "splash"])
def test_on_eight_devices_the_kernels_equal_the_oracle(monkeypatch, backend):
    monkeypatch.setattr(attend, "BLOCK", 16)
    monkeypatch.setattr(attend, "_attend_splash", partial(attend._attend_splash, interpret=True))
    q, k, v = example(8, 40, 2, 1, 16)
    ids = documents(8, 40, 15, 5)

    def local(q, k, v, ids, d_out):
        out, pull_back = jax.vjp(partial(attend_sequence, segment_ids=ids, backend=backend), q, k, v)
        return out, *pull_back(d_out)

    sharded = jax.shard_map(local, mesh=eight_devices(), in_specs=P("data"), out_specs=P("data"))
    got = jax.jit(sharded)(q, k, v, ids, jnp.array(cotangent(q.shape), jnp.float32))
    assert_near(got, oracle(q, k, v, packed(ids)))


def eight_devices():
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def test_the_splash_kernel_takes_any_length_and_head_size(monkeypatch):
    monkeypatch.setattr(attend, "_attend_splash", partial(attend._attend_splash, interpret=True))
    q, k, v = example(2, 150, 4, 2, 32)
    ids = documents(2, 150, 40, 10)
    got = gradients(partial(attend_sequence, segment_ids=ids, backend="splash"), q, k, v)
    assert_near(got, oracle(q, k, v, packed(ids)))


@pytest.mark.parametrize("backend", [*BACKENDS, "dense"])
def test_the_future_and_other_documents_have_no_influence(monkeypatch, backend):
    monkeypatch.setattr(attend, "BLOCK", 8)
    q, k, v = example(1, 30, 2, 2, 8)
    ids = jnp.array([[1] * 11 + [2] * 12 + [0] * 7], jnp.int32)
    hidden_from_15 = (np.arange(30) < 11) | (np.arange(30) > 15)
    noise = np.where(hidden_from_15[None, :, None, None], np.float32(1e3), np.float32(0))

    @jax.jit
    def token_15(k, v):
        return jax.vjp(lambda k, v: attend_sequence(q, k, v, ids, backend=backend)[:, 15], k, v)

    out, pull_back = token_15(k, v)
    np.testing.assert_array_equal(out, token_15(k + noise, v + noise)[0])
    for gradient in jax.jit(pull_back)(jnp.ones_like(out)):
        np.testing.assert_array_equal((np.asarray(gradient) != 0).any(axis=(0, 2, 3)), ~hidden_from_15)


@pytest.mark.parametrize("backend", [*BACKENDS, "dense"])
def test_rows_of_padding_and_large_scores_stay_finite(backend):
    q, k, v = example(2, 12, 2, 1, 8)
    ids = jnp.array([[0] * 12, [1] * 6 + [0] * 6], jnp.int32)
    for x in gradients(partial(attend_sequence, segment_ids=ids, backend=backend), q * 1e4, k, v):
        assert np.isfinite(x).all()


@pytest.mark.parametrize("backend", [*BACKENDS, "dense"])
def test_what_is_not_a_number_is_not_hidden(backend):
    q, k, v = example(1, 130, 2, 1, 8)
    ids = jnp.array([[1] * 63 + [2] * 67], jnp.int32)
    k = k.at[0, 63].set(jnp.nan)
    bad = np.isnan(jit_attend(q, k, v, ids, backend=backend)).any(axis=(0, 2, 3))
    np.testing.assert_array_equal(bad, np.arange(130) >= 63)


def test_blocks_start_at_the_first_block_of_their_documents():
    ids = jnp.array([[1, 1, 1, 1], [1, 1, 2, 2], [3, 3, 3, 3], [3, 4, 4, 0], [0, 0, 0, 0]], jnp.int32)
    np.testing.assert_array_equal(attend._first_live_block(ids), [0, 0, 2, 2, 3])


def test_blocks_tell_unsorted_segment_ids_apart(monkeypatch):
    monkeypatch.setattr(attend, "BLOCK", 4)
    q, k, v = example(2, 23, 2, 1, 8)
    ids = jnp.array(np.random.default_rng(1).integers(0, 4, size=(2, 23)), jnp.int32)
    assert_near([jit_attend(q, k, v, ids, backend="blocks")], oracle(q, k, v, packed(ids))[:1])


def test_blocks_take_memory_linear_in_the_sequence():
    def temporaries(T):
        def loss(q, k, v):
            return attend_sequence(q, k, v, jnp.ones((1, T), jnp.int32), backend="blocks").sum()

        x = [jax.ShapeDtypeStruct((1, T, 4, 32), jnp.float32)] * 3
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*x).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(4096) < 2.2 * temporaries(2048)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("N", "K", "H"), [(4, 2, 8), (3, 1, 20), (2, 2, 3)])
def test_a_decoded_token_sees_the_first_rows_of_its_cache_at_its_depth(backend, N, K, H):
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(3, 1, N, H)) * 3, jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(2, 3, K, 21, H)), jnp.float32) for _ in range(2))
    lengths = jnp.array([1, 13, 21], jnp.int32)
    hidden = (np.arange(21) >= np.asarray(lengths)[:, None])[None, :, None, :, None]
    k, v = (jnp.where(hidden, jnp.nan, a).at[0].set(1e6) for a in (k, v))  # other depths' rows must not matter
    k, v = (a if backend == "native" else jnp.nan_to_num(a) for a in (k, v))
    got = jax.jit(partial(attend_newest, backend=backend))(q, k, v, jnp.int32(1), lengths)
    k, v = (np.nan_to_num(np.asarray(a[1])).swapaxes(1, 2) for a in (k, v))
    assert_near([got], oracle(q, k, v, ~hidden[0, :, 0, None, :, 0])[:1])


def test_each_platform_has_a_backend():
    assert [default_backend(p, "bfloat16") for p in ("cpu", "gpu", "tpu")] == ["blocks", "tokamax", "splash"]
    assert default_backend("gpu", "float32") == "blocks"
    assert default_backend("cpu", "float32") == ("blocks" if library.missing() else "native")


class StandIn:
    """What attend.py asks of a kernel of tokamax, which runs on GPUs alone: attention, what it keeps, a derivative."""

    def __call__(self, q, k, v, *, start, return_residuals):
        assert return_residuals
        out, lse = jax.jit(self.stand_in_forward)(q, k, v, start)
        return out, (lse, jnp.zeros_like(lse))

    def vjp(self, residuals, out, d_out, q, k, v, *, start):
        return dict(zip("qkv", jax.vjp(lambda *x: self.stand_in_forward(*x, start)[0], q, k, v)[1](d_out), strict=True))

    @staticmethod
    def stand_in_forward(q, k, v, start):
        token, group = jnp.arange(q.shape[1]), q.shape[2] // k.shape[2]
        seen = (token[None, None] <= token[None, :, None]) & (token[None, None] >= start[:, :, None])
        scores = jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, group, axis=2)) / q.shape[-1] ** 0.5
        scores = jnp.where(seen[:, None], scores, -jnp.inf)
        out = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), jnp.repeat(v, group, axis=2))
        return out, jax.nn.logsumexp(scores, axis=-1)


@pytest.fixture
def tokamax(monkeypatch):
    """The backend "tokamax" on a CPU."""

    def kernel(q, k, v, start):
        return StandIn(), SimpleNamespace(args=(q, k, v), kwargs={"start": start, "return_residuals": False})

    monkeypatch.setattr(attend, "_tokamax_kernel", kernel)


@pytest.mark.usefixtures("tokamax")
def test_around_the_kernels_of_tokamax_values_and_gradients_are_kept_on_eight_devices():
    q, k, v = example(8, 40, 2, 1, 16)
    ids = documents(8, 40, 15, 5)

    def local(q, k, v, ids, d_out):
        out, pull_back = jax.vjp(partial(attend_sequence, segment_ids=ids, backend="tokamax"), q, k, v)
        return out, *pull_back(d_out)

    sharded = jax.shard_map(local, mesh=eight_devices(), in_specs=P("data"), out_specs=P("data"))
    got = jax.jit(sharded)(q, k, v, ids, jnp.array(cotangent(q.shape), jnp.float32))
    assert_near(got, oracle(q, k, v, packed(ids)))


@pytest.mark.usefixtures("tokamax")
@pytest.mark.parametrize(("kept", "runs"), [(["attention"], 1), ([], 2)])
def test_remat_that_keeps_attention_does_not_run_tokamax_again(kept, runs):
    q, k, v = example(2, 40, 2, 1, 16)
    policy = jax.checkpoint_policies.save_only_these_names(*kept)
    run = jax.checkpoint(
        partial(attend_sequence, segment_ids=documents(2, 40, 15, 5), backend="tokamax"), policy=policy
    )
    jaxpr = jax.make_jaxpr(jax.grad(lambda q: jnp.sum(run(q, k, v) ** 2)))(q)
    assert str(jaxpr).count("name=stand_in_forward") == runs


def test_tokamax_missing_is_an_error_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
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
    visible = np.random.default_rng(2).random((2, 3, 9)) < 0.4
    visible[0, 1] = False
    out = jax.jit(attend_cache)(q, k.swapaxes(1, 2), v.swapaxes(1, 2), jnp.array(visible))
    assert_near([out], oracle(q, k, v, visible)[:1], TOLERANCE[dtype])
    assert (np.asarray(out[0, 1]) == 0).all()


# ---- depth


def depth_example(L, N, K, dtype=jnp.float32, B=2, T=3, H=8):
    q, k, v = example(B, T, N, K, H, dtype)
    r = np.random.default_rng(1)
    return q, k, v, *(jnp.array(r.normal(size=(L, B, T, K, H)), dtype) for _ in "kv")


def depth_oracle(q, k, v, cached_k, cached_v, depth):
    """Each token is a row of its own, whose sequence is its depths up to and including `depth`."""
    B, T, N, H = q.shape
    L, K = cached_k.shape[0], k.shape[2]

    def per_token(cache, own):
        cache = np.array(cache, np.float64)
        cache[depth] = own
        return cache.reshape(L, B * T, K, H).transpose(1, 0, 2, 3)

    visible = np.broadcast_to(np.arange(L) <= depth, (B * T, 1, L))
    d_out = cotangent(q.shape).reshape(B * T, 1, N, H)
    q = np.asarray(q, np.float64).reshape(B * T, 1, N, H)
    out, d_q, *d_caches = oracle(q, per_token(cached_k, k), per_token(cached_v, v), visible, d_out)
    d_caches = [x.transpose(1, 0, 2, 3).reshape(L, B, T, K, H) for x in d_caches]
    d_own = [x[depth].copy() for x in d_caches]
    for x in d_caches:
        x[depth] = 0
    return out.reshape(B, T, N, H), d_q.reshape(B, T, N, H), *d_own, *d_caches


# Depth attention in plain JAX, and by the kernel for CPUs.
FORMS = pytest.mark.parametrize("native_kernel", [False, pytest.param(True, marks=needs_compiler)])


@FORMS
@pytest.mark.parametrize(
    ("N", "K", "depth", "dtype"),
    [(1, 1, 0, jnp.float32), (1, 1, 4, jnp.float32), (4, 2, 3, jnp.float32), (2, 2, 2, jnp.bfloat16)],
)
def test_depth_attention_equals_attention_over_the_depths_so_far(N, K, depth, dtype, native_kernel):
    if native_kernel:  # which computes in float32 only; an odd head size has a rest after its vectors
        x = depth_example(5, N, K, H=37)
        dtype = jnp.float32
    else:
        x = depth_example(5, N, K, dtype)
    got = gradients(lambda *x: attend_depth(*x, jnp.int32(depth), native_kernel=native_kernel)[0], *x)
    assert all(g.dtype == dtype for g in got)
    assert_near(got, depth_oracle(*x, depth), TOLERANCE[dtype])


@FORMS
@pytest.mark.parametrize(("N", "K"), [(1, 1), (4, 2)])
def test_depth_probabilities_are_those_of_the_softmax(N, K, native_kernel):
    L, depth = 5, 3
    q, k, _, cached_k, cached_v = depth_example(L, N, K)
    one_hot = np.broadcast_to(np.eye(L, 8, dtype=np.float32)[:, None, None, None], cached_v.shape)  # values name depths
    run = jax.jit(partial(attend_depth, native_kernel=native_kernel))
    out, p, _ = run(q, k, jnp.array(one_hot[depth]), cached_k, jnp.array(one_hot), jnp.int32(depth))
    assert p.shape == (*q.shape[:3], L)
    assert p.dtype == jnp.float32
    np.testing.assert_allclose(p, out[..., :L], atol=1e-6)
    np.testing.assert_allclose(np.sum(p, axis=-1), 1, atol=1e-6)
    assert (np.asarray(p[..., depth + 1 :]) == 0).all()


@FORMS
def test_gradients_flow_through_the_probabilities(native_kernel):
    x = depth_example(4, 2, 1)
    weights, depth = jnp.cos(jnp.arange(4.0)), 2

    def plain(q, k, v, cached_k, cached_v):
        keys = jnp.concatenate([cached_k[:depth], k[None]])[:, :, :, 0]
        p = jax.nn.softmax(jnp.einsum("btnh,lbth->btnl", q, keys) / q.shape[-1] ** 0.5, axis=-1)
        return jnp.einsum("btnl,l->btn", p, weights[: depth + 1])

    def weighted(*x):
        p = attend_depth(*x, jnp.int32(depth), native_kernel=native_kernel)[1]
        return jnp.einsum("btnl,l->btn", p, weights)

    got = gradients(weighted, *x)
    assert_near(got, [np.asarray(w) for w in gradients(plain, *x)])


@FORMS
def test_what_depth_attention_hands_on_brings_the_gradient_of_later_uses(native_kernel):
    x = depth_example(5, 4, 2)
    depth = jnp.int32(3)

    def twice(*x):
        out, _, handed_on = attend_depth(*x, depth, native_kernel=native_kernel)
        return out + sum(jnp.sum(scale * a) for scale, a in zip((2.0, 3.0, 5.0, 7.0), handed_on, strict=True))

    def apart(*x):
        out = attend_depth(*x, depth)[0]
        return out + sum(jnp.sum(scale * a) for scale, a in zip((2.0, 3.0, 5.0, 7.0), x[1:], strict=True))

    assert_near(gradients(twice, *x), [np.asarray(w) for w in gradients(apart, *x)])


@FORMS
def test_rows_of_the_cache_from_depth_on_are_ignored(native_kernel):
    q, k, v, cached_k, cached_v = depth_example(5, 2, 1)
    depth = 2
    later = (np.arange(5) >= depth).reshape(5, 1, 1, 1, 1)
    garbage = (jnp.array(np.where(later, np.float32(1e9), c)) for c in (cached_k, cached_v))
    form = partial(attend_depth, native_kernel=native_kernel)
    run = partial(gradients, lambda *x: form(*x, jnp.int32(depth))[0], q, k, v)
    clean = run(cached_k, cached_v)
    for a, b in zip(clean, run(*garbage), strict=True):
        np.testing.assert_array_equal(a, b)
    for d_cache in map(np.asarray, clean[-2:]):
        np.testing.assert_array_equal((d_cache != 0).any(axis=(1, 2, 3, 4)), np.arange(5) < depth)


@FORMS
def test_depth_attention_runs_in_a_scan_on_eight_devices(native_kernel):
    x = depth_example(3, 2, 1, B=8)

    def over_depths(q, k, v, cached_k, cached_v):
        def step(total, depth):
            return total + attend_depth(q, k, v, cached_k, cached_v, depth, native_kernel=native_kernel)[0], None

        return jax.lax.scan(step, jnp.zeros_like(q), jnp.arange(3))[0]

    def local(d_out, *x):
        out, pull_back = jax.vjp(over_depths, *x)
        return out, *pull_back(d_out)

    specs = (P("data"),) * 4 + (P(None, "data"),) * 2
    sharded = jax.shard_map(local, mesh=eight_devices(), in_specs=specs, out_specs=specs)
    got = jax.jit(sharded)(jnp.array(cotangent(x[0].shape), jnp.float32), *x)
    assert_near(got, [sum(parts) for parts in zip(*(depth_oracle(*x, depth) for depth in range(3)), strict=True)])
