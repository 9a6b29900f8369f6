"""Benchmarks along a training: a small slice of them, asked of the model as it is."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dreamer_jax.config import Config, user_path
from dreamer_jax.data.template import Template
from dreamer_jax.data.tokenizer import load_tokenizer
from dreamer_jax.evaluation.benchmarks.tasks import named
from dreamer_jax.evaluation.evaluation import estimates, limited
from dreamer_jax.evaluation.requests import EvaluationError, Item, Outcome, Task
from dreamer_jax.evaluation.respondent import Respondent
from dreamer_jax.inference.decoder import make_decoder
from dreamer_jax.kernels.compute import Compute
from dreamer_jax.training.loop import Snapshot
from dreamer_jax.training.metrics import Record


@dataclass(frozen=True)
class Benchmarks:
    """The tasks with the questions that are asked."""

    asked: tuple[tuple[Task, tuple[Item, ...]], ...]

    @staticmethod
    def of(config: Config) -> "Benchmarks":
        """Those that the config names, with their files read.

        Raises:
            EvaluationError: an unknown task, a missing or damaged file, or a task without questions.
        """
        train, template, found = config.train, Template.of(config.data), []
        root = user_path(train.evaluate_data, "train.evaluate_data")
        for task in named([name.strip() for name in train.evaluate_tasks.split(",") if name.strip()]):
            items = limited(task.questions(root, template).items, train.evaluate_limit)
            if not items:
                raise EvaluationError(f"train.evaluate_tasks: {task.name} has no questions in '{root}'")
            found.append((task, tuple(items)))
        return Benchmarks(tuple(found))

    def __call__(self, snapshot: Snapshot) -> Record:
        """evaluate/<task>/<metric> of each metric, and its interval's ends."""
        config = snapshot.config
        compute = replace(Compute.of(config, snapshot.mesh), remat="none")
        decoder = make_decoder(snapshot.model, compute, mesh=snapshot.mesh)
        tokenizer = load_tokenizer(snapshot.tokenizer, config.data.special_tokens)
        respondent = Respondent(decoder, tokenizer, config.data.context)
        record: Record = {}
        # First everything that all processes compute together, then what each does alone, and what may fail in one.
        answered = [(task, *_answered(respondent, items, snapshot.beat)) for task, items in self.asked]
        for task, items, outcomes in answered:
            verdicts = list(task.verdicts(items, outcomes))
            for name, estimate in estimates(task, verdicts).items():
                record |= {f"evaluate/{task.name}/{name}": estimate.value}
                ends = {"low": estimate.low, "high": estimate.high}
                record |= {f"evaluate/{task.name}/{name}_{end}": x for end, x in ends.items() if math.isfinite(x)}
        return record


def _answered(
    respondent: Respondent, items: Sequence[Item], beat: Callable[[], None]
) -> tuple[list[Item], list[Outcome]]:
    """The items that the model can read, and what it says to them."""
    asked = [item for item in items if respondent.can_read(item.request)]
    outcomes: dict[int, Outcome] = {}
    for number, outcome in respondent.respond([item.request for item in asked]):
        outcomes[number] = outcome
        beat()
    return asked, [outcomes[number] for number in range(len(asked))]
