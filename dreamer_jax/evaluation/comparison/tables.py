"""A comparison as Markdown: Table 2 of the paper, paired differences, data efficiency, and scores by depth."""

import math
from collections.abc import Iterable, Sequence

from dreamer_jax.evaluation.comparison.results import Run
from dreamer_jax.evaluation.comparison.side_by_side import (
    AVERAGE,
    Column,
    Comparison,
    Pair,
    Point,
    amount,
    depth_columns,
)
from dreamer_jax.evaluation.comparison.statistics import Efficiency, Estimate

ABSENT = "–"

METHOD = """* Intervals are 95 % and count the questions as a sample; training and its seed are not in them.
* The best of several checkpoints flatters every run: noise helps to be the best. The last checkpoint does not choose.
* The best average is that of one checkpoint, so it may lie below the mean of the row.
* DE: the training tokens of the baseline's first checkpoint with its best score, divided by the tokens at which the run
  reaches this score. Between checkpoints, the running best is taken to rise in a straight line. Noise in the scores is
  not in the range of a DE. There is none where the baseline's best is no better than chance.
* p-values are two-sided, for each row alone: among twenty rows without any difference one has p < 0.05."""


def markdown(comparison: Comparison) -> str:
    """The tables, with what has to be known to read them."""
    several = any(len(run.checkpoints) > 1 for run in comparison.runs)
    last = "Last checkpoint" if several else "The checkpoints"
    parts = ["# Comparison", f"Baseline: {comparison.runs[comparison.baseline].label}. " + legend(comparison.columns)]
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
        parts += [f"## {run.label} by depth", depth_table(run)]
    return "\n\n".join([*parts, "## How to read this", METHOD]) + "\n"


def depth_table(run: Run) -> str:
    """Each task's metric at each depth that the newest such checkpoint was evaluated at.

    Raises:
        EvaluationError: two evaluations asked different things.
    """
    columns, newest = depth_columns(run), run.depths[0]
    rows = []
    for r in run.depths:
        scores = [_score(r.tasks[c.title].estimate, c) if c.title in r.tasks else ABSENT for c in columns]
        rows.append([f"**{r.depth} (trained)**" if r.depth == r.trained_depth else str(r.depth), *scores])
    step = f"Step {newest.step:,}, {amount(newest.tokens)} tokens."
    return f"{step}\n\n{_table(['DEPTH', *map(_title, columns)], rows)}"


def legend(columns: Sequence[Column]) -> str:
    """Which metric a column shows, of how many questions."""
    told = []
    for column in columns:
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
        [r.variant, run.label, str(r.depth), amount(r.parameters), amount(r.tokens)] for run in runs for r in [run.last]
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
                best = f"{100 * goal.estimate.value:.1f} at {amount(goal.tokens)}"
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
        return f"not until {amount(points[-1].tokens)}"
    after = goal.tokens / found.low
    if math.isinf(found.high):
        return f"{amount(after)} or before, the first checkpoint"
    return f"between {amount(goal.tokens / found.high)} and {amount(after)}"


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
