"""The selection of experts by query . key / sqrt(R) + bias (Eq. 2)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dreamer_jax.kernels.interface import Routed


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


def route(
    query: Array,
    keys: Array,
    bias: Array,
    counted: Array,
    active: int,
    best: Callable[[Array, int], Array] = best_by_sorting,
) -> Routed:
    """`Kernels.route`; `best` finds the highest of the biased logits."""
    # Full float32 on every platform: the order of near-equal logits decides who is selected.
    logits = jnp.einsum("tr,er->te", query, keys, precision=lax.Precision.HIGHEST) / keys.shape[1] ** 0.5
    ids = checkpoint_name(best(lax.stop_gradient(logits) + bias[None, :], active), "routing")
    scores = jax.nn.sigmoid(jnp.take_along_axis(logits, ids, axis=-1))
    counts = jnp.zeros_like(bias, jnp.int32).at[ids].add(counted[:, None].astype(jnp.int32))
    return Routed(ids, scores, counts, score_entropy(lax.stop_gradient(logits)))


def score_entropy(logits: Float[Array, "tokens E"]) -> Float[Array, "tokens"]:
    """Entropy in nats of sigmoid scores normalised to sum to one over experts."""
    scores = jax.nn.sigmoid(logits)
    total = jnp.sum(scores, axis=-1)
    return jnp.log(total) - jnp.sum(scores * jax.nn.log_sigmoid(logits), axis=-1) / total
