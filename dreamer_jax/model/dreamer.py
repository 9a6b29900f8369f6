"""The language model: embedding, the depth loop over an attention mixture, LM head. LA, LA+DA, DR and DR+DA."""

import functools
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from dreamer_jax.config import Config, ModelConfig
from dreamer_jax.model import attend, grouped_matmul
from dreamer_jax.model.depth_attention import DepthCache
from dreamer_jax.model.expert_parallel import SLACK, Exchange, Transport, default_transport
from dreamer_jax.model.mixture import Layer, LayerOutput
from dreamer_jax.model.norm import rms_norm
from dreamer_jax.model.parameters import cast_matrices, input_std, matrix, norm, taken_apart
from dreamer_jax.model.recurrence import Remat, depth_scan
from dreamer_jax.model.rope import Rotation, sequence_rotation
from dreamer_jax.model.router import Routing


@dataclass(frozen=True)
class Compute:
    """How the model is executed; it changes speed, memory and rounding, not the model."""

    dtype: DTypeLike = jnp.float32
    remat: Remat = "none"
    attention: attend.AttentionBackend = "blocks"
    matmul: grouped_matmul.Backend = "blocks"
    exchange: Exchange | None = None
    """For a mesh that shares out the experts; inside shard_map."""

    @staticmethod
    def of(config: Config, mesh: Mesh | None = None) -> "Compute":
        """The config's choices, with 'auto' resolved for the mesh's platform (without one: the first device's)."""
        device = mesh.devices.flat[0] if mesh else jax.devices()[0]
        platform = device.platform
        kernels = config.kernels
        return Compute(
            dtype=jnp.dtype(config.train.dtype),
            remat=config.train.remat,
            attention=attend.default_backend(platform, config.train.dtype)
            if kernels.attention == "auto"
            else kernels.attention,
            matmul=grouped_matmul.default_backend(platform, config.train.dtype)
            if kernels.grouped_matmul == "auto"
            else kernels.grouped_matmul,
            exchange=_exchange(kernels.expert_exchange, mesh),
        )


def _exchange(choice: Literal["auto"] | Transport, mesh: Mesh | None) -> Exchange | None:
    if mesh is None or mesh.shape["expert"] == 1:
        return None
    device = mesh.devices.flat[0]
    transport = default_transport(device.platform, device.device_kind) if choice == "auto" else choice
    return Exchange("expert", mesh.shape["expert"], transport, SLACK[transport])


class RouterFigures(NamedTuple):
    """Sums over non-padding tokens for one router kind, stacked over depths."""

    counts: Int[Array, "L E"]
    entropy: Float[Array, "L"]


class Figures(NamedTuple):
    """What a forward pass reports beside its result: sums over the batch, per depth, without gradient."""

    routers: dict[str, RouterFigures]
    """By kind: 'ea', and in DR 'sa' and (with DA) 'da'."""
    square: Float[Array, "L"]
    """Mean over D of the squared residual stream y_l."""
    tokens: Int[Array, ""]
    """Non-padding tokens: the number that the sums divide by."""


class Capture(NamedTuple):
    """Everything that analysis looks at."""

    hidden: Float[Array, "inputs B T D"]
    """x_0 .. x_L, L + 1 in all: what each depth reads, and last what the LM head (LA: the final norm) reads."""
    experts: dict[str, Int[Array, "L B T A"]]
    scores: dict[str, Float[Array, "L B T A"]]
    """Weights of the selected experts: for EA normalised, for attention MoEs the plain score."""
    depth_attention: Float[Array, "L B T N L"] | None


class Dreamer(nnx.Module):
    """The parameters, and the forward pass to the LM head's input."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, *, merged: bool = False):
        """`merged`: the attention MoEs hold W_e + W_shared and no shared experts (Eq. 8), for inference only."""
        self.config = config
        std = input_std(config)
        self.embed = matrix(rngs, (), (config.vocab, config.width), ("vocab", "embed"), std)
        self.layer = Layer(config, rngs, merged=merged)
        # DR: the norm of the residual stream at every depth. LA: one norm, before the LM head.
        self.residual_norm = norm((), config.width)
        self.lm_head = matrix(rngs, (), (config.width, config.vocab), ("embed", "vocab"), std)

    def embedded(self, tokens: Int[Array, "B T"], compute: Compute) -> Float[Array, "B T D"]:
        """x_0: the raw embedding."""
        return self.embed[...].at[tokens].get(mode="clip").astype(compute.dtype)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        compute: Compute,
        *,
        capture: bool = False,
    ) -> tuple[Float[Array, "B T D"], Figures, Capture | None]:
        """The LM head's input, the figures, and with `capture` every depth's inner life.

        Tokens attend within their document, equal numbers in `segment_ids`; 0 is padding. `positions` restart at 0
        in each document.
        """
        return prepared(self, compute).forward(tokens, positions, segment_ids, compute, capture=capture)

    def forward(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        compute: Compute,
        *,
        capture: bool = False,
    ) -> tuple[Float[Array, "B T D"], Figures, Capture | None]:
        """As a call, of a model whose weights are `prepared`: once per step, however many forward passes it has."""
        config, x = self.config, self.embedded(tokens, compute)
        graph, shared, stacked, biases = depth_weights(self)
        constants = (biases, sequence_rotation(positions, config.head_size, config.rope_base), segment_ids)
        body = functools.partial(_depth_step, config, graph, compute, capture)
        entry = depth_entry(config, x)
        y, aux = depth_scan(body, shared, stacked, constants, x, entry, depth=config.depth, remat=compute.remat)
        head_input = rms_norm(y, self.residual_norm[...], config.norm_epsilon)
        routers, square, captured = aux
        figures = Figures(routers, square, jnp.sum(segment_ids > 0))
        x_last = head_input if config.depth_recurrent else y
        return head_input, figures, _capture(captured, x_last) if capture else None

    def logits(self, hidden: Float[Array, "B T D"], compute: Compute) -> Float[Array, "B T V"]:
        """LM head, float32 out. For training use the loss, which never holds this array."""
        return jnp.matmul(hidden, self.lm_head[...].astype(compute.dtype), preferred_element_type=jnp.float32)


def prepared(model: Dreamer, compute: Compute) -> Dreamer:
    """The model as the depth loop uses it: Eq. 8's merge, the kernels' padding, matrices in the compute dtype."""
    model = nnx.clone(model)
    embed = model.embed[...]
    model.layer.prepare(compute.matmul)
    graph, params, biases = taken_apart(model)
    model = nnx.merge(graph, cast_matrices(params, compute.dtype), biases)
    # Looked up, not multiplied: in float32, in which its gradient adds up many tokens.
    model.embed.set_value(embed)
    return model


def depth_weights(model: Dreamer) -> tuple[Any, dict[str, Any], dict[str, Any], nnx.State]:
    """A prepared layer taken apart: (graph, weights shared by depths, stacked weights, router biases).

    The residual norm of DR belongs to every depth, so it travels with the shared weights.
    """
    graph, params, biases = taken_apart(model.layer)
    nothing: dict[str, Any] = {}
    if model.config.depth_recurrent:
        return graph, {"layer": params, "residual_norm": model.residual_norm[...]}, nothing, biases
    return graph, nothing, {"layer": params}, biases


def depth_entry(config: ModelConfig, x: Float[Array, "B T D"]) -> DepthCache | None:
    """An empty cache entry of one depth for the tokens of x; None without DA."""
    if not config.depth_attention:
        return None
    shape = (*x.shape[:2], config.da_kv_heads, config.da_head_size)
    # Made from x, so that it varies over the same mesh axes.
    zeros = jnp.broadcast_to(jnp.zeros_like(x[..., :1])[..., None], shape)
    return DepthCache(zeros, zeros)


def layer_at(
    config: ModelConfig, graph: Any, shared: dict[str, Any], own: dict[str, Any], biases: nnx.State, l: Array
) -> Layer:
    """The layer of depth l: the one layer of DR, or the l-th of LA with its own router biases.

    With parameters of its own, which may hand weights on in a loop around which the model's belong.
    """
    if config.depth_recurrent:
        return nnx.merge(graph, shared["layer"], biases, copy=True)
    at_depth = jax.tree.map(lambda b: lax.dynamic_index_in_dim(b, l, 0, False), biases)
    return nnx.merge(graph, own["layer"], at_depth, copy=True)


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
    capture: bool,
    shared: dict[str, Any],
    own: dict[str, Any],
    constants: tuple[nnx.State, Rotation, Array],
    y: Float[Array, "B T D"],
    cache: DepthCache | None,
    l: Int[Array, ""],
) -> tuple[Float[Array, "B T D"], DepthCache | None, Any, tuple[dict[str, Any], DepthCache | None]]:
    """One depth of training, y_{l-1} to y_l: packed attention, figures, and on request the capture.

    The shared weights and the cache come back as the layer hands them on.
    """
    biases, rotation, segment_ids = constants
    x = layer_input(config, shared, y, l)
    layer = layer_at(config, graph, shared, own, biases, l)
    counted = segment_ids > 0

    def attend_packed(q: Array, k: Array, v: Array) -> tuple[Array, None]:
        return attend.attend_sequence(q, k, v, segment_ids, backend=compute.attention), None

    output = layer(x, l, rotation, counted, cache, attend_packed, compute.matmul, compute.exchange)
    aux: tuple[Any, ...] = _figures(output, counted)
    aux = (*aux, (x, _by_kind(output), output.depth_attention) if capture else None)
    weights = {**shared, "layer": taken_apart(layer)[1]} if config.depth_recurrent else shared
    return output.y, output.entry, lax.stop_gradient(aux), (weights, output.cache)


def _by_kind(output: LayerOutput) -> dict[str, Routing]:
    return {kind: routing for kind, routing in output.routings._asdict().items() if routing is not None}


def _figures(output: LayerOutput, counted: Bool[Array, "B T"]) -> tuple[dict[str, RouterFigures], Float[Array, ""]]:
    routers = {kind: RouterFigures(r.counts, r.entropy) for kind, r in _by_kind(output).items()}
    square = jnp.mean(jnp.square(output.y.astype(jnp.float32)), axis=-1)
    return routers, jnp.sum(square, where=counted)


def _capture(captured: Any, x_last: Float[Array, "B T D"]) -> Capture:
    hidden, routings, attention = captured
    batch = x_last.shape[:2]

    def per_token(a: Array) -> Array:
        return a.reshape(a.shape[0], *batch, a.shape[-1])

    return Capture(
        hidden=jnp.concatenate([hidden, x_last[None]]),
        experts={kind: per_token(routing.ids) for kind, routing in routings.items()},
        scores={kind: per_token(routing.scores) for kind, routing in routings.items()},
        depth_attention=attention,
    )
