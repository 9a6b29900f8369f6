"""Runs side by side: Table 2 of the paper, paired differences, data efficiency, their figures, and scores by depth.

What is said of the runs is put together in `side_by_side.py`; here it is written, as Markdown, as JSON and as figures.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from dreamer_jax.evaluation.comparison.figures import Panel, against_depth, figure_3
from dreamer_jax.evaluation.comparison.panels import accuracy_panels, depth_panels
from dreamer_jax.evaluation.comparison.record import record
from dreamer_jax.evaluation.comparison.results import at_depths, read_runs
from dreamer_jax.evaluation.comparison.side_by_side import compared, depth_columns
from dreamer_jax.evaluation.comparison.tables import depth_table, legend, markdown
from dreamer_jax.figures import save
from dreamer_jax.files import write_whole


def compare(runs: Sequence[Path], out: Path) -> str:
    """Compare runs and write compare.md, compare.json and figures into `out`, a folder that is made if need be.

    Args:
        runs: folders of runs that have been evaluated, or of single evaluations; the first is the baseline.
        out: where to write.

    Returns:
        The text of compare.md and what figures there are.

    Raises:
        EvaluationError: an evaluation is absent or broken, or two of them asked different things.
    """
    comparison = compared(read_runs(runs))
    text, tables = markdown(comparison), out / "compare.md"
    out.mkdir(parents=True, exist_ok=True)
    write_whole(tables, text)
    write_whole(tables.with_suffix(".json"), json.dumps(record(comparison), indent=1, allow_nan=False) + "\n")
    by_depth = depth_panels([run for run in comparison.runs if len(run.depths) > 1])
    drawn = _draw(accuracy_panels(comparison), by_depth, out)
    return f"{text}\ntables: {tables}, {tables.with_suffix('.json')}\n{drawn}"


def write_depths(folders: Sequence[Path], tasks: Sequence[str], out: Path) -> str:
    """Write depth.md and a figure of one checkpoint's scores by depth into `out`, a folder that is made if need be.

    Args:
        folders: evaluations of one run; of several checkpoints, the newest counts.
        tasks: those that were asked at all of these depths.
        out: where to write.

    Returns:
        The text of depth.md and what figures there are.

    Raises:
        EvaluationError: an evaluation is absent or broken, or two of them asked different things.
    """
    found = at_depths(folders, tasks)
    text = f"# {found.label} by depth\n\n{legend(depth_columns(found))}\n\n{depth_table(found)}\n"
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "depth.md", text)
    return f"{text}\ntable: {out / 'depth.md'}\n{_draw([], depth_panels([found]), out)}"


def _draw(accuracies: Sequence[Panel], by_depth: Sequence[Panel], out: Path) -> str:
    """Draw what there is to draw; the line to tell of it."""
    drawings = (("accuracy", figure_3, accuracies), ("depth", against_depth, by_depth))
    files = [file for name, draw, panels in drawings if panels for file in save(draw(panels), out / name)]
    return f"figures: {', '.join(map(str, files))}\n" if files else ""
