"""Experts shared out over devices compute what one device computes with all of them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from dreamer_jax.kernels import exchange as exchange_module
from dreamer_jax.kernels.compute import implementation
from dreamer_jax.kernels.exchange import Exchange, default_transport, exchanged_swiglu
from dreamer_jax.kernels.reference import REFERENCE
from dreamer_jax.kernels.rows import collect, dispatch, order, sort
from tests.kernels.backends import BACKENDS
from tests.kernels.checks import assert_near

TOKENS, ACTIVE, D, F = 24, 3, 8, 6


def arrays(experts, devices, skew=0.0):
    """Tokens of all devices with their routing, weights of all experts, an upstream gradient."""
    rng = np.random.default_rng(experts)
    popularity = np.exp(-skew * np.arange(experts))
    ids = [rng.choice(experts, ACTIVE, replace=False, p=popularity / popularity.sum()) for _ in range(devices * TOKENS)]
    x, d_y = (rng.normal(size=(devices * TOKENS, D)) for _ in range(2))
    scores = rng.uniform(0.1, 1, size=(devices * TOKENS, ACTIVE))
    w_gate_up, w_down = rng.normal(size=(experts, D, 2 * F)) / 3, rng.normal(size=(experts, F, D)) / 3
    floats = [jnp.asarray(a, jnp.float32) for a in (x, scores, w_gate_up, w_down, d_y)]
    return *floats, jnp.asarray(np.stack(ids), jnp.int32)


def layer(swiglu, experts, x, scores, w_gate_up, w_down, ids):
    p = order(ids, experts)
    rows = dispatch(x, p, ACTIVE), sort(scores.reshape(-1, 1), p)
    return collect(swiglu(*rows, w_gate_up, w_down, p.sizes), p, ACTIVE)


def on_one_device(experts, x, scores, w_gate_up, w_down, d_y, ids):
    @jax.jit
    def run(*inputs):
        y, pullback = jax.vjp(lambda *a: layer(REFERENCE.sorted_swiglu, experts, *a, ids), *inputs)
        return y, *pullback(d_y)

    return run(x, scores, w_gate_up, w_down)


def on_many(name, experts, exchange, x, scores, w_gate_up, w_down, d_y, ids):
    mesh = jax.make_mesh((exchange.devices,), ("expert",), axis_types=(AxisType.Auto,))
    extra = -experts % exchange.devices
    padded = [jnp.pad(w, ((0, extra), (0, 0), (0, 0))) for w in (w_gate_up, w_down)]

    @partial(jax.shard_map, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
    def run(x, scores, w_gate_up, w_down, d_y, ids):
        swiglu = partial(exchanged_swiglu, exchange=exchange, kernels=implementation(name))
        y, pullback = jax.vjp(lambda *a: layer(swiglu, experts, *a, ids), x, scores, w_gate_up, w_down)
        return y, *pullback(d_y)

    y, d_x, d_scores, d_gate_up, d_down = jax.jit(run)(x, scores, *padded, d_y, ids)
    return y, d_x, d_scores, d_gate_up[:experts], d_down[:experts]


@pytest.mark.parametrize(
    ("experts", "devices", "skew", "slack"),
    [
        pytest.param(16, 8, 0.0, 2, id="even load", marks=pytest.mark.exhaustive),
        pytest.param(13, 8, 0.0, 2, id="experts that do not divide"),
        pytest.param(5, 8, 0.0, 2, id="devices without an expert"),
        pytest.param(16, 4, 1.0, 0.5, id="several rounds"),
        pytest.param(16, 8, 3.0, 0.2, id="nearly all tokens on one device", marks=pytest.mark.exhaustive),
    ],
)
def test_shared_out_experts_equal_one_device_in_values_and_gradients(experts, devices, skew, slack):
    inputs = arrays(experts, devices, skew)
    got = on_many("reference", experts, Exchange("expert", devices, "all_to_all", slack), *inputs)
    assert_near(got, on_one_device(experts, *inputs))


@pytest.mark.parametrize("name", BACKENDS)
def test_rounds_with_rows_of_no_expert_suit_every_implementation(name):
    inputs = arrays(16, 4, 1.0)
    got = on_many(name, 16, Exchange("expert", 4, "all_to_all", 0.5), *inputs)
    assert_near(got, on_one_device(16, *inputs))


def emulated(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """What `lax.ragged_all_to_all` is documented to do, which CPUs lack: row by row, through gathered copies."""
    me, devices = lax.axis_index(axis_name), lax.axis_size(axis_name)
    everything = [lax.all_gather(a, axis_name) for a in (operand, input_offsets, send_sizes, output_offsets)]
    row = jnp.arange(output.shape[0])
    for source in range(devices):
        rows, first, count, at = everything[0][source], *(a[source, me] for a in everything[1:])
        from_source = rows[jnp.clip(first + row - at, 0, rows.shape[0] - 1)]
        arrived = (row >= at) & (row < at + jnp.minimum(count, recv_sizes[source]))
        output = jnp.where(arrived[:, None], from_source, output)
    return output


@pytest.mark.parametrize(
    ("skew", "slack"),
    [
        pytest.param(0.0, 2, id="one round", marks=pytest.mark.exhaustive),
        pytest.param(1.0, 0.5, id="several rounds"),
    ],
)
def test_the_ragged_transport_sends_every_row_to_the_same_place(monkeypatch, skew, slack):
    monkeypatch.setattr(exchange_module.lax, "ragged_all_to_all", emulated)
    inputs = arrays(13, 4, skew)
    got = on_many("reference", 13, Exchange("expert", 4, "ragged_all_to_all", slack), *inputs)
    assert_near(got, on_one_device(13, *inputs))


def test_balanced_routing_needs_one_round_and_a_skewed_one_more():
    def rounds(skew):
        *_, ids = arrays(16, 4, skew)
        mesh = jax.make_mesh((4,), ("expert",), axis_types=(AxisType.Auto,))

        @partial(jax.shard_map, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
        def count(ids):
            exchange = Exchange("expert", 4, "all_to_all", 2.0)
            routes = exchange_module._routes(exchange, order(ids, 16).sizes, 4)
            capacity = exchange_module._capacity(exchange, ids.size)
            steps = exchange_module._in_rounds(routes, capacity, lambda i, n: n + 1, jnp.zeros_like(routes.total[:1]))
            return steps

        return set(np.asarray(jax.jit(count)(ids)).tolist())

    assert rounds(0.0) == {1}
    assert rounds(3.0) == {2}


def test_platforms_without_ragged_exchange_get_the_fixed_one():
    fixed = [("cpu", "cpu"), ("tpu", "TPU v5 lite")]
    ragged = [("gpu", "NVIDIA H200"), ("tpu", "TPU v5")]
    assert {default_transport(*device) for device in fixed} == {"all_to_all"}
    assert {default_transport(*device) for device in ragged} == {"ragged_all_to_all"}
