"""A model from a dict of named arrays, and back; and a look at everything that it computes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dreamer_jax.config import ModelConfig, OptimizerConfig
from dreamer_jax.convert import names
from dreamer_jax.model.dreamer import Capture, Compute, Dreamer
from dreamer_jax.model.parameters import taken_apart
from dreamer_jax.training.loss import cross_entropy_sum, next_token_targets
from dreamer_jax.training.optimizer import rebalanced


def build(config: ModelConfig, arrays: Mapping[str, Any], *, merged: bool = False) -> Dreamer:
    """A model with these weights, by exchange names; float32.

    Raises:
        WeightError: a missing, extra or misshapen array, named.
    """
    names.check_names(arrays, names.expected_shapes(config, merged=merged))
    model = nnx.eval_shape(lambda: Dreamer(config, nnx.Rngs(0), merged=merged))
    graph, state = nnx.split(model)
    values = names.from_named(config, arrays, merged=merged)
    filled = {path: v.replace(jnp.asarray(values[path], jnp.float32)) for path, v in nnx.to_flat_state(state)}
    return nnx.merge(graph, nnx.from_flat_state(filled))


def named_arrays(model: Dreamer) -> dict[str, Array]:
    """All parameters and router biases by exchange names."""
    return names.to_named(model.config, names.flat_values(nnx.state(model)), merged=is_merged(model))


def is_merged(model: Dreamer) -> bool:
    """Whether Eq. 8 has been applied and the shared experts dropped."""
    return model.config.routed_attention and model.layer.sa.projections.w_qkv_shared is None


def merged_model(model: Dreamer) -> Dreamer:
    """The same function with W_e + W_shared as its attention experts (Eq. 8): for inference, not for training on."""
    arrays = named_arrays(model)
    for name in [n for n in arrays if n.endswith("_shared")]:
        shared = arrays.pop(name)
        arrays[name.removesuffix("_shared")] = arrays[name.removesuffix("_shared")] + shared[None]
    return build(model.config, arrays, merged=model.config.routed_attention)


class Inspection(NamedTuple):
    """Everything that a model computes on a batch, by the letters and names of the exchange format."""

    logits: Float[Array, "B T V"]
    capture: Capture
    loss: Float[Array, ""]
    gradients: dict[str, Array]
    biases: dict[str, Array]
    """Router biases after one update (Eq. 3) by this batch's counts."""


def inspect(
    model: Dreamer,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    response_mask: Bool[Array, "B T"] | None = None,
    *,
    compute: Compute | None = None,
    optimizer: OptimizerConfig | None = None,
) -> Inspection:
    """Run the training path once, in float32 unless `compute` says otherwise.

    The loss is the mean cross-entropy over positions whose successor lies in the same document and, with a mask, is
    a response token. `optimizer` gives the rates of Eq. 3.
    """
    compute = compute or Compute()
    targets, weights = next_token_targets(tokens, segment_ids, response_mask)
    graph, params, biases = taken_apart(model)

    def loss(params: nnx.State) -> tuple[Array, Any]:
        model = nnx.merge(graph, params, biases)
        hidden, figures, capture = model(tokens, positions, segment_ids, compute, capture=True)
        total = cross_entropy_sum(hidden, model.lm_head[...].astype(compute.dtype), targets, weights)
        return total / jnp.maximum(jnp.sum(weights), 1.0), (hidden, figures, capture)

    (value, (hidden, figures, capture)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    updated = rebalanced(biases, figures.routers, model.config, optimizer or OptimizerConfig())
    merged = is_merged(model)
    return Inspection(
        logits=model.logits(hidden, compute),
        capture=capture,
        loss=value,
        gradients=names.to_named(model.config, names.flat_values(gradients), merged=merged),
        biases=names.to_named(model.config, names.flat_values(updated), merged=merged),
    )
