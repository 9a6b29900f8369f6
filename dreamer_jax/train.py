"""Train a model: `python -m dreamer_jax.train --config configs/tiny.py [--section.key value ...]`."""

import argparse
import os
import sys
import time
from typing import TYPE_CHECKING

from dreamer_jax import config as configuration
from dreamer_jax.config import Config, ConfigError
from dreamer_jax.distributed import joined
from dreamer_jax.kernels.native.huge_pages import restart_with_huge_pages

if TYPE_CHECKING:
    from dreamer_jax.training.loop import Summary

INTERRUPTED_CODE = "DREAMER_INTERRUPTED_CODE"
"""Environment: exit code of a run that a signal ended before its last step (0 without it). Launchers set it, to tell
such a run from a finished one."""

USAGE = """python -m dreamer_jax.train --config FILE [--section.key value ...]

Trains the model of a config file; run again, it resumes from the newest checkpoint of the run's folder.
The same command in every process of a cluster makes them one run (docs/processes.md).
`--config FILE --help` lists every key of the config with its default."""


def main(arguments: list[str] | None = None) -> int:
    """Parse, train, report."""
    try:
        config = parse(sys.argv[1:] if arguments is None else arguments)
        return run(config)
    except (ConfigError, ValueError, RuntimeError, OSError) as error:
        if not _ours(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1


def parse(arguments: list[str]) -> Config:
    """The resolved config of a command line."""
    parser = argparse.ArgumentParser(usage=USAGE, add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    known, overrides = parser.parse_known_args(arguments)
    if known.config is None:
        print(f"usage: {USAGE}")
        raise SystemExit(0 if {"-h", "--help"} & set(arguments) else 2)
    return configuration.load(known.config, overrides)


def run(config: Config) -> int:
    """Train and say what came of it."""
    started = time.monotonic()
    with joined(config.distributed) as group:
        from dreamer_jax.kernels.cores import use_cores  # late, so that --help and config errors do not wait for JAX
        from dreamer_jax.training.loop import train

        if group.count == 1:
            use_cores(config)
        summary = train(config, group)
    code = int(os.environ.get(INTERRUPTED_CODE, "0")) if summary.stopped_by else 0
    if group.index:
        return code  # the rest is process 0's, on its own
    minutes = (time.monotonic() - started) / 60
    if summary.stopped_by:
        print(f"{summary.stopped_by}: saved step {summary.step} in {config.run_dir}; the same command resumes there.")
        return code
    print(f"trained {config.model.variant} to step {summary.step} in {minutes:.1f} minutes")
    if summary.train_loss is not None:
        print(f"  training loss    {summary.train_loss:.4f} nats per token (last batch)")
    if summary.validation_loss is not None:
        print(f"  validation loss  {summary.validation_loss:.4f} nats per token")
    print(f"  unigram entropy  {summary.unigram_entropy:.4f} nats per token (what token frequencies alone reach)")
    print(sample(summary))
    print(f"wrote {config.run_dir}: checkpoints, config.json, tokenizer, metrics.jsonl, tensorboard")
    print(f'next: python -m dreamer_jax.generate --checkpoint {config.run_dir} --prompt "..."')
    return 0


def sample(summary: "Summary") -> str:
    """A prompt and the trained model's likeliest answer to it."""
    from dreamer_jax.data.sources import render_prompt
    from dreamer_jax.data.tokenizer import load_tokenizer
    from dreamer_jax.inference.engine import generate
    from dreamer_jax.kernels.compute import Compute

    tokenizer = load_tokenizer(summary.prepared.tokenizer)
    source = summary.config.data.sources[0].name
    examples = summary.prepared.report["sources"][source]["examples"]
    prompt = summary.config.log.sample_prompt or (examples[0]["prompt"] if examples else "What is 12 + 30?")
    rendered = render_prompt(prompt)
    tokens = [tokenizer.bos, *tokenizer.encode(rendered)]
    compute, longest = Compute.of(summary.config), max(1, min(160, summary.config.data.context - len(tokens)))
    [answer] = generate(summary.model, compute, [tokens], max_tokens=longest, stop_ids=(tokenizer.eos,))
    return f"a held-out prompt and the model's answer:\n  {rendered}{tokenizer.decode(answer)}".replace("\n", "\n  ")


def _ours(error: BaseException) -> bool:
    """Errors with a message for the user; anything else is a bug and keeps its traceback."""
    return type(error).__module__.startswith("dreamer_jax.")


if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())
