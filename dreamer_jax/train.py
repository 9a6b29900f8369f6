"""Train a model: `python -m dreamer_jax.train --config configs/tiny.py [--section.key value ...]`."""

from dreamer_jax.kernels.native.huge_pages import restart_with_huge_pages
from dreamer_jax.training.preemption import all_is_saved, early_signals, interrupted_code

if __name__ == "__main__":  # before the imports that take time
    early_signals()
    restart_with_huge_pages()

import argparse
import sys
import time
from typing import TYPE_CHECKING

from dreamer_jax import config as configuration
from dreamer_jax.config import Config
from dreamer_jax.distributed import joined
from dreamer_jax.door import guarded, unbreakable_output

if TYPE_CHECKING:
    from dreamer_jax.training.loop import Draw, Look, Summary

USAGE = """python -m dreamer_jax.train --config FILE [--section.key value ...]

Trains the model of a config file; run again, it resumes from the newest checkpoint of the run's folder.
The same command in every process of a cluster makes them one run (docs/processes.md).
`--config FILE --help` lists every key of the config with its default."""


def main(arguments: list[str] | None = None) -> int:
    """Parse, train, report."""
    given = sys.argv[1:] if arguments is None else arguments
    with unbreakable_output():
        return guarded(lambda: run(parse(given)), doing="out")


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
    interrupted_code()  # a wrong one is refused now
    started = time.monotonic()
    with joined(config.distributed) as group:
        from dreamer_jax.kernels.cores import use_cores  # late, so that --help and config errors do not wait for JAX
        from dreamer_jax.training.loop import train

        if group.count == 1:
            use_cores(config)
        summary = train(config, group, benchmarks(config), figures(config))
    code = interrupted_code() if summary.stopped_by else 0
    all_is_saved(code)
    if group.index:
        return code  # the rest is process 0's, on its own
    minutes = (time.monotonic() - started) / 60
    if summary.stopped_by:
        print(f"{summary.stopped_by}: saved step {summary.step} in {config.run_dir}; the same command resumes there.")
        return code
    print(f"trained {config.model.variant} to step {summary.step} in {minutes:.1f} minutes")
    if summary.train_loss is not None:
        print(f"  training loss    {summary.train_loss:.4f} nats per token ({last_batch(config, summary.step)})")
    if summary.validation_loss is not None:
        print(f"  validation loss  {summary.validation_loss:.4f} nats per token")
    print(f"  unigram entropy  {summary.unigram_entropy:.4f} nats per token (what token frequencies alone reach)")
    print(sample(summary))
    print(f"wrote {config.run_dir}: checkpoints, config.json, tokenizer, metrics.jsonl, tensorboard")
    print(f'next: python -m dreamer_jax.generate --checkpoint {config.run_dir} --prompt "..."')
    return 0


def last_batch(config: Config, step: int) -> str:
    """What the training loss is of: with random depths, also of which one."""
    from dreamer_jax.training.depths import depth_of

    return f"last batch, at depth {depth_of(config, step)}" if config.train.depths else "last batch"


def benchmarks(config: Config) -> "Look | None":
    """What `train.evaluate_every` asks for; its files are read now, so that one that is missing costs no training."""
    if not config.train.evaluate_every:
        return None
    from dreamer_jax.evaluation.snapshots import Benchmarks

    return Benchmarks.of(config)


def figures(config: Config) -> "Draw | None":
    """What `log.figures_every` asks for; None if nothing would show it."""
    if not config.log.figures_every or not (config.log.tensorboard or config.log.wandb):
        return None
    from dreamer_jax.analysis.live import live_figures

    return live_figures


def sample(summary: "Summary") -> str:
    """A prompt and the trained model's likeliest answer to it."""
    from dreamer_jax.data.template import Template
    from dreamer_jax.data.tokenizer import load_tokenizer
    from dreamer_jax.inference.engine import generate
    from dreamer_jax.kernels.compute import Compute

    tokenizer = load_tokenizer(summary.prepared.tokenizer, summary.config.data.special_tokens)
    sources = summary.prepared.report["sources"]
    examples = [example for name in summary.prepared.weights for example in sources[name]["examples"]]
    prompt = summary.config.log.sample_prompt or (examples[0]["prompt"] if examples else "What is 12 + 30?")
    rendered = Template.of(summary.config.data).asked(prompt)
    tokens = [tokenizer.bos, *tokenizer.encode(rendered)]
    compute, longest = Compute.of(summary.config), max(1, min(160, summary.config.data.context - len(tokens)))
    [answer] = generate(summary.model, compute, [tokens], max_tokens=longest, stop_ids=(tokenizer.eos,))
    return f"a held-out prompt and the model's answer:\n  {rendered}{tokenizer.decode(answer)}".replace("\n", "\n  ")


if __name__ == "__main__":
    sys.exit(main())
