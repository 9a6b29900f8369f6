"""Tables look like the paper's Table 2."""

import math
import re

import pytest

from dreamer_jax.evaluation.comparison.record import record
from dreamer_jax.evaluation.comparison.results import read_runs
from dreamer_jax.evaluation.comparison.tables import depth_table, markdown
from tests.evaluation.comparison.folders import (
    columns,
    compared_paths,
    efficiencies,
    evaluate,
    perplexity,
    rows,
    task,
    train,
)


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
    table = depth_table(*read_runs([path]))
    assert table.startswith("Step 200, 200M tokens.")
    assert [line.split("|")[1].strip() for line in table.splitlines()[4:]] == ["8", "**16 (trained)**", "32"]
    assert [line.split("|")[2].split()[0] for line in table.splitlines()[4:]] == ["25.0", "50.0", "40.0"]


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
