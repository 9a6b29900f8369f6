"""A comparison as JSON, for machines."""

import math
from typing import Any

from dreamer_jax.evaluation.comparison.results import Run
from dreamer_jax.evaluation.comparison.side_by_side import Column, Comparison, Point

FORMAT = 1
"""Of compare.json."""


def record(comparison: Comparison) -> dict[str, Any]:
    """All figures; infinite bounds are null."""
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
    checkpoints = [{"step": r.step, "tokens": r.tokens, "folder": str(r.folder)} for r in run.checkpoints]
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
