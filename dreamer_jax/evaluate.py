"""Score a checkpoint on benchmarks: `python -m dreamer_jax.evaluate --checkpoint runs/tiny --data ROOT --tasks gsm8k`.

docs/evaluation.md gives every task's prompt, files, extraction and scoring.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from dreamer_jax.door import guarded

if TYPE_CHECKING:
    from dreamer_jax.evaluation.checkpoints import Candidate, Settings
    from dreamer_jax.evaluation.requests import Task

PAPER = "ppl,gsm8k,math,mmlu_math,mathqa"


@dataclass(frozen=True)
class Arguments:
    """Score checkpoints on benchmarks (--checkpoint, --data), compare runs (--compare), or check scorers (--gold)."""

    checkpoint: Path | None = None
    """Folder of a run, or of one of its checkpoints."""
    tasks: str = ""
    """Benchmarks, with commas between: ppl, gsm8k, math, mmlu_math, mathqa (all of these by default), gsm8k_platinum,
    math500, mmlu_math_val, mathqa_dev."""
    data: Path | None = None
    """Folder of the benchmarks' files: gsm8k/test.jsonl, math/test.jsonl, ... (docs/evaluation.md)."""
    text: tuple[Path, ...] = ()
    """JSON-lines files for ppl, in place of those in the data folder; without --tasks, for ppl alone. May be given
    several times."""
    limit: int | None = None
    """Questions of each part of a task (subject, category, form), from the beginning; all by default."""
    depth: tuple[int, ...] = ()
    """How many depths run; without it as many as in training. Given several times, a table and a plot compare them."""
    depth_rope_scaling: bool | None = None
    """Count depth positions in steps of the trained depth over the depth that runs (True), or in whole steps (False);
    without it as in training. It matters at other depths than the trained one."""
    all: bool = False
    """Every checkpoint that the run keeps, not the newest alone."""
    out: Path | None = None
    """Folder for the results; by default <run>/evaluation/<step>, or <run>/comparison."""
    batch: int = 32
    """Requests that are worked on at a time."""
    context: int | None = None
    """Tokens that a prompt and its answer may have together; by default those of training."""
    stride: int | None = None
    """Tokens by which the window moves over texts that are longer; half a context by default."""
    expert_devices: int = 1
    """Of several devices, those that share out the experts; all others share out the requests."""
    seed: int = 0
    """Of what is drawn; the benchmarks are answered greedily and draw nothing."""
    compare: tuple[Path, ...] = ()
    """Run folder whose evaluations are compared with the others'. Given several times; the first is the baseline."""
    gold: bool = False
    """Score the benchmarks' own solutions in place of a model's."""


def main(arguments: list[str] | None = None) -> int:
    """Parse, evaluate, report."""
    given = sys.argv[1:] if arguments is None else arguments
    kind = tyro.conf.UseAppendAction[tyro.conf.FlagCreatePairsOff[Arguments]]
    parsed = tyro.cli(kind, args=given, prog="python -m dreamer_jax.evaluate")
    return guarded(lambda: run(parsed), doing="--out")


def run(arguments: Arguments) -> int:
    """Do one of three: compare, check the scorers, or evaluate."""
    from dreamer_jax.evaluation.requests import EvaluationError  # late, so that --help does not wait for JAX

    _check(arguments)
    if arguments.compare:
        return compare(arguments)
    if arguments.data is None and not arguments.text:
        raise EvaluationError("give --data, the folder of the benchmarks' files (docs/evaluation.md says which)")
    if arguments.gold:
        return check_scorers(arguments)
    if arguments.checkpoint is None:
        raise EvaluationError("give --checkpoint and --data, or --compare RUN --compare RUN, or --gold and --data")
    return evaluate(arguments)


def _check(arguments: Arguments) -> None:
    from dreamer_jax.evaluation.requests import EvaluationError

    for name in ("limit", "batch", "context", "stride", "expert_devices"):
        value = getattr(arguments, name)
        if value is not None and value < (2 if name == "context" else 1):
            raise EvaluationError(
                f"--{name.replace('_', '-')} {value}: must be at least {2 if name == 'context' else 1}"
            )
    if sum(map(bool, (arguments.compare, arguments.gold, arguments.checkpoint))) > 1:
        raise EvaluationError("--checkpoint, --compare and --gold are three commands: give one of them")
    if arguments.all and arguments.out:
        raise EvaluationError("--all writes beside each checkpoint: leave --out away")
    if len(arguments.depth) > 1 and arguments.out:
        raise EvaluationError("several depths have a folder each: leave --out away, or give one --depth")


def chosen_tasks(arguments: Arguments) -> list["Task"]:
    """The tasks of --tasks, ppl with the files of --text."""
    from dreamer_jax.evaluation.benchmarks.perplexity import PerplexityTask
    from dreamer_jax.evaluation.benchmarks.tasks import named
    from dreamer_jax.evaluation.requests import EvaluationError

    given = arguments.tasks or ("ppl" if arguments.text else PAPER)
    tasks = named([name.strip() for name in given.split(",") if name.strip()])
    if not arguments.text:
        return tasks
    if not any(isinstance(task, PerplexityTask) for task in tasks):
        raise EvaluationError("--text is read by ppl, which --tasks leaves out")
    texts = PerplexityTask(tuple(path.expanduser() for path in arguments.text))
    return [texts if isinstance(task, PerplexityTask) else task for task in tasks]


def evaluate(arguments: Arguments) -> int:
    """Ask every checkpoint at every depth what the tasks ask, and print the scores."""
    from dreamer_jax.evaluation.checkpoints import Settings, all_checkpoints, candidate, run_folder
    from dreamer_jax.evaluation.comparison.compare import write_depths

    assert arguments.checkpoint
    tasks, root = chosen_tasks(arguments), (arguments.data or Path()).expanduser()
    for task in tasks:  # a file that is missing is missed before the model is loaded
        task.questions(root)
    settings = Settings(arguments.batch, arguments.context, arguments.stride, arguments.expert_devices, arguments.seed)
    paths = all_checkpoints(run_folder(arguments.checkpoint)) if arguments.all else [arguments.checkpoint]
    folders = []
    for path in paths:
        asked = candidate(path, arguments.depth_rope_scaling)
        folders += [evaluate_at(asked, d, tasks, root, settings, arguments) for d in arguments.depth or (None,)]
        del asked  # before the next one is loaded
    run = run_folder(arguments.checkpoint)
    if len(arguments.depth) > 1:
        print(write_depths(folders, [task.name for task in tasks], folders[0].parent))
    own = folders[-1] if arguments.depth_rope_scaling is not None else run  # these do not lie among the run's others
    given = shlex.quote(str(arguments.out or own))
    print(f"next: python -m dreamer_jax.evaluate --compare {given} --compare ANOTHER")
    return 0


def evaluate_at(
    asked: "Candidate",
    depth: int | None,
    tasks: list["Task"],
    root: Path,
    settings: "Settings",
    arguments: Arguments,
) -> Path:
    """Ask one checkpoint at one depth, print and write the scores; the folder that they are in."""
    from dreamer_jax.evaluation.evaluation import Evaluation

    folder = arguments.out.expanduser() if arguments.out else asked.results(depth)
    subject = asked.subject(settings, depth)
    evaluation = Evaluation.opened(folder, subject)
    respondent = asked.respondent(settings, depth)
    print(f"{subject.run}, step {subject.step}, depth {subject.depth} of {subject.trained_depth}", flush=True)
    for task in tasks:
        with _Progress(task.name) as progress:
            scores = evaluation.run(
                task, root, respondent, template=asked.template, limit=arguments.limit, progress=progress.at
            )
        print(report(task, scores), flush=True)
    print(f"wrote {folder}: scores.json, items.jsonl")
    return folder


class _Progress:
    """A bar on stderr, whose speed leaves out what was done before."""

    def __init__(self, name: str):
        self._name = name
        self._bar: Any = None

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def at(self, done: int, total: int) -> None:
        """So many requests are done."""
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(total=total, initial=done, desc=self._name, unit="request", file=sys.stderr)
        self._bar.update(done - self._bar.n)


def report(task: "Task", scores: dict[str, Any]) -> str:
    """Some lines for a person."""
    limit = f" (at most {scores['limit']} of each part)" if scores["limit"] else ""
    lines = [f"  {task.name}{limit}"]
    for name, metric in scores["metrics"].items():
        low, high = (metric[bound] if metric[bound] is not None else float("nan") for bound in ("low", "high"))
        chance = f", chance {metric['chance']:g}" if metric["chance"] is not None else ""
        lines.append(f"    {name:16} {metric['value']:.4f}  [{low:.4f}, {high:.4f}], n = {metric['n']}{chance}")
    lines += [f"    {count} {what}" for what, count in scores["notes"].items()]
    return "\n".join(lines)


def compare(arguments: Arguments) -> int:
    """Table 2's layout for the runs given, with paired differences, data efficiency and Figure 3."""
    from dreamer_jax.evaluation.comparison.compare import compare as compared

    out = (arguments.out or arguments.compare[0] / "comparison").expanduser()
    print(compared([path.expanduser() for path in arguments.compare], out))
    print(f"wrote {out}")
    return 0


def check_scorers(arguments: Arguments) -> int:
    """Score the benchmarks' own solutions, and the same dealt out to other questions."""
    from dreamer_jax.evaluation.benchmarks.perplexity import PerplexityTask
    from dreamer_jax.evaluation.gold import check

    root = (arguments.data or Path()).expanduser()
    for task in chosen_tasks(arguments):
        if isinstance(task, PerplexityTask):
            continue  # texts have no solutions
        found = check(task, root)
        print(f"{task.name}: {found.items} items")
        for name in found.gold:
            wrong = found.exceptions.get(name, [])
            tail = f", not: {', '.join(wrong[:20])}{' ...' if len(wrong) > 20 else ''}" if wrong else ""
            shuffled = f", shuffled {found.shuffled[name]:.4f}" if name in found.shuffled else ""
            print(f"  {name:16} gold {found.gold[name]:.4f}{shuffled}{tail}")
        for what, count in found.notes.items():
            print(f"  {count} {what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
