"""Generation for many requests: a batch of slots, each refilled with the next request as soon as its answer ends.

Three programs on the device: `insert` reads prompts into free slots, `step` takes a token of every busy slot, and both
leave the newest tokens for the host. The host decides which answers have ended, one step behind the device, so that
neither waits for the other. Their shapes are few: one for steps, one for each size of prompts.
"""

import functools
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int, UInt

from dreamer_jax.inference.decoder import (
    CACHES,
    ROWS,
    Caches,
    Decoder,
    empty_caches,
    make_decoder,
    on_devices,
    on_hosts,
    prompt_size,
    read_prompts,
    read_tokens,
    rows_for,
)
from dreamer_jax.inference.sample import Draws, GenerationError, Sampling, choose
from dreamer_jax.kernels.compute import Compute
from dreamer_jax.model.dreamer import Dreamer, check_tokens

LIKELIEST = Sampling()
LONGEST = 2**20
"""Tokens of an answer: more is a slip of the keyboard, and its cache fits nowhere."""
OnToken = Callable[[int, int], bool | None]
"""(number of the request, new token) -> True to end its answer here."""


@dataclass(frozen=True)
class Prompt:
    """A request for one answer."""

    tokens: Sequence[int]
    max_tokens: int
    sampling: Sampling = LIKELIEST


class Answer(NamedTuple):
    """What was said to one prompt."""

    number: int
    """Of the prompt, in the order in which they came."""
    tokens: list[int]
    finished: bool
    """False: it was cut at `max_tokens`."""


class Slots(NamedTuple):
    """What the device knows of the requests that it works on, a row each; or how these arrays are split."""

    memories: Any
    """Caches by dimension."""
    tokens: Any
    """int32 [B]: the newest, which has not been read yet."""
    positions: Any
    """int32 [B]: where it stands."""
    draws: Draws


SLOTS = Slots(CACHES, ROWS, ROWS, Draws(ROWS, ROWS, ROWS))


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
    """Continue prompts of any lengths, all at once.

    A row ends before a token of `stop_ids`, after a token for which `on_token` returns True, or at `max_tokens`. What
    it says depends on its prompt, its number and the seed, not on the other rows.

    Raises:
        GenerationError: no prompt, an empty one, a seed or max_tokens out of range.
        TokenError: an id outside of the vocabulary.
    """
    if not prompts:
        raise GenerationError("there is no prompt")
    requests = [Prompt(tokens, max_tokens, sampling) for tokens in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    rows = max(rows_needed(request) for request in requests)
    engine = Engine(decoder, slots=len(prompts), rows=rows, group=len(prompts), seed=seed)
    for answer in engine.answers(requests, stop_ids=stop_ids, on_token=on_token):
        answers[answer.number] = answer.tokens
    return answers


def check_request(max_tokens: int, seed: int) -> None:
    """Raise GenerationError for a number that is out of its range."""
    if not 1 <= max_tokens <= LONGEST:
        raise GenerationError(f"max-tokens = {max_tokens}: must be at least 1 and at most {LONGEST:,}")
    if not 0 <= seed < 2**32:
        raise GenerationError(f"seed = {seed}: must be at least 0 and below 2^32")


def rows_needed(prompt: Prompt) -> int:
    """Rows of a cache for a prompt, padded to its compiled size, and its answer, whose last token is never read."""
    size = len(prompt.tokens)
    return rows_for(max(size + prompt.max_tokens - 1, prompt_size(size)))


@dataclass(eq=False)
class _Request:
    """A request at work, as the host knows it."""

    number: int
    prompt: Prompt
    tokens: list[int] = field(default_factory=list)
    asked: int = 0
    """Tokens that the device has been told to make."""
    ended: bool = False


Owners = list[tuple[int, _Request]]
"""(slot, request) of those for which a program makes a token."""


class Engine:
    """Answers requests in a fixed number of slots; for one thread.

    Args:
        decoder: the model.
        slots: requests at work at a time; rounded up to a multiple of the decoder's devices.
        rows: tokens that a prompt and its answer may have together.
        group: prompts that are read at once by each device, for which free slots wait; by default for an eighth of its
            slots.
        seed: of everything that is drawn.
    """

    def __init__(self, decoder: Decoder, *, slots: int, rows: int, group: int | None = None, seed: int = 0):
        check_request(1, seed)
        self._parts = decoder.parts
        self._own = -(-slots // self._parts)  # slots of each device
        self.slots, self.rows = self._own * self._parts, rows
        self._group = min(self._own, group or -(-self._own // 8))
        self._decoder, self._seed = decoder, np.uint32(seed)
        self._state = _no_requests(decoder, self.slots, rows)
        self._free_all()

    def _free_all(self) -> None:
        self._free = [deque(range(self._own)) for _ in range(self._parts)]
        self._busy: dict[int, _Request] = {}

    def answers(
        self, prompts: Iterable[Prompt], *, stop_ids: Collection[int] = (), on_token: OnToken | None = None
    ) -> Iterator[Answer]:
        """The answers as they end, in that order. One queue at a time: a new one ends what is left of the last.

        Raises:
            GenerationError: an empty prompt, one that does not fit the rows, max_tokens out of range.
            TokenError: an id outside of the vocabulary.
        """
        self._free_all()
        waiting = enumerate(prompts)
        queue: deque[_Request] = deque()
        behind: deque[tuple[Owners, Array]] = deque()
        more = True
        while True:
            while more and len(queue) < self.slots:  # as lazily as there are slots to fill
                following = next(waiting, None)
                more = following is not None
                if following is not None:
                    queue.append(self._checked(*following))
            while queue and self._may_insert(queue):
                behind.append(self._insert(queue))
            if self._busy:
                behind.append(self._step())
            if not behind:
                return
            while len(behind) > 1 or (behind and not self._busy):
                owners, tokens = behind.popleft()
                latest = jax.device_get(tokens)
                yield from self._read(owners, latest, stop_ids, on_token)

    def _checked(self, number: int, prompt: Prompt) -> _Request:
        check_request(prompt.max_tokens, 0)
        if not len(prompt.tokens):
            raise GenerationError(f"prompt {number} is empty")
        check_tokens(np.asarray(prompt.tokens), self._decoder.config.vocab)
        if (needed := rows_needed(prompt)) > self.rows:
            raise GenerationError(f"prompt {number} and its answer need {needed} rows, the engine has {self.rows}")
        return _Request(number, prompt)

    def _may_insert(self, queue: deque[_Request]) -> bool:
        free = sum(map(len, self._free))
        return free >= min(self._group * self._parts, len(queue)) if self._busy else free > 0

    def _insert(self, queue: deque[_Request]) -> tuple[Owners, Array]:
        """Give the next requests to free slots, those of each device to a part of the rows that are read."""
        owners: Owners = []
        taken: list[_Request | None] = []
        where: list[int] = []
        for part, free in enumerate(self._free):
            for _ in range(self._group):
                request = queue.popleft() if queue and free else None
                slot = free.popleft() if request else self._own  # past the end: written nowhere
                taken.append(request)
                where.append(slot)
                if request:
                    owners.append((part * self._own + slot, request))
        prompts = [request.prompt if request else _NOBODY for request in taken]
        tokens, lengths = padded([prompt.tokens for prompt in prompts])
        numbers = [request.number if request else 0 for request in taken]
        draws = Draws.of(numbers, [prompt.sampling for prompt in prompts])
        given = tokens, lengths, np.array(where, np.int32), draws
        self._state, latest = _insert(self._decoder, self.rows, self._seed, self._state, *given)
        self._busy |= dict(owners)
        self._asked(owners)
        return owners, latest

    def _step(self) -> tuple[Owners, Array]:
        owners = list(self._busy.items())
        active = np.zeros(self.slots, bool)
        active[list(self._busy)] = True
        self._state, latest = _step(self._decoder, self.rows, self._seed, self._state, active)
        self._asked(owners)
        return owners, latest

    def _asked(self, owners: Owners) -> None:
        """Count a token for each; those that have all get no more, and their slots are free for what comes next."""
        for slot, request in owners:
            request.asked += 1
            if request.asked == request.prompt.max_tokens:
                self._release(slot, request)

    def _release(self, slot: int, request: _Request) -> None:
        if self._busy.get(slot) is request:
            del self._busy[slot]
            self._free[slot // self._own].append(slot % self._own)

    def _read(
        self,
        owners: Owners,
        latest: Int[np.ndarray, "B"],
        stop_ids: Collection[int],
        on_token: OnToken | None,
    ) -> Iterator[Answer]:
        for slot, request in owners:
            if request.ended:
                continue
            token = int(latest[slot])
            stopped = token in stop_ids
            if not stopped:
                request.tokens.append(token)
                stopped = on_token is not None and bool(on_token(request.number, token))
            request.ended = stopped or len(request.tokens) == request.prompt.max_tokens
            if request.ended:
                self._release(slot, request)
                yield Answer(request.number, request.tokens, stopped)


_NOBODY = Prompt([0], 1)
"""Fills a group of prompts up; it is read and forgotten."""


def padded(prompts: Sequence[Sequence[int]]) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]:
    """Prompts padded at the end to one of a few lengths, and their own lengths."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), prompt_size(int(lengths.max()))), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths


@functools.partial(jax.jit, static_argnums=(1, 2))
def _no_requests(decoder: Decoder, slots: int, rows: int) -> Slots:
    def empty(decoder: Decoder) -> Slots:
        own = slots // decoder.parts
        nothing = jnp.zeros(own, jnp.int32)
        draws = Draws(nothing, jnp.zeros(own), jnp.ones(own))
        return Slots(empty_caches(decoder, own, rows).memories, nothing, nothing, draws)

    return on_devices(empty, decoder, given=(), result=SLOTS)()


@functools.partial(jax.jit, static_argnums=1, donate_argnums=3)
def _insert(
    decoder: Decoder,
    rows: int,
    seed: UInt[Array, ""],
    slots: Slots,
    tokens: Int[Array, "n T"],
    lengths: Int[Array, "n"],
    where: Int[Array, "n"],
    draws: Draws,
) -> tuple[Slots, Int[Array, "B"]]:
    """The slots with prompts read into some of them; the newest token of every slot."""

    def insert(decoder, seed, slots, tokens, lengths, where, draws):
        size = tokens.shape[1]
        logits, caches = read_prompts(decoder, empty_caches(decoder, len(tokens), size), tokens, lengths)
        first = choose(logits, draws, lengths, seed)
        # Rows after the prompts keep what others left there: nothing sees them before they are written.
        memories = jax.tree.map(
            lambda old, new: old.at[:, where, ..., :size, :].set(new, mode="drop"), slots.memories, caches.memories
        )
        others = jax.tree.map(lambda old, new: old.at[where].set(new, mode="drop"), slots[1:], (first, lengths, draws))
        return Slots(memories, *others)

    arrays = seed, slots, tokens, lengths, where, draws
    given = P(), SLOTS, ROWS, ROWS, ROWS, SLOTS.draws
    slots = on_devices(insert, decoder, given=given, result=SLOTS)(*arrays)
    return slots, on_hosts(decoder, slots.tokens)


@functools.partial(jax.jit, static_argnums=1, donate_argnums=3)
def _step(
    decoder: Decoder, rows: int, seed: UInt[Array, ""], slots: Slots, active: Bool[Array, "B"]
) -> tuple[Slots, Int[Array, "B"]]:
    """The slots after one more token of the active ones; the newest token of every slot."""

    def step(decoder, seed, slots, active):
        caches = Caches(slots.memories, rows)
        logits, caches = read_tokens(decoder, caches, slots.tokens, slots.positions, active)
        positions = slots.positions + active.astype(jnp.int32)
        tokens = choose(logits, slots.draws, positions, seed)
        return Slots(caches.memories, tokens, positions, slots.draws)

    given = P(), SLOTS, ROWS
    slots = on_devices(step, decoder, given=given, result=SLOTS)(seed, slots, active)
    return slots, on_hosts(decoder, slots.tokens)
