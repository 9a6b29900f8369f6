"""One optimizer step: weights gathered once, gradients of all microbatches, one sum over devices, AdamW, balancing."""

import dataclasses
import functools
from collections.abc import Callable
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
from dreamer_jax.data.batch import Batch
from dreamer_jax.kernels.compute import Compute
from dreamer_jax.model.dreamer import Dreamer, Figures, working_weights
from dreamer_jax.model.parameters import taken_apart
from dreamer_jax.sharding import AXES, spec_of, tree_shardings, tree_specs, varying
from dreamer_jax.training.loss import cross_entropy_sum, next_token_targets
from dreamer_jax.training.optimizer import adamw, learning_rate, rebalanced


class Rows(NamedTuple):
    """A batch with what the loss wants of it."""

    batch: Batch
    targets: Int[Array, "B T"]
    weights: Float[Array, "B T"]


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
    """(graph definition of the model, state before the first step), a pure function of `train.seed` and of given files.

    Raises:
        ConfigError: as `abstract_state`; or such a file is missing or does not fit.
    """
    for dimension in config.model.dimensions.values():
        dimension.check_files()  # an error inside of the program would leave its other devices waiting
    graph, shapes = abstract_state(config, mesh)
    shardings = jax.tree.map(lambda array: array.sharding, shapes)
    init = functools.partial(_initial, config)
    return graph, jax.jit(init, out_shardings=shardings, compiler_options=_init_options(mesh))()


def abstract_state(config: Config, mesh: Mesh) -> tuple[Any, TrainState]:
    """As `init_state`, with shapes and shardings in place of arrays.

    Raises:
        ConfigError: an axis of a parameter does not divide into the devices that split it.
    """
    graph = nnx.graphdef(nnx.eval_shape(lambda: Dreamer(config.model, nnx.Rngs(0))))
    shapes = jax.eval_shape(functools.partial(_initial, config))
    placed = jax.tree.map(
        lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), shapes, tree_shardings(mesh, shapes)
    )
    return graph, placed


def _initial(config: Config) -> TrainState:
    _, params, biases = taken_apart(Dreamer(config.model, nnx.Rngs(config.train.seed)))
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, biases, adamw(config.optimizer).init(params), zero, zero)


def _init_options(mesh: Mesh) -> dict[str, Any] | None:
    """On CPUs, optimising the random generator's code for every shape takes longer than it saves."""
    if mesh.devices.flat[0].platform != "cpu":
        return None
    return {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def make_train_step(
    config: Config, compute: Compute, mesh: Mesh, graph: Any, depth: int | None = None
) -> Callable[[TrainState, Batch], tuple[TrainState, StepResult]]:
    """The compiled step at a depth, the trained one if None.

    Its first argument is donated: use the state that it returns.

    Raises:
        ConfigError: when it is compiled, a depth that the model cannot run at.
    """
    split = _parameter_specs(config)
    gradients = jax.shard_map(
        functools.partial(_gradients, config, compute, graph, depth),
        mesh=mesh,
        in_specs=(split, P(), spec_of(("batch",))),
        out_specs=(split, P(), P(), P()),
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepResult]:
        grads, loss, loss_tokens, figures = gradients(state.params, state.biases, batch)
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


@jax.named_scope("optimizer")
def _updated(config: Config, state: TrainState, grads: nnx.State, figures: Figures) -> TrainState:
    """The state after AdamW and one balancing step."""
    with jax.numpy_dtype_promotion("standard"):  # Optax relies on it; our own code runs with "strict" too
        updates, optimizer = adamw(config.optimizer).update(grads, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    biases = rebalanced(state.biases, figures.routers, config.model, config.optimizer)
    return state._replace(params=params, biases=biases, optimizer=optimizer)


def _gradients(
    config: Config,
    compute: Compute,
    graph: Any,
    depth: int | None,
    params: nnx.State,
    biases: nnx.State,
    batch: Batch,
) -> tuple[nnx.State, Array, Array, Figures]:
    """The program of one device: (its part of the gradients, mean loss, loss positions, figures) of all devices.

    Weights are gathered once. Microbatches are then accumulated, in float32, without communication other than that of
    tokens with their experts; the one sum over devices comes at the end.
    """
    rows = _with_targets(config, batch)
    loss_tokens = lax.psum(jnp.sum(rows.weights), AXES)
    biases = jax.tree.map(varying, biases)
    weights = working_weights(graph, compute, biases, params)

    def objective(weights: nnx.State, part: Rows) -> tuple[Array, Figures]:
        total, figures = loss_sum(graph, weights, biases, part, compute, depth)
        return total / jnp.maximum(loss_tokens, 1.0), figures

    def accumulate(sums: nnx.State, part: Rows) -> tuple[nnx.State, tuple[Array, Figures]]:
        (loss, figures), grads = jax.value_and_grad(objective, has_aux=True)(weights, part)
        return jax.tree.map(lambda total, grad: total + grad.astype(total.dtype), sums, grads), (loss, figures)

    # How gradients reach the parameters: what makes weights of them is linear, and transposed here in float32.
    exact = dataclasses.replace(compute, dtype=jnp.float32)
    unused, pullback = jax.vjp(functools.partial(working_weights, graph, exact, biases), params)
    nothing = jax.tree.map(jnp.zeros_like, unused)
    sums, (losses, figures) = lax.scan(accumulate, nothing, _microbatches(rows, config))
    losses, figures = jax.tree.map(lambda a: jnp.sum(a, axis=0), (losses, figures))
    (grads,) = pullback(sums)
    return grads, lax.psum(losses, AXES), loss_tokens, lax.psum(figures, AXES)


def _parameter_specs(config: Config) -> nnx.State:
    _, params, _ = taken_apart(nnx.eval_shape(lambda: Dreamer(config.model, nnx.Rngs(0))))
    return tree_specs(params)


def _with_targets(config: Config, batch: Batch) -> Rows:
    mask = batch.response_mask if config.data.response_only else None
    return Rows(batch, *next_token_targets(batch.tokens, batch.segment_ids, mask))


def _microbatches(rows: Rows, config: Config) -> Rows:
    return jax.tree.map(lambda a: a.reshape(config.train.microbatches, -1, *a.shape[1:]), rows)


def loss_sum(
    graph: Any, weights: nnx.State, biases: nnx.State, part: Rows, compute: Compute, depth: int | None = None
) -> tuple[Float[Array, ""], Figures]:
    """Cross-entropy summed over the weighted positions of some rows, and the figures of their forward pass.

    `depth` is how many depths run, the trained number if None.
    """
    model = nnx.merge(graph, weights, biases)
    batch = part.batch
    passed = model.forward(batch.tokens, batch.positions, batch.segment_ids, compute, depth=depth)
    return cross_entropy_sum(passed.hidden, model.lm_head[...], part.targets, part.weights), passed.figures


def make_evaluation(
    config: Config, compute: Compute, mesh: Mesh, graph: Any, depth: int | None = None
) -> Callable[[nnx.State, nnx.State, Batch], tuple[Array, Array]]:
    """The compiled (summed loss, number of loss positions) of a batch of held-out rows; `depth` as of a step."""

    def local(params: nnx.State, biases: nnx.State, batch: Batch) -> tuple[Array, Array]:
        rows = _with_targets(config, batch)
        biases = jax.tree.map(varying, biases)
        working = working_weights(graph, compute, biases, params)
        parts = _microbatches(rows, config)
        totals = lax.map(lambda part: loss_sum(graph, working, biases, part, compute, depth)[0], parts)
        return lax.psum((jnp.sum(totals), jnp.sum(rows.weights)), AXES)

    specs = (_parameter_specs(config), P(), spec_of(("batch",)))
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P()))
