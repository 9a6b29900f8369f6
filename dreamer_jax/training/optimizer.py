"""AdamW with warm-up, clipping and a weight-decay mask (Table 3), cooldown, the balancing of router biases (Eq. 3)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from dreamer_jax.config import ModelConfig, OptimizerConfig
from dreamer_jax.model.dreamer import RouterFigures
from dreamer_jax.model.parameters import Norm, RouterBias
from dreamer_jax.model.router import balanced_bias


def learning_rate(config: OptimizerConfig, step: Int[Array, ""]) -> Float[Array, ""]:
    """Rate of step `step` (from 0): rises linearly, reaches its constant value at step warmup_steps - 1.

    With a cooldown it falls linearly from step cooldown_start on; it would be zero cooldown_steps later.
    """
    at, warmup = step.astype(jnp.float32), jnp.asarray(max(config.warmup_steps, 1), jnp.float32)
    rate = config.learning_rate * jnp.minimum(1.0, (at + 1.0) / warmup)
    if not config.cooldown_steps:
        return rate
    left = (config.cooldown_start + config.cooldown_steps - at) / config.cooldown_steps
    return rate * jnp.clip(left, 0.0, 1.0)


def adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clip by global norm (0: not at all), then AdamW; decoupled weight decay on matrices, not on norms."""
    return optax.chain(
        optax.clip_by_global_norm(config.gradient_clip or float("inf")),
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

    `routers[name].counts` [L, E] are summed over microbatches and devices; in DR, where one bias serves all depths,
    they are summed over depths here, before the sign.
    """
    rates = {"expert": config.expert_bias_rate, "attention": config.attention_bias_rate, "none": 0.0}
    updated = {}
    for path, bias in nnx.to_flat_state(biases):
        if not isinstance(bias, RouterBias):
            updated[path] = bias
            continue
        name = str(path[1])  # layer.<dimension>. ... .router.bias
        counts, own = routers[name].counts, jnp.asarray(model.depths_of(name))  # LA has biases for its own depths only
        counts = counts.sum(axis=0) if model.depth_recurrent else counts[own]
        rate = rates[model.dimensions[name].balancing]
        updated[path] = bias.replace(balanced_bias(bias[...], counts, rate))
    return nnx.from_flat_state(updated)
