"""Which tasks there are, in the order of the paper's Table 2, and the hash of all that they ask."""

import difflib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict

from dreamer_jax.evaluation.benchmarks.gsm8k import Gsm8k, gsm8k_platinum
from dreamer_jax.evaluation.benchmarks.hendrycks_math import Math, math500
from dreamer_jax.evaluation.benchmarks.mathqa import MathQa, mathqa_dev
from dreamer_jax.evaluation.benchmarks.mmlu import Mmlu, mmlu_math_val
from dreamer_jax.evaluation.benchmarks.perplexity import PerplexityTask
from dreamer_jax.evaluation.requests import EvaluationError, Item, Task

TASKS: dict[str, Callable[[], Task]] = {
    "ppl": PerplexityTask,
    "gsm8k": Gsm8k,
    "math": Math,
    "mmlu_math": Mmlu,
    "mathqa": MathQa,
    # Other splits and selections of these, which the paper does not report.
    "gsm8k_platinum": gsm8k_platinum,
    "math500": math500,
    "mmlu_math_val": mmlu_math_val,
    "mathqa_dev": mathqa_dev,
}


def named(names: Sequence[str]) -> list[Task]:
    """The tasks of these names, in their order.

    Raises:
        EvaluationError: there is no such task, and the nearest is named; or one is named twice, or none.
    """
    if not names:
        raise EvaluationError(f"no task is named; there are {', '.join(TASKS)}")
    for name in names:
        if name not in TASKS:
            close = difflib.get_close_matches(name.lower(), TASKS, n=1)
            guess = f"did you mean '{close[0]}'? There are" if close else "there are"
            raise EvaluationError(f"unknown task '{name}'; {guess} {', '.join(TASKS)}")
        if names.count(name) > 1:
            raise EvaluationError(f"task '{name}' is named twice; name it once")
    return [TASKS[name]() for name in names]


def prompts_hash(items: Sequence[Item]) -> str:
    """SHA-256, in hexadecimal, of all that the items ask, in their order: prompts, options, stops and limits."""
    digest = hashlib.sha256()
    for item in items:
        request = {"kind": type(item.request).__name__, **asdict(item.request)}
        digest.update(json.dumps(request, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()
