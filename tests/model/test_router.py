"""A router against the float64 oracle, compiled and not; and the balancing of Eq. 3."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dreamer_jax.kernels.interface import Kernels
from dreamer_jax.kernels.norm import rms_norm
from dreamer_jax.kernels.plain.heads import rotate
from dreamer_jax.kernels.plain.implementation import PLAIN
from dreamer_jax.model.parameters import table_of
from dreamer_jax.model.rope import depth_rotation
from dreamer_jax.model.router import Router, balanced_bias
from tests import oracle
from tests.models import sizes_of, small

CONFIG = small("DR+DA")
SIZES = sizes_of(CONFIG)
NAME, ACTIVE, DEPTH_INDEX = "layer.ea.router", CONFIG.ea.active_experts, 1
EXACT = {"rtol": 2e-5, "atol": 2e-6}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class TestRouter(chex.TestCase):
    def setUp(self):
        super().setUp()
        weights = oracle.random_weights(SIZES, seed=3)
        router = Router(CONFIG, table_of(CONFIG, "ea", nnx.Rngs(0), merged=False))
        for name in ("w_q", "keys", "q_norm", "k_norm", "bias"):
            getattr(router, name).set_value(jnp.asarray(weights[f"{NAME}.{name}"], jnp.float32))
        self.graph, self.state = nnx.split(router)
        self.x, self.counted = normal(0, 40, CONFIG.width), np.arange(40) % 3 > 0
        depth = oracle.Depth(DEPTH_INDEX, CONFIG.depth)
        self.expected = oracle.route(oracle.tensors(weights), SIZES, NAME, oracle.tensor(self.x[None]), depth, ACTIVE)

    @chex.variants(with_jit=True, without_jit=True)
    def test_it_selects_and_scores_as_the_oracle_does(self):
        @self.variant
        def route(state, x, counted):
            router = nnx.merge(self.graph, state)
            return router(x, counted, ACTIVE, jnp.int32(DEPTH_INDEX), CONFIG.depth, Kernels(PLAIN), with_logits=True)

        routing = route(self.state, jnp.asarray(self.x), jnp.asarray(self.counted))
        ids = self.expected.ids[0]
        chex.assert_trees_all_equal(
            (routing.ids, routing.counts), (ids, np.bincount(ids[self.counted].ravel(), minlength=SIZES.experts))
        )
        every = 1 / (1 + np.exp(-np.asarray(routing.logits, np.float64)))
        share = every / every.sum(axis=-1, keepdims=True)
        entropy = -(share * np.log(share)).sum(axis=-1)[self.counted].sum()
        scores = np.asarray(self.expected.scores.value)[0].reshape(ids.shape)
        chex.assert_trees_all_close((routing.scores, routing.entropy), (scores, entropy), **EXACT)


class TestItsParts(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_norm_and_depth_rotation_equal_the_oracle_s(self):
        x, weight = 3 * normal(1, 5, SIZES.router_size), 1 + normal(2, SIZES.router_size) / 4

        @self.variant
        def run(x, weight, l):
            normed = rms_norm(x, weight, CONFIG.norm_epsilon)
            return normed, rotate(normed, depth_rotation(CONFIG, l, CONFIG.depth, SIZES.router_size))

        for l in range(CONFIG.depth):
            normed = oracle.rms_norm(oracle.tensor(x), oracle.tensor(weight), SIZES.norm_eps)
            angles = oracle.depth_angles_of(SIZES, oracle.Depth(l, CONFIG.depth), SIZES.router_size)
            expected = normed.value, oracle.rotate(normed, angles).value
            chex.assert_trees_all_close(run(jnp.asarray(x), jnp.asarray(weight), jnp.int32(l)), expected, **EXACT)

    @chex.variants(with_jit=True, without_jit=True)
    def test_biases_move_towards_the_median(self):
        counts = np.array([[4, 0, 9, 5], [7, 7, 7, 7], [2**24 + 1, 2**24, 2**24, 2**24 + 3]], np.int32)
        bias = normal(4, *counts.shape)
        moved = self.variant(lambda bias, counts: balanced_bias(bias, counts, 0.5))(
            jnp.asarray(bias), jnp.asarray(counts)
        )
        steps = np.array([[1, 1, -1, -1], [0, 0, 0, 0], [-1, 1, 1, -1]], np.float32)
        chex.assert_trees_all_close(moved, bias + 0.5 * steps, rtol=1e-6)
        chex.assert_trees_all_equal_shapes_and_dtypes(moved, jax.ShapeDtypeStruct(counts.shape, jnp.float32))
