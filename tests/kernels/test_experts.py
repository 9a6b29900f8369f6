"""SwiGLU experts: rows that lie sorted, and tokens that are sent to their experts and back."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_trees_all_equal_dtypes
from jax.sharding import PartitionSpec as P

from dreamer_jax.kernels import blocks, gpu
from tests.kernels.backends import BACKENDS, needs_compiler
from tests.kernels.checks import assert_near, gradients, kernels, widened
from tests.kernels.examples import experts

pytestmark = pytest.mark.usefixtures("tokamax")

D, F = 16, 8
WIDTHS = [("plain", D), pytest.param("native", D, marks=needs_compiler), ("gpu", D), ("tpu", 128)]
"""Implementations, and the widths to test them with: the kernels of TPUs want whole tiles."""

SIZES = {
    "some experts are empty": [0, 13, 0, 0, 90, 1, 30, 0],
    "one expert takes all rows": [0, 0, 300, 0],
    "rows end within a block": [70, 61],
    "fewer rows than a block": [2, 0, 1],
    "one row": [0, 1],
    "one expert": [37],
    "many small experts": [n % 4 for n in range(64)],
}


def through_experts(name, x, scores, w_gate_up, w_down, d_y, sizes):
    """y and the gradients of sorted rows, scores and weights."""
    run = partial(kernels(name).sorted_swiglu, sizes=sizes)
    y, pull_back = jax.vjp(run, x, scores, w_gate_up, w_down)
    return y, *pull_back(d_y)


def results(name, arrays):
    return jax.jit(partial(through_experts, name))(*arrays)


@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize("name", BACKENDS)
def test_every_row_passes_through_its_expert_alone_in_values_and_gradients(name, case):
    arrays = experts(SIZES[case])
    assert_near(results(name, arrays), results("reference", arrays))


@needs_compiler
@pytest.mark.parametrize(("d", "f"), [(40, 24), (37, 19), (1, 1), (130, 67)])
def test_native_kernels_take_any_width_and_more_rows_than_a_thread_takes_at_a_time(d, f):
    arrays = experts([3, 300, 0, 17], d=d, f=f)
    assert_near(results("native", arrays), results("reference", arrays))


@needs_compiler
def test_native_gates_that_are_shut_or_wide_open_are_exact():
    x, *others = experts([40, 2])
    arrays = x * 100, *others  # gates of some hundreds, either sign
    got = results("native", arrays)
    assert all(jnp.isfinite(a).all() for a in got)
    assert_near(got, results("reference", arrays))


@pytest.mark.parametrize(("name", "width"), WIDTHS)
def test_empty_experts_get_a_gradient_of_exactly_zero(name, width):
    arrays = experts(SIZES["some experts are empty"], d=width, f=width)
    got = results(name, arrays)
    assert_near(got, results("reference", arrays))
    empty = np.asarray(arrays[-1]) == 0
    for gradient in map(np.asarray, got[3:]):
        np.testing.assert_array_equal(gradient.any(axis=(1, 2)), ~empty)


@pytest.mark.parametrize(("name", "width"), WIDTHS)
def test_rows_that_no_expert_owns_are_zero_and_reach_no_gradient(name, width):
    sizes, rows = SIZES["some experts are empty"], 300
    x, scores, w_gate_up, w_down, d_y, counts = experts(sizes, d=width, f=width, rows=rows)
    past = (jnp.arange(rows) >= sum(sizes))[:, None]
    weights = w_gate_up, w_down
    got = results(name, (jnp.where(past, jnp.nan, x), scores, *weights, jnp.where(past, jnp.inf, d_y), counts))
    wanted = results("reference", (x, scores, *weights, jnp.where(past, 0, d_y), counts))
    assert_near(got, wanted)
    for of_rows in got[:3]:
        assert not np.asarray(of_rows)[sum(sizes) :].any()


FEW = ("some experts are empty", "fewer rows than a block")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in FEW else [pytest.mark.exhaustive]) for case in SIZES]
)
def test_on_nvidia_16_bits_go_through_tokamax_and_float32_through_blocks_of_rows(case):
    arrays = experts(SIZES[case], jnp.bfloat16)
    wanted = results("reference", (*widened(arrays[:-1]), arrays[-1]))
    assert_near(results("gpu", arrays), wanted, 2e-2)
    arrays = experts(SIZES[case])
    assert_near(results("gpu", arrays), results("reference", arrays))


def test_blocks_come_in_batches_that_bound_the_copies_of_weights(monkeypatch):
    arrays = experts([3, 700, 0, 129, 128])
    monkeypatch.setattr(blocks, "BATCH_BYTES", 4 * 3 * D * 2 * F)
    assert_near(results("gpu", arrays), results("reference", arrays))


@pytest.fixture
def tried(monkeypatch):
    """As on a GPU, where the gradient of tokamax is tried before it is used."""
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(platform="gpu")])
    monkeypatch.setattr(gpu, "_TRIED_ROWS", 256)
    gpu.gradient_of_weights_holds.cache_clear()
    yield
    gpu.gradient_of_weights_holds.cache_clear()


@pytest.mark.usefixtures("tried")
def test_a_gradient_of_tokamax_that_does_not_hold_is_replaced_and_said(monkeypatch):
    sums = gpu._by_tokamax
    monkeypatch.setattr(gpu, "_by_tokamax", lambda product, *x: sums(product, *x) * (1 + (product == "d_w")))
    arrays = experts([40, 90], jnp.bfloat16)
    with pytest.warns(UserWarning, match=r"gradient of the experts' weights is off by 1e\+00"):
        got = results("gpu", arrays)
    assert_near(got, results("reference", (*widened(arrays[:-1]), arrays[-1])), 2e-2)


@pytest.mark.usefixtures("tried")
def test_a_gradient_of_tokamax_that_holds_is_used():
    assert gpu.gradient_of_weights_holds()


def test_bfloat16_rounds_once_and_sums_weight_gradients_over_blocks_in_float32():
    arrays = experts([3000, 5], jnp.bfloat16)
    got = results("plain", arrays)
    assert_trees_all_equal_dtypes(got, (arrays[0], *arrays[:4]))
    wanted = results("reference", (*widened(arrays[:-1]), arrays[-1]))
    for g, w in zip(got, wanted, strict=True):  # bfloat16 rounds by at most 2^-8 of the value, here once
        np.testing.assert_allclose(np.asarray(g, np.float64), w, rtol=1.01 * 2**-8, atol=1e-5 * np.abs(w).max())


@pytest.mark.parametrize("name", BACKENDS)
def test_a_nan_in_one_experts_rows_stays_with_that_expert(name):
    x, *rest = experts([5, 40, 3])
    y, d_x, _, d_gate_up, _ = results(name, (x.at[:5].set(jnp.nan), *rest))
    for a, bad in ((y, slice(5)), (d_x, slice(5)), (d_gate_up, slice(1))):
        assert jnp.isnan(a[bad]).all()
        assert not jnp.isnan(a[bad.stop :]).any()


def tokens(T=230, E=7, A=3, width=D):
    """x, scores, weights, and choices in which nobody wants the last expert and some want one twice."""
    rng = np.random.default_rng(0)
    ids = jnp.asarray(np.argsort(rng.random((T, E)), axis=1)[:, :A] % (E - 1), jnp.int32)
    x = jnp.asarray(rng.normal(size=(T, width)), jnp.float32)
    _, _, w_gate_up, w_down, _, _ = experts([1] * E, d=width, f=width)
    return x, jnp.asarray(rng.uniform(0.1, 1, size=(T, A)), jnp.float32), w_gate_up, w_down, ids


@pytest.mark.parametrize(("name", "width"), [*WIDTHS, ("reference", D)])
def test_tokens_through_their_experts_and_back_equal_every_token_by_itself(name, width):
    *arrays, ids = tokens(width=width)

    def literal(x, scores, w_gate_up, w_down):
        gate, up = jnp.split(jnp.einsum("td,tadf->taf", x, w_gate_up[ids], precision="highest"), 2, -1)
        each = jnp.einsum("taf,tafd->tad", jax.nn.silu(gate) * up, w_down[ids], precision="highest")
        return jnp.sum(scores[..., None] * each, axis=1)

    def ours(*arrays):
        run = kernels(name)
        return run.swiglu(*arrays, run.order(ids, 7))

    assert_near(gradients(ours, *arrays), gradients(literal, *arrays))


@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
def test_weights_that_are_handed_on_bring_the_gradient_of_later_uses(name):
    *arrays, ids = tokens(T=40)

    def twice(name, follow, x, scores, *weights):
        run = kernels(name)
        order = run.order(ids, 7)
        y = run.swiglu(x, scores, *weights, order)
        return y + run.swiglu(y, scores, *(run.handed_on.latest(weights) if follow else weights), order)

    assert_near(gradients(partial(twice, name, True), *arrays), gradients(partial(twice, "reference", False), *arrays))


@pytest.mark.parametrize(("kept", "products"), [(["products"], 6), ([], 7)])
def test_remat_that_keeps_products_does_not_multiply_again(kept, products):
    x, scores, *weights, ids = tokens(T=40)
    arrays = x.astype(jnp.bfloat16), scores, *(w.astype(jnp.bfloat16) for w in weights)
    run = kernels("gpu")
    policy = jax.checkpoint_policies.save_only_these_names(*kept)
    layer = jax.checkpoint(lambda *x: run.swiglu(*x, run.order(ids, 7)), policy=policy)
    jaxpr = jax.make_jaxpr(jax.grad(lambda *x: jnp.sum(layer(*x) ** 2), argnums=(0, 1, 2, 3)))(*arrays)
    # two forward, d_x and d_w of each, and without "products" the first again: no gradient needs the second
    assert str(jaxpr).count("ragged_dot_general[") == products


def depth_loop(name, x, w_gate_up, w_down, scores, ids):
    """Three depths of routed experts over one set of weights, as the model runs them."""

    def layer(x, ids):
        run = kernels(name)
        return x + run.swiglu(x, scores, w_gate_up, w_down, run.order(ids, w_down.shape[0])), None

    return jax.lax.scan(jax.checkpoint(layer), x, ids)[0]


def sharded_gradients(name, width):
    """Value and gradients of the depth loop over four devices with replicated weights; and arguments for it."""
    x, _, w_gate_up, w_down, _, _ = experts([10] * 4, d=width, f=width)
    scores = jax.random.uniform(jax.random.key(0), (40, 2))
    ids = jax.random.randint(jax.random.key(1), (3, 40, 2), 0, 4, jnp.int32)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = (P("data"), P(), P(), P("data"), P(None, "data"))

    @partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=P("data"))
    def sharded(x, w_gate_up, w_down, scores, ids):
        w_gate_up, w_down = (jax.lax.pcast(w, "data", to="varying") for w in (w_gate_up, w_down))
        return depth_loop(name, x, w_gate_up, w_down, scores, ids)

    return value_and_gradients(sharded), (x, w_gate_up, w_down, scores, ids)


def value_and_gradients(f):
    return jax.jit(jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(f(*a))), argnums=(0, 1, 2, 3)))


@pytest.mark.parametrize("name", [*BACKENDS, "gpu"])
def test_a_checkpointed_depth_loop_under_shard_map_equals_the_same_loop_on_one_device(name):
    run, arrays = sharded_gradients(name, D)
    assert_near(run(*arrays), value_and_gradients(partial(depth_loop, "reference"))(*arrays), 2e-5)


def test_megablox_lowers_for_tpus_inside_the_same_loop():
    run, arrays = sharded_gradients("tpu", 128)
    program = run.trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()
    # two products forward, d_x and d_w of each; under checkpoint the first again: no gradient needs the second
    assert program.count("tpu_custom_call") == 7


@pytest.mark.parametrize("name", [*BACKENDS, "gpu"])
def test_weights_and_rows_that_vary_over_different_mesh_axes_meet(name):
    x, scores, w_gate_up, w_down, _, sizes = experts([6, 10])
    mesh = jax.make_mesh((2, 2), ("data", "expert"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    w_down = jnp.concatenate([w_down, 2 * w_down], axis=2)  # half of the columns on each device

    def local(x, scores, w_gate_up, w_down):
        y = kernels(name).sorted_swiglu(x, scores, w_gate_up, w_down, sizes)
        return jax.lax.psum(jnp.sin(y).sum(), ("data", "expert"))

    def sharded(x, *others):
        specs = P("data"), P(), P(), P(None, None, "expert")
        run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
        return run(jnp.concatenate([x, x]), *others)

    def on_one_device(x, scores, w_gate_up, w_down):
        parts = (kernels("reference").sorted_swiglu(x, scores, w_gate_up, w, sizes) for w in jnp.split(w_down, 2, 2))
        return 2 * sum(jnp.sin(y).sum() for y in parts)

    arrays = x, scores, w_gate_up, w_down
    got, wanted = (jax.jit(jax.grad(f, argnums=range(4)))(*arrays) for f in (sharded, on_one_device))
    assert_near(got, wanted, 1e-5)


@pytest.mark.usefixtures("without_tokamax")
def test_without_tokamax_the_error_names_the_extra():
    with pytest.raises(ImportError, match=r"dreamer-jax\[gpu\]"):
        through_experts("gpu", *experts([1, 1], jnp.bfloat16))
    jax.eval_shape(partial(through_experts, "gpu"), *experts([1, 1]))  # float32 needs no tokamax
