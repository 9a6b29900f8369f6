"""Generation: make the weights ready once, read the prompts in one pass, then decode a token a step for each."""

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from dreamer_jax.config import ModelConfig
from dreamer_jax.inference.sample import GenerationError, Sampling, choose, sequence_keys
from dreamer_jax.kernels.compute import Compute
from dreamer_jax.model.dreamer import Dreamer, check_tokens, checked_depth, made_ready
from dreamer_jax.model.mixture import Memories

LONGEST = 2**20
"""Tokens of an answer: more is a slip of the keyboard, and its cache fits nowhere."""
OnToken = Callable[[int, int], bool | None]
"""(row of the batch, new token) -> True to end this row here."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Decoder:
    """A model ready to decode: matrices in the compute dtype, attention experts merged with the shared one (Eq. 8).

    A pytree. JAX rebuilds it around things that are no arrays, hence the loose types.
    """

    config: ModelConfig = field(metadata={"static": True})
    compute: Compute = field(metadata={"static": True})
    depth: int = field(metadata={"static": True})
    graph: Any = field(metadata={"static": True})
    state: Any

    @property
    def model(self) -> Dreamer:
        """The model, put together."""
        return nnx.merge(self.graph, self.state)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Caches:
    """What is remembered of some sequences."""

    memories: Memories
    """By dimension."""
    rows: int = field(metadata={"static": True})
    """Tokens that a sequence may have."""


def make_decoder(model: Dreamer, compute: Compute, *, depth: int | None = None) -> Decoder:
    """Merge, cast and pad the weights: once, not for every token. `depth`: how many depths run.

    Raises:
        ConfigError: the model cannot run at this depth.
    """
    depth = checked_depth(model.config, depth)
    graph, state = nnx.split(model)

    ready_graph, _ = nnx.eval_shape(lambda: _readied(graph, compute, state))
    return Decoder(model.config, compute, depth, ready_graph, _ready_state(graph, compute, state))


def _readied(graph: Any, compute: Compute, state: nnx.State) -> tuple[Any, nnx.State]:
    model = made_ready(nnx.merge(graph, state).merged(), compute)
    model.embed.set_value(model.embed[...].astype(compute.dtype))
    return nnx.split(model)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _ready_state(graph: Any, compute: Compute, state: nnx.State) -> nnx.State:
    return _readied(graph, compute, state)[1]


def generate(
    model: Dreamer,
    compute: Compute,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Collection[int] = (),
    on_token: OnToken | None = None,
    depth: int | None = None,
) -> list[list[int]]:
    """The continuations of one batch of prompts, as `complete` gives them; for more batches `make_decoder` once."""
    sampling, decoder = Sampling(temperature, top_p), make_decoder(model, compute, depth=depth)
    return complete(decoder, prompts, sampling, max_tokens=max_tokens, seed=seed, stop_ids=stop_ids, on_token=on_token)


def complete(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_tokens: int,
    seed: int = 0,
    stop_ids: Collection[int] = (),
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """Continue prompts of any lengths in one batch.

    A row ends before a token of `stop_ids`, after a token for which `on_token` returns True, or at `max_tokens`. What
    it says depends on its prompt, its index in the batch and the seed, not on the other rows.

    Raises:
        GenerationError: no prompt, an empty one, a seed or max_tokens out of range.
        TokenError: an id outside of the vocabulary.
    """
    check_request(max_tokens, seed)
    tokens, lengths = padded(prompts)
    check_tokens(tokens, decoder.config.vocab)
    longest = int(lengths.max()) + max_tokens - 1  # the last token is never read
    rows = rows_for(max(longest, tokens.shape[1]))
    keys, positions = sequence_keys(seed, len(prompts)), jnp.asarray(lengths)
    completions = _Completions(len(prompts), stop_ids, on_token)
    caches, following = _first(decoder, sampling, rows, jnp.asarray(tokens), positions, keys)
    for i in range(max_tokens):
        latest = following
        if i + 1 < max_tokens:  # the device starts on the next token before the host looks at this one
            caches, following = _next(decoder, sampling, caches, latest, positions, keys)
            positions = positions + 1
        if completions.append(jax.device_get(latest)):
            break
    return completions.tokens


def check_request(max_tokens: int, seed: int) -> None:
    """Raise GenerationError for a number that is out of its range."""
    if not 1 <= max_tokens <= LONGEST:
        raise GenerationError(f"max-tokens = {max_tokens}: must be at least 1 and at most {LONGEST:,}")
    if not 0 <= seed < 2**32:
        raise GenerationError(f"seed = {seed}: must be at least 0 and below 2^32")


def padded(prompts: Sequence[Sequence[int]]) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]:
    """Prompts padded at the end to one of a few lengths, and their own lengths."""
    if not prompts:
        raise GenerationError("there is no prompt")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise GenerationError(f"prompt {i} is empty")
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), rows_for(int(lengths.max()))), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths


def rows_for(tokens: int) -> int:
    """`tokens` rounded up to one of four sizes per octave: few shapes to compile, little to spare."""
    size = max(16, (1 << (tokens - 1).bit_length()) // 8)
    return -(-tokens // size) * size


class _Completions:
    """What each row has said so far, and which rows go on."""

    def __init__(self, rows: int, stop_ids: Collection[int], on_token: OnToken | None):
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self._going, self._stop_ids, self._on_token = list(range(rows)), stop_ids, on_token

    def append(self, latest: Int[np.ndarray, "B"]) -> bool:
        """Add a token to the rows that go on; True when none does any more."""
        self._going = [row for row in self._going if not self._ends(row, int(latest[row]))]
        return not self._going

    def _ends(self, row: int, token: int) -> bool:
        if token in self._stop_ids:
            return True
        self.tokens[row].append(token)
        return self._on_token is not None and bool(self._on_token(row, token))


@functools.partial(jax.jit, static_argnames=("sampling", "rows"))
def _first(
    decoder: Decoder,
    sampling: Sampling,
    rows: int,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    keys: Key[Array, "B"],
) -> tuple[Caches, Int[Array, "B"]]:
    caches = empty_caches(decoder, tokens.shape[0], rows)
    logits, caches = read_prompts(decoder, caches, tokens, lengths)
    return caches, choose(logits, keys, lengths, sampling)


@functools.partial(jax.jit, static_argnames=("sampling",), donate_argnames=("caches",))
def _next(
    decoder: Decoder,
    sampling: Sampling,
    caches: Caches,
    tokens: Int[Array, "B"],
    positions: Int[Array, "B"],
    keys: Key[Array, "B"],
) -> tuple[Caches, Int[Array, "B"]]:
    logits, caches = read_tokens(decoder, caches, tokens, positions)
    return caches, choose(logits, keys, positions + 1, sampling)


def empty_caches(decoder: Decoder, batch: int, rows: int) -> Caches:
    """Nothing remembered yet of `batch` sequences of at most `rows` tokens."""
    return Caches(decoder.model.empty_caches(decoder.depth, batch, rows, decoder.compute.dtype), rows)


def read_prompts(
    decoder: Decoder, caches: Caches, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]
) -> tuple[Float[Array, "B V"], Caches]:
    """The logits after each prompt's last token, and the caches with the prompts in their first T rows.

    Raises:
        GenerationError: the caches have fewer than T rows.
    """
    if tokens.shape[1] > caches.rows:
        raise GenerationError(f"prompts of {tokens.shape[1]} tokens do not fit caches of {caches.rows} rows")
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    segment_ids = (positions < lengths[:, None]).astype(jnp.int32)
    hidden, caches = _read(decoder, caches, tokens, positions, segment_ids)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    return decoder.model.logits(last, decoder.compute)[:, 0], caches


def read_tokens(
    decoder: Decoder, caches: Caches, tokens: Int[Array, "B"], positions: Int[Array, "B"]
) -> tuple[Float[Array, "B V"], Caches]:
    """The logits after one more token of each sequence, which stands at its position, and the caches with it.

    The logits of a sequence whose position lies past the caches' rows are NaN.
    """
    segment_ids = jnp.ones_like(tokens)[:, None]
    hidden, caches = _read(decoder, caches, tokens[:, None], positions[:, None], segment_ids)
    logits = decoder.model.logits(hidden, decoder.compute)[:, 0]
    return jnp.where((positions < caches.rows)[:, None], logits, jnp.nan), caches


def _read(
    decoder: Decoder,
    caches: Caches,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
) -> tuple[Float[Array, "B T D"], Caches]:
    forward = functools.partial(decoder.model.forward, depth=decoder.depth, caches=caches.memories)
    passed = forward(tokens, positions, segment_ids, decoder.compute)
    return passed.hidden, Caches(passed.caches, caches.rows)
