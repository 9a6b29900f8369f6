"""Routing of EA and of the attention MoEs: attention over learned expert keys, sparse by top-k (3.5, Eq. 2 and 3)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from dreamer_jax.kernels.interface import Kernels
from dreamer_jax.kernels.norm import rms_norm
from dreamer_jax.model.parameters import WeightTable
from dreamer_jax.model.rope import depth_rotation
from dreamer_jax.model_config import ModelConfig


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
    logits: Float[Array, "tokens E"] | None = None
    """For inspection only."""
    margins: Float[Array, "tokens"] | None = None
    """For inspection: by how much logit + bias of the last selected expert exceeds that of the best one left out."""


class Router(nnx.Module):
    """Low-rank router: a query per token with depth RoPE, a learned key and a balancing bias per expert."""

    def __init__(self, config: ModelConfig, table: WeightTable):
        """The table is that of the dimension whose experts it selects."""
        self.config = config
        self.w_q, self.keys = table.make("router.w_q"), table.make("router.keys")
        self.q_norm, self.k_norm = table.make("router.q_norm"), table.make("router.k_norm")
        self.bias = table.make("router.bias")

    @jax.named_scope("router")
    def __call__(
        self,
        x: Float[Array, "tokens D"],
        counted: Bool[Array, "tokens"],
        active: int,
        l: Int[Array, ""],
        depth: int,
        kernels: Kernels,
        *,
        with_logits: bool = False,
    ) -> Routing:
        """Select `active` experts for each token by logit + bias (Eq. 2; ties go to the lower index)."""
        config = self.config
        query = jnp.matmul(x, self.w_q[...], preferred_element_type=jnp.float32)
        query = checkpoint_name(query, "products")[None, :, None, :]
        rotation = depth_rotation(config, l, depth, config.router.size)
        query = kernels.norm_and_rotate(query, self.q_norm[...], config.norm_epsilon, rotation)[0, :, 0]
        keys = rms_norm(self.keys[...], self.k_norm[...], config.norm_epsilon)
        routed = kernels.route(query, keys, self.bias[...], counted, active)
        routing = Routing(routed.ids, routed.scores, routed.counts, jnp.sum(routed.entropy, where=counted))
        if not with_logits:
            return routing
        seen = logits(query, keys)
        return routing._replace(logits=seen, margins=margins(seen + self.bias[...][None], active))


def logits(query: Float[Array, "tokens R"], keys: Float[Array, "E R"]) -> Float[Array, "tokens E"]:
    """Scaled dot products of rotated queries with unrotated keys, in full float32 on every platform."""
    return jnp.einsum("tr,er->te", query, keys, precision=lax.Precision.HIGHEST) / keys.shape[1] ** 0.5


def margins(biased: Float[Array, "tokens E"], active: int) -> Float[Array, "tokens"]:
    """The distance of the last selected expert's logit + bias from the best other one's; infinite without others."""
    if biased.shape[1] <= active:
        return jnp.full(biased.shape[:1], jnp.inf)
    best = lax.top_k(biased, active + 1)[0]
    return best[:, -2] - best[:, -1]


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
