"""A trained model that answers requests: texts in, texts and likelihoods out, many at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from dreamer_jax.data.tokenizer import Tokenizer, UnknownCharacter
from dreamer_jax.evaluation.requests import (
    Choose,
    EvaluationError,
    Generate,
    Generated,
    Likelihoods,
    Outcome,
    Read,
    Reading,
    Request,
)
from dreamer_jax.inference.decoder import Decoder
from dreamer_jax.inference.engine import Engine, Prompt, rows_needed
from dreamer_jax.inference.likelihood import Options, option_likelihoods, text_likelihoods
from dreamer_jax.inference.sample import Sampling
from dreamer_jax.inference.text import TextStream

GREEDY = Sampling()
R = TypeVar("R", Generate, Choose, Read)


@dataclass(frozen=True)
class Respondent:
    """A model with its tokenizer, and how much it reads at a time."""

    decoder: Decoder
    tokenizer: Tokenizer
    context: int
    """Tokens that a document may have: those of training. Longer prompts lose their beginning (see `fitted`)."""
    batch: int = 32
    """Requests that are worked on at a time."""
    stride: int | None = None
    """Tokens by which the window moves over a text longer than the context; half a context if None."""
    seed: int = 0
    """Of everything that is drawn."""

    def can_read(self, request: Request) -> bool:
        """Whether the tokenizer knows all characters of a request."""
        match request:
            case Generate():
                texts = [request.prompt]
            case Choose():
                texts = [request.context, *request.options]
            case Read():
                texts = [request.text]
        try:
            for text in texts:
                self.tokenizer.encode(text)
        except UnknownCharacter:
            return False
        return True

    def respond(self, requests: Sequence[Request], sampling: Sampling = GREEDY) -> Iterator[tuple[int, Outcome]]:
        """(number of the request, its outcome), as they are ready.

        Raises:
            EvaluationError: an option without tokens of its own.
            UnknownCharacter: a text that the tokenizer cannot put into tokens.
        """
        yield from self._generated(_of_kind(requests, Generate), sampling)
        yield from self._chosen(_of_kind(requests, Choose))
        yield from self._read(_of_kind(requests, Read))

    def _generated(self, requests: dict[int, Generate], sampling: Sampling) -> Iterator[tuple[int, Outcome]]:
        """Shorter prompts first, so that those which are read together are of one size."""
        if not requests:
            return
        fits = {number: self._fitted_prompt(request) for number, request in requests.items()}
        order = sorted(requests, key=lambda number: len(fits[number][0]))
        streams = [TextStream(self.tokenizer.decode, requests[number].stop) for number in order]
        texts = [""] * len(order)
        ended = [False] * len(order)

        def on_token(place: int, token: int) -> bool:
            if token == self.tokenizer.eos:
                ended[place] = True
            else:
                texts[place] += streams[place].push(token)
                ended[place] = streams[place].ended
            return ended[place]

        prompts = [self._prompt(fits[number][0], requests[number].max_tokens, sampling) for number in order]
        engine = Engine(
            self.decoder, slots=min(self.batch, len(order)), rows=max(map(rows_needed, prompts)), seed=self.seed
        )
        for answer in engine.answers(prompts, on_token=on_token):
            number = order[answer.number]
            stream = streams[answer.number]
            text = texts[answer.number] + stream.finish()
            finished = ended[answer.number] or stream.ended
            yield number, Generated(text, tokens=len(answer.tokens), finished=finished, cut=fits[number][1])

    def _chosen(self, requests: dict[int, Choose]) -> Iterator[tuple[int, Outcome]]:
        options = {number: self._fitted_options(request) for number, request in requests.items()}
        numbers = list(requests)
        found = option_likelihoods(self.decoder, [options[number][0] for number in numbers], batch=self.batch)
        for place, likelihoods in found:
            asked, cut = options[numbers[place]]
            yield (
                numbers[place],
                Likelihoods(
                    nats=tuple(likelihood.nats for likelihood in likelihoods),
                    greedy=tuple(likelihood.greedy for likelihood in likelihoods),
                    tokens=tuple(map(len, asked.options)),
                    cut=cut,
                ),
            )

    def _read(self, requests: dict[int, Read]) -> Iterator[tuple[int, Outcome]]:
        numbers = list(requests)
        texts = [[self.tokenizer.bos, *self.tokenizer.encode(request.text)] for request in requests.values()]
        rows = max(1, self.batch // 4)  # whole contexts, which hold several short texts
        found = text_likelihoods(self.decoder, texts, context=self.context, stride=self.stride, batch=rows)
        for place, nats in found:
            yield numbers[place], Reading(-nats, len(texts[place]) - 1)

    def _prompt(self, tokens: list[int], max_tokens: int, sampling: Sampling) -> Prompt:
        return Prompt(tokens, min(max_tokens, self.context - len(tokens)), sampling)

    def _fitted_prompt(self, request: Generate) -> tuple[list[int], bool]:
        reserve = min(request.max_tokens, self.context // 2)
        return fitted([self.tokenizer.bos, *self.tokenizer.encode(request.prompt)], self.context - reserve)

    def _fitted_options(self, request: Choose) -> tuple[Options, bool]:
        prefix, options = split_options(self.tokenizer, request)
        room = self.context - max(map(len, options))
        if room < 1:
            raise EvaluationError(f"the option {request.options!r} is longer than the context of {self.context} tokens")
        prefix, cut = fitted([self.tokenizer.bos, *prefix], room)
        return Options(prefix, options), cut


def _of_kind(requests: Sequence[Request], kind: type[R]) -> dict[int, R]:
    return {number: request for number, request in enumerate(requests) if isinstance(request, kind)}


def fitted(tokens: list[int], room: int) -> tuple[list[int], bool]:
    """The last `room` tokens, and whether others had to go: as evaluation harnesses do, from the beginning."""
    return tokens[-room:], len(tokens) > room


def split_options(tokenizer: Tokenizer, request: Choose) -> tuple[list[int], list[list[int]]]:
    """(ids of the context, ids of each option): those that text and option together have after the context's.

    White space at the context's end goes to the options, because tokenizers join it with what follows. These are the
    rules of the lm-evaluation-harness.

    Raises:
        EvaluationError: an option without tokens of its own.
    """
    context = request.context.rstrip()
    space = request.context[len(context) :]
    prefix = tokenizer.encode(context)
    options = [tokenizer.encode(context + space + option)[len(prefix) :] for option in request.options]
    for option, tokens in zip(request.options, options, strict=True):
        if not tokens:
            raise EvaluationError(f"the option {option!r} adds no token to its context")
    return prefix, options
