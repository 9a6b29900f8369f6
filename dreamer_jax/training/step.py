"""One optimizer step: gradients on every device, one sum over devices, AdamW, router balancing."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from dreamer_jax.config import Config
from dreamer_jax.model.dreamer import Compute, Dreamer, Figures
from dreamer_jax.model.parameters import taken_apart
from dreamer_jax.sharding import AXES, replicated
from dreamer_jax.training.loss import cross_entropy_sum, next_token_targets
from dreamer_jax.training.optimizer import adamw, learning_rate, rebalanced

Batch = Mapping[str, Array]
"""tokens, positions, segment_ids [B, T] int32 and response_mask [B, T] bool."""


class TrainState(NamedTuple):
    """All that a run carries from step to step; the data position is `step` itself."""

    step: Int[Array, ""]
    """Batches seen."""
    params: nnx.State
    biases: nnx.State
    """Router biases."""
    optimizer: Any
    skipped: Int[Array, ""]
    """Steps skipped because of a non-finite loss or gradient, in all."""
    bad_in_a_row: Int[Array, ""]


class StepResult(NamedTuple):
    """What a step reports."""

    loss: Float[Array, ""]
    """Mean cross-entropy in nats."""
    gradient_norm: Float[Array, ""]
    """Global norm before clipping."""
    learning_rate: Float[Array, ""]
    loss_tokens: Float[Array, ""]
    """Positions that the loss is the mean of."""
    figures: Figures
    skipped: Int[Array, ""]
    bad_in_a_row: Int[Array, ""]


def init_state(config: Config, mesh: Mesh) -> tuple[Any, TrainState]:
    """(graph definition of the model, state before the first step), a pure function of `train.seed`."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: Dreamer(config.model, nnx.Rngs(0))))

    @functools.partial(jax.jit, out_shardings=replicated(mesh), compiler_options=_init_options(mesh))
    def init() -> TrainState:
        model = Dreamer(config.model, nnx.Rngs(config.train.seed))
        _, params, biases = taken_apart(model)
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, biases, adamw(config.optimizer).init(params), zero, zero)

    return graph, init()


def _init_options(mesh: Mesh) -> dict[str, Any] | None:
    """On CPUs, optimising the random generator's code for every shape takes longer than it saves."""
    if mesh.devices.flat[0].platform != "cpu":
        return None
    return {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def make_train_step(
    config: Config, compute: Compute, mesh: Mesh, graph: Any
) -> Callable[[TrainState, Batch], tuple[TrainState, StepResult]]:
    """The compiled step. Its first argument is donated: use the state that it returns."""
    gradients = jax.shard_map(
        functools.partial(_gradients, config, compute, graph), mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P()
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepResult]:
        grads, loss, loss_tokens, figures = gradients(state.params, state.biases, dict(batch))
        norm = optax.tree.norm(grads)
        updated = _updated(config, state, grads, figures)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
        state = kept._replace(
            step=state.step + 1,
            skipped=state.skipped + jnp.where(finite, 0, 1),
            bad_in_a_row=jnp.where(finite, 0, state.bad_in_a_row + 1),
        )
        rate = learning_rate(config.optimizer, state.step - 1 - state.skipped)
        return state, StepResult(loss, norm, rate, loss_tokens, figures, state.skipped, state.bad_in_a_row)

    return train_step


def _updated(config: Config, state: TrainState, grads: nnx.State, figures: Figures) -> TrainState:
    """The state after AdamW and one balancing step."""
    with jax.numpy_dtype_promotion("standard"):  # Optax relies on it; our own code runs with "strict" too
        updates, optimizer = adamw(config.optimizer).update(grads, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    biases = rebalanced(state.biases, figures.routers, config.model, config.optimizer)
    return state._replace(params=params, biases=biases, optimizer=optimizer)


def _gradients(
    config: Config, compute: Compute, graph: Any, params: nnx.State, biases: nnx.State, batch: Batch
) -> tuple[nnx.State, Array, Array, Figures]:
    """The program of one device: (gradients, mean loss, loss positions, figures), all summed over devices.

    Microbatches are accumulated without communication: the one sum over devices comes at the end.
    """
    mask = batch["response_mask"] if config.data.response_only else None
    targets, weights = next_token_targets(batch["tokens"], batch["segment_ids"], mask)
    loss_tokens = lax.psum(jnp.sum(weights), AXES)
    inputs = {**batch, "targets": targets, "weights": weights}
    # From here on each device differentiates its own copy of the parameters.
    params, biases = lax.pcast((params, biases), AXES, to="varying")

    def objective(params: nnx.State, part: Batch) -> tuple[Array, Figures]:
        total, figures = loss_sum(graph, params, biases, part, compute)
        return total / jnp.maximum(loss_tokens, 1.0), figures

    def accumulate(grads: nnx.State, part: Batch) -> tuple[nnx.State, tuple[Array, Figures]]:
        (loss, figures), part_grads = jax.value_and_grad(objective, has_aux=True)(params, part)
        return jax.tree.map(jnp.add, grads, part_grads), (loss, figures)

    parts = _microbatches(inputs, config)
    grads, (losses, figures) = lax.scan(accumulate, jax.tree.map(jnp.zeros_like, params), parts)
    losses, figures = jax.tree.map(lambda a: jnp.sum(a, axis=0), (losses, figures))
    return *lax.psum((grads, losses), AXES), loss_tokens, lax.psum(figures, AXES)


def _microbatches(batch: Batch, config: Config) -> Batch:
    return jax.tree.map(lambda a: a.reshape(config.train.microbatches, -1, *a.shape[1:]), batch)


def loss_sum(
    graph: Any, params: nnx.State, biases: nnx.State, part: Batch, compute: Compute
) -> tuple[Float[Array, ""], Figures]:
    """Cross-entropy summed over the weighted positions of some rows, and the figures of their forward pass."""
    model = nnx.merge(graph, params, biases)
    hidden, figures, _ = model(part["tokens"], part["positions"], part["segment_ids"], compute)
    lm_head = model.lm_head[...].astype(compute.dtype)
    return cross_entropy_sum(hidden, lm_head, part["targets"], part["weights"]), figures


def make_evaluation(
    config: Config, compute: Compute, mesh: Mesh, graph: Any
) -> Callable[[nnx.State, nnx.State, Batch], tuple[Array, Array]]:
    """The compiled (summed loss, number of loss positions) of a batch of held-out rows."""

    def local(params: nnx.State, biases: nnx.State, batch: Batch) -> tuple[Array, Array]:
        mask = batch["response_mask"] if config.data.response_only else None
        targets, weights = next_token_targets(batch["tokens"], batch["segment_ids"], mask)
        params, biases = lax.pcast((params, biases), AXES, to="varying")
        parts = _microbatches({**batch, "targets": targets, "weights": weights}, config)
        totals = lax.map(lambda part: loss_sum(graph, params, biases, part, compute)[0], parts)
        return lax.psum((jnp.sum(totals), jnp.sum(weights)), AXES)

    specs = (P(), P(), P("data"))
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P()))
