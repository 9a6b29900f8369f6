"""The command line of lm-evaluation-harness, with the models of this project: `dreamer-lm-eval run ...`.

`python -m dreamer_jax.evaluation.harness` is the same. docs/lm_eval.md tells how to use it.
"""

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dreamer_jax.data.template import DEFAULT_TEMPLATE, Template
from dreamer_jax.door import guarded
from dreamer_jax.evaluation.requests import EvaluationError

if TYPE_CHECKING:
    from lm_eval._cli import HarnessCLI

PROGRAM = "dreamer-lm-eval"
MODEL = "dreamer"
"""What `--model` calls a checkpoint of this project."""
MODEL_CLASS = "dreamer_jax.evaluation.harness.model:DreamerLM"
"""Where it is; imported, with JAX, when a model is loaded."""


def main(arguments: list[str] | None = None) -> int:
    """Do what the harness's command line does; `--model dreamer` is known to it, and `write-tasks`."""
    if arguments is not None:
        sys.argv = [PROGRAM, *arguments]  # the harness reads it there
    return guarded(run, doing="--output_path")


def run() -> int:
    """Parse and execute.

    Raises:
        EvaluationError: the harness is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise EvaluationError("lm-eval is not installed; install it with: pip install 'dreamer-jax[eval]'")
    from lm_eval.api.registry import model_registry
    from lm_eval.utils import setup_logging

    setup_logging()
    if MODEL not in model_registry:
        model_registry.register(MODEL, target=MODEL_CLASS)
    harness = command_line()
    parsed = harness.parse_args()
    if parsed.command == "run":
        fill_in(parsed)
    harness.execute(parsed)
    return 0


def command_line() -> "HarnessCLI":
    """The harness's commands and `write-tasks`."""
    from lm_eval._cli import HarnessCLI

    harness = HarnessCLI()
    about = "Write tasks over local files of benchmarks, for `run --include_path` without a network"
    parser = harness._subparsers.add_parser("write-tasks", help=about, description=about)
    parser.add_argument("--data", type=Path, required=True, help="folder of the files: gsm8k/test.jsonl, ...")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tasks and copies of their data")
    parser.add_argument("--checkpoint", type=Path, help="run with prompts of another layout than the usual one")
    parser.set_defaults(func=write)
    return harness


def fill_in(parsed: argparse.Namespace) -> None:
    """Evaluate a model of this project if none is named, and not one request at a time, as the harness does."""
    if parsed.config:
        return
    parsed.model = parsed.model or MODEL
    if parsed.model != MODEL:
        return
    parsed.device = parsed.device or "jax"  # the results would say cuda:0
    if not hasattr(parsed, "batch_size"):
        parsed.batch_size = "32"


def write(parsed: argparse.Namespace) -> None:
    """Do `write-tasks`, and say what came of it."""
    from dreamer_jax.evaluation.harness.local_tasks import write_tasks

    out = parsed.out.expanduser().absolute()
    written = write_tasks(parsed.data.expanduser(), out, template_of(parsed.checkpoint))
    for line in written.missing:
        print(f"left out: {line}")
    for name, about in written.tasks.items():
        print(f"{name}: {about}")
    some = next(iter(written.tasks))
    print(f"next: {PROGRAM} run --model_args checkpoint=runs/NAME --include_path {out} --tasks {some}")


def template_of(checkpoint: Path | None) -> Template:
    """The layout of a run's training; without a run, the usual one."""
    if checkpoint is None:
        return DEFAULT_TEMPLATE
    from dreamer_jax.training.checkpoint import load_model  # with JAX, which nothing else here needs

    return Template.of(load_model(checkpoint).config.data)


if __name__ == "__main__":
    sys.exit(main())
