"""A model ready to read: weights merged, cast and placed once; then prompts and tokens, with caches of what was read.

On a mesh every device holds whole weights but for its part of the experts, and reads its own sequences; tokens travel
to the devices of their experts and back, as in training.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from dreamer_jax.config import ModelConfig
from dreamer_jax.inference.sample import GenerationError
from dreamer_jax.kernels.compute import Compute
from dreamer_jax.model.dreamer import Dreamer, checked_depth, made_ready, working_weights
from dreamer_jax.model.mixture import Memories
from dreamer_jax.model.parameters import taken_apart
from dreamer_jax.sharding import AXES, tree_shardings, tree_specs, varying

ROWS = P(AXES)
"""Arrays whose first axis are sequences: each device has its own."""
CACHES = P(None, AXES)
"""The axes of caches are [depth, sequence, ..., rows, size]."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Decoder:
    """A model ready to read: matrices in the compute dtype, attention experts merged with the shared one (Eq. 8).

    A pytree. JAX rebuilds it around things that are no arrays, hence the loose types.
    """

    config: ModelConfig = field(metadata={"static": True})
    compute: Compute = field(metadata={"static": True})
    depth: int = field(metadata={"static": True})
    mesh: Mesh | None = field(metadata={"static": True})
    """Where it lies; None for one device."""
    graph: Any = field(metadata={"static": True})
    state: Any

    @property
    def model(self) -> Dreamer:
        """The model, put together."""
        return nnx.merge(self.graph, *self.state)

    @property
    def parts(self) -> int:
        """Devices that share out the sequences; batches are multiples of it."""
        return self.mesh.size if self.mesh else 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Caches:
    """What is remembered of some sequences."""

    memories: Memories
    """By dimension."""
    rows: int = field(metadata={"static": True})
    """Tokens that a sequence may have."""


def make_decoder(model: Dreamer, compute: Compute, *, depth: int | None = None, mesh: Mesh | None = None) -> Decoder:
    """Merge, cast, pad and place the weights: once, not for every token.

    Args:
        model: one device holds it, or it lies on the mesh.
        compute: with `Compute.of(config, mesh)` experts are shared out over the mesh.
        depth: how many depths run, the trained number if None.
        mesh: devices that share out sequences and experts.

    Raises:
        ConfigError: the model cannot run at this depth, or an axis does not divide into the devices that split it.
    """
    depth = checked_depth(model.config, depth)
    graph, *state = taken_apart(model)
    ready_graph = nnx.eval_shape(lambda: taken_apart(_ready(graph, compute, *state)))[0]
    if mesh is None:
        return Decoder(model.config, compute, depth, mesh, ready_graph, _ready_state(graph, compute, state))
    params, biases = state
    params = jax.device_put(params, tree_shardings(mesh, params))
    biases = jax.device_put(biases, NamedSharding(mesh, P()))
    return Decoder(model.config, compute, depth, mesh, ready_graph, _placed(graph, compute, mesh, params, biases))


def _ready(graph: Any, compute: Compute, params: nnx.State, biases: nnx.State) -> Dreamer:
    model = made_ready(nnx.merge(graph, params, biases).merged(), compute)
    model.embed.set_value(model.embed[...].astype(compute.dtype))
    return model


@functools.partial(jax.jit, static_argnums=(0, 1))
def _ready_state(graph: Any, compute: Compute, state: list[nnx.State]) -> list[nnx.State]:
    return list(taken_apart(_ready(graph, compute, *state))[1:])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _placed(graph: Any, compute: Compute, mesh: Mesh, params: nnx.State, biases: nnx.State) -> list[nnx.State]:
    weights = nnx.eval_shape(lambda: taken_apart(_ready(graph, compute, params, biases)))[1]
    arrive = jax.shard_map(
        functools.partial(_arrived, graph, compute),
        mesh=mesh,
        in_specs=(tree_specs(params), P()),
        out_specs=[tree_specs(weights, "work"), P()],
        check_vma=False,  # every device gathers the same
    )
    placed: list[nnx.State] = arrive(params, biases)
    return placed


def _arrived(graph: Any, compute: Compute, params: nnx.State, biases: nnx.State) -> list[nnx.State]:
    """On each device, its part of the parameters as the weights that its depth loops read."""
    merged, params, biases = taken_apart(nnx.merge(graph, params, biases).merged())
    weights = working_weights(merged, compute, biases, params)
    return list(taken_apart(_ready(merged, compute, weights, biases))[1:])


def on_devices(program: Callable[..., Any], decoder: Decoder, *, given: Any, result: Any) -> Callable[..., Any]:
    """`program(decoder, *arrays)` where the decoder lies: on a mesh, every device runs it on its own sequences.

    `given` and `result` are the partitions of the arrays and of what comes out, `ROWS`, `CACHES` or `P()`.
    """
    if decoder.mesh is None:
        return functools.partial(program, decoder)
    weights = replace(decoder, state=[tree_specs(decoder.state[0], "work"), P()])

    def local(*arguments: Any) -> Any:
        return program(*jax.tree.map(varying, arguments))

    mapped = jax.shard_map(local, mesh=decoder.mesh, in_specs=(weights, *given), out_specs=result)
    return functools.partial(mapped, decoder)


def on_hosts(decoder: Decoder, arrays: Any) -> Any:
    """Inside jit: arrays whose first axis are sequences, where the host of every process sees all of them."""
    if decoder.mesh is None:
        return arrays
    return jax.lax.with_sharding_constraint(arrays, NamedSharding(decoder.mesh, P()))


def rows_for(tokens: int) -> int:
    """`tokens` rounded up to one of four sizes per octave: few shapes to compile, little to spare."""
    size = max(16, (1 << (tokens - 1).bit_length()) // 8)
    return -(-tokens // size) * size


def prompt_size(tokens: int) -> int:
    """`tokens` rounded up to one of two sizes per octave: prompts of any lengths are compiled for few."""
    size = max(16, 1 << (tokens - 1).bit_length())
    return size * 3 // 4 if tokens <= size * 3 // 4 and size > 16 else size


def empty_caches(decoder: Decoder, batch: int, rows: int) -> Caches:
    """Nothing remembered yet of `batch` sequences of at most `rows` tokens."""
    memories = decoder.model.empty_caches(decoder.depth, batch, rows, decoder.compute.dtype)
    return Caches(memories if decoder.mesh is None else jax.tree.map(varying, memories), rows)


def read_prompts(
    decoder: Decoder, caches: Caches, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]
) -> tuple[Float[Array, "B V"], Caches]:
    """The logits after each prompt's last token, and the caches with the prompts in their first T rows.

    Raises:
        GenerationError: the caches have fewer than T rows.
    """
    hidden, caches = read_beginnings(decoder, caches, tokens, lengths)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    return decoder.model.logits(last, decoder.compute)[:, 0], caches


def read_beginnings(
    decoder: Decoder, caches: Caches, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]
) -> tuple[Float[Array, "B T D"], Caches]:
    """As `read_prompts`, with what the LM head reads at every token; a length may be 0.

    Raises:
        GenerationError: the caches have fewer than T rows.
    """
    if tokens.shape[1] > caches.rows:
        raise GenerationError(f"prompts of {tokens.shape[1]} tokens do not fit caches of {caches.rows} rows")
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    return _read(decoder, caches, tokens, positions, positions < lengths[:, None])


def read_tokens(
    decoder: Decoder,
    caches: Caches,
    tokens: Int[Array, "B"],
    positions: Int[Array, "B"],
    active: Bool[Array, "B"] | None = None,
) -> tuple[Float[Array, "B V"], Caches]:
    """The logits after one more token of each sequence, which stands at its position, and the caches with it.

    The logits of a sequence whose position lies past the caches' rows are NaN. Of those that are not `active` nothing
    is counted, and their logits mean nothing.
    """
    counted = jnp.ones_like(tokens, bool) if active is None else active
    hidden, caches = _read(decoder, caches, tokens[:, None], positions[:, None], counted[:, None], continues=True)
    logits = decoder.model.logits(hidden, decoder.compute)[:, 0]
    return jnp.where((positions < caches.rows)[:, None], logits, jnp.nan), caches


def read_more(
    decoder: Decoder, caches: Caches, tokens: Int[Array, "B T"], start: Int[Array, "B"], lengths: Int[Array, "B"]
) -> tuple[Float[Array, "B T D"], Caches]:
    """What the LM head reads at the next `lengths` tokens of sequences that have `start` tokens, and the caches."""
    steps = jnp.arange(tokens.shape[1])[None]
    return _read(decoder, caches, tokens, start[:, None] + steps, steps < lengths[:, None], continues=True)


def _read(
    decoder: Decoder,
    caches: Caches,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    counted: Bool[Array, "B T"],
    *,
    continues: bool = False,
) -> tuple[Float[Array, "B T D"], Caches]:
    forward = functools.partial(decoder.model.forward, depth=decoder.depth, continues=continues)
    passed = forward(tokens, positions, counted.astype(jnp.int32), decoder.compute, caches=caches.memories)
    return passed.hidden, Caches(passed.caches, caches.rows)


def read_packed(
    decoder: Decoder, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """What the LM head reads at every token of packed rows, without caches."""
    return decoder.model.forward(tokens, positions, segment_ids, decoder.compute, depth=decoder.depth).hidden
