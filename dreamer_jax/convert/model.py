"""A model from a dict of named arrays, and back; and a look at everything that it computes."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dreamer_jax.config import ModelConfig, OptimizerConfig
from dreamer_jax.convert import names
from dreamer_jax.kernels.compute import Compute
from dreamer_jax.kernels.documents import document_start
from dreamer_jax.model.dreamer import Capture, Dreamer, check_tokens
from dreamer_jax.model.parameters import taken_apart
from dreamer_jax.training.loss import cross_entropy_sum, next_token_targets
from dreamer_jax.training.optimizer import rebalanced


def build(config: ModelConfig, arrays: Mapping[str, Any], *, merged: bool = False) -> Dreamer:
    """A model with these weights, by exchange names; float32.

    Raises:
        WeightError: a missing, extra or misshapen array, named.
    """
    names.check_names(arrays, names.expected_shapes(config, merged=merged))
    graph, state = nnx.split(nnx.eval_shape(lambda: Dreamer(config, nnx.Rngs(0), merged=merged)))
    return nnx.merge(graph, names.from_named(config, arrays, state))


def named_arrays(model: Dreamer) -> dict[str, Array]:
    """All parameters and router biases by exchange names."""
    return names.to_named(model.config, nnx.state(model))


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
    tokens: Int[Array | np.ndarray, "B T"],
    positions: Int[Array | np.ndarray, "B T"] | None = None,
    segment_ids: Int[Array | np.ndarray, "B T"] | None = None,
    response_mask: Bool[Array | np.ndarray, "B T"] | None = None,
    *,
    compute: Compute | None = None,
    optimizer: OptimizerConfig | None = None,
    depth: int | None = None,
) -> Inspection:
    """Run the training path once, in float32 and with the trainer's kernels unless `compute` says otherwise.

    The loss is the mean cross-entropy over positions whose successor lies in the same document and, with a mask, is
    a response token. `optimizer` gives the rates of Eq. 3, `depth` how many depths run.

    Args:
        model: not merged for gradients of the shared experts.
        tokens: ids in [0, V).
        positions: of each token in its document; without them the documents of `segment_ids` are counted through.
        segment_ids: equal numbers for the tokens of a document, 0 for padding; without them each row is a document.
        response_mask: tokens that the loss looks at.
        compute: how it is computed.
        optimizer: rates of balancing.
        depth: the trained depth if None.

    Raises:
        TokenError: an id outside of the vocabulary.
        ConfigError: a depth that the model cannot run at.
    """
    check_tokens(np.asarray(tokens), model.config.vocab)
    tokens = jnp.asarray(tokens, jnp.int32)
    segment_ids = jnp.ones_like(tokens) if segment_ids is None else jnp.asarray(segment_ids, jnp.int32)
    positions = document_positions(segment_ids) if positions is None else jnp.asarray(positions, jnp.int32)
    mask = None if response_mask is None else jnp.asarray(response_mask)
    targets, weights = next_token_targets(tokens, segment_ids, mask)
    graph, params, biases = taken_apart(model)
    static = compute or Compute.fastest(), optimizer or OptimizerConfig(), depth
    return _inspect(graph, *static, params, biases, tokens, positions, segment_ids, targets, weights)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _inspect(
    graph: Any,
    compute: Compute,
    optimizer: OptimizerConfig,
    depth: int | None,
    params: nnx.State,
    biases: nnx.State,
    tokens: Array,
    positions: Array,
    segment_ids: Array,
    targets: Array,
    weights: Array,
) -> Inspection:
    def loss(params: nnx.State) -> tuple[Array, Any]:
        model = nnx.merge(graph, params, biases)
        passed = model(tokens, positions, segment_ids, compute, depth=depth, capture=True)
        total = cross_entropy_sum(passed.hidden, model.lm_head[...].astype(compute.dtype), targets, weights)
        return total / jnp.maximum(jnp.sum(weights), 1.0), (passed, model.logits(passed.hidden, compute))

    (value, (passed, logits)), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    config = nnx.merge(graph, params, biases).config
    updated = rebalanced(biases, passed.figures.routers, config, optimizer)
    by_name = functools.partial(names.to_named, config)
    return Inspection(logits, passed.capture, value, by_name(gradients), by_name(updated))


def document_positions(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The position of each token in its document."""
    token = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    return token - document_start(segment_ids)
