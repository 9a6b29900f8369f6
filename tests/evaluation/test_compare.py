"""Runs are compared as the paper's Table 2 does, and only if they can be."""

import json
import math
import re
import sys

import pytest

from dreamer_jax.evaluation.compare import compare, compared, depth_table, markdown, read_runs, record
from dreamer_jax.evaluation.requests import EvaluationError
from dreamer_jax.evaluation.statistics import mean_interval

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
        "complete": True,
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


@pytest.fixture
def runs(tmp_path):
    """The best of `la` on gsm8k and math are at different checkpoints."""
    return [
        train(tmp_path, "la", [4, 6, 8, 10], [4, 10, 6, 6], variant="LA"),
        train(tmp_path, "dr", [6, 10, 12, 11], [6, 8, 12, 12], (8.0, 7.0, 6.5, 5.5)),
        train(tmp_path, "dr_da", [12, 14, 16, 15], [4, 4, 6, 8], (7.0, 6.0, 5.5, 5.0), variant="DR+DA"),
    ]


def compared_paths(*paths):
    return compared(read_runs(paths))


def rows(text, heading):
    """The cells of the table below a heading, without the line of dashes."""
    table = next(part for part in text.split(f"## {heading}")[1].split("\n\n") if part.startswith("|"))
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    return [lines[0], *lines[2:]]


def columns(text, heading):
    """The same by row and title; of titles that are there twice the last."""
    titles, *lines = rows(text, heading)
    return {line[titles.index("RUN")]: dict(zip(titles, line, strict=True)) for line in lines}


def test_table_2_has_the_best_checkpoint_of_each_column(runs):
    best = columns(markdown(compared_paths(*runs)), "Best over checkpoints")
    assert re.match(r"50\.0 \[29\.\d, 70\.\d\]", best["la"]["gsm8k ACC ↑"])
    assert best["la"]["math ACC ↑"].startswith("<u>50.0</u> ")
    assert best["la"]["PPL ↓"].startswith("6.00 [5.40, 6.60]")
    assert (best["la"]["MODEL"], best["la"]["DEPTH"], best["dr_da"]["MODEL"]) == ("LA", "16", "DR+DA")


def test_the_columns_stand_in_the_order_of_table_2(runs):
    titles = rows(markdown(compared_paths(*runs)), "Best over checkpoints")[0]
    assert titles == [
        *("MODEL", "RUN", "DEPTH", "PPL ↓"),
        *("gsm8k ACC ↑", "DE ↑", "math ACC ↑", "DE ↑", "average ACC ↑", "DE ↑"),
    ]


def test_the_best_average_is_that_of_one_checkpoint(runs):
    # Of la: 20, 40, 35 and 40 %; not the 50 % of two best columns.
    assert columns(markdown(compared_paths(*runs)), "Best over checkpoints")["la"]["average ACC ↑"].startswith("40.0 ")


def test_the_best_is_bold_and_the_second_underlined(runs):
    best = columns(markdown(compared_paths(*runs)), "Best over checkpoints")
    gsm8k = [best[run]["gsm8k ACC ↑"].split()[0] for run in ("la", "dr", "dr_da")]
    ppl = [best[run]["PPL ↓"].split()[0] for run in ("la", "dr", "dr_da")]
    assert gsm8k == ["50.0", "<u>60.0</u>", "**80.0**"]
    assert ppl == ["6.00", "<u>5.50</u>", "**5.00**"]


def test_the_second_of_two_is_not_underlined(runs):
    assert "<u>" not in markdown(compared_paths(*runs[:2]))


def test_the_last_checkpoint_has_a_table_of_its_own(runs):
    last = columns(markdown(compared_paths(*runs)), "Last checkpoint")
    assert last["la"]["math ACC ↑"].startswith("30.0 ")
    assert last["dr"]["gsm8k ACC ↑"].startswith("<u>55.0</u> ")
    assert (last["la"]["TOKENS"], last["la"]["PARAMETERS"]) == ("400M", "1.17B")


def efficiencies(comparison, title):
    [column] = [column for column in record(comparison)["columns"] if column["task"] == title]
    return {run: (values["data_efficiency"] or {}).get("text") for run, values in column["runs"].items()}


def test_data_efficiency_is_the_baselines_tokens_over_those_of_the_run(runs):
    # la has its 10 right at 400; dr at 200; dr_da has 12 at 100, its first checkpoint.
    assert efficiencies(compared_paths(*runs), "gsm8k") == {"la": "1.0", "dr": "2.0", "dr_da": "≥ 4.0"}
    # la has its 10 right at 200; dr halfway between 8 at 200 and 12 at 300; dr_da never, until 400.
    assert efficiencies(compared_paths(*runs), "math") == {"la": "1.0", "dr": "0.8", "dr_da": "< 0.5"}
    # The averages of la are best, 8, at 200 first; dr has 6, 9; dr_da 8 at once.
    assert efficiencies(compared_paths(*runs), "average")["dr"] == "1.2"


def test_what_the_checkpoints_prove_of_an_efficiency_is_told(runs):
    lines = rows(markdown(compared_paths(*runs)), "Data efficiency")
    assert ["dr", "gsm8k", "2.0", "2.00 to 4.00", "50.0 at 400M", "between 100M and 200M"] in lines
    assert ["dr_da", "gsm8k", "≥ 4.0", "4.00 or more", "50.0 at 400M", "100M or before, the first checkpoint"] in lines
    assert ["dr_da", "math", "< 0.5", "below 0.50", "50.0 at 200M", "not until 400M"] in lines


def test_one_checkpoint_has_no_efficiency(tmp_path):
    paths = train(tmp_path, "la", [4], [4]), train(tmp_path, "dr", [6, 8], [6, 8])
    comparison = compared_paths(*paths)
    assert efficiencies(comparison, "gsm8k") == {"la": None, "dr": None}
    assert columns(markdown(comparison), "Best over checkpoints")["dr"]["DE ↑"] == "–"
    assert "## Data efficiency" not in markdown(comparison)


def test_another_baseline_can_be_named(runs, tmp_path):
    text = compare(runs, tmp_path / "out", baseline=runs[1])
    assert "Baseline: dr." in text
    assert {line[0] for line in rows(text, "Differences")[1:]} == {"la", "dr_da"}
    with pytest.raises(EvaluationError, match="is none of the runs"):
        compare(runs, tmp_path / "out", baseline=tmp_path / "other")


def test_questions_are_compared_one_by_one(runs):
    differences = {(d["run"], d["task"]): d for d in record(compared_paths(*runs))["differences"]}
    gsm8k = differences["dr_da", "gsm8k"]
    assert gsm8k["value"] == pytest.approx(0.25)
    # 5 wins of 5: twice half of 1 / 32.
    assert gsm8k["p"] == pytest.approx(1 / 32)
    assert gsm8k["n"] == QUESTIONS
    assert gsm8k["correlation"] == pytest.approx(1 / math.sqrt(3))
    average = differences["dr_da", "average"]
    assert average["value"] == pytest.approx((0.25 + 0.1) / 2)


def test_questions_are_joined_by_id_and_not_by_place(runs):
    expected = record(compared_paths(*runs))["differences"]
    path = runs[1] / "evaluation" / "400" / "items.jsonl"
    path.write_text("\n".join(reversed(path.read_text().splitlines())))
    assert record(compared_paths(*runs))["differences"] == expected


def test_perplexities_are_compared_as_a_ratio(runs):
    [line] = [line for line in rows(markdown(compared_paths(*runs[:2])), "Differences") if line[1] == "ppl"]
    assert line[2] == f"× {5.5 / 6.0:.3f}"


def test_perplexities_of_different_tokenizers_are_compared_by_byte(tmp_path):
    one = evaluate(tmp_path, "a", 1, {"ppl": perplexity(6.0)})
    other = evaluate(tmp_path, "b", 1, {"ppl": perplexity(6.0, tokens=(20, 40))})
    [difference] = record(compared_paths(one, other))["differences"]
    assert difference["unit"] == "nats per byte"
    assert difference["value"] == pytest.approx(20 * math.log(6.0) / 160)
    assert "tokenizers differ" in markdown(compared_paths(one, other))


def test_missing_questions_are_an_error_that_counts_them(runs):
    path = runs[1] / "evaluation" / "400" / "items.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0].replace('"0"', '"new"'), *lines[3:]]))
    with pytest.raises(EvaluationError, match=r"gsm8k: questions are missing, 3 in '.*dr/.*' and 1 in '.*la/.*'"):
        compared_paths(*runs[:2])


def test_other_depths_are_left_out_of_the_main_tables(runs, tmp_path):
    expected = rows(markdown(compared_paths(*runs)), "Best over checkpoints")
    evaluate(tmp_path, "dr", 400, {"gsm8k": task(20), "math": task(20, metric="verified")}, depth=32)
    text = markdown(compared_paths(*runs))
    assert rows(text, "Best over checkpoints") == expected
    titles, trained, deeper = rows(text, "dr by depth")
    assert titles == ["DEPTH", "gsm8k ACC ↑", "math ACC ↑", "PPL ↓"]
    assert (trained[0], trained[3]) == ("**16 (trained)**", "5.50 [4.95, 6.05]")
    assert deeper == ["32", "100.0 [83.9, 100.0]", "100.0 [83.9, 100.0]", "–"]


def test_a_depth_table_is_of_the_newest_checkpoint_with_several_depths(tmp_path):
    for step, depth, right in ((100, 16, 1), (200, 8, 5), (200, 16, 10), (200, 32, 8), (300, 16, 20)):
        path = evaluate(tmp_path, "dr", step, {"gsm8k": task(right)}, depth=depth)
    table = depth_table(path)
    assert table.startswith("Step 200, 200M tokens.")
    assert [line.split("|")[1].strip() for line in table.splitlines()[4:]] == ["8", "**16 (trained)**", "32"]
    assert [line.split("|")[2].split()[0] for line in table.splitlines()[4:]] == ["25.0", "50.0", "40.0"]


def test_single_evaluations_can_be_compared_at_any_depth(tmp_path):
    for depth, right in ((16, 10), (32, 12)):
        evaluate(tmp_path, "dr", 100, {"gsm8k": task(right)}, depth=depth)
    folders = [tmp_path / "dr" / "evaluation" / name for name in ("100", "100-depth32")]
    [difference] = record(compared_paths(*folders))["differences"]
    assert difference["run"] == "dr, step 100, depth 32"
    assert difference["value"] == pytest.approx(0.1)


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    paths = [evaluate(tmp_path / seed, "dr", 1, {"gsm8k": task(4)}) for seed in ("one", "two")]
    assert [run.label for run in read_runs(paths)] == [str(path) for path in paths]


def refused(*paths):
    with pytest.raises(EvaluationError) as refusal:
        compared_paths(*paths)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_a_run_that_was_not_evaluated_is_told_how(runs, tmp_path):
    path = tmp_path / "my run"
    path.mkdir()
    assert refused(runs[0], path) == (
        f"'{path}' has no evaluation; make it: python -m dreamer_jax.evaluate --checkpoint '{path}' --all"
    )
    assert refused(runs[0], tmp_path / "absent").startswith(f"'{tmp_path / 'absent'}' is not a folder")


def test_a_run_that_was_evaluated_at_other_depths_alone_is_told_how(runs, tmp_path):
    path = evaluate(tmp_path, "deep", 100, {"gsm8k": task(5)}, depth=32)
    assert "at the trained depth" in refused(runs[0], path)


def test_a_run_is_not_compared_with_itself(runs):
    assert "given twice" in refused(runs[0], runs[0])


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"prompts": "b" * 64}, "the prompts differ"),
        ({"limit": 20}, "the limits of questions differ"),
        ({"complete": False}, "is not finished"),
        ({"metric": "exact"}, "the metrics differ"),
    ],
)
def test_what_was_asked_or_scored_otherwise_is_not_compared(tmp_path, changes, cause):
    one = evaluate(tmp_path, "la", 100, {"gsm8k": task(5)})
    other = evaluate(tmp_path, "dr", 100, {"gsm8k": task(5, **changes)})
    message = refused(one, other)
    assert cause in message
    assert f"'{other / 'evaluation' / '100'}'" in message


def test_an_older_checkpoint_that_was_asked_otherwise_is_found_too(tmp_path):
    evaluate(tmp_path, "la", 100, {"gsm8k": task(5, prompts="old")})
    assert "the prompts differ" in refused(evaluate(tmp_path, "la", 200, {"gsm8k": task(5)}))


def test_a_task_that_some_run_lacks_is_left_out_and_told(tmp_path):
    one = evaluate(tmp_path, "la", 100, {"gsm8k": task(5), "math": task(5)})
    comparison = compared_paths(one, evaluate(tmp_path, "dr", 100, {"gsm8k": task(5)}))
    assert [column.title for column in comparison.columns] == ["gsm8k"]
    assert comparison.notes == ("math is left out: some run has none of it. Not evaluated: dr (step 100).",)


def test_the_average_is_of_checkpoints_that_have_all_tasks(tmp_path):
    evaluate(tmp_path, "la", 100, {"gsm8k": task(10), "math": task(4)})
    path = evaluate(tmp_path, "la", 200, {"gsm8k": task(20)})
    comparison = compared_paths(path)
    average = record(comparison)["columns"][-1]["runs"]["la"]
    assert [point["step"] for point in average["points"]] == [100]
    assert average["best"]["value"] == pytest.approx(0.35)
    assert average["last"] is None
    assert columns(markdown(comparison), "Last checkpoint")["la"]["average ACC ↑"] == "–"
    assert "la (step 200)" in comparison.notes[0]


def test_runs_without_a_common_task_are_refused(tmp_path):
    one, other = (evaluate(tmp_path, name, 1, {name: task(5)}) for name in ("gsm8k", "math"))
    assert refused(one, other).startswith("no task has been evaluated for all runs ('gsm8k': gsm8k; 'math': math)")


def test_limits_and_unequal_training_are_noted(tmp_path):
    one = evaluate(tmp_path, "la", 100, {"gsm8k": task(5, limit=20)})
    notes = compared_paths(one, evaluate(tmp_path, "dr", 300, {"gsm8k": task(5, limit=20)})).notes
    assert notes == (
        "gsm8k is limited to 20 questions.",
        "The last checkpoints have seen different numbers of training tokens: la 100M, dr 300M.",
    )


@pytest.mark.parametrize(
    ("break_it", "cause"),
    [
        (lambda scores: scores.pop("tokens"), "tokens is missing"),
        (lambda scores: scores["tasks"]["gsm8k"].pop("prompts"), r"tasks\.gsm8k\.prompts is missing"),
        (lambda scores: scores["tasks"]["gsm8k"]["metrics"].clear(), r"tasks\.gsm8k\.metrics is empty"),
        (
            lambda scores: scores["tasks"]["gsm8k"]["metrics"]["robust"].pop("value"),
            r"metrics\.robust\.value is missing",
        ),
        (lambda scores: scores.update(format=2), "format 2 is not 1"),
    ],
)
def test_broken_scores_are_named(tmp_path, break_it, cause):
    path = evaluate(tmp_path, "la", 100, {"gsm8k": task(5)})
    file = path / "evaluation" / "100" / "scores.json"
    scores = json.loads(file.read_text())
    break_it(scores)
    file.write_text(json.dumps(scores))
    assert re.search(f"'{file}'.*{cause}", refused(path))
    file.write_text("{")
    assert f"'{file}' is not JSON" in refused(path)


@pytest.mark.parametrize(
    ("text", "cause"),
    [("{", "row 2 is not JSON"), ("[]", "row 2 is not an item"), ('{"task": "gsm8k"}', "row 2 is not an item")],
)
def test_a_broken_row_is_named(runs, text, cause):
    file = runs[0] / "evaluation" / "400" / "items.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], text, *lines[2:]]))
    assert f"'{file}', {cause}" in refused(*runs)
    file.write_text("\n".join([lines[0], *lines]))
    assert f"'{file}', row 2: '0' of gsm8k is there twice" in refused(*runs)
    file.unlink()
    assert f"'{file}' is missing" in refused(*runs)


def test_an_item_without_the_score_is_named(runs):
    file = runs[1] / "evaluation" / "400" / "items.jsonl"
    file.write_text(file.read_text().replace("verified", "other"))
    assert f"'{file}': an item has no score 'verified'" in refused(*runs)


def test_two_evaluations_of_one_checkpoint_are_refused(tmp_path):
    evaluate(tmp_path, "la", 100, {"gsm8k": task(5)})
    path = evaluate(tmp_path, "la", 100, {"gsm8k": task(6)}, folder="copy")
    assert "one of two evaluations of step 100 at depth 16" in refused(path)


def test_unbounded_intervals_are_null_in_json(tmp_path):
    entry, items = task(5)
    entry["metrics"]["robust"] |= {"low": None, "high": None}
    path = evaluate(tmp_path, "la", 100, {"gsm8k": (entry, items)})
    compare([path], tmp_path / "out")
    best = json.loads((tmp_path / "out" / "compare.json").read_text())["columns"][0]["runs"]["la"]["best"]
    assert (best["value"], best["low"], best["high"]) == (0.25, None, None)


def test_tables_and_figures_are_written(runs, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra 'figures' is not installed")
    evaluate(tmp_path, "dr", 400, {"gsm8k": task(5), "ppl": perplexity(8.0)}, depth=32)
    out = tmp_path / "a" / "b"
    text = compare(runs, out)
    names = ["accuracy.png", "accuracy.svg", "compare.json", "compare.md", "depth.png", "depth.svg"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert all(str(out / name) in text for name in names)
    assert text.startswith((out / "compare.md").read_text())


def test_without_matplotlib_the_tables_are_written(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = compare(runs, tmp_path / "out")
    assert text.endswith("no figures: figures need matplotlib: pip install 'dreamer-jax[figures]'\n")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["compare.json", "compare.md"]
