"""The whole model against the float64 oracle, by the exchange format's names."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dreamer_jax import convert
from dreamer_jax.kernels.compute import Compute
from dreamer_jax.model.dreamer import Dreamer
from dreamer_jax.model.parameters import taken_apart
from tests import oracle
from tests.kernels.backends import needs_compiler
from tests.models import (
    PARALLEL,
    SEQUENTIAL,
    VARIANTS,
    changed,
    packed_batch,
    relative_error,
    sizes_of,
    small,
)

CASES = {
    **{variant: (small(variant), 3) for variant in VARIANTS},
    "DR+DA sequential": (small("DR+DA", SEQUENTIAL), 3),
    "DR+DA parallel": (small("DR+DA", PARALLEL), 3),
    "DR+DA at some depths": (small("DR+DA", ("da[::2]+sa[1:]", "ea[:2]")), 3),
    "LA+DA at some depths": (small("LA+DA", ("da[1:]", "sa[:2]", "ea[::2]")), 3),
    "DR+DA deeper at some depths": (small("DR+DA", ("da[::2]+sa", "ea[-2:]")), 5),
    "DR+DA shallower, scaled, counted up": (
        changed(small("DR+DA"), depth_rope_scaling=True, depth_rope_reversed=False),
        2,
    ),
}
"""Model, and the depth that runs."""
FURTHER = ("DR+DA at some depths",)
"""Nothing that a deeper one does not have."""


def grouped():
    """A case is computed by one process, for all tests that look at it."""
    for name, case in CASES.items():
        marks = [pytest.mark.xdist_group(name), *([pytest.mark.exhaustive] if name in FURTHER else [])]
        yield pytest.param(case, id=name, marks=marks)


@pytest.fixture(params=grouped(), scope="module")
def compared(request):
    """(what the model computes, what the oracle computes) on the same weights and batch."""
    config, depth = request.param
    batch = packed_batch(config.vocab)
    mask = np.random.default_rng(5).random(batch[0].shape) < 0.7
    sizes = sizes_of(config)
    weights = oracle.random_weights(sizes, seed=1, scale=0.3)
    expected = oracle.forward(weights, sizes, *batch, depth)
    loss = oracle.loss(weights, sizes, *batch, mask, depth)
    gradients = oracle.gradients(weights, sizes, *batch, mask, depth)
    biases = oracle.updated_biases(weights, sizes, expected.counts)
    model = convert.build(config, weights)
    inputs = *map(jnp.asarray, batch), jnp.asarray(mask)
    actual = convert.inspect(model, *inputs, compute=Compute(), depth=depth)
    return (config, depth), jax.device_get(actual), expected, float(loss), gradients, biases


def test_selected_experts_equal_the_oracles(compared):
    (config, depth), actual, expected, *_ = compared
    routed = {kind for kind in ("sa", "da", "ea") if getattr(expected, f"{kind}_ids") is not None}
    assert set(actual.capture.experts) == routed
    for kind, ids in actual.capture.experts.items():
        depths = list(config.depths_of(kind, depth))
        chosen, wanted = ids[depths], getattr(expected, f"{kind}_ids")[depths]
        np.testing.assert_array_equal(chosen if kind == "ea" else chosen[..., 0], wanted)


def test_hidden_states_and_logits_equal_the_oracles(compared):
    _, actual, expected, *_ = compared
    assert relative_error(actual.capture.hidden, expected.hidden) < 2e-5
    assert relative_error(actual.logits, expected.logits) < 2e-5


def test_depth_attention_equals_the_oracles_and_never_looks_deeper(compared):
    (config, depth), actual, expected, *_ = compared
    attention = actual.capture.attention.get("da")
    if not config.depth_attention:
        assert attention is None
        return
    assert relative_error(attention, expected.da_attention) < 2e-5
    for l in range(depth):
        assert (attention[l, ..., l + 1 :] == 0).all()
        np.testing.assert_allclose(attention[l].sum(-1), float(l in config.depths_of("da", depth)), rtol=1e-5)


def test_loss_and_every_gradient_equal_the_oracles(compared):
    _, actual, _, loss, gradients, _ = compared
    assert abs(actual.loss - loss) < 1e-5 * abs(loss)
    assert set(actual.gradients) == set(gradients)
    errors = {name: relative_error(actual.gradients[name], gradients[name]) for name in gradients}
    assert max(errors.values()) < 1e-4, errors


def test_biases_after_one_update_equal_the_oracles(compared):
    _, actual, _, _, _, biases = compared
    assert set(actual.biases) == set(biases)
    for name, bias in biases.items():
        np.testing.assert_allclose(actual.biases[name], bias, rtol=0, atol=1e-7, err_msg=name)


@functools.cache
def gradient_program(remat: str, kernels: str = "plain") -> str:
    """StableHLO of the gradient of DR+DA's head input."""
    config = small("DR+DA")
    graph, params, biases = taken_apart(Dreamer(config, nnx.Rngs(0)))
    batch = [jnp.asarray(a) for a in packed_batch(config.vocab)]

    def total(params):
        return jnp.sum(nnx.merge(graph, params, biases)(*batch, Compute(remat=remat, kernels=kernels)).hidden ** 2)

    return jax.jit(jax.grad(total)).lower(params).as_text()


def test_no_remat_policy_routes_or_sorts_a_second_time():
    once = gradient_program("none")
    for remat in ("full", "selective", "products"):
        text = gradient_program(remat)
        for operation in ("top_k", "stablehlo.sort"):
            assert text.count(operation) == once.count(operation) > 0, (remat, operation)


def test_selective_remat_does_not_attend_a_second_time():
    products = {
        remat: gradient_program(remat).count("stablehlo.dot_general") for remat in ("none", "selective", "full")
    }
    assert products["none"] < products["selective"] < products["full"]


@needs_compiler
def test_native_kernels_give_the_gradients_of_plain_jax_through_all_depths():
    config = small("DR+DA")
    graph, params, biases = taken_apart(Dreamer(config, nnx.Rngs(0)))
    batch = [jnp.asarray(a) for a in packed_batch(config.vocab)]

    @functools.partial(jax.jit, static_argnums=1)
    def gradients(params, compute):
        def total(params):
            return jnp.sum(nnx.merge(graph, params, biases)(*batch, compute).hidden ** 3)

        return jax.grad(total)(params)

    native = gradients(params, Compute(remat="products", kernels="native"))
    plain = gradients(params, Compute(remat="products", kernels="plain"))
    for got, want in zip(jax.tree.leaves(native), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * float(jnp.abs(want).max()))


@needs_compiler
def test_products_remat_multiplies_no_experts_a_second_time():
    """Nor projects: what is left to recompute are a few products inside of attention over depths and routing."""
    programs = {remat: gradient_program(remat, "native") for remat in ("none", "products", "selective")}
    for kernel in ("dreamer_grouped_forward", "dreamer_grouped_linear("):
        count = {remat: text.count(f"@{kernel}") for remat, text in programs.items()}
        assert 0 < count["none"] == count["products"] < count["selective"], (kernel, count)
    products = {remat: text.count("stablehlo.dot_general") for remat, text in programs.items()}
    assert products["none"] <= products["products"] < products["selective"]
