"""Routing of EA and of the attention MoEs: attention over learned expert keys, sparse by top-k (3.5, Eq. 2 and 3)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from dreamer_jax.config import ModelConfig
from dreamer_jax.model.grouped_matmul import Backend
from dreamer_jax.model.norm import rms_norm
from dreamer_jax.model.parameters import RouterBias, RouterKeys, Stack, input_std, matrix, norm
from dreamer_jax.model.rope import depth_rotation, norm_and_rotate
from dreamer_jax.native import kernels as native
from dreamer_jax.sharding import vary_together


class Routing(NamedTuple):
    """What a router decided for each token, and the figures reported of it."""

    ids: Int[Array, "tokens A"]
    """Selected experts, highest biased logit first."""
    scores: Float[Array, "tokens A"]
    """sigmoid(logit) of the selected experts, float32, not normalised."""
    counts: Int[Array, "E"]
    """Selections of each expert by non-padding tokens: N of Eq. 3."""
    entropy: Float[Array, ""]
    """Sum over non-padding tokens of the entropy, in nats, of the scores normalised over all experts."""


class Router(nnx.Module):
    """Low-rank router: a query per token with depth RoPE, a learned key and a balancing bias per expert."""

    def __init__(self, config: ModelConfig, experts: int, rngs: nnx.Rngs, stack: Stack):
        """Stacked over layers in LA; `experts` is E for EA, M for an attention MoE."""
        self.config = config
        width, size, std = config.width, config.router_size, input_std(config)
        self.w_q = matrix(rngs, stack, (width, size), ("embed", "router"), std)
        keys = std * jax.random.normal(rngs.params(), (*stack, experts, size), jnp.float32)
        self.keys = RouterKeys(keys, axes=("depth",) * len(stack) + ("router_expert", "router"))
        self.q_norm = norm(stack, size)
        self.k_norm = norm(stack, size)
        self.bias = RouterBias(jnp.zeros((*stack, experts), jnp.float32), axes=("depth",) * len(stack) + ("norm",))

    @jax.named_scope("router")
    def __call__(
        self,
        x: Float[Array, "tokens D"],
        l: Int[Array, ""],
        counted: Bool[Array, "tokens"],
        active: int,
        backend: Backend,
    ) -> Routing:
        """Select `active` experts for each token by logit + bias (Eq. 2; ties go to the lower index)."""
        if backend == "native":
            query, keys = self._query(x, l, native=True), self._keys()
            found = _route(active, *vary_together(query, keys, self.bias[...], counted.astype(jnp.int32)))
        else:
            best = best_by_passes if backend == "tokamax" else best_by_sorting
            found = _select(self.logits(x, l), self.bias[...], counted, active, best)
        ids, scores, counts, entropy = found
        return Routing(ids, scores, counts, jnp.sum(entropy, where=counted))

    def logits(self, x: Float[Array, "tokens D"], l: Int[Array, ""]) -> Float[Array, "tokens E"]:
        """Scaled dot products of rotated queries with unrotated keys, float32."""
        query, keys = self._query(x, l, native=False), self._keys()
        # Full float32 on every platform: the order of near-equal logits decides who is selected.
        return jnp.einsum("tr,er->te", query, keys, precision=lax.Precision.HIGHEST) / keys.shape[1] ** 0.5

    def _query(self, x: Float[Array, "tokens D"], l: Int[Array, ""], *, native: bool) -> Float[Array, "tokens R"]:
        """Normed and turned to the depth, float32."""
        config = self.config
        query = jnp.matmul(x, self.w_q[...], preferred_element_type=jnp.float32)
        query = checkpoint_name(query, "products")[None, :, None, :]
        rotation = depth_rotation(l, config.depth, config.router_size, config.depth_rope_base)
        return norm_and_rotate(query, self.q_norm[...], config.norm_epsilon, rotation, native=native)[0, :, 0]

    def _keys(self) -> Float[Array, "E R"]:
        return rms_norm(self.keys[...], self.k_norm[...], self.config.norm_epsilon)


def _select(logits, bias, counted, active, best):
    """Select: ids and scores [tokens, A], counts [E], entropy [tokens].

    The selection carries a checkpoint name, so that no remat policy ever decides it a second time.
    """
    ids = checkpoint_name(best(lax.stop_gradient(logits) + bias[None, :], active), "routing")
    scores = jax.nn.sigmoid(jnp.take_along_axis(logits, ids, axis=-1))
    counts = jnp.zeros_like(bias, jnp.int32).at[ids].add(counted[:, None].astype(jnp.int32))
    return ids, scores, counts, score_entropy(lax.stop_gradient(logits))


def best_by_sorting(values: Float[Array, "tokens E"], active: int) -> Int[Array, "tokens A"]:
    """The indices of each row's highest values, best first; the lower index of two equal ones."""
    return lax.top_k(values, active)[1]


def best_by_passes(values: Float[Array, "tokens E"], active: int) -> Int[Array, "tokens A"]:
    """The same in one pass for each choice, for NVIDIA, where `lax.top_k` sorts all E; on CPUs it is slower."""
    index, ids = jnp.arange(values.shape[1], dtype=jnp.int32)[None, :], []
    for _ in range(active):
        best = jnp.argmax(values, axis=1).astype(jnp.int32)
        ids.append(best)
        values = jnp.where(index == best[:, None], -jnp.inf, values)
    return jnp.stack(ids, axis=1)


# The same from queries and keys in one call of the CPU's kernel, whose gradient touches the selected experts only.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _route(active, query, keys, bias, counted):
    return tuple(native.route(query, keys, bias, counted, active))


def _route_forward(active, query, keys, bias, counted):
    ids, scores, counts, entropy = _route(active, query, keys, bias, counted)
    ids, scores = checkpoint_name((ids, scores), "routing")
    return (ids, scores, counts, entropy), (query, keys, ids, scores)


def _route_backward(active, residuals, cotangents):
    query, keys, ids, scores = residuals
    return *native.route_gradients(query, keys, ids, scores, cotangents[1]), None, None


_route.defvjp(_route_forward, _route_backward)


def score_entropy(logits: Float[Array, "tokens E"]) -> Float[Array, "tokens"]:
    """Entropy in nats of sigmoid scores normalised to sum to one over experts."""
    scores = jax.nn.sigmoid(logits)
    total = jnp.sum(scores, axis=-1)
    return jnp.log(total) - jnp.sum(scores * jax.nn.log_sigmoid(logits), axis=-1) / total


def balanced_bias(
    bias: Float[Array, "*stack E"], counts: Int[Array, "*stack E"], rate: float
) -> Float[Array, "*stack E"]:
    """Move b by rate * sign(median(N) - N) (Eq. 3); the median of an even count is the mean of the two middle ones.

    `counts` are N over everything that shares the bias: depths, microbatches and devices, summed before the sign.
    """
    # Twice the median, in integers, compares exactly where a float32 mean of two large counts would round.
    ordered = jnp.sort(counts, axis=-1)
    experts = counts.shape[-1]
    twice_median = ordered[..., (experts - 1) // 2, None] + ordered[..., experts // 2, None]
    return bias + rate * jnp.sign(twice_median - 2 * counts).astype(jnp.float32)
