"""Answer prompts with a trained model: `python -m dreamer_jax.generate --checkpoint runs/tiny --prompt "..."`."""

import dataclasses
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from dreamer_jax.door import guarded

if TYPE_CHECKING:
    from dreamer_jax.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Arguments:
    """Answer prompts with a trained model."""

    checkpoint: Path
    """Folder of a run, or of one of its checkpoints."""
    prompt: tuple[str, ...] = ()
    """What to answer. Given several times, all prompts are answered in one batch."""
    temperature: float = 0.0
    """Higher is more random; 0 takes the likeliest token each time."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together have this probability, in (0, 1]."""
    max_tokens: int = 256
    """Longest answer, in tokens."""
    seed: int = 0
    """The same seed, prompts and settings give the same answers."""
    depth: int | None = None
    """How many depths run; without it as many as in training. A recurrent model runs at any depth."""
    stop: tuple[str, ...] = ()
    """Text before which an answer ends. May be given several times."""


def main(arguments: list[str] | None = None) -> int:
    """Parse, generate, report."""
    given = sys.argv[1:] if arguments is None else arguments
    parsed = tyro.cli(tyro.conf.UseAppendAction[Arguments], args=given, prog="python -m dreamer_jax.generate")
    return guarded(lambda: run(parsed), doing="the output")


def run(arguments: Arguments) -> int:
    """Load the checkpoint, stream the answers, say how fast it went."""
    # Late, so that --help does not wait for JAX.
    from dreamer_jax.data.template import Template
    from dreamer_jax.data.tokenizer import load_tokenizer
    from dreamer_jax.inference import engine
    from dreamer_jax.inference.decoder import make_decoder
    from dreamer_jax.inference.sample import GenerationError, Sampling
    from dreamer_jax.kernels.compute import Compute
    from dreamer_jax.training.checkpoint import load_model

    sampling = Sampling(arguments.temperature, arguments.top_p)
    engine.check_request(arguments.max_tokens, arguments.seed)
    if not arguments.prompt or not all(prompt.strip() for prompt in arguments.prompt):
        raise GenerationError('a prompt is empty or absent: give --prompt "..."')
    for text in (*arguments.prompt, *arguments.stop):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise GenerationError(f"{text[:40]!a} is not UTF-8 text: give the prompt and the stops in UTF-8")
    loaded = load_model(arguments.checkpoint)
    tokenizer = load_tokenizer(loaded.known_tokenizer, loaded.config.data.special_tokens)
    template = Template.of(loaded.config.data)
    prompts = [[tokenizer.bos, *tokenizer.encode(template.asked(prompt))] for prompt in arguments.prompt]
    _warn_of_length(max(map(len, prompts)), arguments.max_tokens, loaded.config.data.context)
    answers = Answers(tokenizer, arguments.prompt, arguments.stop)
    compute = dataclasses.replace(Compute.of(loaded.config), remat="none")
    decoder = make_decoder(loaded.model, compute, depth=arguments.depth)
    engine.complete(
        decoder, prompts, sampling, max_tokens=arguments.max_tokens, seed=arguments.seed, on_token=answers.add
    )
    answers.finish()
    print(answers.report(), file=sys.stderr)
    print(
        f"next: python -m dreamer_jax.convert --checkpoint {arguments.checkpoint} --to safetensors --out OUT",
        file=sys.stderr,
    )
    return 0


def _warn_of_length(longest: int, max_tokens: int, context: int) -> None:
    if longest > context:
        print(f"warning: a prompt of {longest} tokens exceeds the trained context of {context}", file=sys.stderr)
    elif longest + max_tokens > context:
        print(
            f"warning: answers longer than {context - longest} tokens exceed the trained context of {context}",
            file=sys.stderr,
        )


class Answers:
    """Prints one prompt's answer as it grows, or the answers to several prompts, each when it is done."""

    def __init__(self, tokenizer: "Tokenizer", prompts: tuple[str, ...], stop: tuple[str, ...]):
        """An answer ends at the tokenizer's end-of-document token, or before a stop string."""
        from dreamer_jax.inference.text import TextStream

        self._eos, self._prompts = tokenizer.eos, prompts
        self._streams = [TextStream(tokenizer.decode, stop) for _ in prompts]
        self._texts = ["" for _ in prompts]
        self._open = set(range(len(prompts)))
        self._tokens, self._started, self._first = 0, time.monotonic(), 0.0

    def add(self, row: int, token: int) -> bool:
        """Take one more token of a prompt's answer; True ends the answer."""
        self._first = self._first or time.monotonic()
        self._tokens += 1
        if token != self._eos:
            self._show(row, self._streams[row].push(token))
            if not self._streams[row].ended:
                return False
        self._close(row)
        return True

    def finish(self) -> None:
        """End the answers that have reached the largest number of tokens."""
        for row in sorted(self._open):
            self._close(row)

    def report(self) -> str:
        """Tokens and tokens per second, without the time to the first one, which includes compilation."""
        seconds, decoded = time.monotonic() - self._first, self._tokens - len(self._prompts)
        rate = f"{decoded / seconds:.1f} tokens/s" if decoded > 0 else "too few for a rate"
        return f"{self._tokens} tokens, {rate} (the first came after {self._first - self._started:.1f} s)"

    def _show(self, row: int, text: str) -> None:
        if not self._texts[row]:
            text = text.lstrip(" ")  # the space that separates an answer from its prompt
        self._texts[row] += text
        if len(self._prompts) == 1:
            print(text, end="", flush=True)

    def _close(self, row: int) -> None:
        self._show(row, self._streams[row].finish())
        self._open.remove(row)
        if len(self._prompts) > 1:
            print(f"== {self._prompts[row]}\n{self._texts[row]}", end="")
        print(flush=True)


if __name__ == "__main__":
    sys.exit(main())
