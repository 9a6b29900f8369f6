"""Attention over packed rows and over the cache of a generated sequence."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_trees_all_equal_dtypes
from jax.sharding import PartitionSpec as P

from dreamer_jax.kernels.documents import document_start
from dreamer_jax.kernels.plain import attention
from tests.kernels.backends import BACKENDS, needs_compiler
from tests.kernels.checks import assert_near, cotangents, eight_devices, gradients, kernels, widened
from tests.kernels.examples import documents, heads

FLOAT32, BFLOAT16 = jnp.float32, jnp.bfloat16
TOLERANCE = {FLOAT32: 4e-6, BFLOAT16: 1e-2}


def attend(name, ids):
    return partial(kernels(name).attend_sequence, segment_ids=ids)


def wanted(ids, *x):
    return gradients(attend("reference", ids), *widened(x))


def assert_equals_reference(name, ids, *x):
    got = gradients(attend(name, ids), *x)
    assert_trees_all_equal_dtypes(got, (x[0], x))
    assert_near(got, wanted(ids, *x), TOLERANCE[x[0].dtype.type])


@pytest.mark.usefixtures("tokamax")
@pytest.mark.parametrize(
    ("name", "dtype", "T", "mean_length", "padding"),
    [
        ("plain", FLOAT32, 1, 9, 0),
        ("plain", FLOAT32, 16, 99, 0),
        ("plain", FLOAT32, 37, 6, 10),
        ("plain", BFLOAT16, 37, 12, 3),
        pytest.param("native", FLOAT32, 1, 9, 0, marks=needs_compiler),
        pytest.param("native", FLOAT32, 37, 6, 10, marks=needs_compiler),
        pytest.param("native", FLOAT32, 197, 60, 20, marks=needs_compiler),
        pytest.param("native", FLOAT32, 300, 999, 0, marks=needs_compiler),
        ("gpu", FLOAT32, 37, 6, 10),
        ("gpu", BFLOAT16, 37, 12, 3),
        ("reference", BFLOAT16, 37, 12, 3),
    ],
)
def test_packed_attention_equals_the_reference(monkeypatch, name, dtype, T, mean_length, padding):
    monkeypatch.setattr(attention, "BLOCK", 8)
    assert_equals_reference(name, documents(2, T, mean_length, padding), *heads(2, T, 4, 2, 8, dtype))


@pytest.mark.parametrize(("N", "K"), [(1, 1), (6, 2), (3, 1)])
@pytest.mark.parametrize("name", BACKENDS)
def test_query_heads_are_grouped(monkeypatch, N, K, name):
    monkeypatch.setattr(attention, "BLOCK", 8)
    assert_equals_reference(name, documents(1, 20, 8, 0), *heads(1, 20, N, K, 16))


def test_blocks_of_the_default_size_equal_the_reference():
    T = 3 * attention.BLOCK - 5
    assert_equals_reference("plain", documents(1, T, attention.BLOCK, 40), *heads(1, T, 2, 1, 8))


@pytest.mark.usefixtures("tokamax", "interpreted")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("plain", FLOAT32),
        pytest.param("native", FLOAT32, marks=needs_compiler),
        ("gpu", BFLOAT16),
        ("tpu", FLOAT32),
    ],
)
def test_on_eight_devices_values_and_gradients_equal_the_reference(monkeypatch, name, dtype):
    monkeypatch.setattr(attention, "BLOCK", 16)
    x, ids = heads(8, 40, 2, 1, 16, dtype), documents(8, 40, 15, 5)

    def local(q, k, v, ids, d_out):
        out, pull_back = jax.vjp(attend(name, ids), q, k, v)
        return out, pull_back(d_out)

    sharded = jax.shard_map(local, mesh=eight_devices(), in_specs=P("data"), out_specs=P("data"))
    assert_near(jax.jit(sharded)(*x, ids, cotangents(x[0])), wanted(ids, *x), TOLERANCE[dtype])


@pytest.mark.usefixtures("interpreted")
def test_the_splash_kernel_takes_any_length_and_head_size():
    assert_equals_reference("tpu", documents(2, 150, 40, 10), *heads(2, 150, 4, 2, 32))


@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
def test_the_future_and_other_documents_have_no_influence(monkeypatch, name):
    monkeypatch.setattr(attention, "BLOCK", 8)
    q, k, v = heads(1, 30, 2, 2, 8)
    ids = jnp.array([[1] * 11 + [2] * 12 + [0] * 7], jnp.int32)
    hidden_from_15 = (np.arange(30) < 11) | (np.arange(30) > 15)
    noise = np.where(hidden_from_15[None, :, None, None], np.float32(1e3), np.float32(0))

    @jax.jit
    def token_15(k, v):
        return jax.vjp(lambda k, v: attend(name, ids)(q, k, v)[:, 15], k, v)

    out, pull_back = token_15(k, v)
    np.testing.assert_array_equal(out, token_15(k + noise, v + noise)[0])
    for gradient in jax.jit(pull_back)(jnp.ones_like(out)):
        np.testing.assert_array_equal((np.asarray(gradient) != 0).any(axis=(0, 2, 3)), ~hidden_from_15)


@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
def test_rows_of_padding_and_large_scores_stay_finite(name):
    q, k, v = heads(2, 12, 2, 1, 8)
    ids = jnp.array([[0] * 12, [1] * 6 + [0] * 6], jnp.int32)
    for x in jax.tree.leaves(gradients(attend(name, ids), q * 1e4, k, v)):
        assert np.isfinite(x).all()


@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
def test_what_is_not_a_number_is_not_hidden(name):
    q, k, v = heads(1, 130, 2, 1, 8)
    ids = jnp.array([[1] * 63 + [2] * 67], jnp.int32)
    k = k.at[0, 63].set(jnp.nan)
    bad = np.isnan(jax.jit(attend(name, ids))(q, k, v)).any(axis=(0, 2, 3))
    np.testing.assert_array_equal(bad, np.arange(130) >= 63)


def test_blocks_start_at_the_first_block_of_their_documents():
    ids = jnp.array([[1, 1, 1, 1], [1, 1, 2, 2], [3, 3, 3, 3], [3, 4, 4, 0], [0, 0, 0, 0]], jnp.int32)
    np.testing.assert_array_equal(attention._first_live_block(ids), [0, 0, 2, 2, 3])


def test_blocks_tell_unsorted_segment_ids_apart(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 4)
    ids = jnp.array(np.random.default_rng(1).integers(0, 4, size=(2, 23)), jnp.int32)
    assert_equals_reference("plain", ids, *heads(2, 23, 2, 1, 8))


def test_blocks_take_memory_linear_in_the_sequence():
    def temporaries(T):
        def loss(q, k, v):
            return attend("plain", jnp.ones((1, T), jnp.int32))(q, k, v).sum()

        x = [jax.ShapeDtypeStruct((1, T, 4, 32), jnp.float32)] * 3
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*x).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(4096) < 2.2 * temporaries(2048)


@pytest.mark.usefixtures("tokamax")
@pytest.mark.parametrize(("kept", "runs"), [(["attention"], 1), ([], 2)])
def test_remat_that_keeps_attention_does_not_run_tokamax_again(kept, runs):
    q, k, v = heads(2, 40, 2, 1, 16, BFLOAT16)
    policy = jax.checkpoint_policies.save_only_these_names(*kept)
    run = jax.checkpoint(attend("gpu", documents(2, 40, 15, 5)), policy=policy)
    jaxpr = jax.make_jaxpr(jax.grad(lambda q: jnp.sum(run(q, k, v) ** 2)))(q)
    assert str(jaxpr).count("name=stand_in_forward") == runs


@pytest.mark.usefixtures("without_tokamax")
def test_tokamax_missing_is_an_error_that_names_the_extra():
    ids = jnp.ones((1, 4), jnp.int32)
    with pytest.raises(ImportError, match=r"dreamer-jax\[gpu\]"):
        attend("gpu", ids)(*heads(1, 4, 1, 1, 8, BFLOAT16))
    attend("gpu", ids)(*heads(1, 4, 1, 1, 8))  # float32 needs no tokamax


def test_the_first_token_of_each_document_is_found():
    ids = jnp.array([[1, 1, 2, 2, 2, 3, 0, 0], [5, 5, 5, 5, 0, 0, 0, 0]])
    np.testing.assert_array_equal(document_start(ids), [[0, 0, 2, 2, 2, 5, 6, 6], [0, 0, 0, 0, 4, 4, 4, 4]])


def decoded():
    """Every kernel with one and three tokens; other heads by default with one token in float32."""
    kinds = [("plain", FLOAT32), ("plain", BFLOAT16), ("native", FLOAT32), ("reference", BFLOAT16)]
    for T, sizes, (name, dtype) in itertools.product([1, 3], [(4, 2, 8), (3, 1, 20), (2, 2, 3)], kinds):
        always = sizes == (4, 2, 8) or (T == 1 and dtype == FLOAT32)
        marks = [needs_compiler] if name == "native" else []
        marks += [] if always else [pytest.mark.exhaustive]
        yield pytest.param(T, *sizes, name, dtype, marks=marks)


@pytest.mark.parametrize(("T", "N", "K", "H", "name", "dtype"), decoded())
def test_a_decoded_token_sees_the_first_rows_of_its_cache_at_its_depth(name, dtype, T, N, K, H):
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(4, T, N, H)) * 3, dtype)
    k, v = (jnp.asarray(rng.normal(size=(2, 4, K, 21, H)), dtype) for _ in range(2))
    lengths = jnp.array([0, 1, 13, 21], jnp.int32)
    hidden = (np.arange(21) >= np.asarray(lengths)[:, None])[None, :, None, :, None]
    garbage = jnp.asarray(jnp.nan if name == "native" and T == 1 else 1e6, dtype)
    seen = [jnp.where(hidden, garbage, a).at[0].set(1e6) for a in (k, v)]  # other depths' rows must not matter
    got = jax.jit(kernels(name).attend_newest)(q, *seen, jnp.int32(1), lengths)
    assert got.dtype == dtype
    assert_near(got, kernels("reference").attend_newest(*widened((q, k, v)), jnp.int32(1), lengths), TOLERANCE[dtype])
    assert not got[0].any()
