"""What stands between the model and its implementations."""

from functools import partial

import jax.numpy as jnp
import pytest
from chex import assert_trees_all_equal

from dreamer_jax.kernels.compute import implementation
from dreamer_jax.kernels.interface import HandedOn, pad_experts
from tests.kernels.checks import assert_near, gradients, kernels
from tests.kernels.examples import experts


def test_an_array_stands_for_another_until_a_third_does():
    a, b, c, other = (jnp.full(2, float(i)) for i in range(4))
    handed_on = HandedOn()
    assert handed_on.latest(a) is a
    handed_on.replace(a, b)
    handed_on.replace(other, other)
    assert handed_on.latest({"x": a, "y": [other, None]})["x"] is b
    handed_on.replace(b, c)
    first, second, third = handed_on.latest((a, b, other))
    assert first is c
    assert second is c
    assert third is other


def test_what_is_replaced_keeps_its_identity():
    handed_on, successor = HandedOn(), jnp.ones(1)
    for _ in range(100):
        handed_on.replace(jnp.zeros(1), successor)  # nobody else holds it: its identity must not be given away
        fresh = jnp.zeros(1)
        assert handed_on.latest(fresh) is fresh


def test_depths_know_nothing_of_each_other():
    assert kernels("plain").handed_on is not kernels("plain").handed_on


@pytest.mark.parametrize("stack", [(), (2,)], ids=["one layer", "stacked layers"])
def test_padding_widens_gate_and_up_each_by_itself(stack):
    w_gate_up, w_down = (jnp.ones((*stack, 3, *shape)) for shape in ((16, 2 * 8), (8, 16)))
    wide_gate_up, wide_down = pad_experts(implementation("tpu"), w_gate_up, w_down)
    columns = jnp.arange(256) % 128 < 8
    assert_trees_all_equal(wide_gate_up, jnp.broadcast_to(columns, (*stack, 3, 16, 256)).astype(jnp.float32))
    assert_trees_all_equal(wide_down, jnp.broadcast_to(columns[:128, None], (*stack, 3, 128, 16)).astype(jnp.float32))


def test_padding_the_experts_changes_neither_values_nor_gradients():
    *arrays, _, sizes = experts([0, 13, 0, 0, 90, 1, 30, 0])

    def run(padding, x, scores, *weights):
        return kernels("plain").sorted_swiglu(x, scores, *pad_experts(implementation(padding), *weights), sizes)

    assert_near(gradients(partial(run, "gpu"), *arrays), gradients(partial(run, "plain"), *arrays), 1e-6)


def test_padding_leaves_experts_of_a_fitting_width_alone():
    _, _, *weights, _, _ = experts([1, 1], f=256)
    assert all(wide is w for wide, w in zip(pad_experts(implementation("tpu"), *weights), weights, strict=True))
    _, _, *weights, _, _ = experts([1, 1])
    assert all(wide is w for wide, w in zip(pad_experts(implementation("native"), *weights), weights, strict=True))
