"""Expert parallelism: the experts shared out over the devices of a mesh axis, dropless.

Every device routes its own tokens over all experts and sorts them (rows.py). Since neighbouring experts live on one
device, the sorted rows of each destination are contiguous: they travel there, pass through its experts, and travel
back. `exchanged_swiglu` therefore stands in for `Kernels.sorted_swiglu`.

Buffers are bounded and nothing is dropped: rows travel in rounds of at most `capacity` rows for each pair of devices.
Balanced routers need one round; how many, all devices agree on beforehand. Two transports give the same result:

    all_to_all          every pair exchanges a full round; exists on every platform
    ragged_all_to_all   only the rows that exist travel; GPU and TPU
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dreamer_jax.kernels.interface import ExpertOrder, Implementation
from dreamer_jax.kernels.rows import order, sort, unsort
from dreamer_jax.sharding import axes_of

Transport = Literal["all_to_all", "ragged_all_to_all"]

SLACK: dict[Transport, float] = {"all_to_all": 1.5, "ragged_all_to_all": 2.0}
"""Rows that a round may carry between two devices, in multiples of an even share. Balanced routings fit one round; what
is not used costs all_to_all time on the wire, and the ragged transport only memory."""


class Exchange(NamedTuple):
    """Over which mesh axis experts are shared out, and how rows travel."""

    axis: str
    devices: int
    transport: Transport
    slack: float


def default_transport(platform: str, device_kind: str) -> Transport:
    """The transport for a JAX platform ("cpu", "gpu", "cuda" or "tpu") and `jax.Device.device_kind`."""
    # XLA refuses the ragged form on large slices of TPU v5e, whose network routes less freely.
    return "all_to_all" if platform == "cpu" or "v5 lite" in device_kind else "ragged_all_to_all"


class _Routes(NamedTuple):
    """Which rows go where; P devices, E / P experts on each (the last device's filled up)."""

    start: Int[Array, "P"]
    """First of the sorted rows that go to each device."""
    total: Int[Array, "P"]
    """How many go there."""
    incoming: Int[Array, "P local"]
    """Rows that each device sends to each expert of this one."""
    landing: Int[Array, "P"]
    """`start`, on each device, of the rows that come from there to this one."""


@jax.named_scope("exchange")
def exchanged_swiglu(
    x: Float[Array, "R D"],
    scores: Float[Array, "R 1"],
    w_gate_up: Float[Array, "local D G"],
    w_down: Float[Array, "local F D"],
    sizes: Int[Array, "E"],
    *,
    exchange: Exchange,
    kernels: Implementation,
) -> Float[Array, "R D"]:
    """`sorted_swiglu` with this device's part of the experts; inside shard_map.

    Args:
        x: this device's rows, sorted by expert over all experts.
        scores: weight of each row, float32.
        w_gate_up: this device's experts, [E / P, D, 2F], filled up to a whole number on every device.
        w_down: [E / P, F, D].
        sizes: this device's rows of each of all E experts; they sum to R.
        exchange: mesh axis and transport.
        kernels: whose `sorted_swiglu` computes.
    """
    return _exchanged(exchange, kernels, x, scores, w_gate_up, w_down, sizes)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _exchanged(exchange: Exchange, kernels: Implementation, x, scores, w_gate_up, w_down, sizes):
    routes, capacity = _routes(exchange, sizes, w_down.shape[0]), _capacity(exchange, x.shape[0])

    def through_experts(i, y):
        arrivals = _arrivals(routes, i, capacity)
        rows, row_scores = (sort(_send(exchange, routes, i, capacity, a), arrivals) for a in (x, scores))
        out = kernels.sorted_swiglu(rows, row_scores, w_gate_up, w_down, arrivals.sizes[:-1])
        return _return(exchange, routes, i, capacity, unsort(out, arrivals), y)

    return _in_rounds(routes, capacity, through_experts, jnp.zeros_like(x))


def _exchanged_forward(exchange, kernels, x, scores, w_gate_up, w_down, sizes):
    arrays = x, scores, w_gate_up, w_down, sizes
    return _exchanged(exchange, kernels, *arrays), arrays


def _exchanged_backward(exchange, kernels, residuals, d_y):
    """Rows and cotangents travel to the experts again: cheaper than keeping what arrived at every depth."""
    x, scores, w_gate_up, w_down, sizes = residuals
    routes, capacity = _routes(exchange, sizes, w_down.shape[0]), _capacity(exchange, x.shape[0])

    def through_experts(i, sums):
        d_x, d_scores, *d_weights = sums
        arrivals = _arrivals(routes, i, capacity)
        *rows, d_out = [sort(_send(exchange, routes, i, capacity, a), arrivals) for a in (x, scores, d_y)]
        swiglu = partial(kernels.sorted_swiglu, sizes=arrivals.sizes[:-1])
        *d_rows, d_gate_up, d_down = jax.vjp(swiglu, *rows, w_gate_up, w_down)[1](d_out)
        d_x, d_scores = (
            _return(exchange, routes, i, capacity, unsort(d, arrivals), into)
            for d, into in zip(d_rows, (d_x, d_scores), strict=True)
        )
        return d_x, d_scores, d_weights[0] + d_gate_up, d_weights[1] + d_down

    zeros = tuple(jnp.zeros_like(a) for a in (x, scores, w_gate_up, w_down))
    return *_in_rounds(routes, capacity, through_experts, zeros), None


_exchanged.defvjp(_exchanged_forward, _exchanged_backward)


def _capacity(exchange: Exchange, rows: int) -> int:
    """Rows of one round between two devices."""
    return max(1, min(rows, int(exchange.slack * rows / exchange.devices)))


def _routes(exchange: Exchange, sizes: Int[Array, "E"], local: int) -> _Routes:
    """From this device's rows of each expert, by one exchange of counts."""
    outgoing = jnp.pad(sizes, (0, exchange.devices * local - sizes.shape[0])).reshape(exchange.devices, local)
    total = jnp.sum(outgoing, axis=1)
    start = jnp.cumsum(total) - total
    incoming, landing = (lax.all_to_all(a, exchange.axis, 0, 0, tiled=True) for a in (outgoing, start))
    return _Routes(start, total, incoming, landing)


def _in_rounds(routes: _Routes, capacity: int, step: Callable[[Any, Any], Any], init: Any) -> Any:
    """Apply step(i, carry) for as many rounds as the fullest pair of devices needs; the first stands outside a loop."""
    needed = lax.pmax(-(-jnp.max(routes.total) // capacity), axes_of(routes.total))
    return lax.fori_loop(1, needed, step, step(0, init))


def _arrivals(routes: _Routes, i: Any, capacity: int) -> ExpertOrder:
    """The order by expert of what arrives in round i; rows of no expert come last."""
    ends = jnp.cumsum(routes.incoming, axis=1)
    at = i * capacity + jnp.arange(capacity, dtype=ends.dtype)
    # Each device's rows come sorted by expert; past its last row, `side="right"` gives the number of experts.
    expert = jax.vmap(lambda ends: jnp.searchsorted(ends, at, side="right"))(ends)
    return order(expert.reshape(-1, 1), routes.incoming.shape[1] + 1)


def _in_round(total: Int[Array, "P"], i: Any, capacity: int) -> Int[Array, "P"]:
    """How many of `total` rows travel in round i."""
    return jnp.clip(total - i * capacity, 0, capacity)


def _send(
    exchange: Exchange, routes: _Routes, i: Any, capacity: int, x: Float[Array, "R D"]
) -> Float[Array, "slots D"]:
    """Round i's rows of x at their destinations: `capacity` slots for each source, zero where no row travels."""
    devices = exchange.devices
    leaving = _in_round(routes.total, i, capacity)
    if exchange.transport == "ragged_all_to_all":
        buffer = jnp.zeros_like(x, shape=(devices * capacity, x.shape[1]))
        arriving = _in_round(jnp.sum(routes.incoming, axis=1), i, capacity)
        mine = jnp.full_like(routes.start, capacity) * lax.axis_index(exchange.axis)
        first = jnp.minimum(routes.start + i * capacity, x.shape[0])
        return lax.ragged_all_to_all(x, buffer, first, leaving, mine, arriving, axis_name=exchange.axis)
    slot = jnp.arange(capacity, dtype=routes.start.dtype)
    row = jnp.minimum(routes.start[:, None] + i * capacity + slot[None], x.shape[0] - 1)
    travels = slot[None] < leaving[:, None]
    buffer = jnp.where(travels.reshape(-1, 1), x.at[row.reshape(-1)].get(mode="promise_in_bounds"), 0)
    return lax.all_to_all(buffer, exchange.axis, 0, 0, tiled=True)


def _return(
    exchange: Exchange,
    routes: _Routes,
    i: Any,
    capacity: int,
    y: Float[Array, "slots D"],
    into: Float[Array, "R D"],
) -> Float[Array, "R D"]:
    """`into` with the results of round i, from the slots that rows arrived in, at the rows that they came from."""
    devices = exchange.devices
    leaving = _in_round(routes.total, i, capacity)
    if exchange.transport == "ragged_all_to_all":
        arrived = _in_round(jnp.sum(routes.incoming, axis=1), i, capacity)
        first = jnp.arange(devices, dtype=arrived.dtype) * capacity
        home = jnp.minimum(routes.landing + i * capacity, into.shape[0])
        return lax.ragged_all_to_all(y, into, first, arrived, home, leaving, axis_name=exchange.axis)
    back = lax.all_to_all(y, exchange.axis, 0, 0, tiled=True)
    row = jnp.arange(into.shape[0], dtype=routes.start.dtype)
    device = jnp.searchsorted(routes.start + routes.total, row, side="right")
    device = jnp.minimum(device, devices - 1)
    slot = row - routes.start[device] - i * capacity
    travelled = (slot >= 0) & (slot < capacity)
    found = back.at[device * capacity + jnp.clip(slot, 0, capacity - 1)].get(mode="promise_in_bounds")
    return jnp.where(travelled[:, None], found, into)
