"""Attention over depths equals attention over a sequence of depths, compiled and not."""

import chex
import jax.numpy as jnp
import numpy as np

from dreamer_jax.kernels.interface import Kernels
from dreamer_jax.kernels.plain.implementation import PLAIN
from dreamer_jax.kernels.reference import REFERENCE
from tests import oracle


class TestDepthAttention(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_a_token_attends_to_the_depths_before_and_to_its_own(self):
        L, l, B, T, N, K, H = 5, 3, 2, 3, 4, 2, 8
        rng = np.random.default_rng(0)
        shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H), (L, B, T, K, H), (L, B, T, K, H)
        q, k, v, cached_k, cached_v = arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]

        def by_depth(cached, own):
            """One row [B * T] of the oracle for every token; depths stand where it has the sequence."""
            rows = np.concatenate([cached[:l], own[None]])
            return oracle.tensor(np.moveaxis(rows, 0, 2).reshape(B * T, l + 1, K, H))

        allowed = np.ones((B * T, 1, l + 1), bool)
        keys, values = by_depth(cached_k, k), by_depth(cached_v, v)
        out, p = oracle.attend(oracle.tensor(q.reshape(B * T, 1, N, H)), keys, values, allowed)
        probabilities = np.pad(p.value.reshape(B, T, N, l + 1), [(0, 0)] * 3 + [(0, L - l - 1)])
        expected = out.value.reshape(B, T, N, H), probabilities
        for implementation in (PLAIN, REFERENCE):
            run = self.variant(lambda *x, of=implementation: Kernels(of).attend_depths(*x))
            actual = run(*map(jnp.asarray, arrays), jnp.int32(l))
            chex.assert_trees_all_close(actual, expected, rtol=2e-5, atol=2e-6)
