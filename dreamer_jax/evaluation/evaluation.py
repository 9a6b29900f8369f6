"""The evaluation of one checkpoint: ask what is not yet answered, judge, add up, write.

<out>/items.jsonl    a line for every request: prompt, outcome, what was found in it, scores
<out>/scores.json    what was evaluated and how, and the metrics of every task that is complete
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from dreamer_jax.data.template import Template
from dreamer_jax.evaluation.benchmarks.tasks import prompts_hash
from dreamer_jax.evaluation.comparison.statistics import Estimate, mean_interval
from dreamer_jax.evaluation.requests import (
    EvaluationError,
    Generated,
    Item,
    Likelihoods,
    Outcome,
    Reading,
    Request,
    Task,
    Verdict,
)
from dreamer_jax.files import write_whole

FORMAT = 1
ITEMS, SCORES = "items.jsonl", "scores.json"
KINDS: dict[str, type[Generated] | type[Likelihoods] | type[Reading]] = {
    kind.__name__: kind for kind in (Generated, Likelihoods, Reading)
}
Record = dict[str, Any]
Key = tuple[str, str]
"""(task, id of the item)."""


UNREADABLE = "left out: the tokenizer does not know a character"


@runtime_checkable
class Model(Protocol):
    """What is evaluated; a `Respondent`."""

    def can_read(self, request: Request) -> bool:
        """Whether it has tokens for all of a request."""

    def respond(self, requests: Sequence[Request]) -> Iterator[tuple[int, Outcome]]:
        """(number of the request, its outcome) of each, as they are ready."""


@dataclass(frozen=True)
class Subject:
    """What is evaluated, and how: outcomes belong together only if all of this is the same."""

    run: str
    checkpoint: str
    step: int
    tokens: int
    """Training tokens behind the checkpoint: packed rows times their length."""
    depth: int
    trained_depth: int
    variant: str
    parameters: int
    weights: str
    """A checksum of the weights."""
    dtype: str
    context: int
    stride: int | None = None
    depth_rope_scaling: bool | None = None
    """If it is not as in training."""


@dataclass
class Evaluation:
    """A folder of results, taken up again where it was left."""

    folder: Path
    subject: Subject
    tasks: dict[str, Record] = field(default_factory=dict)
    """What scores.json says of each task."""
    records: dict[Key, Record] = field(default_factory=dict)
    """What items.jsonl says of each item."""

    @staticmethod
    def opened(folder: Path, subject: Subject) -> "Evaluation":
        """With what is there of an earlier evaluation of the same subject.

        Raises:
            EvaluationError: the folder holds one of another subject.
        """
        evaluation = Evaluation(folder, subject)
        scores = folder / SCORES
        if scores.is_file():
            found = _read_scores(scores)
            _check_same(folder, found, subject)
            evaluation.tasks = found["tasks"]
            evaluation.records = {(r["task"], r["id"]): r for r in read_records(folder / ITEMS)}
        elif (folder / ITEMS).is_file():
            raise EvaluationError(f"'{folder}' has {ITEMS} and no {SCORES}, which says of what; move it away")
        folder.mkdir(parents=True, exist_ok=True)
        evaluation._write_items()  # without a line that was cut off
        evaluation._write_scores()
        return evaluation

    def run(
        self,
        task: Task,
        root: Path,
        model: Model,
        *,
        template: Template,
        limit: int | None,
        progress: Callable[[int, int], None],
    ) -> Record:
        """Evaluate one task and write what came of it; outcomes that are there already are not asked for again.

        Args:
            task: the benchmark.
            root: folder of the benchmarks' files.
            model: what is evaluated.
            template: the layout of its training.
            limit: questions of each part of the task, from the beginning; all if None.
            progress: told of (requests that are done, all of them), first of those that were done before.

        Raises:
            EvaluationError: a file is missing or damaged, or no question is left.
        """
        questions = task.questions(root, template)
        given = limited(questions.items, limit)
        items = [item for item in given if model.can_read(item.request)]
        notes = questions.notes | ({UNREADABLE: len(given) - len(items)} if len(given) > len(items) else {})
        if not items:
            raise EvaluationError(f"{task.name}: there is no question ({notes or 'no row'})")
        self.tasks.pop(task.name, None)  # incomplete until it is judged
        self._write_scores()
        self._ask(task, items, model, progress)
        self._forget_scores(task)  # an earlier limit may have been larger
        found = [self.records[task.name, item.id] for item in items]
        verdicts = list(task.verdicts(items, [outcome_of(record) for record in found]))
        for item, record, verdict in zip(items, found, verdicts, strict=True):
            record |= {"group": item.group, "gold": item.gold}
            record |= {"scores": verdict.scores, "extracted": verdict.extracted}
        self.tasks[task.name] = summary(task, items, verdicts) | {
            "prompts": prompts_hash(items),
            "notes": notes | counted(found),
            "limit": limit,
        }
        self._write_items()
        self._write_scores()
        return self.tasks[task.name]

    def _ask(self, task: Task, items: Sequence[Item], model: Model, progress: Callable[[int, int], None]) -> None:
        missing = [item for item in items if not self._answered(task, item)]
        progress(len(items) - len(missing), len(items))
        with (self.folder / ITEMS).open("a", encoding="utf-8") as file:
            for done, (number, outcome) in enumerate(model.respond([item.request for item in missing]), 1):
                record = record_of(task.name, missing[number], outcome)
                self.records[task.name, missing[number].id] = record
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
                progress(len(items) - len(missing) + done, len(items))

    def _forget_scores(self, task: Task) -> None:
        for (name, _), record in self.records.items():
            if name == task.name:
                record.pop("scores", None)
                record.pop("extracted", None)

    def _answered(self, task: Task, item: Item) -> bool:
        record = self.records.get((task.name, item.id))
        return record is not None and record["request"] == asked(item.request)

    def _write_items(self) -> None:
        lines = (json.dumps(record, ensure_ascii=False) for record in self.records.values())
        write_whole(self.folder / ITEMS, "".join(f"{line}\n" for line in lines))

    def _write_scores(self) -> None:
        content = {"format": FORMAT, **asdict(self.subject), "tasks": self.tasks}
        write_whole(self.folder / SCORES, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def limited(items: Sequence[Item], limit: int | None) -> list[Item]:
    """The first `limit` items of each part of a task: of each group and form (what ids have before their last '/')."""
    taken: dict[Key, int] = defaultdict(int)
    kept = []
    for item in items:
        part = item.id.rpartition("/")[0], item.group
        taken[part] += 1
        if limit is None or taken[part] <= limit:
            kept.append(item)
    return kept


def record_of(task: str, item: Item, outcome: Outcome) -> Record:
    """The line of an item that is not judged yet."""
    return {
        "task": task,
        "id": item.id,
        "group": item.group,
        "request": asked(item.request),
        "kind": type(outcome).__name__,
        "outcome": outcome._asdict(),
        "gold": item.gold,
    }


def asked(request: Request) -> Record:
    """A request as JSON has it."""
    content: Record = json.loads(json.dumps(asdict(request)))
    return content


def outcome_of(record: Record) -> Outcome:
    """The outcome in a line."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in record["outcome"].items()}
    kind: Callable[..., Outcome] = KINDS[record["kind"]]
    return kind(**values)


def read_records(path: Path) -> list[Record]:
    """The lines of items.jsonl; a last one that was cut off is left out.

    Raises:
        EvaluationError: another line is damaged.
    """
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n") if path.is_file() else []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
            outcome_of(records[-1])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number == len(lines):
                return records[: number - 1]
            raise EvaluationError(f"{path}: line {number} is damaged; delete the file to ask again") from error
    return records


def counted(records: Sequence[Record]) -> dict[str, int]:
    """How many outcomes are not what they would be without limits, and how many answers no one could verify."""
    counts = {
        "prompts cut to the context": sum(bool(r["outcome"].get("cut")) for r in records),
        "answers that did not end": sum(r["outcome"].get("finished") is False for r in records),
    }
    for record in records:
        if fate := record.get("extracted", {}).get("verification"):
            name = f"verification {fate}"
            counts[name] = counts.get(name, 0) + 1
    return {name: n for name, n in counts.items() if n}


def summary(task: Task, items: Sequence[Item], verdicts: Sequence[Verdict]) -> Record:
    """The metrics of a task, and of each of its groups."""
    groups: dict[str, list[Verdict]] = defaultdict(list)
    for item, verdict in zip(items, verdicts, strict=True):
        groups[item.group].append(verdict)
    parts = {name: _metrics(task, members) for name, members in groups.items()} if len(groups) > 1 else {}
    return {"metrics": _metrics(task, verdicts), "groups": parts}


def _metrics(task: Task, verdicts: Sequence[Verdict]) -> Record:
    found = estimates(task, verdicts)
    return {
        name: {"value": e.value, "low": _finite(e.low), "high": _finite(e.high), "n": e.n, "chance": metric.chance}
        for name, metric in task.metrics.items()
        if (e := found.get(name)) is not None
    }


def estimates(task: Task, verdicts: Sequence[Verdict]) -> dict[str, Estimate]:
    """The mean of each score, or what the task makes of them."""
    scores: dict[str, list[float]] = defaultdict(list)
    for verdict in verdicts:
        for name, score in verdict.scores.items():
            scores[name].append(score)
    return task.add_up(scores) or {name: mean_interval(values) for name, values in scores.items()}


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def _read_scores(path: Path) -> Record:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("tasks"), dict):
        raise EvaluationError(f"{path} is damaged; delete its folder to evaluate again")
    if found.get("format") != FORMAT:
        raise EvaluationError(
            f"{path} has format {found.get('format')}, this program writes {FORMAT}; choose another --out"
        )
    return dict(found)


def _check_same(folder: Path, found: Record, subject: Subject) -> None:
    wanted = json.loads(json.dumps(asdict(subject)))
    free = ("run", "checkpoint")  # a run folder may have been moved
    differing = [f"{name} {found.get(name)}, now {value}" for name, value in wanted.items() if found.get(name) != value]
    differing = [text for text in differing if text.split()[0] not in free]
    if differing:
        raise EvaluationError(
            f"'{folder}' holds an evaluation of another model or setting ({'; '.join(differing)}); give another --out, "
            f"or delete the folder"
        )
