"""A checkpoint as lm-evaluation-harness wants a model: likelihoods of continuations and texts, and generated texts."""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import simple_parse_args_string
from tqdm import tqdm

from dreamer_jax.evaluation.checkpoints import Settings, candidate
from dreamer_jax.evaluation.requests import EvaluationError, Generate, Generated
from dreamer_jax.inference.likelihood import Options, option_likelihoods, text_likelihoods
from dreamer_jax.inference.sample import Sampling

MODEL_ARGS = ("checkpoint", "depth", "batch_size", "context", "expert_devices", "seed")
MAX_GEN_TOKS = 1024
"""Tokens of an answer where a task says nothing: the harness's 256 cut solutions of MATH short."""
MOST_OPTIONS = 16
"""Continuations that are read together after one context, which is read once for them."""
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call the largest number of new tokens, in the harness's order of preference."""

Pair = tuple[tuple[str, str], list[int], list[int]]
"""((context, continuation), ids of the context, ids of the continuation)."""


@register_model("dreamer")
class DreamerLM(TemplateLM):
    """`--model dreamer --model_args checkpoint=runs/x[,depth=8][,context=2048][,batch_size=32]`."""

    def __init__(
        self,
        checkpoint: Any = None,
        depth: Any = None,
        batch_size: Any = 32,
        context: Any = None,
        expert_devices: Any = 1,
        seed: Any = 0,
        pretrained: Any = None,
        device: Any = None,
        **unknown: Any,
    ):
        """Load the newest checkpoint of a run folder, or the one given. Values are as the command line has them.

        Args:
            checkpoint: the folder.
            depth: how many depths run; as many as in training if None.
            batch_size: requests that are worked on at a time.
            context: tokens that a document may have; those of training if None.
            expert_devices: devices that share out the experts; all others share out the requests.
            seed: of what is drawn, where a task samples.
            pretrained: the checkpoint, too: what the harness's own models call it, and names its folder of results by.
            device: has no effect; the harness always gives one. JAX takes all devices (JAX_PLATFORMS chooses).
            **unknown: refused.

        Raises:
            EvaluationError: no checkpoint is named, or an argument is unknown or out of its range.
            CheckpointError: there is no such checkpoint, or it is damaged.
        """
        super().__init__()
        if unknown:
            raise EvaluationError(f"--model_args {', '.join(unknown)}: unknown; there are {', '.join(MODEL_ARGS)}")
        checkpoint = pretrained if checkpoint is None else checkpoint
        if checkpoint is None:
            raise EvaluationError("--model_args: give checkpoint=DIR, the folder of a run or of one of its checkpoints")
        settings = Settings(
            batch=whole("batch_size", batch_size, 1),
            context=None if context is None else whole("context", context, 2),
            expert_devices=whole("expert_devices", expert_devices, 1),
            seed=whole("seed", seed, 0),
        )
        depth = None if depth is None else whole("depth", depth, 1)
        chosen = candidate(Path(str(checkpoint)))
        self._respondent = chosen.respondent(settings, depth)
        self._subject = chosen.subject(settings, depth)
        self._tokenizer_path = str(chosen.loaded.known_tokenizer)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "DreamerLM":
        """From `--model_args`, which win over flags of the harness such as `--batch_size`."""
        flags = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**(flags | arg_dict))

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> "DreamerLM":
        """As `create_from_arg_obj`, from "checkpoint=runs/x,depth=8"."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    # What it is

    @property
    def max_length(self) -> int:
        """Tokens that a document may have."""
        return self._respondent.context

    @property
    def max_gen_toks(self) -> int:
        """New tokens where a task gives no limit; the end of the context ends an answer, too."""
        return MAX_GEN_TOKS

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's file."""
        return self._tokenizer_path

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self._respondent.tokenizer.eos

    @property
    def prefix_token_id(self) -> int:
        """The token that begins a document."""
        return self._respondent.tokenizer.bos

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results: step, depth, a checksum of the weights, devices and more."""
        devices = f"{jax.device_count()} {jax.devices()[0].device_kind}"
        return {"dreamer": {**asdict(self._subject), "devices": devices}}

    def chat_template(self, chat_template: bool | str = False) -> str:
        """There is none.

        Raises:
            EvaluationError: one is asked for.
        """
        if chat_template:
            raise EvaluationError("--apply_chat_template: models of this project are no chat models; leave it away")
        return ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Raise EvaluationError: there is no template."""
        return self.chat_template(True)

    # What it answers

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text; the token that begins a document stands in front unless `add_special_tokens` is False."""
        ids = self._respondent.tokenizer.encode(string)
        return ids if add_special_tokens is False else [self.prefix_token_id, *ids]

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether each token was the likeliest) of each continuation."""
        groups = list(shared_contexts(requests, self.max_length))
        asked = [Options(group.prefix, group.options) for group in groups]
        results = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), desc="Reading continuations", disable=disable_tqdm) as bar:
            for number, found in option_likelihoods(self._respondent.decoder, asked, batch=self._respondent.batch):
                for place, likelihood in enumerate(found, groups[number].first):
                    results[place] = (likelihood.nats, likelihood.greedy)
                    self.cache_hook.add_partial("loglikelihood", requests[place][0], results[place])
                bar.update(len(found))
        return results

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text as a document of its own.

        The windows are those of the harness's models: each judges as many tokens as the context has, after the one
        token before them; the last window of a text goes back as far as the context does.
        """
        texts = [self.tok_encode(text) for (text,) in (request.args for request in requests)]
        results = [0.0] * len(requests)
        found = text_likelihoods(
            self._respondent.decoder,
            texts,
            context=self.max_length + 1,  # a window's last token is judged, and what comes after it is not
            stride=self.max_length,
            batch=max(1, self._respondent.batch // 4),
        )
        for place, nats in tqdm(found, total=len(texts), desc="Reading texts", disable=disable_tqdm):
            results[place] = nats
            self.cache_hook.add_partial("loglikelihood_rolling", requests[place].args, nats)
        return results

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that continues each context, up to the first of the strings that end it."""
        texts = [""] * len(requests)
        alike: dict[Sampling, list[int]] = defaultdict(list)
        asked: list[Generate] = []
        for place, (context, kwargs) in enumerate(request.args for request in requests):
            request, sampling = generation(context, kwargs, self.max_gen_toks)
            asked.append(request)
            alike[sampling].append(place)
        with tqdm(total=len(requests), desc="Generating", disable=disable_tqdm) as bar:
            for sampling, places in alike.items():
                for number, outcome in self._respondent.respond([asked[place] for place in places], sampling):
                    assert isinstance(outcome, Generated)
                    texts[places[number]] = outcome.text
                    self.cache_hook.add_partial("generate_until", requests[places[number]].args, outcome.text)
                    bar.update()
        return texts


class Shared(NamedTuple):
    """Continuations that follow one another in the requests and have the same context."""

    first: int
    """Place of the first among the requests."""
    prefix: list[int]
    options: list[list[int]]


def shared_contexts(requests: Sequence[Pair], room: int) -> Iterator[Shared]:
    """The requests in their order, those of equal contexts together; see `fitted_pair`."""
    pairs = [fitted_pair(request, room) for request in requests]
    first = 0
    for prefix, members in itertools.groupby(pairs, key=lambda pair: pair[0]):
        options = [continuation for _, continuation in members]
        for at in range(0, len(options), MOST_OPTIONS):
            several = options[at : at + MOST_OPTIONS]
            yield Shared(first, prefix, several)
            first += len(several)


def fitted_pair(request: Pair, room: int) -> tuple[list[int], list[int]]:
    """(context, continuation) without the beginning that has no room, as the harness cuts it: the last is not read.

    Raises:
        EvaluationError: a continuation without tokens, or longer than the context.
    """
    (_, text), context, continuation = request
    if not continuation:
        raise EvaluationError(f"the continuation {text!r} adds no token to its context; leave the question out")
    if len(continuation) > room:
        raise EvaluationError(
            f"the continuation {text[:40]!r} has {len(continuation)} tokens, the context {room}; "
            f"give --model_args context=N, or leave the question out"
        )
    return (context + continuation)[-(room + 1) : -len(continuation)], continuation


def generation(context: str, kwargs: Mapping[str, Any], max_gen_toks: int) -> tuple[Generate, Sampling]:
    """What a task's `generation_kwargs` ask for, by the harness's rules: greedy unless they say otherwise.

    Raises:
        EvaluationError: an argument that is unknown here or out of its range.
    """
    unknown = [name for name in kwargs if name not in ("until", "do_sample", "temperature", "top_p", *LIMITS)]
    if dict(kwargs).get("num_beams") == 1:
        unknown.remove("num_beams")  # what is done anyway
    if unknown:
        known = "until, max_gen_toks, do_sample, temperature, top_p"
        raise EvaluationError(f"generation_kwargs {', '.join(unknown)}: unknown to these models; there are {known}")
    until = kwargs.get("until") or []
    limit = next((kwargs[name] for name in LIMITS if kwargs.get(name) is not None), max_gen_toks)
    request = Generate(context, (until,) if isinstance(until, str) else tuple(until), whole("max_gen_toks", limit, 1))
    return request, sampling_of(kwargs)


def sampling_of(kwargs: Mapping[str, Any]) -> Sampling:
    """Greedy, unless `do_sample` is true or, where it is not given, the temperature is above 0."""
    sample = kwargs.get("do_sample")
    temperature = float(kwargs.get("temperature", 1.0 if sample else 0.0))
    if sample is False or temperature == 0:
        return Sampling()
    return Sampling(temperature, float(kwargs.get("top_p", 1.0)))


def whole(name: str, value: Any, least: int) -> int:
    """A whole number, which may be written as text.

    Raises:
        EvaluationError: it is none, or below `least`.
    """
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if not isinstance(number, int) or isinstance(number, bool) or number < least:
        raise EvaluationError(f"{name} = {value!r}: must be a whole number, {least} or more")
    return number
