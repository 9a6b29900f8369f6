"""The paper's six trainings, with the rule of its section 4.1: two seeds to 25B tokens, then the better one to the end.

    python launch/reproduce.py                                 all six, one after another, on this machine's devices
    python launch/reproduce.py --models dr_da_1b --launcher "srun python -m dreamer_jax.train"
    python launch/reproduce.py --models la_1b --launcher "sbatch --wait launch/slurm.sbatch" -- --out /shared/runs

What follows `--` goes to every training. A run's folder is <out>/<config's name>_seed<seed>.

What is done is read from the run folders alone: a leg is done when its last step has a validation loss, which is
measured after that step's checkpoint is on disk. So this command may be killed and started again at any moment; a
training that was cut off resumes from its newest checkpoint. Neither the learning rate (constant after its warm-up) nor
the data depend on train.steps: a run in two legs equals a run in one.
"""

import argparse
import json
import math
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from dreamer_jax import config as configuration
from dreamer_jax.door import guarded
from dreamer_jax.errors import DreamerError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
MODELS = ("la_1b", "dr_1b", "dr_da_1b", "la_2b", "dr_2b", "dr_da_2b")
FIRST_LEG_TOKENS = 25e9
TRAIN = f"{shlex.quote(sys.executable)} -m dreamer_jax.train"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""They ask a training to save and leave."""
INTERRUPTED = 75
"""Exit code of a training that a signal ended, and of this command then."""


class LegError(DreamerError, RuntimeError):
    """A leg that did not get to its end."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class Leg(NamedTuple):
    """A training up to a step."""

    config: Path
    run: Path
    seed: int
    steps: int


class Plan(NamedTuple):
    """The trainings of one model."""

    model: str
    first: list[Leg]
    """One for each seed."""
    last_step: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing, and report."""
    asked, overrides = parse(list(sys.argv[1:] if arguments is None else arguments))
    plans = [plan(model, asked.seeds, asked.first_leg_tokens, overrides) for model in asked.models]
    if asked.winners:
        print("\n".join(f"{p.model} {second_leg(p).run}" for p in plans if finished(p)))
        return 0
    try:
        for p in plans:
            for leg in p.first:
                take(leg, asked.launcher, overrides, dry=asked.dry_run)
            if asked.dry_run and not decided(p):
                print(f"{p.model}: then the seed with the lower validation loss, to step {p.last_step}")
                continue
            print(verdict(p), flush=True)
            take(second_leg(p), asked.launcher, overrides, dry=asked.dry_run)
    except LegError as error:
        print(f"error: {error}; the same command goes on from there", file=sys.stderr)
        return error.code
    for p in filter(finished, plans):
        print(f"{p.model}: validation loss {validation_loss(second_leg(p)):.4f} at step {p.last_step}")
        print(f'next: python -m dreamer_jax.generate --checkpoint {second_leg(p).run} --prompt "..."')
    return 0


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the overrides of configs that follow --."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help="names in configs/, or config files")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1))
    parser.add_argument("--first-leg-tokens", type=float, default=FIRST_LEG_TOKENS, help="tokens for each seed")
    parser.add_argument("--launcher", default=TRAIN, help="command that takes the arguments of dreamer_jax.train")
    parser.add_argument("--dry-run", action="store_true", help="show the commands that come next")
    parser.add_argument("--winners", action="store_true", help="list the finished models and their run folders")
    return parser.parse_args(arguments[:end]), arguments[end + 1 :]


def plan(model: str, seeds: Sequence[int], first_leg_tokens: float, overrides: list[str]) -> Plan:
    """The legs of a model: `first_leg_tokens` for each seed, rounded up to whole steps."""
    path = Path(model) if model.endswith(".py") else CONFIGS / f"{model}.py"
    config = configuration.load(path, overrides)
    steps = min(math.ceil(first_leg_tokens / config.tokens_per_step), config.train.steps)
    name = f"{config.name}_seed"
    legs = [Leg(path, config.run_dir.with_name(f"{name}{seed}"), seed, steps) for seed in seeds]
    return Plan(config.name, legs, config.train.steps)


def take(leg: Leg, launcher: str, overrides: list[str], *, dry: bool = False) -> None:
    """Train to the end of a leg, unless that is done.

    Raises:
        LegError: the training failed, was interrupted, or left no validation loss.
    """
    if validation_loss(leg) is not None:
        return
    own = {"--name": leg.run.name, "--train.seed": leg.seed, "--train.steps": leg.steps}
    command = [*shlex.split(launcher), "--config", str(leg.config), *overrides]
    command += [str(word) for pair in own.items() for word in pair]
    print(f"{leg.run.name} to step {leg.steps}:\n  {shlex.join(command)}", flush=True)
    if dry:
        return
    code = run(command)
    if code:
        how = "was interrupted" if code == INTERRUPTED else f"ended with code {code}"
        raise LegError(f"the training of {leg.run.name} {how}", code)
    if validation_loss(leg) is None:
        raise LegError(f"{leg.run}/metrics.jsonl has no validation loss of step {leg.steps} after its training", 1)


def run(command: list[str]) -> int:
    """The exit code of a training; signals are passed on to it, however early they come."""
    asked: list[int] = []
    started: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _: FrameType | None = None) -> None:
        asked.append(number)
        if number != signal.SIGINT:  # Ctrl-C reaches all processes of a terminal
            for process in started:
                process.send_signal(number)

    numbers = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]  # as nohup wants it
    previous = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        started.append(subprocess.Popen(command, env=os.environ | {"DREAMER_INTERRUPTED_CODE": str(INTERRUPTED)}))
        for number in set(asked):  # came while nothing was there to hear it
            pass_on(number)
        code = started[0].wait()
        died_of_it = -code in asked  # before it could take signals
        return INTERRUPTED if asked and (code == 0 or died_of_it) else code
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def validation_loss(leg: Leg) -> float | None:
    """The held-out loss at the end of a leg; None if it is not done, infinite if the loss is no number."""
    path = leg.run / "metrics.jsonl"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # torn by a kill
        if isinstance(record, dict) and record.get("step") == leg.steps and "validation/loss" in record:
            return math.inf if record["validation/loss"] is None else record["validation/loss"]
    return None


def decided(p: Plan) -> bool:
    """Whether all seeds have ended their first leg."""
    return all(validation_loss(leg) is not None for leg in p.first)


def second_leg(p: Plan) -> Leg:
    """The run with the lowest loss, to the last step; of equal ones the first."""
    best = min(p.first, key=lambda leg: validation_loss(leg) or 0.0)
    return best._replace(steps=p.last_step)


def finished(p: Plan) -> bool:
    """Whether nothing is left to train."""
    return decided(p) and validation_loss(second_leg(p)) is not None


def verdict(p: Plan) -> str:
    """What the first leg found."""
    losses = ", ".join(f"seed {leg.seed} {validation_loss(leg):.4f}" for leg in p.first)
    return f"{p.model}: validation losses at step {p.first[0].steps}: {losses}; seed {second_leg(p).seed} goes on"


if __name__ == "__main__":
    sys.exit(guarded(main, doing="--launcher"))
