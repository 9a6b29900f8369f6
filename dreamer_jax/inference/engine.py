"""Generation: prepare the weights once, read the prompts in one pass, then decode a token a step for each of them."""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

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
from dreamer_jax.inference.sample import Sampling, choose, sequence_keys
from dreamer_jax.model import attend
from dreamer_jax.model.dreamer import Compute, Dreamer, depth_weights, layer_at, next_input
from dreamer_jax.model.norm import rms_norm

OnToken = Callable[[int, int], bool | None]
"""(row of the batch, new token) -> True to end this row here."""


class Weights(NamedTuple):
    """What decoding reads: matrices in the compute dtype, attention experts merged with the shared one (Eq. 8)."""

    embed: Float[Array, "V D"]
    graph: Any
    shared: dict[str, Any]
    stacked: dict[str, Any]
    biases: nnx.State
    residual_norm: Float[Array, "D"]
    lm_head: Float[Array, "D V"]


class Prepared(NamedTuple):
    """A model ready to decode."""

    config: ModelConfig
    compute: Compute
    weights: Weights


def prepare(model: Dreamer, compute: Compute) -> Prepared:
    """Merge, cast and pad the weights, once for all tokens."""
    graph, state = nnx.split(model)

    @jax.jit
    def weights(state: nnx.State) -> Weights:
        model = convert.merged_model(nnx.merge(graph, state))
        layers = depth_weights(model, compute)
        embed, lm_head = (matrix[...].astype(compute.dtype) for matrix in (model.embed, model.lm_head))
        return Weights(embed, *layers, model.residual_norm[...], lm_head)

    return Prepared(model.config, compute, weights(state))


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
    """The continuations of prompts, as token ids; see `complete`. For more than one batch, `prepare` the model once."""
    sampling = Sampling(temperature, top_p)
    prepared = prepare(model, compute)
    return complete(
        prepared, prompts, max_tokens=max_tokens, sampling=sampling, seed=seed, stop_ids=stop_ids, on_token=on_token
    )


def complete(
    prepared: Prepared,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    seed: int = 0,
    stop_ids: Collection[int] = (),
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """Continue prompts of any lengths in one batch.

    A row ends before a token of `stop_ids`, after a token for which `on_token` returns True, or at `max_tokens`. What
    a row says depends on its prompt, its index and the seed, not on the other rows.

    Raises:
        ValueError: no prompts, an empty one, or max_tokens below 1.
    """
    tokens, lengths = padded(prompts)
    if max_tokens < 1:
        raise ValueError(f"max-tokens = {max_tokens}: must be at least 1")
    plan, weights = prepared[:2], prepared.weights
    rows = memory.rows_for(max(int(lengths.max()) + max_tokens - 1, tokens.shape[1]))
    keys, positions = sequence_keys(seed, len(prompts)), jnp.asarray(lengths)
    cache, latest = _first(*plan, sampling, rows, weights, jnp.asarray(tokens), positions, keys)
    rows_of_tokens = _Completions(len(prompts), stop_ids, on_token)
    for i in range(max_tokens):
        current = latest
        if i + 1 < max_tokens:  # the device starts on the next token before the host looks at this one
            cache, latest = _next(*plan, sampling, weights, cache, current, positions, keys)
            positions = positions + 1
        if rows_of_tokens.append(jax.device_get(current)):
            break
    return rows_of_tokens.texts


def padded(prompts: Sequence[Sequence[int]]) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]:
    """Prompts padded at the end to one of a few lengths, and their own lengths."""
    if not prompts:
        raise ValueError("there is no prompt")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty")
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), memory.rows_for(int(lengths.max()))), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths


class _Completions:
    """What each row has said, and whether it has ended."""

    def __init__(self, rows: int, stop_ids: Collection[int], on_token: OnToken | None):
        self.texts: list[list[int]] = [[] for _ in range(rows)]
        self._going, self._stop_ids, self._on_token = set(range(rows)), stop_ids, on_token

    def append(self, tokens: Int[np.ndarray, "B"]) -> bool:
        """Add a token to the rows that go on; True when none does any more."""
        for row in sorted(self._going):
            token = int(tokens[row])
            if token in self._stop_ids:
                self._going.remove(row)
                continue
            self.texts[row].append(token)
            if self._on_token is not None and self._on_token(row, token):
                self._going.remove(row)
        return not self._going


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _first(
    config: ModelConfig, compute: Compute, sampling: Sampling, rows: int, weights: Weights, tokens: Array, lengths: Array, keys: Key[Array, "B"]
) -> tuple[SequenceCache, Int[Array, "B"]]:
    cache = memory.empty_cache(config, tokens.shape[0], rows, compute.dtype)
    logits, cache = read_prompts(config, compute, weights, tokens, lengths, cache)
    return cache, choose(logits, keys, lengths, sampling)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnames=("cache",))
def _next(
    config: ModelConfig, compute: Compute, sampling: Sampling, weights: Weights, cache: SequenceCache, tokens: Array, positions: Array, keys: Key[Array, "B"]
) -> tuple[SequenceCache, Int[Array, "B"]]:
    logits, cache = read_tokens(config, compute, weights, tokens, positions, cache)
    return cache, choose(logits, keys, positions + 1, sampling)


def read_prompts(
    config: ModelConfig,
    compute: Compute,
    weights: Weights,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    cache: SequenceCache,
) -> tuple[Float[Array, "B V"], SequenceCache]:
    """The logits after each prompt, and the cache with their keys and values in its first T rows."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    counted = positions < lengths[:, None]
    segment_ids = counted.astype(jnp.int32)

    def attend_prompts(cache: SequenceCache, l: Array, q: Array, k: Array, v: Array) -> tuple[Array, SequenceCache]:
        o = attend.attend_sequence(q, k, v, segment_ids, backend=compute.attention)
        return o, memory.write_prompts(cache, l, k, v)

    x, cache = _through_depths(config, compute, weights, tokens, positions, counted, cache, attend_prompts)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    return _logits(weights, last), cache


def read_tokens(
    config: ModelConfig,
    compute: Compute,
    weights: Weights,
    tokens: Int[Array, "B"],
    positions: Int[Array, "B"],
    cache: SequenceCache,
) -> tuple[Float[Array, "B V"], SequenceCache]:
    """The logits after one more token of each sequence, which stands at its position, and the cache with it."""
    visible = memory.visible_rows(cache, positions)

    def attend_tokens(cache: SequenceCache, l: Array, q: Array, k: Array, v: Array) -> tuple[Array, SequenceCache]:
        cache = memory.write_tokens(cache, l, positions, k, v)
        return attend.attend_cache(q, *memory.rows_at(cache, l), visible), cache

    counted = jnp.ones_like(tokens, jnp.bool_)[:, None]
    x, cache = _through_depths(
        config, compute, weights, tokens[:, None], positions[:, None], counted, cache, attend_tokens
    )
    return _logits(weights, x), cache


def _through_depths(
    config: ModelConfig,
    compute: Compute,
    weights: Weights,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    counted: Bool[Array, "B T"],
    cache: SequenceCache,
    attend_at: Callable[..., tuple[Array, SequenceCache]],
) -> tuple[Float[Array, "B T D"], SequenceCache]:
    """The LM head's input, as in training, with `attend_at(cache, l, q, k, v)` for SA."""
    x = weights.embed.at[tokens].get(mode="clip")

    def step(carry: Any, inputs: Any) -> Any:
        x, depths, cache = carry
        l, own = inputs
        layer = layer_at(config, weights.graph, weights.shared, own, weights.biases, l)
        output = layer(x, l, positions, counted, depths, functools.partial(attend_at, cache, l), compute.matmul)
        x = next_input(config, weights.shared, output.y)
        return (x, memory.write_depth(depths, l, output.entry), output.kept), None

    carry = (x, memory.empty_depth_cache(config, x), cache)
    (x, _, cache), _ = lax.scan(step, carry, (jnp.arange(config.depth), weights.stacked))
    return x if config.depth_recurrent else rms_norm(x, weights.residual_norm, config.norm_epsilon), cache


def _logits(weights: Weights, x: Float[Array, "B 1 D"]) -> Float[Array, "B V"]:
    return jnp.matmul(x[:, 0], weights.lm_head, preferred_element_type=jnp.float32)
