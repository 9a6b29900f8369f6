"""How likely are given tokens: options after a shared prefix, which is read once, and whole texts in windows."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dreamer_jax.inference.decoder import (
    ROWS,
    Caches,
    Decoder,
    empty_caches,
    on_devices,
    on_hosts,
    prompt_size,
    read_beginnings,
    read_more,
    read_packed,
    rows_for,
)
from dreamer_jax.inference.sample import GenerationError
from dreamer_jax.model.dreamer import check_tokens

Tokens = Sequence[int]

CHUNK = 256
"""Tokens whose logits are there at a time, on each device."""


class Likelihood(NamedTuple):
    """Of some tokens after others."""

    nats: float
    """Log-likelihood of all of them together, at most 0."""
    greedy: bool
    """Whether each was the likeliest."""


class Options(NamedTuple):
    """Which of these goes on from the prefix?"""

    prefix: Tokens
    options: Sequence[Tokens]


class Window(NamedTuple):
    """A piece of a text that fits the context; its last `counted` tokens are judged, the others come before them."""

    text: int
    tokens: Tokens
    counted: int


def option_likelihoods(
    decoder: Decoder, requests: Sequence[Options], *, batch: int = 8
) -> Iterator[tuple[int, list[Likelihood]]]:
    """(number of the request, the likelihood of each of its options), about `batch` options at a time.

    Requests of similar sizes go together, so that little is padded and few shapes are compiled; so they do not come
    back in their order.

    Raises:
        GenerationError: an empty prefix, option or list of options.
        TokenError: an id outside of the vocabulary.
    """
    for number, request in enumerate(requests):
        _check(decoder, number, request)
    shapes = [(len(request.options), _option_size(request)) for request in requests]
    order = sorted(range(len(requests)), key=lambda i: (shapes[i], len(requests[i].prefix)))
    while order:
        several, size = shapes[order[0]]
        rows = max(1, batch // several // decoder.parts) * decoder.parts
        alike = [i for i in order[:rows] if shapes[i] == (several, size)]
        order = order[len(alike) :]
        longest = prompt_size(max(len(requests[i].prefix) for i in alike))
        arrays = _option_arrays([requests[i] for i in alike], rows, longest, several, size)
        nats, greedy = jax.device_get(_option_nats(decoder, *arrays))
        for row, i in enumerate(alike):
            of_option = zip(requests[i].options, nats[row], greedy[row], strict=False)
            yield i, [_summed(len(option), n, g) for option, n, g in of_option]


def _check(decoder: Decoder, number: int, request: Options) -> None:
    if not len(request.prefix) or not request.options or not all(len(option) for option in request.options):
        raise GenerationError(f"request {number} has an empty prefix, no options or an empty one")
    for tokens in (request.prefix, *request.options):
        check_tokens(np.asarray(tokens), decoder.config.vocab)


def _option_size(request: Options) -> int:
    """Tokens of its longest option, rounded up to a power of four."""
    longest = max(map(len, request.options))
    return 1 << -(-(longest - 1).bit_length() // 2) * 2


def _option_arrays(requests: Sequence[Options], batch: int, prefix: int, options: int, tokens: int) -> list[np.ndarray]:
    prefixes, lengths = np.zeros((batch, prefix), np.int32), np.ones(batch, np.int32)
    texts, sizes = np.zeros((batch, options, tokens), np.int32), np.zeros((batch, options), np.int32)
    for row, request in enumerate(requests):
        prefixes[row, : len(request.prefix)], lengths[row] = request.prefix, len(request.prefix)
        for i, option in enumerate(request.options):
            texts[row, i, : len(option)], sizes[row, i] = option, len(option)
    return [prefixes, lengths, texts, sizes]


def _summed(tokens: int, nats: Float[np.ndarray, "U"], greedy: Bool[np.ndarray, "U"]) -> Likelihood:
    return Likelihood(float(nats[:tokens].sum(dtype=np.float64)), bool(greedy[:tokens].all()))


@jax.jit
def _option_nats(
    decoder: Decoder,
    prefixes: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    options: Int[Array, "B M U"],
    sizes: Int[Array, "B M"],
) -> tuple[Float[Array, "B M U"], Bool[Array, "B M U"]]:
    """The log-likelihood of each token of each option, and whether it was the likeliest."""

    def local(decoder, prefixes, lengths, options, sizes):
        (batch, size), (_, several, longest) = prefixes.shape, options.shape
        caches = empty_caches(decoder, batch, rows_for(size + longest))
        # The last token of the prefix is read with every option: what comes after it is the option's first.
        _, caches = read_beginnings(decoder, caches, prefixes, lengths - 1)
        caches = Caches(jax.tree.map(lambda c: jnp.repeat(c, several, axis=1), caches.memories), caches.rows)
        last = jnp.take_along_axis(prefixes, (lengths - 1)[:, None], axis=1)
        last = jnp.repeat(last, several, axis=0)
        targets = options.reshape(batch * several, longest)
        start = jnp.repeat(lengths - 1, several)
        read = jnp.concatenate([last, targets[:, :-1]], axis=1)
        hidden, _ = read_more(decoder, caches, read, start, sizes.reshape(-1))
        nats, greedy = token_nats(decoder, hidden, targets)
        return nats.reshape(options.shape), greedy.reshape(options.shape)

    nats, greedy = on_hosts(
        decoder, on_devices(local, decoder, given=(ROWS,) * 4, result=ROWS)(prefixes, lengths, options, sizes)
    )
    return nats, greedy


def text_likelihoods(
    decoder: Decoder, texts: Sequence[Tokens], *, context: int, stride: int | None = None, batch: int = 8
) -> Iterator[tuple[int, float]]:
    """(number of the text, log-likelihood of its tokens after the first), texts that fit into few rows together.

    A text longer than the context is read in windows, each `stride` tokens (by default half a context) further than
    the one before. Every token is judged once: in the first window that it stands in, with the most tokens in front of
    it that leaves `stride` at a time.

    Raises:
        GenerationError: a text without tokens, a context or stride out of range.
        TokenError: an id outside of the vocabulary.
    """
    stride = stride or context // 2
    if context < 2 or not 1 <= stride < context:
        raise GenerationError(f"context = {context}, stride = {stride}: a stride is at least 1 and below the context")
    for number, text in enumerate(texts):
        if not len(text):
            raise GenerationError(f"text {number} has no tokens")
        check_tokens(np.asarray(text), decoder.config.vocab)
    pieces = [window for i, text in enumerate(texts) for window in windows(i, text, context, stride)]
    batch = -(-batch // decoder.parts) * decoder.parts
    totals, left = dict.fromkeys(range(len(texts)), 0.0), [0] * len(texts)
    for window in pieces:
        left[window.text] += 1
    rows = packed(pieces, context)
    for at in range(0, len(rows), batch):
        several = rows[at : at + batch]
        nats = jax.device_get(_packed_nats(decoder, *packed_arrays(several, batch, context)))
        for row, members in zip(nats, several, strict=False):
            end = 0
            for window in members:
                end += len(window.tokens)
                judged = row[end - 1 - window.counted : end - 1]  # the last position predicts what is not there
                totals[window.text] += float(judged.sum(dtype=np.float64))
                left[window.text] -= 1
                if not left[window.text]:
                    yield window.text, totals[window.text]


def windows(text: int, tokens: Tokens, context: int, stride: int) -> Iterator[Window]:
    """The windows of a text; of one token there is one, in which nothing is judged."""
    end = min(len(tokens), context)
    yield Window(text, tokens[:end], end - 1)
    while end < len(tokens):
        following = min(end + stride, len(tokens))
        yield Window(text, tokens[max(0, following - context) : following], following - end)
        end = following


@runtime_checkable
class Piece(Protocol):
    """What has tokens that are read in one."""

    @property
    def tokens(self) -> Tokens:
        """Not more than a row holds."""


OnePiece = TypeVar("OnePiece", bound=Piece)


def packed(pieces: Sequence[OnePiece], context: int) -> list[list[OnePiece]]:
    """Rows of at most `context` tokens, filled in order."""
    rows: list[list[OnePiece]] = []
    room = 0
    for window in pieces:
        if len(window.tokens) > room:
            rows.append([])
            room = context
        rows[-1].append(window)
        room -= len(window.tokens)
    return rows


def packed_arrays(rows: Sequence[Sequence[Piece]], batch: int, context: int) -> list[np.ndarray]:
    """Tokens, positions and segment ids [B, T] of rows, filled up with empty ones to `batch`."""
    tokens, positions, segments = (np.zeros((batch, context), np.int32) for _ in range(3))
    for row, members in enumerate(rows):
        at = 0
        for number, window in enumerate(members, 1):
            size = len(window.tokens)
            tokens[row, at : at + size], segments[row, at : at + size] = window.tokens, number
            positions[row, at : at + size] = np.arange(size)
            at += size
    return [tokens, positions, segments]


@jax.jit
def _packed_nats(
    decoder: Decoder, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """At each token the log-likelihood of the one after it."""

    def local(decoder, tokens, positions, segment_ids):
        hidden = read_packed(decoder, tokens, positions, segment_ids)
        return token_nats(decoder, hidden, jnp.roll(tokens, -1, axis=1))[0]

    return on_hosts(decoder, on_devices(local, decoder, given=(ROWS,) * 3, result=ROWS)(tokens, positions, segment_ids))


def token_nats(
    decoder: Decoder, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Log p of each target, and whether none was likelier; [B, T, V] is never there as a whole."""
    model, size = decoder.model, hidden.shape[0] * hidden.shape[1]
    chunk = min(CHUNK, size)
    chunks = -(-size // chunk)

    def split(a: Array) -> Array:
        a = a.reshape(size, *a.shape[2:])
        return jnp.pad(a, [(0, chunks * chunk - size)] + [(0, 0)] * (a.ndim - 1)).reshape(chunks, chunk, *a.shape[1:])

    def of_chunk(part: tuple[Array, Array]) -> tuple[Array, Array]:
        states, wanted = part
        logits = model.logits(states[None], decoder.compute)[0]
        chosen = jnp.take_along_axis(logits, wanted[:, None], axis=-1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == wanted

    nats, greedy = lax.map(of_chunk, (split(hidden), split(targets)))
    return nats.reshape(-1)[:size].reshape(targets.shape), greedy.reshape(-1)[:size].reshape(targets.shape)
