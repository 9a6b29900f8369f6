from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dreamer_jax.model import grouped_matmul as grouped
from dreamer_jax.model.grouped_matmul import (
    collect,
    dispatch,
    grouped_matmul,
    grouped_swiglu,
    plan,
    routed_swiglu,
    sort,
    unsort,
)
from tests.native import BACKENDS, needs_compiler

D, F = 16, 8
WIDTHS = [("blocks", D), pytest.param("native", D, marks=needs_compiler), ("dense", D), ("megablox", 128)]
SIZES = {
    "some experts are empty": [0, 13, 0, 0, 90, 1, 30, 0],
    "one expert takes all rows": [0, 0, 300, 0],
    "rows end within a block": [70, 61],
    "fewer rows than a block": [2, 0, 1],
    "one row": [0, 1],
    "one expert": [37],
    "many small experts": [n % 4 for n in range(64)],
}


def experts(sizes, dtype=jnp.float32, d=D, f=F, rows=None):
    """Random rows, scores, weights and an upstream gradient, at the scale of a trained layer."""
    rng, rows = np.random.default_rng(len(sizes)), rows or sum(sizes)
    shapes = [(rows, d), (len(sizes), d, 2 * f), (len(sizes), f, d), (rows, d)]
    scales = [1, d**-0.5, f**-0.5, 1]
    x, *others = [jnp.asarray(rng.normal(size=s) * c, dtype) for s, c in zip(shapes, scales, strict=True)]
    scores = jnp.asarray(rng.uniform(0.1, 1, size=(rows, 1)), jnp.float32)
    return x, scores, *others, jnp.asarray(sizes, jnp.int32)


def by_hand(x, scores, w_gate_up, w_down, d_y, sizes):
    """SwiGLU of each expert on its own slice of rows in NumPy float64, and its gradients, written out."""
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
    return y, d_x, d_scores, d_gate_up, d_down


def swiglu_and_gradients(x, scores, w_gate_up, w_down, d_y, sizes, backend):
    y, vjp = jax.vjp(lambda *a: grouped_swiglu(*a, sizes, backend=backend), x, scores, w_gate_up, w_down)
    return y, *vjp(d_y)


def assert_near(got, want, tolerance):
    for g, w in zip(got, want, strict=True):
        w = np.asarray(w, np.float64)
        np.testing.assert_allclose(np.asarray(g, np.float64), w, rtol=0, atol=tolerance * max(np.abs(w).max(), 1e-30))


@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_row_passes_through_its_expert_alone_in_values_and_gradients(case, backend):
    arrays = experts(SIZES[case])
    assert_near(jax.jit(partial(swiglu_and_gradients, backend=backend))(*arrays), by_hand(*arrays), 3e-6)


@needs_compiler
@pytest.mark.parametrize(("d", "f"), [(40, 24), (37, 19), (1, 1), (130, 67)])
def test_native_kernels_take_any_width_and_more_rows_than_a_thread_takes_at_a_time(d, f):
    arrays = experts([3, 300, 0, 17], d=d, f=f)
    assert_near(jax.jit(partial(swiglu_and_gradients, backend="native"))(*arrays), by_hand(*arrays), 3e-6)


@needs_compiler
def test_native_gates_that_are_shut_or_wide_open_are_exact():
    arrays = list(experts([40, 2]))
    arrays[0] = arrays[0] * 100  # gates of some hundreds, either sign
    got = jax.jit(partial(swiglu_and_gradients, backend="native"))(*arrays)
    assert all(jnp.isfinite(a).all() for a in got)
    assert_near(got, by_hand(*arrays), 3e-6)


@pytest.mark.parametrize(("backend", "width"), [("dense", D), ("megablox", 128)])
def test_other_backends_equal_the_products_by_hand_and_leave_empty_experts_at_zero(backend, width):
    arrays = experts(SIZES["some experts are empty"], d=width, f=width)
    got = jax.jit(partial(swiglu_and_gradients, backend=backend))(*arrays)
    assert_near(got, by_hand(*arrays), 3e-6)
    assert not got[3][0].any()
    assert not got[4][-1].any()


@pytest.mark.parametrize(("backend", "width"), WIDTHS)
def test_rows_that_no_expert_owns_are_zero_and_reach_no_gradient(backend, width):
    sizes, rows = SIZES["some experts are empty"], 300
    x, scores, w_gate_up, w_down, d_y, counts = experts(sizes, d=width, f=width, rows=rows)
    past = (jnp.arange(rows) >= sum(sizes))[:, None]
    x, d_y = jnp.where(past, jnp.nan, x), jnp.where(past, jnp.inf, d_y)
    arrays = (x, scores, w_gate_up, w_down, d_y, counts)
    assert_near(jax.jit(partial(swiglu_and_gradients, backend=backend))(*arrays), by_hand(*arrays), 3e-6)


def test_tokamax_products_equal_the_products_by_hand(monkeypatch):
    pytest.importorskip("tokamax")
    monkeypatch.setattr(grouped, "TOKAMAX_IMPLEMENTATIONS", ("xla",))
    arrays = experts(SIZES["some experts are empty"])
    assert_near(jax.jit(partial(swiglu_and_gradients, backend="tokamax"))(*arrays), by_hand(*arrays), 3e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_product_equals_the_dense_form_in_values_and_gradients(backend):
    x, _, w, _, _, sizes = experts(SIZES["some experts are empty"])
    d_y = jnp.cos(jnp.arange(x.shape[0] * 2.0 * F)).reshape(-1, 2 * F)

    @partial(jax.jit, static_argnums=0)
    def run(backend):
        y, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, backend=backend), x, w)
        return y, *vjp(d_y)

    assert_near(run(backend), run("dense"), 3e-6)


def test_bfloat16_rounds_once_and_sums_weight_gradients_over_blocks_in_float32():
    arrays = experts([3000, 5], jnp.bfloat16)
    got = jax.jit(partial(swiglu_and_gradients, backend="blocks"))(*arrays)
    assert [a.dtype for a in got] == [jnp.bfloat16] * 2 + [jnp.float32] + [jnp.bfloat16] * 2
    for g, w in zip(got, by_hand(*arrays), strict=True):  # bfloat16 rounds by at most 2^-8 of the value, here once
        np.testing.assert_allclose(np.asarray(g, np.float64), w, rtol=1.01 * 2**-8, atol=1e-5 * np.abs(w).max())


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_experts_get_a_gradient_of_exactly_zero(backend):
    arrays = experts([0, 9, 0])
    *_, d_gate_up, d_down = jax.jit(partial(swiglu_and_gradients, backend=backend))(*arrays)
    for gradient in (d_gate_up, d_down):
        assert not gradient[jnp.array([0, 2])].any()
        assert gradient[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_in_one_experts_rows_stays_with_that_expert(backend):
    x, *rest = experts([5, 40, 3])
    run = jax.jit(partial(swiglu_and_gradients, backend=backend))
    y, d_x, _, d_gate_up, _ = run(x.at[:5].set(jnp.nan), *rest)
    for a, bad in ((y, slice(5)), (d_x, slice(5)), (d_gate_up, slice(1))):
        assert jnp.isnan(a[bad]).all()
        assert not jnp.isnan(a[bad.stop :]).any()


def test_padding_the_experts_changes_neither_values_nor_gradients():
    *arrays, sizes = experts(SIZES["some experts are empty"])

    @partial(jax.jit, static_argnums=0)
    def run(backend):
        def padded(x, scores, *weights):
            weights = grouped.pad_experts_for(backend, *weights)
            assert weights[1].shape[1] == (128 if backend == "tokamax" else F)
            return grouped_swiglu(x, scores, *weights, sizes, backend="blocks")

        y, vjp = jax.vjp(padded, *arrays[:4])
        return y, *vjp(arrays[4])

    assert_near(run("tokamax"), run("blocks"), 1e-6)


def test_padding_leaves_experts_of_a_fitting_width_alone():
    _, _, w_gate_up, w_down, _, _ = experts([1, 1], f=256)
    assert grouped.pad_experts_for("megablox", w_gate_up, w_down)[1] is w_down


@pytest.mark.parametrize("shape", [(50, 1), (20, 5), (33, 3)], ids=["A = 1", "A = E", "A < E"])
def test_the_plan_sorts_by_expert_and_keeps_the_order_of_tokens(shape):
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(5)[: shape[1]] for _ in range(shape[0])]).astype(np.int32)
    p = jax.tree.map(np.asarray, jax.jit(plan, static_argnums=1)(ids, 7))
    flat = ids.reshape(-1)
    np.testing.assert_array_equal(p.order, np.argsort(flat, kind="stable"))
    np.testing.assert_array_equal(p.order[p.inverse], np.arange(flat.size))
    np.testing.assert_array_equal(p.sizes, np.bincount(flat, minlength=7))
    assert p.sizes.dtype == jnp.int32


def routed(tokens=33, active=3, n_experts=7):
    rng = np.random.default_rng(0)
    ids = jnp.asarray(np.stack([rng.permutation(n_experts)[:active] for _ in range(tokens)]), jnp.int32)
    x, g = (jnp.asarray(rng.normal(size=(tokens, D)), jnp.float32) for _ in range(2))
    y = jnp.asarray(rng.normal(size=(tokens * active, D)), jnp.float32)
    return (
        ids,
        jax.jit(plan, static_argnums=1)(ids, n_experts),
        x,
        g,
        y,
        jnp.asarray(rng.uniform(size=ids.shape), jnp.float32),
    )


def test_dispatch_gives_every_row_the_token_that_chose_its_expert():
    ids, p, x, *_ = routed()
    rows, at = [], 0
    for expert in range(7):
        rows += [x[token] for token in range(33) if expert in ids[token]]
        at += p.sizes[expert]
        assert len(rows) == at
    np.testing.assert_array_equal(dispatch(x, p, 3), np.stack(rows))


def test_dispatch_and_collect_are_each_others_transposes():
    _, p, x, _, y, _ = routed()
    np.testing.assert_allclose(jnp.vdot(dispatch(x, p, 3), y), jnp.vdot(x, collect(y, p, 3)), rtol=1e-5)
    np.testing.assert_allclose(jax.vjp(lambda x: dispatch(x, p, 3), x)[1](y)[0], collect(y, p, 3), rtol=1e-6)
    np.testing.assert_array_equal(jax.vjp(lambda y: collect(y, p, 3), y)[1](x)[0], dispatch(x, p, 3))


def test_collect_adds_up_the_choices_of_each_token():
    _, p, _, g, y, scores = routed()

    def one_hot(y):
        choices = jax.nn.one_hot(p.order, p.order.size, axis=0) @ y
        return choices.reshape(*scores.shape, D).sum(axis=1)

    out, vjp = jax.vjp(lambda y: collect(y, p, 3), y)
    expected, expected_vjp = jax.vjp(one_hot, y)
    assert_near([out, *vjp(g)], [expected, *expected_vjp(g)], 1e-6)


def test_sorting_gives_every_row_the_score_of_its_choice():
    _, p, *_, scores = routed()
    flat = scores.reshape(-1, 1)
    rows, vjp = jax.vjp(lambda s: sort(s, p), flat)
    np.testing.assert_array_equal(rows, flat[p.order])
    np.testing.assert_array_equal(vjp(rows)[0], flat)


def test_unsort_restores_token_order_and_its_gradient_sorts():
    _, p, x, g, *_ = routed(active=1)
    restored, vjp = jax.vjp(lambda y: unsort(y, p), dispatch(x, p, 1))
    np.testing.assert_array_equal(restored, x)
    np.testing.assert_array_equal(vjp(g)[0], dispatch(g, p, 1))


def test_combining_bfloat16_rows_sums_in_float32_and_returns_bfloat16():
    _, p, *_ = routed(tokens=4, active=5)
    y = jnp.where(jnp.arange(20)[:, None] < 1, 256.0, 1.0).repeat(D, 1).astype(jnp.bfloat16)[p.order]
    out, vjp = jax.vjp(lambda y: collect(y, p, 5), y)
    assert out.dtype == jnp.bfloat16
    assert out[0, 0] == 260  # 256 + 1 is 256 in bfloat16
    assert vjp(out)[0].dtype == jnp.bfloat16
    (d_x,) = jax.vjp(lambda x: dispatch(x, p, 5), out)[1](y)
    assert d_x.dtype == jnp.bfloat16
    assert d_x[0, 0] == 260


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_through_their_experts_and_back_equal_every_token_by_itself(backend):
    rng = np.random.default_rng(0)
    T, E, A = 230, 7, 3
    ids = jnp.asarray(np.argsort(rng.random((T, E)), axis=1)[:, :A] % (E - 1), jnp.int32)  # nobody wants the last one
    x, d_y = (jnp.asarray(rng.normal(size=(T, D)), jnp.float32) for _ in range(2))
    _, _, w_gate_up, w_down, _, _ = experts([1] * E)
    scores = jnp.asarray(rng.uniform(0.1, 1, size=(T, A)), jnp.float32)

    def literal(x, scores, w_gate_up, w_down):
        gate, up = jnp.split(jnp.einsum("td,tadf->taf", x, w_gate_up[ids], precision="highest"), 2, -1)
        each = jnp.einsum("taf,tafd->tad", jax.nn.silu(gate) * up, w_down[ids], precision="highest")
        return jnp.sum(scores[..., None] * each, axis=1)

    def ours(*arrays):
        return routed_swiglu(*arrays, plan(ids, E), backend=backend)[0]

    def results(f):
        y, vjp = jax.vjp(f, x, scores, w_gate_up, w_down)
        return y, *vjp(d_y)

    assert_near(jax.jit(partial(results, ours))(), results(literal), 3e-6)


def depth_loop(x, w_gate_up, w_down, scores, ids, backend):
    """Three depths of routed experts over one set of weights, as the model runs them."""

    def layer(x, ids):
        p = plan(ids, w_down.shape[0])
        weights = sort(scores.reshape(-1, 1), p)
        rows = grouped_swiglu(dispatch(x, p, ids.shape[1]), weights, w_gate_up, w_down, p.sizes, backend=backend)
        return x + collect(rows, p, ids.shape[1]), None

    return jax.lax.scan(jax.checkpoint(layer), x, ids)[0]


def sharded_gradients(width, backend):
    """Value and gradients of the depth loop over four devices with replicated weights; and arguments for it."""
    x, _, w_gate_up, w_down, _, _ = experts([10] * 4, d=width, f=width)
    scores = jax.random.uniform(jax.random.key(0), (40, 2))
    ids = jax.random.randint(jax.random.key(1), (3, 40, 2), 0, 4, jnp.int32)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated, split = PartitionSpec(), PartitionSpec("data")
    specs = (split, replicated, replicated, split, PartitionSpec(None, "data"))

    @partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=split)
    def sharded(x, w_gate_up, w_down, scores, ids):
        w_gate_up, w_down = (jax.lax.pcast(w, "data", to="varying") for w in (w_gate_up, w_down))
        return depth_loop(x, w_gate_up, w_down, scores, ids, backend)

    return gradients(sharded), (x, w_gate_up, w_down, scores, ids)


def gradients(f):
    return jax.jit(jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(f(*a))), argnums=(0, 1, 2, 3)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_checkpointed_depth_loop_under_shard_map_equals_the_same_loop_on_one_device(backend):
    run, arrays = sharded_gradients(D, backend)
    value, grads = run(*arrays)
    expected, expected_grads = gradients(partial(depth_loop, backend="dense"))(*arrays)
    assert_near([value, *grads], [expected, *expected_grads], 1e-5)


def test_megablox_lowers_for_tpus_inside_the_same_loop():
    run, arrays = sharded_gradients(128, "megablox")
    program = run.trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()
    # two products forward, d_x and d_w of each; under checkpoint the first again: no gradient needs the second
    assert program.count("tpu_custom_call") == 7


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_and_rows_that_vary_over_different_mesh_axes_meet(backend):
    x, _, w, _, _, sizes = experts([6, 10])
    mesh = jax.make_mesh((2, 2), ("data", "expert"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def f(x, w, backend):
        return jax.lax.psum(jnp.sin(grouped_matmul(x, w, sizes, backend=backend)).sum(), ("data", "expert"))

    def loss(x, w, backend):
        body = partial(f, backend=backend)
        specs = (PartitionSpec("data"), PartitionSpec(None, None, "expert"))
        return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())(jnp.concatenate([x, x]), w)

    got = jax.jit(jax.grad(partial(loss, backend=backend), argnums=(0, 1)))(x, w)
    on_one_device = partial(grouped_matmul, sizes=sizes, backend="dense")
    assert_near(got, jax.grad(lambda x, w: 2 * jnp.sin(on_one_device(x, w)).sum(), argnums=(0, 1))(x, w), 1e-5)


def test_platforms_have_a_backend_and_unknown_ones_an_error():
    found = [grouped.default_backend(p, "bfloat16") for p in ("cpu", "gpu", "tpu")]
    assert found == ["blocks", "tokamax", "megablox"]
    with pytest.raises(ValueError, match="abacus"):
        grouped.default_backend("abacus", "float32")


def test_without_tokamax_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokamax", None)
    x, _, w, _, _, sizes = experts([1, 1])
    with pytest.raises(ImportError, match=r"dreamer-jax\[gpu\]"):
        grouped_matmul(x, w, sizes, backend="tokamax")
