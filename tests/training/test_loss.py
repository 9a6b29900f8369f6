"""The chunked cross-entropy is the plain one, in values and gradients, without its memory."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import PartitionSpec as P

from dreamer_jax.training import loss as loss_module
from dreamer_jax.training.loss import cross_entropy_sum, next_token_targets

VOCABULARY = 101


def plain_cross_entropy_sum(hidden, lm_head, targets, weights):
    """The oracle: float32 logits of all tokens, jax's own log-softmax and derivatives."""
    logits = jnp.einsum("btd,dv->btv", hidden, lm_head, preferred_element_type=jnp.float32)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return -(weights * jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]).sum()


def example(B=2, T=37, D=16, V=VOCABULARY, dtype=jnp.float32, seed=0):
    r = np.random.default_rng(seed)
    hidden, lm_head = jnp.array(r.normal(size=(B, T, D)), dtype), jnp.array(r.normal(size=(D, V)), dtype)
    targets = jnp.array(r.integers(V, size=(B, T)), jnp.int32)
    return hidden, lm_head, targets, jnp.array(r.random((B, T)) < 0.7, jnp.float32)


def value_and_gradients(function, hidden, lm_head, targets, weights):
    scaled = jax.value_and_grad(lambda *x: function(*x, targets, weights) / 7, argnums=(0, 1))
    return jax.jit(scaled)(hidden, lm_head)


def in_chunks_of(monkeypatch, tokens, V=VOCABULARY):
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", tokens * V * 4)
    monkeypatch.setattr(loss_module, "MIN_CHUNK", 1)


def relative_error(got, wanted):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize(
    ("tokens", "dtype", "tolerance"),
    [(10**6, jnp.float32, 1e-6), (30, jnp.float32, 1e-6), (1, jnp.float32, 1e-6), (30, jnp.bfloat16, 6e-3)],
)
def test_values_and_gradients_equal_the_plain_form(monkeypatch, tokens, dtype, tolerance):
    in_chunks_of(monkeypatch, tokens)
    inputs = example(dtype=dtype)
    value, gradients = value_and_gradients(cross_entropy_sum, *inputs)
    wanted, wanted_gradients = value_and_gradients(plain_cross_entropy_sum, *inputs)
    assert value.dtype == jnp.float32
    assert relative_error(value, wanted) < 1e-6
    chex.assert_trees_all_equal_shapes_and_dtypes(gradients, inputs[:2])
    for got, want in zip(gradients, wanted_gradients, strict=True):
        assert relative_error(got, want) < tolerance
    np.testing.assert_allclose(jax.jit(cross_entropy_sum)(*inputs) / 7, value, rtol=1e-6)


def test_the_gradient_of_the_head_is_accumulated_in_float32(monkeypatch):
    in_chunks_of(monkeypatch, 4)
    hidden, lm_head, targets, weights = example(B=4, T=256, dtype=jnp.bfloat16)
    exact = value_and_gradients(
        plain_cross_entropy_sum, hidden.astype(jnp.float32), lm_head.astype(jnp.float32), targets, weights
    )[1]
    got = value_and_gradients(cross_entropy_sum, hidden, lm_head, targets, weights)[1]
    assert relative_error(got[1], exact[1]) < 4e-3  # 256 roundings to bfloat16 would cost several times as much


def test_without_weights_loss_and_gradients_are_zero():
    hidden, lm_head, targets, weights = example()
    value, gradients = value_and_gradients(cross_entropy_sum, hidden, lm_head, targets, jnp.zeros_like(weights))
    chex.assert_trees_all_equal((value, gradients), jax.tree.map(jnp.zeros_like, (value, gradients)))


def test_tokens_of_weight_zero_have_no_gradient():
    hidden, lm_head, targets, weights = example()
    gradient = value_and_gradients(cross_entropy_sum, hidden, lm_head, targets, weights)[1][0]
    np.testing.assert_array_equal((gradient != 0).any(axis=-1), weights > 0)


def test_large_logits_stay_finite():
    hidden, lm_head, targets, weights = example()
    value, gradients = value_and_gradients(cross_entropy_sum, hidden * 3e3, lm_head, targets, weights)
    assert jnp.abs(hidden * 3e3 @ lm_head).max() > 1e4
    chex.assert_tree_all_finite((value, gradients))
    assert relative_error(value * 7, plain_cross_entropy_sum(hidden * 3e3, lm_head, targets, weights)) < 1e-6


def equations(jaxpr):
    """Every equation of a jaxpr and of those nested in it."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(list(equation.params.values())):
            if isinstance(parameter, ClosedJaxpr):
                yield from equations(parameter.jaxpr)
            elif isinstance(parameter, Jaxpr):
                yield from equations(parameter)


def largest_array(jaxpr):
    return max(variable.aval.size for equation in equations(jaxpr) for variable in equation.outvars)


def matmuls(jaxpr):
    return sum(equation.primitive.name == "dot_general" for equation in equations(jaxpr))


def differentiated(function, inputs):
    return jax.make_jaxpr(jax.value_and_grad(function, argnums=(0, 1)))(*inputs).jaxpr


def test_no_array_of_all_logits_exists_when_there_are_chunks(monkeypatch):
    in_chunks_of(monkeypatch, 16)
    inputs = example()
    all_logits = inputs[2].size * VOCABULARY
    assert largest_array(differentiated(plain_cross_entropy_sum, inputs)) == all_logits
    assert largest_array(differentiated(cross_entropy_sum, inputs)) <= 16 * VOCABULARY


def test_a_gradient_costs_three_matmuls_and_a_value_one():
    inputs = example()
    assert matmuls(jax.make_jaxpr(cross_entropy_sum)(*inputs).jaxpr) == 1
    assert matmuls(differentiated(cross_entropy_sum, inputs)) == 3


@pytest.mark.parametrize("tokens", [8, 10**6])
def test_eight_devices_and_accumulated_microbatches_equal_one_device(monkeypatch, tokens):
    in_chunks_of(monkeypatch, tokens)
    inputs = example(B=16, T=11)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(hidden, lm_head, targets, weights):
        count = jax.lax.psum(weights.sum(), "data")

        def microbatch(lm_head, x):
            return jax.lax.psum(cross_entropy_sum(x[0][None], lm_head, x[1][None], x[2][None]), "data") / count

        def accumulate(sums, x):
            return jax.tree.map(jnp.add, sums, jax.value_and_grad(microbatch)(lm_head, x)), None

        nothing = jnp.zeros_like(count), jnp.zeros_like(lm_head)
        return jax.lax.scan(accumulate, nothing, (hidden, targets, weights))[0]

    specs = P("data"), P(), P("data"), P("data")
    value, gradient = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(P(), P())))(*inputs)
    wanted, wanted_gradients = value_and_gradients(plain_cross_entropy_sum, *inputs)
    scale = 7 / inputs[3].sum()
    assert relative_error(value, wanted * scale) < 1e-6
    assert relative_error(gradient, wanted_gradients[1] * scale) < 1e-6


def test_targets_are_successors_in_the_same_document():
    tokens = jnp.array([[11, 12, 13, 21, 22, 31, 0, 0]])
    segment_ids = jnp.array([[1, 1, 1, 2, 2, 3, 0, 0]])
    targets, weights = next_token_targets(tokens, segment_ids)
    np.testing.assert_array_equal(targets, [[12, 13, 21, 22, 31, 0, 0, 0]])
    np.testing.assert_array_equal(weights, [[1, 1, 0, 1, 0, 0, 0, 0]])
    assert weights.dtype == jnp.float32


def test_a_response_mask_keeps_positions_whose_successor_is_a_response():
    tokens = jnp.arange(6)[None]
    segment_ids = jnp.array([[1, 1, 1, 1, 2, 2]])
    response = jnp.array([[False, False, True, True, True, False]])
    weights = next_token_targets(tokens, segment_ids, response)[1]
    np.testing.assert_array_equal(weights, [[0, 1, 1, 0, 0, 0]])


class TestCompiledAndNot(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_values_and_gradients_are_those_of_the_plain_form(self):
        *differentiated, targets, weights = example()

        def gradients_of(function):
            return jax.value_and_grad(lambda *x: function(*x, targets, weights), argnums=(0, 1))

        actual = self.variant(gradients_of(cross_entropy_sum))(*differentiated)
        chex.assert_trees_all_close(
            actual, gradients_of(plain_cross_entropy_sum)(*differentiated), rtol=1e-5, atol=1e-5
        )
