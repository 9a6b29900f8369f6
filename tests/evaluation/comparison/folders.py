"""Folders as evaluations leave them, and what is found in their comparison."""

import json
import math

import pytest

from dreamer_jax.evaluation.comparison.record import record
from dreamer_jax.evaluation.comparison.results import read_runs
from dreamer_jax.evaluation.comparison.side_by_side import compared
from dreamer_jax.evaluation.comparison.statistics import mean_interval
from dreamer_jax.evaluation.requests import EvaluationError

QUESTIONS = 20


def task(right, n=QUESTIONS, metric="robust", **changes):
    """The first `right` of n questions were answered well: the entry of scores.json and the lines of items.jsonl."""
    scores = [1.0] * right + [0.0] * (n - right)
    entry = {
        "metrics": {
            metric: {**mean_interval(scores)._asdict(), "chance": 0.25},
            "strict": {"value": 0.0, "low": 0.0, "high": 0.1, "n": n, "chance": None},
        },
        "groups": {"algebra": {metric: {"value": 0.5, "n": 2}}},
        "prompts": "a" * 64,
        "notes": {},
        "limit": None,
    }
    items = [{"id": str(i), "group": "", "scores": {metric: score, "strict": 0.0}} for i, score in enumerate(scores)]
    return {**entry, **changes}, items


def perplexity(value, tokens=(10, 30), **changes):
    """Of two documents."""
    entry, _ = task(0)
    one = {"value": value, "low": 0.9 * value, "high": 1.1 * value, "n": 2, "chance": None}
    entry["metrics"] = {"perplexity": one, "nats_per_token": {**one, "value": math.log(value)}}
    spread = (0.9, (sum(tokens) - 0.9 * tokens[0]) / tokens[1])
    items = [
        {"id": str(i), "scores": {"nats": share * n * math.log(value), "tokens": n, "bytes": 4 * size}}
        for i, (share, n, size) in enumerate(zip(spread, tokens, (10, 30), strict=True))
    ]
    return {**entry, **changes}, items


def evaluate(root, run, step, tasks, depth=16, variant="DR", trained_depth=16, tokens=None, folder=None, name=None):
    """Write the folder that an evaluation leaves; returns that of the run."""
    own = str(step) if depth == trained_depth else f"{step}-depth{depth}"
    path = root / run / "evaluation" / (folder or own)
    path.mkdir(parents=True)
    scores = {
        "format": 1,
        "run": name or run,
        "checkpoint": f"runs/{run}",
        "step": step,
        "tokens": tokens or step * 1e6,
        "depth": depth,
        "trained_depth": trained_depth,
        "variant": variant,
        "parameters": 1_170_000_000,
        "tasks": {name: entry for name, (entry, _) in tasks.items()},
    }
    lines = [json.dumps({"task": name} | item) for name, (_, items) in tasks.items() for item in items]
    (path / "scores.json").write_text(json.dumps(scores))
    (path / "items.jsonl").write_text("\n".join(lines) + "\n")
    return root / run


def train(root, run, gsm8k, math_, ppl=(9.0, 8.0, 7.0, 6.0), **about):
    """A checkpoint every 100 steps, with the number of right answers at each."""
    for i, (a, b, c) in enumerate(zip(gsm8k, math_, ppl, strict=False)):
        tasks = {"gsm8k": task(a), "math": task(b, metric="verified"), "ppl": perplexity(c)}
        path = evaluate(root, run, 100 * (i + 1), tasks, **about)
    return path


def compared_paths(*paths):
    return compared(read_runs(paths))


def refused(*paths):
    """Why these are not compared."""
    with pytest.raises(EvaluationError) as refusal:
        compared_paths(*paths)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def rows(text, heading):
    """The cells of the table below a heading, without the line of dashes."""
    table = next(part for part in text.split(f"## {heading}")[1].split("\n\n") if part.startswith("|"))
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    return [lines[0], *lines[2:]]


def columns(text, heading):
    """The same by row and title; of titles that are there twice the last."""
    titles, *lines = rows(text, heading)
    return {line[titles.index("RUN")]: dict(zip(titles, line, strict=True)) for line in lines}


def efficiencies(comparison, title):
    """The texts of a task's data efficiencies, by run."""
    [column] = [column for column in record(comparison)["columns"] if column["task"] == title]
    return {run: (values["data_efficiency"] or {}).get("text") for run, values in column["runs"].items()}
