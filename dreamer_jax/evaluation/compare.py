"""Runs side by side: Table 2 of the paper, paired differences, data efficiency, their figures, and scores by depth."""

import json
import math
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from dreamer_jax.evaluation import figures
from dreamer_jax.evaluation.figures import Curve, Panel, Saving
from dreamer_jax.evaluation.requests import EvaluationError
from dreamer_jax.evaluation.statistics import (
    Difference,
    Efficiency,
    Estimate,
    average,
    average_difference,
    data_efficiency,
    paired_difference,
    paired_rate_difference,
    running_best,
)
from dreamer_jax.files import write_whole

FORMAT = 1
"""Of the folders that are read and of compare.json."""
PERPLEXITY = "perplexity"
"""A first metric of this name is better when lower, no accuracy, and no part of the average."""
AVERAGE = "average"
ABSENT = "–"

METHOD = """* Intervals are 95 % and count the questions as a sample; training and its seed are not in them.
* The best of several checkpoints flatters every run: noise helps to be the best. The last checkpoint does not choose.
* The best average is that of one checkpoint, so it may lie below the mean of the row.
* DE: the training tokens of the baseline's first checkpoint with its best score, divided by the tokens at which the run
  reaches this score. Between checkpoints, the running best is taken to rise in a straight line. Noise in the scores is
  not in the range of a DE.
* p-values are two-sided, for each row alone: among twenty rows without any difference one has p < 0.05."""

Kind = TypeVar("Kind")
Items = dict[str, dict[str, dict[str, float]]]
"""Scores by task, item and metric."""


@dataclass(frozen=True)
class Result:
    """What an evaluation says of one task."""

    metrics: dict[str, Estimate]
    """The first is the one that stands in tables."""
    chance: float | None
    prompts: str
    """Hash of all that the model was asked."""
    limit: int | None
    complete: bool

    @property
    def metric(self) -> str:
        """The name of the metric that stands in tables."""
        return next(iter(self.metrics))

    @property
    def estimate(self) -> Estimate:
        """Its value."""
        return self.metrics[self.metric]


@dataclass(frozen=True)
class Evaluation:
    """One checkpoint at one depth."""

    folder: Path
    run: str
    step: int
    tokens: float
    """Training tokens until then."""
    depth: int
    trained_depth: int
    variant: str
    parameters: int
    tasks: dict[str, Result]


@dataclass(frozen=True)
class Run:
    """The evaluations of one run."""

    label: str
    """Unique among the runs that are compared."""
    path: Path
    """As it was given."""
    checkpoints: tuple[Evaluation, ...]
    """Those at the trained depth, in the order of training; or the only one that was named, at whatever depth."""
    evaluations: tuple[Evaluation, ...]
    """All of them."""

    @property
    def last(self) -> Evaluation:
        """The newest checkpoint."""
        return self.checkpoints[-1]

    @property
    def depths(self) -> tuple[Evaluation, ...]:
        """The newest checkpoint that was evaluated at several depths, at each of them; else the newest alone."""
        steps = [e.step for e in self.evaluations]
        step = max((s for s in steps if steps.count(s) > 1), default=max(steps))
        return tuple(sorted((e for e in self.evaluations if e.step == step), key=lambda e: e.depth))


class Point(NamedTuple):
    """A score of a checkpoint."""

    step: int
    tokens: float
    estimate: Estimate


@dataclass(frozen=True)
class Column:
    """What all runs reach on one task, or on average."""

    title: str
    metric: str
    chance: float | None
    points: tuple[tuple[Point, ...], ...]
    """By run, in the order of training."""

    @property
    def accuracy(self) -> bool:
        """Whether higher is better and the unit is percent; else it is a perplexity."""
        return self.metric != PERPLEXITY

    @cached_property
    def best(self) -> tuple[Point | None, ...]:
        """By run; the first of equally good checkpoints."""
        return tuple(points[running_best(self._rising(points))[-1]] if points else None for points in self.points)

    def last(self, runs: Sequence[Run]) -> tuple[Point | None, ...]:
        """By run, of its newest checkpoint; None where that one was not asked this."""
        newest = (points[-1] if points else None for points in self.points)
        return tuple(p if p and p.step == run.last.step else None for p, run in zip(newest, runs, strict=True))

    def efficiency(self, run: int, baseline: int) -> Efficiency | None:
        """Data efficiency of an accuracy; None where it cannot be told (see `data_efficiency`)."""
        ours, theirs = self.points[run], self.points[baseline]
        if not self.accuracy or min(len(ours), len(theirs)) < 2:
            return None
        if run == baseline:
            return Efficiency(1.0, 1.0, 1.0)
        return data_efficiency(
            [p.tokens for p in theirs], self._rising(theirs), [p.tokens for p in ours], self._rising(ours)
        )

    def _rising(self, points: Sequence[Point]) -> list[float]:
        """Their scores, such that higher is better."""
        return [p.estimate.value if self.accuracy else -p.estimate.value for p in points]


class Pair(NamedTuple):
    """A run against the baseline on the same questions, each at its last checkpoint."""

    run: str
    task: str
    unit: str
    """Of the difference: `accuracy`, `nats per token` or `nats per byte`."""
    difference: Difference


@dataclass(frozen=True)
class Comparison:
    """All that is said of some runs."""

    runs: tuple[Run, ...]
    baseline: int
    columns: tuple[Column, ...]
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...]


def compare(runs: Sequence[Path], out: Path, baseline: Path | None = None) -> str:
    """Compare runs and write compare.md, compare.json and figures into `out`, a folder that is made if need be.

    Args:
        runs: folders of runs that have been evaluated, or of single evaluations.
        out: where to write.
        baseline: the one of `runs` that the others are compared with; the first if not given.

    Returns:
        The text of compare.md and what figures there are. Without matplotlib there are none, and the text says so.

    Raises:
        EvaluationError: an evaluation is absent, broken or unfinished, or two of them asked different things.
    """
    comparison = compared(read_runs(runs), _position(runs, baseline))
    text, tables = markdown(comparison), out / "compare.md"
    out.mkdir(parents=True, exist_ok=True)
    write_whole(tables, text)
    write_whole(tables.with_suffix(".json"), json.dumps(record(comparison), indent=1, allow_nan=False) + "\n")
    return f"{text}\ntables: {tables}, {tables.with_suffix('.json')}\n{_draw(comparison, out)}"


def depth_table(run: Path) -> str:
    """Each task's metric at each depth that the newest such checkpoint was evaluated at, as a Markdown table.

    Raises:
        EvaluationError: an evaluation is absent, broken or unfinished, or two of them asked different things.
    """
    return _depth_table(read_runs([run])[0])


def read_runs(paths: Sequence[Path]) -> tuple[Run, ...]:
    """The evaluations of each run, with labels that tell the runs apart.

    Raises:
        EvaluationError: no evaluation, a broken one, or a run that is given twice.
    """
    if not paths:
        raise EvaluationError("there is nothing to compare: name two runs or more")
    places = [path.resolve() for path in paths]
    for path, place in zip(paths, places, strict=True):
        if places.count(place) > 1:
            raise EvaluationError(f"'{path}' is given twice: name each run once")
    runs = [_run(path) for path in paths]
    labels = [run.label for run in runs]
    return tuple(
        Run(str(run.path), run.path, run.checkpoints, run.evaluations) if labels.count(run.label) > 1 else run
        for run in runs
    )


def compared(runs: tuple[Run, ...], baseline: int = 0) -> Comparison:
    """All figures of a comparison.

    Raises:
        EvaluationError: an evaluation is unfinished, or two of them asked different things.
    """
    for run in runs:
        if not run.checkpoints:
            raise EvaluationError(f"'{run.path}' has no evaluation at the trained depth; make it: {_command(run.path)}")
    tasks = [name for name in _tasks(runs) if all(_results(run, name) for run in runs)]
    if not tasks:
        have = "; ".join(f"'{run.label}': {', '.join(_tasks([run])) or 'none'}" for run in runs)
        raise EvaluationError(f"no task has been evaluated for all runs ({have}): {_command(runs[-1].path)}")
    _check_comparable([e for run in runs for e in run.checkpoints], tasks)
    columns = [_column(runs, name) for name in tasks]
    columns.sort(key=lambda column: column.accuracy)
    accuracies = [column for column in columns if column.accuracy]
    if len(accuracies) > 1:
        columns.append(_average(accuracies))
    return Comparison(runs, baseline, tuple(columns), _pairs(runs, baseline, columns), tuple(_notes(runs, tasks)))


# Reading.


def _run(path: Path) -> Run:
    if (path / "scores.json").is_file():
        only = _evaluation(path)
        other = f", depth {only.depth}" if only.depth != only.trained_depth else ""
        return Run(f"{only.run}, step {only.step}{other}", path, (only,), (only,))
    evaluations = tuple(_evaluation(file.parent) for file in sorted(path.glob("evaluation/*/scores.json")))
    if not path.is_dir():
        raise EvaluationError(f"'{path}' is not a folder: give that of a run, or of one of its evaluations")
    if not evaluations:
        raise EvaluationError(f"'{path}' has no evaluation; make it: {_command(path)}")
    places = [(e.step, e.depth) for e in evaluations]
    for e in evaluations:
        if places.count((e.step, e.depth)) > 1:
            raise EvaluationError(
                f"'{e.folder}' is one of two evaluations of step {e.step} at depth {e.depth}: remove one"
            )
    checkpoints = sorted((e for e in evaluations if e.depth == e.trained_depth), key=lambda e: (e.tokens, e.step))
    return Run(evaluations[-1].run, path, tuple(checkpoints), evaluations)


def _evaluation(folder: Path) -> Evaluation:
    path = folder / "scores.json"
    scores = _json(path.read_bytes(), f"'{path}'", folder)
    if _get(scores, "format", int, path) != FORMAT:
        raise EvaluationError(f"'{path}': format {scores['format']} is not {FORMAT}, which this version reads")
    return Evaluation(
        folder=folder,
        run=_get(scores, "run", str, path),
        step=_get(scores, "step", int, path),
        tokens=_number(scores, "tokens", path),
        depth=_get(scores, "depth", int, path),
        trained_depth=_get(scores, "trained_depth", int, path),
        variant=_get(scores, "variant", str, path),
        parameters=_get(scores, "parameters", int, path),
        tasks={name: _result(task, name, path) for name, task in _get(scores, "tasks", dict, path).items()},
    )


def _result(task: Any, name: str, path: Path) -> Result:
    where = f"tasks.{name}"
    metrics = _get(task, "metrics", dict, path, where)
    if not metrics:
        raise EvaluationError(f"'{path}': {where}.metrics is empty; evaluate again: {_command(path.parent)}")
    limit = task.get("limit")
    return Result(
        metrics={metric: _estimate(values, path, f"{where}.metrics.{metric}") for metric, values in metrics.items()},
        chance=next(iter(metrics.values())).get("chance"),
        prompts=_get(task, "prompts", str, path, where),
        limit=None if limit is None else _get(task, "limit", int, path, where),
        complete=_get(task, "complete", bool, path, where),
    )


def _estimate(values: Any, path: Path, where: str) -> Estimate:
    low, high = (_number(values, key, path, where, bound) for key, bound in (("low", -math.inf), ("high", math.inf)))
    return Estimate(_number(values, "value", path, where), low, high, _get(values, "n", int, path, where))


def _number(values: Any, key: str, path: Path, where: str = "", null: float | None = None) -> float:
    """A number; `null`, if given, stands for one that is not there."""
    if null is not None and isinstance(values, dict) and values.get(key) is None:
        return null
    return float(_get(values, key, (int, float), path, where))


def _get(values: Any, key: str, kind: type[Kind] | tuple[type[Kind], ...], path: Path, where: str = "") -> Kind:
    found = values.get(key) if isinstance(values, dict) else None
    if not isinstance(found, kind):
        name = f"{where}.{key}" if where else key
        raise EvaluationError(f"'{path}': {name} is missing or not what it should be; {_again(path.parent)}")
    return found


def _json(text: bytes, where: str, folder: Path) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise EvaluationError(f"{where} is not JSON ({error}); {_again(folder)}") from None


def _items(evaluation: Evaluation) -> Items:
    """Of all tasks of an evaluation."""
    path = evaluation.folder / "items.jsonl"
    if not path.is_file():
        raise EvaluationError(f"'{path}' is missing; {_again(evaluation.folder)}")
    items: Items = {}
    for row, line in enumerate(path.read_bytes().splitlines(), 1):
        item = _json(line, f"'{path}', row {row}", evaluation.folder)
        try:
            task, name, scores = item["task"], str(item["id"]), item["scores"]
            twice = name in items.setdefault(task, {})
            items[task][name] = {metric: float(score) for metric, score in scores.items()}
        except (KeyError, TypeError, ValueError, AttributeError):
            raise EvaluationError(f"'{path}', row {row} is not an item; {_again(evaluation.folder)}") from None
        if twice:
            raise EvaluationError(
                f"'{path}', row {row}: '{name}' of {task} is there twice; {_again(evaluation.folder)}"
            )
    return items


def _command(path: Path) -> str:
    """What makes the evaluations of a run, or of the run that a folder of an evaluation lies in."""
    run = path.parent.parent if path.parent.name == "evaluation" else path
    return f"python -m dreamer_jax.evaluate --checkpoint {shlex.quote(str(run))} --all"


def _again(folder: Path) -> str:
    return f"remove '{folder}' and evaluate again: {_command(folder)}"


def _position(paths: Sequence[Path], baseline: Path | None) -> int:
    if baseline is None:
        return 0
    places = [path.resolve() for path in paths]
    if baseline.resolve() not in places:
        raise EvaluationError(f"the baseline '{baseline}' is none of the runs: {', '.join(map(str, paths))}")
    return places.index(baseline.resolve())


# Can they be compared?


def _tasks(runs: Sequence[Run]) -> list[str]:
    """All tasks of some runs' checkpoints, in the order in which they appear."""
    return list(dict.fromkeys(name for run in runs for e in run.checkpoints for name in e.tasks))


def _results(run: Run, task: str) -> list[tuple[Evaluation, Result]]:
    return [(e, e.tasks[task]) for e in run.checkpoints if task in e.tasks]


def _check_comparable(evaluations: Iterable[Evaluation], tasks: Sequence[str]) -> None:
    """All must have asked the same of their models, and have finished.

    Raises:
        EvaluationError: one did not.
    """
    evaluations = list(evaluations)
    for task in tasks:
        asked = [(e, e.tasks[task]) for e in evaluations if task in e.tasks]
        first, reference = asked[0]
        for e, result in asked:
            if not result.complete:
                raise EvaluationError(f"'{e.folder}': {task} is not finished; go on with it: {_command(e.folder)}")
            apart = _apart(result, reference)
            if apart:
                raise EvaluationError(
                    f"{task} cannot be compared, for {apart}: '{e.folder}' and '{first.folder}'; evaluate both alike"
                )


def _apart(a: Result, b: Result) -> str:
    """In what two evaluations of a task differ that have to be alike; empty if in nothing."""
    if a.limit != b.limit:
        return f"the limits of questions differ ({a.limit or 'none'} and {b.limit or 'none'})"
    if a.prompts != b.prompts:
        return f"the prompts differ (hashes {a.prompts[:12]} and {b.prompts[:12]})"
    return f"the metrics differ ({a.metric} and {b.metric})" if a.metric != b.metric else ""


def _notes(runs: Sequence[Run], tasks: Sequence[str]) -> list[str]:
    """What a reader should know of these runs before comparing them."""
    notes = []
    for name in _tasks(runs):
        lacking = [f"{run.label} (step {e.step})" for run in runs for e in run.checkpoints if name not in e.tasks]
        if lacking:
            fate = "is left out where it is missing" if name in tasks else "is left out: some run has none of it"
            notes.append(f"{name} {fate}. Not evaluated: {_few(lacking)}.")
    for name in tasks:
        limit = _results(runs[0], name)[0][1].limit
        if limit is not None:
            notes.append(f"{name} is limited to {limit:,} questions.")
    if len({run.last.tokens for run in runs}) > 1:
        each = ", ".join(f"{run.label} {_amount(run.last.tokens)}" for run in runs)
        notes.append(f"The last checkpoints have seen different numbers of training tokens: {each}.")
    return notes


# Columns and pairs.


def _column(runs: Sequence[Run], task: str) -> Column:
    points = tuple(tuple(Point(e.step, e.tokens, r.estimate) for e, r in _results(run, task)) for run in runs)
    result = _results(runs[0], task)[0][1]
    return Column(task, result.metric, result.chance, points)


def _average(columns: Sequence[Column]) -> Column:
    """The mean over tasks of each checkpoint that has all of them."""
    points = []
    for run in range(len(columns[0].points)):
        by_step = [{p.step: p for p in column.points[run]} for column in columns]
        shared = [p for step, p in by_step[0].items() if all(step in steps for steps in by_step)]
        means = [average([steps[p.step].estimate for steps in by_step]) for p in shared]
        points.append(tuple(Point(p.step, p.tokens, mean) for p, mean in zip(shared, means, strict=True)))
    return Column(AVERAGE, "mean of tasks", None, tuple(points))


def _pairs(runs: Sequence[Run], baseline: int, columns: Sequence[Column]) -> tuple[Pair, ...]:
    """Each other run against the baseline, where both last checkpoints have the task."""
    if len(runs) == 1:
        return ()
    reference = _items(runs[baseline].last)
    pairs = []
    for run in (run for i, run in enumerate(runs) if i != baseline):
        items = _items(run.last)
        tasks = [c for c in columns if c.title in run.last.tasks and c.title in runs[baseline].last.tasks]
        mine = [_pair(run, runs[baseline], column, items, reference) for column in tasks]
        accuracies = [pair.difference for pair in mine if pair.unit == "accuracy"]
        if 1 < len(accuracies) == sum(c.accuracy and c.title != AVERAGE for c in columns):
            mine.append(Pair(run.label, AVERAGE, "accuracy", average_difference(accuracies)))
        pairs += mine
    return tuple(pairs)


def _pair(run: Run, baseline: Run, column: Column, items: Items, reference: Items) -> Pair:
    ours, theirs = items.get(column.title, {}), reference.get(column.title, {})
    if ours.keys() != theirs.keys():
        raise EvaluationError(
            f"{column.title}: questions are missing, {len(theirs.keys() - ours.keys()):,} in '{run.last.folder}' and "
            f"{len(ours.keys() - theirs.keys()):,} in '{baseline.last.folder}'; remove both and evaluate again"
        )

    def both(metric: str) -> tuple[list[float], list[float]]:
        return _scores(ours, theirs, metric, run.last), _scores(theirs, theirs, metric, baseline.last)

    if column.accuracy:
        return Pair(run.label, column.title, "accuracy", paired_difference(*both(column.metric)))
    # Tokens of one tokenizer are worth more than those of another; bytes are bytes.
    tokens, other = both("tokens")
    unit, sizes = ("nats per token", tokens) if tokens == other else ("nats per byte", both("bytes")[0])
    return Pair(run.label, column.title, unit, paired_rate_difference(*both("nats"), sizes))


def _scores(
    items: dict[str, dict[str, float]], order: Iterable[str], metric: str, evaluation: Evaluation
) -> list[float]:
    try:
        return [items[name][metric] for name in order]
    except KeyError:
        path = evaluation.folder / "items.jsonl"
        raise EvaluationError(f"'{path}': an item has no score '{metric}'; {_again(evaluation.folder)}") from None


# As Markdown.


def markdown(comparison: Comparison) -> str:
    """The tables, with what has to be known to read them."""
    several = any(len(run.checkpoints) > 1 for run in comparison.runs)
    last = "Last checkpoint" if several else "The checkpoints"
    parts = ["# Comparison", f"Baseline: {comparison.runs[comparison.baseline].label}. " + _legend(comparison)]
    parts += ["\n".join(f"* {note}" for note in comparison.notes)] if comparison.notes else []
    parts += ["## Best over checkpoints", _best_table(comparison)] if several else []
    parts += [f"## {last}", _last_table(comparison)]
    if comparison.pairs:
        parts += [
            "## Differences from the baseline at the last checkpoint, question by question",
            _pair_table(comparison),
        ]
    efficiencies = _efficiency_table(comparison)
    parts += ["## Data efficiency", efficiencies] if efficiencies else []
    for run in (run for run in comparison.runs if len(run.depths) > 1):
        parts += [f"## {run.label} by depth", _depth_table(run)]
    return "\n\n".join([*parts, "## How to read this", METHOD]) + "\n"


def _legend(comparison: Comparison) -> str:
    """Which metric a column shows, of how many questions."""
    told = []
    for column in comparison.columns:
        if column.title != AVERAGE:
            n = next(p.estimate.n for points in column.points for p in points)
            guessed = f", chance {100 * column.chance:.1f}" if column.chance is not None else ""
            told.append(f"{column.title}: {column.metric}, n = {n:,}{guessed}")
    return f"{'; '.join(told)}."


def _best_table(comparison: Comparison) -> str:
    """Table 2: the best checkpoint of each column."""
    titles, cells = ["MODEL", "RUN", "DEPTH"], [[r.last.variant, r.label, str(r.last.depth)] for r in comparison.runs]
    for column in comparison.columns:
        titles += [_title(column)]
        _extend(cells, _score_cells(column, column.best))
        if column.accuracy:
            titles.append("DE ↑")
            _extend(cells, _efficiency_cells(comparison, column))
    return _table(titles, cells)


def _last_table(comparison: Comparison) -> str:
    runs = comparison.runs
    cells = [
        [e.variant, r.label, str(e.depth), _amount(e.parameters), _amount(e.tokens)] for r in runs for e in [r.last]
    ]
    for column in comparison.columns:
        _extend(cells, _score_cells(column, column.last(runs)))
    return _table(["MODEL", "RUN", "DEPTH", "PARAMETERS", "TOKENS", *map(_title, comparison.columns)], cells)


def _pair_table(comparison: Comparison) -> str:
    rows = [
        [pair.run, pair.task, *_difference_cells(pair), _p(d.p), _or_absent(d.correlation, "{:.2f}"), f"{d.n:,}"]
        for pair in comparison.pairs
        for d in [pair.difference]
    ]
    return _table(["RUN", "TASK", "DIFFERENCE", "95 % INTERVAL", "p", "CORRELATION", "n"], rows)


def _difference_cells(pair: Pair) -> list[str]:
    """The difference in points of percent; of perplexities their ratio; else as it is."""
    value, low, high = pair.difference[:3]
    if pair.unit == "accuracy":
        return [f"{100 * value:+.1f} points", f"[{100 * low:+.1f}, {100 * high:+.1f}]"]
    if pair.unit == "nats per token":
        return [f"× {math.exp(value):.3f}", f"[{math.exp(low):.3f}, {math.exp(high):.3f}]"]
    return [f"{value:+.4f} {pair.unit} (tokenizers differ)", f"[{low:+.4f}, {high:+.4f}]"]


def _efficiency_table(comparison: Comparison) -> str:
    """What is behind each DE; empty where there is none."""
    rows = []
    for i, run in enumerate(comparison.runs):
        for column in comparison.columns if i != comparison.baseline else ():
            found, goal = column.efficiency(i, comparison.baseline), column.best[comparison.baseline]
            if found is not None and goal is not None:
                best = f"{100 * goal.estimate.value:.1f} at {_amount(goal.tokens)}"
                rows.append(
                    [run.label, column.title, str(found), _range(found), best, _reached(found, column.points[i], goal)]
                )
    titles = ["RUN", "TASK", "DE ↑", "RANGE BY CHECKPOINTS", "BASELINE'S BEST", "REACHED AT"]
    return _table(titles, rows) if rows else ""


def _range(found: Efficiency) -> str:
    """What the checkpoints prove: the closer they are, the narrower."""
    if found.low == 0:
        return f"below {found.high:.2f}"
    return f"{found.low:.2f} or more" if math.isinf(found.high) else f"{found.low:.2f} to {found.high:.2f}"


def _reached(found: Efficiency, points: Sequence[Point], goal: Point) -> str:
    if found.low == 0:
        return f"not until {_amount(points[-1].tokens)}"
    after = goal.tokens / found.low
    if math.isinf(found.high):
        return f"{_amount(after)} or before, the first checkpoint"
    return f"between {_amount(goal.tokens / found.high)} and {_amount(after)}"


def _depth_table(run: Run) -> str:
    evaluations = run.depths
    tasks = list(dict.fromkeys(name for e in evaluations for name in e.tasks))
    _check_comparable(evaluations, tasks)
    columns = [_column([Run(run.label, run.path, evaluations, evaluations)], name) for name in tasks]
    rows = []
    for e in evaluations:
        scores = [_score(e.tasks[c.title].estimate, c) if c.title in e.tasks else ABSENT for c in columns]
        rows.append([f"**{e.depth} (trained)**" if e.depth == e.trained_depth else str(e.depth), *scores])
    step = f"Step {evaluations[0].step:,}, {_amount(evaluations[0].tokens)} tokens."
    return f"{step}\n\n{_table(['DEPTH', *map(_title, columns)], rows)}"


def _score_cells(column: Column, points: Sequence[Point | None]) -> list[str]:
    texts = [_score(p.estimate, column) if p else ABSENT for p in points]
    return _emphasised(texts, [p.estimate.value if p else None for p in points], rising=column.accuracy)


def _efficiency_cells(comparison: Comparison, column: Column) -> list[str]:
    found = [column.efficiency(i, comparison.baseline) for i in range(len(comparison.runs))]
    texts = [str(e) if e else ABSENT for e in found]
    if any(e and math.isinf(e.high) for e in found):
        return texts  # nobody knows which is the best
    return _emphasised(texts, [e.value if e else None for e in found], rising=True)


def _emphasised(texts: Sequence[str], values: Sequence[float | None], *, rising: bool) -> list[str]:
    """The best in bold, and the second-best underlined where there are more than two; only their first word."""
    order = sorted({value for value in values if value is not None}, reverse=rising)
    forms = {order[0]: "**{}**"} if len(order) > 1 else {}
    if len(order) > 1 and len(texts) > 2:
        forms[order[1]] = "<u>{}</u>"
    words = [text.partition(" ") for text in texts]
    return [
        forms.get(value, "{}").format(first) + space + rest if value is not None else first + space + rest
        for value, (first, space, rest) in zip(values, words, strict=True)
    ]


def _score(estimate: Estimate, column: Column) -> str:
    scale, digits = (100, 1) if column.accuracy else (1, 2)
    value, low, high = (f"{scale * x:.{digits}f}" for x in estimate[:3])
    return f"{value} [{low}, {high}]"


def _title(column: Column) -> str:
    return f"{column.title} ACC ↑" if column.accuracy else f"{column.title} PPL ↓".removeprefix("ppl ")


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _extend(rows: list[list[str]], cells: Sequence[str]) -> None:
    for row, cell in zip(rows, cells, strict=True):
        row.append(cell)


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _or_absent(value: float | None, form: str) -> str:
    return ABSENT if value is None else form.format(value)


def _amount(n: float | int) -> str:
    """A number of tokens or parameters for people, with three digits."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{float(f'{n / size:.3g}'):g}{unit}"
    return f"{n:g}"


def _few(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# As JSON.


def record(comparison: Comparison) -> dict[str, Any]:
    """All figures for machines; infinite bounds are null."""
    return {
        "format": FORMAT,
        "baseline": comparison.runs[comparison.baseline].label,
        "runs": [_run_record(run) for run in comparison.runs],
        "columns": [_column_record(comparison, column) for column in comparison.columns],
        "differences": [
            {"run": pair.run, "task": pair.task, "unit": pair.unit} | _finite(pair.difference._asdict())
            for pair in comparison.pairs
        ],
        "notes": list(comparison.notes),
    }


def _run_record(run: Run) -> dict[str, Any]:
    last = run.last
    about = {"variant": last.variant, "depth": last.depth, "parameters": last.parameters}
    checkpoints = [{"step": e.step, "tokens": e.tokens, "folder": str(e.folder)} for e in run.checkpoints]
    return {"label": run.label, "path": str(run.path)} | about | {"checkpoints": checkpoints}


def _column_record(comparison: Comparison, column: Column) -> dict[str, Any]:
    runs = {}
    for i, (run, best, last) in enumerate(zip(comparison.runs, column.best, column.last(comparison.runs), strict=True)):
        efficiency = column.efficiency(i, comparison.baseline)
        runs[run.label] = {
            "points": [_point_record(p) for p in column.points[i]],
            "best": _point_record(best) if best else None,
            "last": _point_record(last) if last else None,
            "data_efficiency": _finite(efficiency._asdict()) | {"text": str(efficiency)} if efficiency else None,
        }
    return {"task": column.title, "metric": column.metric, "chance": column.chance, "runs": runs}


def _point_record(p: Point) -> dict[str, Any]:
    return {"step": p.step, "tokens": p.tokens} | _finite(p.estimate._asdict())


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


# As figures.


def _draw(comparison: Comparison, out: Path) -> str:
    """Draw what there is to draw; the line to tell of it."""
    sweeps = [run for run in comparison.runs if len(run.depths) > 1]
    panels = [_panel(comparison, column) for column in comparison.columns if column.accuracy]
    drawings: dict[str, Callable[[], Any]] = {}
    if panels:
        drawings["accuracy"] = lambda: figures.figure_3(panels)
    if sweeps:
        drawings["depth"] = lambda: figures.against_depth(_depth_panels(sweeps))
    try:
        files = [file for name, draw in drawings.items() for file in figures.save(draw(), out / name)]
    except EvaluationError as error:
        return f"no figures: {error}\n"
    return f"figures: {', '.join(map(str, files))}\n" if files else ""


def _panel(comparison: Comparison, column: Column) -> Panel:
    """An accuracy against training tokens."""
    curves = [
        _curve(run.label, [p.tokens for p in points], [p.estimate for p in points], scale=100)
        for run, points in zip(comparison.runs, column.points, strict=True)
    ]
    goal = column.best[comparison.baseline]
    if goal is None or len(column.points[comparison.baseline]) < 2:
        return Panel(column.title, "accuracy (%)", tuple(curves))
    savings = []
    for i in range(len(comparison.runs)):
        found = column.efficiency(i, comparison.baseline)
        if i != comparison.baseline and found is not None and found.low > 0:
            savings.append(Saving(i, goal.tokens, goal.tokens / (found.value or found.low), f"{found}×"))
    best = 100 * goal.estimate.value
    return Panel(column.title, "accuracy (%)", tuple(curves), best, tuple(savings), comparison.baseline)


def _depth_panels(runs: Sequence[Run]) -> list[Panel]:
    """A task's metric against depth, for the runs that were evaluated at several."""
    panels = []
    for task in dict.fromkeys(name for run in runs for e in run.depths for name in e.tasks):
        found = [[(e, e.tasks[task]) for e in run.depths if task in e.tasks] for run in runs]
        metric = next(result.metric for results in found for _, result in results)
        unit, scale = ("perplexity", 1) if metric == PERPLEXITY else ("accuracy (%)", 100)
        curves = [
            _curve(
                run.label,
                [e.depth for e, _ in results],
                [r.estimate for _, r in results],
                scale,
                run.last.trained_depth,
            )
            for run, results in zip(runs, found, strict=True)
        ]
        panels.append(Panel(task, unit, tuple(curves)))
    return panels


def _curve(
    label: str, x: Sequence[float | int], estimates: Sequence[Estimate], scale: int, trained: int | None = None
) -> Curve:
    value, low, high = (tuple(scale * e[i] for e in estimates) for i in range(3))
    return Curve(label, tuple(map(float, x)), value, low, high, None if trained is None else float(trained))
