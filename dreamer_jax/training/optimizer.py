"""AdamW with warm-up, clipping and a weight-decay mask (Table 3), and the balancing of router biases (Eq. 3)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from dreamer_jax.config import ModelConfig, OptimizerConfig
from dreamer_jax.model.dreamer import RouterFigures
from dreamer_jax.model.parameters import Norm
from dreamer_jax.model.router import balanced_bias


def learning_rate(config: OptimizerConfig, step: Int[Array, ""]) -> Float[Array, ""]:
    """Rate of step `step` (from 0): rises linearly, reaches its constant value at step warmup_steps - 1."""
    warmup = jnp.asarray(max(config.warmup_steps, 1), jnp.float32)
    return config.learning_rate * jnp.minimum(1.0, (step.astype(jnp.float32) + 1.0) / warmup)


def adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW; decoupled weight decay on matrices, not on norms."""
    return optax.chain(
        optax.clip_by_global_norm(config.gradient_clip),
        optax.adamw(
            lambda step: learning_rate(config, step),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )


def decayed(params: nnx.State) -> nnx.State:
    """True where weight decay applies."""
    return jax.tree.map(
        lambda v: v.replace(not isinstance(v, Norm)), params, is_leaf=lambda v: isinstance(v, nnx.Variable)
    )


def rebalanced(
    biases: nnx.State, routers: Mapping[str, RouterFigures], model: ModelConfig, config: OptimizerConfig
) -> nnx.State:
    """Router biases after one update by the step's counts (Eq. 3).

    `routers[kind].counts` [L, E] are summed over microbatches and devices; in DR, where one bias serves all depths,
    they are summed over depths here, before the sign.
    """
    updated = {}
    for path, bias in nnx.to_flat_state(biases):
        kind = str(path[1])  # layer.<kind>. ... .router.bias
        counts = routers[kind].counts.sum(axis=0) if model.depth_recurrent else routers[kind].counts
        rate = config.expert_bias_rate if kind == "ea" else config.attention_bias_rate
        updated[path] = bias.replace(balanced_bias(bias[...], counts, rate))
    return nnx.from_flat_state(updated)
