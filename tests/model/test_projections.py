"""Attention mixtures: one linear expert for each token, weighted, with the gradient of Eq. 7."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from dreamer_jax.model.grouped_matmul import plan
from dreamer_jax.model.projections import Selection, _project
from dreamer_jax.model.router import Routing
from tests.native import BACKENDS

TOKENS, EXPERTS, INTO, OUT = 250, 5, 24, 40


def arrays():
    """x, scores, routed experts, shared expert, upstream gradient; and the tokens' experts, all but the last."""
    rng = np.random.default_rng(0)
    shapes = [(TOKENS, INTO), (EXPERTS, INTO, OUT), (INTO, OUT), (TOKENS, OUT)]
    x, w, shared, d_y = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    ids = jnp.asarray(rng.integers(0, EXPERTS - 1, TOKENS), jnp.int32)
    return x, jnp.asarray(rng.uniform(0.1, 1, TOKENS), jnp.float32), w, shared, d_y, ids


def literal(x, scores, w, shared, ids):
    """Eq. 7 and 8 token by token: the merged expert times the score, whose gradient leaves the shared part out."""
    with jax.default_matmul_precision("highest"):
        own, common = jnp.einsum("ti,tio->to", x, w[ids]), x @ shared
    return scores[:, None] * own + lax.stop_gradient(scores)[:, None] * common


def projected(x, scores, w, shared, ids, backend):
    routing = Routing(ids[:, None], scores[:, None], jnp.zeros(EXPERTS, jnp.int32), jnp.zeros(()))
    merged = nnx.Param(w + shared[None]), nnx.Param(lax.stop_gradient(shared))
    return _project(x, *merged, Selection(routing, plan(ids[:, None], EXPERTS)), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients_are_those_of_equation_7(backend):
    *inputs, d_y, ids = arrays()

    @jax.jit
    def results(*inputs):
        y, vjp = jax.vjp(lambda *a: projected(*a, ids, backend), *inputs)
        return y, *vjp(d_y)

    y, vjp = jax.vjp(lambda *a: literal(*a, ids), *inputs)
    for got, want in zip(results(*inputs), (y, *vjp(d_y)), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_merged_weights_alone_give_the_same_values(backend):
    x, scores, w, shared, _, ids = arrays()
    selection = Selection(
        Routing(ids[:, None], scores[:, None], jnp.zeros(EXPERTS, jnp.int32), jnp.zeros(())),
        plan(ids[:, None], EXPERTS),
    )
    got = _project(x, nnx.Param(w + shared[None]), None, selection, backend)
    np.testing.assert_allclose(got, literal(x, scores, w, shared, ids), rtol=0, atol=1e-4)
