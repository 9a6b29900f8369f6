"""Generation: prepare the weights once, read the prompts in one pass, then decode a token a step for each of them."""

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from dreamer_jax import convert
from dreamer_jax.config import ModelConfig
from dreamer_jax.inference import cache as memory
from dreamer_jax.inference.cache import SequenceCache
from dreamer_jax.inference.sample import GenerationError, Sampling, choose, sequence_keys
from dreamer_jax.model import attend
from dreamer_jax.model.dreamer import Compute, Dreamer, depth_weights, layer_at, layer_input, prepared
from dreamer_jax.model.norm import rms_norm
from dreamer_jax.model.rope import sequence_rotation

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
    embed: Any
    graph: Any
    shared: Any
    stacked: Any
    biases: Any
    residual_norm: Any
    lm_head: Any


def prepare(model: Dreamer, compute: Compute) -> Decoder:
    """Merge, cast and pad the weights: once, not for every token."""
    graph, state = nnx.split(model)

    @jax.jit
    def decoder(state: nnx.State) -> Decoder:
        model = nnx.merge(graph, state)
        model = convert.merged_model(model) if model.config.routed_attention else model
        model = prepared(model, compute)
        embed, lm_head = model.embed[...].astype(compute.dtype), model.lm_head[...]
        return Decoder(model.config, compute, embed, *depth_weights(model), model.residual_norm[...], lm_head)

    return decoder(state)


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
) -> list[list[int]]:
    """The continuations of one batch of prompts, as `complete` gives them; for more batches `prepare` once."""
    sampling, decoder = Sampling(temperature, top_p), prepare(model, compute)
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
        GenerationError: no prompt, an empty one, or max_tokens below 1.
    """
    if max_tokens < 1:
        raise GenerationError(f"max-tokens = {max_tokens}: must be at least 1")
    tokens, lengths = padded(prompts)
    longest = int(lengths.max()) + max_tokens - 1  # the last token is never read
    rows = memory.rows_for(max(longest, tokens.shape[1]))
    keys, positions = sequence_keys(seed, len(prompts)), jnp.asarray(lengths)
    completions = _Completions(len(prompts), stop_ids, on_token)
    cache, following = _first(decoder, sampling, rows, jnp.asarray(tokens), positions, keys)
    for i in range(max_tokens):
        latest = following
        if i + 1 < max_tokens:  # the device starts on the next token before the host looks at this one
            cache, following = _next(decoder, sampling, cache, latest, positions, keys)
            positions = positions + 1
        if completions.append(jax.device_get(latest)):
            break
    return completions.tokens


def padded(prompts: Sequence[Sequence[int]]) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]:
    """Prompts padded at the end to one of a few lengths, and their own lengths."""
    if not prompts:
        raise GenerationError("there is no prompt")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise GenerationError(f"prompt {i} is empty")
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), memory.rows_for(int(lengths.max()))), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths


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
) -> tuple[SequenceCache, Int[Array, "B"]]:
    cache = memory.empty_cache(decoder.config, tokens.shape[0], rows, decoder.compute.dtype)
    logits, cache = read_prompts(decoder, cache, tokens, lengths)
    return cache, choose(logits, keys, lengths, sampling)


@functools.partial(jax.jit, static_argnames=("sampling",), donate_argnames=("cache",))
def _next(
    decoder: Decoder,
    sampling: Sampling,
    cache: SequenceCache,
    tokens: Int[Array, "B"],
    positions: Int[Array, "B"],
    keys: Key[Array, "B"],
) -> tuple[SequenceCache, Int[Array, "B"]]:
    logits, cache = read_tokens(decoder, cache, tokens, positions)
    return cache, choose(logits, keys, positions + 1, sampling)


def read_prompts(
    decoder: Decoder, cache: SequenceCache, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]
) -> tuple[Float[Array, "B V"], SequenceCache]:
    """The logits after each prompt's last token, and the cache with the prompts in its first T rows."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    counted = positions < lengths[:, None]
    segment_ids = counted.astype(jnp.int32)

    def attend_prompts(cache: SequenceCache, l: Array, q: Array, k: Array, v: Array) -> tuple[Array, SequenceCache]:
        o = attend.attend_sequence(q, k, v, segment_ids, backend=decoder.compute.attention)
        return o, memory.write_prompts(cache, l, k, v)

    x, cache = _through_depths(decoder, cache, tokens, positions, counted, attend_prompts)
    return _logits(decoder, jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)), cache


def read_tokens(
    decoder: Decoder, cache: SequenceCache, tokens: Int[Array, "B"], positions: Int[Array, "B"]
) -> tuple[Float[Array, "B V"], SequenceCache]:
    """The logits after one more token of each sequence, which stands at its position, and the cache with it."""

    def attend_tokens(cache: SequenceCache, l: Array, q: Array, k: Array, v: Array) -> tuple[Array, SequenceCache]:
        cache = memory.write_tokens(cache, l, positions, k, v)
        o = attend.attend_newest(q, *cache, l, positions + 1, backend=decoder.compute.attention)
        return o, cache

    counted = jnp.ones((len(tokens), 1), jnp.bool_)
    x, cache = _through_depths(decoder, cache, tokens[:, None], positions[:, None], counted, attend_tokens)
    return _logits(decoder, x), cache


def _through_depths(
    decoder: Decoder,
    cache: SequenceCache,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    counted: Bool[Array, "B T"],
    attend_at: Callable[..., tuple[Array, SequenceCache]],
) -> tuple[Float[Array, "B T D"], SequenceCache]:
    """The LM head's input, with `attend_at(cache, l, q, k, v)` as the attention of SA at depth l."""
    config, matmul = decoder.config, decoder.compute.matmul
    rotation = sequence_rotation(positions, config.head_size, config.rope_base)
    y = decoder.embed.at[tokens].get(mode="clip")

    def step(carry: Any, inputs: Any) -> Any:
        y, depths, cache = carry
        l, own = inputs
        x = layer_input(config, decoder.shared, y, l)
        layer = layer_at(config, decoder.graph, decoder.shared, own, decoder.biases, l)
        output = layer(x, l, rotation, counted, depths, functools.partial(attend_at, cache, l), matmul)
        return (output.y, memory.write_depth(depths, l, output.entry), output.kept), None

    carry = (y, memory.empty_depth_cache(config, y), cache)
    (y, _, cache), _ = lax.scan(step, carry, (jnp.arange(config.depth), decoder.stacked))
    return rms_norm(y, decoder.residual_norm, config.norm_epsilon), cache


def _logits(decoder: Decoder, x: Float[Array, "B 1 D"]) -> Float[Array, "B V"]:
    return jnp.matmul(x[:, 0], decoder.lm_head, preferred_element_type=jnp.float32)
