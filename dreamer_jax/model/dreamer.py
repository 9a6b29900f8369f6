"""The language model: embedding, the depth loop over an attention mixture, LM head. LA, LA+DA, DR and DR+DA."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from dreamer_jax.config import ConfigError, ModelConfig
from dreamer_jax.dimensions.base import DEEPEST
from dreamer_jax.errors import DreamerError
from dreamer_jax.kernels.compute import Compute
from dreamer_jax.kernels.interface import Kernels
from dreamer_jax.kernels.norm import rms_norm
from dreamer_jax.model.dimension import Ablation, Context, Update
from dreamer_jax.model.mixture import Layer, Memories
from dreamer_jax.model.parameters import Matrix, WeightTable, cast_matrices, taken_apart
from dreamer_jax.model.recurrence import depth_scan
from dreamer_jax.sharding import at_work, moves


class TokenError(DreamerError, ValueError):
    """Ids that the model does not have; the message names one."""


class RouterFigures(NamedTuple):
    """Sums over non-padding tokens for one router kind, stacked over depths."""

    counts: Int[Array, "L E"]
    entropy: Float[Array, "L"]


class Figures(NamedTuple):
    """What a forward pass reports beside its result: sums over the batch, per depth, without gradient."""

    routers: dict[str, RouterFigures]
    """By dimension, for those that route."""
    square: Float[Array, "L"]
    """Mean over D of the squared residual stream y_l."""
    tokens: Int[Array, ""]
    """Non-padding tokens: the number that the sums divide by."""


class Capture(NamedTuple):
    """Everything that analysis looks at; dicts are by dimension."""

    hidden: Float[Array, "inputs B T D"]
    """x_0 .. x_L, L + 1 in all: what each depth reads, and last what the LM head (LA: the final norm) reads."""
    updates: dict[str, Float[Array, "L B T D"]]
    """What each dimension adds to the residual stream."""
    experts: dict[str, Int[Array, "L B T A"]]
    scores: dict[str, Float[Array, "L B T A"]]
    """Weights of the selected experts: for EA normalised, for attention MoEs the plain score."""
    router_logits: dict[str, Float[Array, "L B T E"]]
    """Without bias."""
    counts: dict[str, Int[Array, "L E"]]
    """Selections of each expert by non-padding tokens."""
    attention: dict[str, Float[Array, "L ..."]]
    """Maps of each token over what a dimension attends to; of DA over depths [L, B, T, N, L]."""

    @property
    def depth_attention(self) -> Any:
        """DA's map over depths [L, B, T, N, L]; None without DA, or with its linear form."""
        return self.attention.get("da")


class Forward(NamedTuple):
    """What a forward pass gives back."""

    hidden: Float[Array, "B T D"]
    """The LM head's input."""
    figures: Figures
    caches: Memories
    """Of generation, with the tokens of this pass; without them empty."""
    capture: Capture | None
    seen: Any = None
    """What `look` made of each depth, stacked over depths."""


class Glimpse(NamedTuple):
    """One depth, as `look` sees it."""

    l: Int[Array, ""]
    depth: int
    """L: how many depths run."""
    x: Float[Array, "B T D"]
    """What the depth reads: x_l."""
    y: Float[Array, "B T D"]
    """The residual stream after it: y_l."""
    updates: dict[str, Update]
    """By dimension."""
    counted: Bool[Array, "B T"]
    """The tokens that are not padding."""


DepthLook = Callable[[Glimpse], Any]
"""What is wanted of each depth, as a tree of arrays."""


class Dreamer(nnx.Module):
    """The parameters, and the forward pass to the LM head's input."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, *, merged: bool = False):
        """`merged`: the attention MoEs hold W_e + W_shared and no shared experts (Eq. 8), for inference only."""
        self.config, self.is_merged = config, merged
        outer = WeightTable(config, config.outer_weights(), rngs, "", ())
        self.embed = outer.make("embed")
        self.layer = Layer(config, rngs, merged=merged)
        # DR: the norm of the residual stream at every depth. LA: one norm, before the LM head.
        self.residual_norm = outer.make("residual_norm" if config.depth_recurrent else "final_norm")
        self.lm_head = outer.make("lm_head")

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        compute: Compute,
        *,
        depth: int | None = None,
        capture: bool = False,
    ) -> Forward:
        """The LM head's input, the figures, and with `capture` every depth's inner life.

        Tokens attend within their document, equal numbers in `segment_ids`; 0 is padding. `positions` restart at 0
        in each document. `depth` is how many depths run, the trained number if None.

        Raises:
            ConfigError: a depth that this model cannot run at.
        """
        return made_ready(self, compute).forward(tokens, positions, segment_ids, compute, depth=depth, capture=capture)

    def forward(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        compute: Compute,
        *,
        depth: int | None = None,
        caches: Memories | None = None,
        continues: bool = False,
        capture: bool = False,
        look: DepthLook | None = None,
        ablations: Mapping[str, Ablation] | None = None,
    ) -> Forward:
        """As a call, of a model whose weights are `made_ready`: once per step, however many forward passes it has.

        With `caches` (of `empty_caches`) the tokens belong to sequences: prompts from position 0 on, padded at the
        end; or, if it `continues`, the next tokens of each sequence, whose positions follow one another.

        `look` is called at each depth and says what is kept of it, for analysis; `capture` keeps everything. With
        `ablations`, by dimension, parts are left out.
        """
        config, x = self.config, self.embedded(tokens, compute.dtype)
        depth = checked_depth(config, depth)
        graph, shared, stacked, biases = depth_weights(self)
        dimensions = self.layer.dimensions
        before = {name: dimension.before_depths(positions) for name, dimension in dimensions.items()}
        rows = {name: dimension.row(x, depth) for name, dimension in dimensions.items()}
        carried = dict(caches or {})
        if caches is not None:
            states = {name: dimension.state(x, depth) for name, dimension in dimensions.items()}
            carried |= _present(states)
        rows = {name: row for name, row in _present(rows).items() if name not in carried}
        body = functools.partial(
            _depth_step, config, graph, compute, depth, continues, _everything if capture else look
        )
        constants = biases, before, positions, segment_ids, dict(ablations or {})
        scan = functools.partial(depth_scan, body, compute.implementation, depth=depth, remat=compute.remat)
        y, carried, aux = scan(shared, stacked, constants, x, rows, carried)
        hidden = rms_norm(y, self.residual_norm[...], config.norm_epsilon)
        routers, square, seen = aux
        figures = Figures(routers, square, jnp.sum(segment_ids > 0))
        captured = None
        if capture:
            inputs, updates = seen
            captured = _capture(inputs, updates, hidden if config.depth_recurrent else y)
        return Forward(hidden, figures, {name: carried[name] for name in caches or {}}, captured, seen)

    def embedded(self, tokens: Int[Array, "B T"], dtype: DTypeLike) -> Float[Array, "B T D"]:
        """x_0: the raw embedding."""
        return self.embed[...].at[tokens].get(mode="clip").astype(dtype)

    def empty_caches(self, depth: int, batch: int, rows: int, dtype: DTypeLike) -> Memories:
        """What generation remembers of `batch` sequences of at most `rows` tokens, by dimension."""
        found = {name: d.cache(depth, batch, rows, dtype) for name, d in self.layer.dimensions.items()}
        return _present(found)

    def logits(self, hidden: Float[Array, "B T D"], compute: Compute) -> Float[Array, "B T V"]:
        """LM head, float32 out. For training use the loss, which never holds this array."""
        return jnp.matmul(hidden, self.lm_head[...].astype(compute.dtype), preferred_element_type=jnp.float32)

    def merged(self) -> "Dreamer":
        """The same function with W_e + W_shared as its attention experts (Eq. 8): for inference, not for training.

        The model itself where there is nothing to merge.
        """
        config = self.config
        changes = any(d.weights(config, True) != d.weights(config, False) for d in config.dimensions.values())
        if self.is_merged or not changes:
            return self
        model = nnx.clone(self)
        for dimension in model.layer.dimensions.values():
            dimension.merge()
        model.is_merged = True
        return model


def made_ready(model: Dreamer, compute: Compute) -> Dreamer:
    """The model as the depth loop uses it: Eq. 8's sum, the kernels' padding, matrices in the compute dtype."""
    model = nnx.clone(model)
    embed = model.embed[...]
    model.layer.make_ready(compute.implementation)
    graph, params, biases = taken_apart(model)
    model = nnx.merge(graph, cast_matrices(params, compute.dtype), biases)
    # Looked up, not multiplied: in float32, in which its gradient adds up many tokens.
    model.embed.set_value(embed)
    return model


@jax.named_scope("weights")
def working_weights(graph: Any, compute: Compute, biases: nnx.State, params: nnx.State) -> nnx.State:
    """Inside shard_map: this device's part of the parameters as the weights that its depth loops read.

    Prepared (Eq. 8, padding, cast) before they are gathered, so that what travels is small and every device prepares
    its own part only.
    """
    _, ready, _ = taken_apart(made_ready(nnx.merge(graph, params, biases), compute))

    def arrive(variable: nnx.Variable) -> nnx.Variable:
        value, axes = variable[...], variable.get_metadata()["axes"]
        smaller = isinstance(variable, Matrix) and moves(axes)
        sent = value.astype(compute.dtype) if smaller else value
        return variable.replace(at_work(sent, axes).astype(value.dtype))

    return jax.tree.map(arrive, ready, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def check_tokens(tokens: Int[np.ndarray, "..."], vocab: int) -> None:
    """Raise TokenError if an id lies outside of the vocabulary: inside of a program it would be clipped."""
    outside = tokens[(tokens < 0) | (tokens >= vocab)]
    if outside.size:
        raise TokenError(f"token id {outside[0]} is not in the model's vocabulary of {vocab} (0 to {vocab - 1})")


def checked_depth(config: ModelConfig, depth: int | None) -> int:
    """How many depths run, the trained number if None.

    Raises:
        ConfigError: the model cannot run at this depth.
    """
    if depth is None:
        return config.depth
    if depth < 1:
        raise ConfigError(f"depth = {depth}: at least one depth must run")
    if depth > DEEPEST:
        raise ConfigError(f"depth = {depth}: at most {DEEPEST} depths can run")
    if not config.depth_recurrent and depth != config.depth:
        raise ConfigError(f"depth = {depth}: this model has {config.depth} distinct layers and runs at that depth only")
    for name in config.dimensions:
        if not config.depths_of(name, depth):
            raise ConfigError(f"depth = {depth}: {name} would run at none of its depths (model.mixture)")
    return depth


def depth_weights(model: Dreamer) -> tuple[Any, dict[str, Any], dict[str, Any], nnx.State]:
    """A ready layer taken apart: (graph, weights shared by depths, weights stacked over depths, router biases).

    The residual norm of DR belongs to every depth, so it travels with the shared weights.
    """
    graph, params, biases = taken_apart(model.layer)
    if model.config.depth_recurrent:
        return graph, {"layer": params, "residual_norm": model.residual_norm[...]}, {}, biases
    return graph, {}, {"layer": _at_all_depths(model.config, params)}, _at_all_depths(model.config, biases)


def _at_all_depths(config: ModelConfig, state: nnx.State) -> nnx.State:
    """LA's stacked arrays with an entry for every depth; where a dimension does not run, one that nobody reads."""
    flat = dict(nnx.to_flat_state(state))
    for path, variable in flat.items():
        depths = config.depths_of(str(path[0]))
        if len(depths) < config.depth:
            entry = jnp.searchsorted(jnp.asarray(depths), jnp.arange(config.depth)).clip(0, len(depths) - 1)
            flat[path] = variable.replace(variable[...][entry])
    return nnx.from_flat_state(flat)


def layer_at(
    config: ModelConfig, graph: Any, shared: dict[str, Any], own: dict[str, Any], biases: nnx.State, l: Array
) -> Layer:
    """The layer of depth l: the one layer of DR, or the l-th of LA with its own router biases."""
    if config.depth_recurrent:
        return nnx.merge(graph, shared["layer"], biases)
    at_depth = jax.tree.map(lambda b: lax.dynamic_index_in_dim(b, l, 0, False), biases)
    return nnx.merge(graph, own["layer"], at_depth)


def layer_input(
    config: ModelConfig, shared: dict[str, Any], y: Float[Array, "B T D"], l: Int[Array, ""]
) -> Float[Array, "B T D"]:
    """x_l from y_{l-1}: in DR its RMSNorm, so that scales agree at every depth (3.7); in LA y_{l-1} itself.

    At depth 0, y is the raw embedding and stays as it is. Normalising here, and not after the layer, keeps what the
    layer computed last out of what its recomputation needs.
    """
    if not config.depth_recurrent:
        return y
    return jnp.where(l == 0, y, rms_norm(y, shared["residual_norm"], config.norm_epsilon))


def _depth_step(
    config: ModelConfig,
    graph: Any,
    compute: Compute,
    depth: int,
    continues: bool,
    look: DepthLook | None,
    kernels: Kernels,
    shared: dict[str, Any],
    own: dict[str, Any],
    constants: tuple[Any, ...],
    y: Float[Array, "B T D"],
    cache: Memories,
    carried: Memories,
    l: Int[Array, ""],
) -> tuple[Float[Array, "B T D"], Memories, Memories, Any]:
    """One depth, y_{l-1} to y_l, in training and in generation."""
    biases, before, positions, segment_ids, ablations = constants
    x = layer_input(config, shared, y, l)
    layer = layer_at(config, graph, shared, own, biases, l)
    inspecting = look is not None
    context = Context(l, depth, kernels, compute.exchange, segment_ids, positions, None, None, continues, inspecting)
    output = layer(x, context, before, cache, carried, ablations)
    routers = {
        name: RouterFigures(update.routing.counts, update.routing.entropy)
        for name, update in output.updates.items()
        if update.routing is not None
    }
    square = jnp.mean(jnp.square(output.y.astype(jnp.float32)), axis=-1)
    seen = None if look is None else look(Glimpse(l, depth, x, output.y, output.updates, context.counted))
    return output.y, output.rows, output.carried, (routers, jnp.sum(square, where=context.counted), seen)


def _everything(at: Glimpse) -> tuple[Array, dict[str, Update]]:
    return at.x, at.updates


def _capture(inputs: Float[Array, "L B T D"], updates: dict[str, Update], x_last: Float[Array, "B T D"]) -> Capture:
    batch = x_last.shape[:2]
    routings = _present({name: update.routing for name, update in updates.items()})

    def per_token(a: Array) -> Array:
        return a.reshape(a.shape[0], *batch, a.shape[-1])

    return Capture(
        hidden=jnp.concatenate([inputs, x_last[None]]),
        updates={name: update.residual for name, update in updates.items()},
        experts={name: per_token(routing.ids) for name, routing in routings.items()},
        scores={name: per_token(routing.scores) for name, routing in routings.items()},
        router_logits={name: per_token(routing.logits) for name, routing in routings.items()},
        counts={name: routing.counts for name, routing in routings.items()},
        attention=_present({name: update.attention for name, update in updates.items()}),
    )


def _present(values: dict[str, Any]) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in values.items() if value is not None}
