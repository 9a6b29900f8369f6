"""Tables, figures and their data are written."""

import json

import pytest

from dreamer_jax.evaluation.comparison.compare import compare, write_depths
from tests.evaluation.comparison.folders import (
    evaluate,
    perplexity,
    task,
)


def depths_of(run):
    """(all evaluations of a run, the tasks of the last)."""
    folders = sorted((run / "evaluation").iterdir())
    return folders, list(json.loads((folders[-1] / "scores.json").read_text())["tasks"])


def test_unbounded_intervals_are_null_in_json(tmp_path):
    entry, items = task(5)
    entry["metrics"]["robust"] |= {"low": None, "high": None}
    path = evaluate(tmp_path, "la", 100, {"gsm8k": (entry, items)})
    compare([path], tmp_path / "out")
    best = json.loads((tmp_path / "out" / "compare.json").read_text())["columns"][0]["runs"]["la"]["best"]
    assert (best["value"], best["low"], best["high"]) == (0.25, None, None)


def test_tables_and_figures_are_written(runs, tmp_path):
    evaluate(tmp_path, "dr", 400, {"gsm8k": task(5), "ppl": perplexity(8.0)}, depth=32)
    out = tmp_path / "a" / "b"
    text = compare(runs, out)
    names = ["accuracy.png", "accuracy.svg", "compare.json", "compare.md", "depth.png", "depth.svg"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert all(str(out / name) in text for name in names)
    assert text.startswith((out / "compare.md").read_text())


@pytest.fixture
def deep(tmp_path):
    """A run that was evaluated at three depths."""
    for depth, right in ((8, 2), (16, 10), (32, 9)):
        path = evaluate(tmp_path, "dr", 400, {"gsm8k": task(right), "ppl": perplexity(90.0 / right)}, depth=depth)
    return path


def test_the_depths_of_one_run_are_written(deep):
    out = deep / "evaluation"
    text = write_depths(*depths_of(deep), out)
    written = {path.name for path in out.iterdir() if path.is_file()}
    assert written == {"depth.md", "depth.png", "depth.svg"}
    assert all(str(out / name) in text for name in written)
    assert text.startswith((out / "depth.md").read_text())
    assert "gsm8k: robust, n = 20, chance 25.0; ppl: perplexity, n = 2." in text
    assert [line.split()[1] for line in text.splitlines() if line.startswith("|")] == [
        "DEPTH",
        "---",
        "8",
        "**16",
        "32",
    ]


def test_depths_without_that_of_training_are_written_too(tmp_path):
    for depth in (8, 32):
        path = evaluate(tmp_path, "dr", 400, {"gsm8k": task(depth // 2)}, depth=depth)
    assert "(trained)" not in write_depths(*depths_of(path), tmp_path / "out")
