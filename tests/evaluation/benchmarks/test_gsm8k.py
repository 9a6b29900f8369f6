"""GSM8K's items are the harness's requests, and its three metrics judge a text as they say."""

import json
from pathlib import Path

import pytest

from dreamer_jax.data.template import Template
from dreamer_jax.evaluation.benchmarks.gsm8k import (
    NO_ANSWER,
    STOPS,
    Gsm8k,
    flexible_number,
    gsm8k_platinum,
    strict_number,
)
from dreamer_jax.evaluation.requests import EvaluationError, Generate, Generated, Item, Likelihoods, Questions, Verdict

ROW = {"question": "What is twice 9?", "answer": "It is 2*9 = <<2*9=18>>18.\n#### 18"}
MISREAD = ["$18.00", "It costs $18.00", "The result is 18...", "18.50 or 18.00"]
"""Right answers that flexible-extract takes for wrong ones."""
SCORES: dict[str, tuple[int, int, int]] = {
    # text: robust, strict, flexible, where 18 is right
    "2*9 = 18\n#### 18": (1, 1, 1),
    "2*9 = <<2*9=18>>18\n#### 18": (1, 1, 1),
    "#### 18.": (1, 1, 1),
    "#### 18,": (1, 1, 1),
    "#### 1,8": (0, 1, 1),
    "#### 018": (1, 0, 0),
    "#### 18.00": (1, 0, 0),
    "#### 18..": (1, 0, 0),
    "#### -18": (0, 0, 0),
    "#### +18": (1, 0, 1),
    "#### $18": (1, 0, 1),
    "####18": (1, 0, 1),
    "####  18": (1, 0, 1),
    "#### 18 dollars": (1, 1, 1),
    "#### 18%": (1, 1, 1),
    "#### 18 of 20": (1, 1, 0),
    "#### 9\n#### 18": (0, 0, 1),
    "#### 18\n#### 9": (1, 1, 0),
    "#### \\boxed{18}": (1, 0, 1),
    "#### **18**": (1, 0, 1),
    "#### 36/2": (1, 0, 0),
    "#### 2*9 = 18": (1, 0, 1),
    "### 18": (1, 0, 1),
    "The answer is 18.": (1, 0, 1),
    "The answer is 18, not 19.": (1, 0, 0),
    "The answer is $18.": (1, 0, 1),
    "**18**": (1, 0, 1),
    "It is 18, I think": (1, 0, 1),
    "2 * 9 = 18 cm^2": (1, 0, 0),
    "20-2=18": (1, 0, 1),
    "20-18": (1, 0, 0),
    "-18": (0, 0, 0),
    "\u221218": (0, 0, 1),
    "\\boxed{18}, from 9": (1, 0, 0),
    "\\$18": (1, 0, 1),
    "18\\text{ dollars}": (1, 0, 1),
    "18 !": (1, 0, 1),
    "1.8": (0, 0, 0),
    "180": (0, 0, 0),
    "$": (0, 0, 0),
    "...": (0, 0, 0),
    "": (0, 0, 0),
    "eighteen": (0, 0, 0),
    "18 . . .": (1, 0, 1),
    "9" * 5000: (0, 0, 0),
    **{text: (1, 0, 0) for text in MISREAD},
}


GSM8K = Gsm8k()


def questions(root: Path, *rows: dict[str, str], task: Gsm8k = GSM8K) -> Questions:
    path = root / task.place
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return task.questions(root)


def verdict(text: str, gold: str = "18", *, finished: bool = True) -> Verdict:
    item = Item("0", Generate("", STOPS, 9), gold)
    return next(Gsm8k().verdicts([item], [Generated(text, 9, finished)]))


@pytest.mark.parametrize("text", SCORES)
def test_the_three_metrics_of_a_text(text: str) -> None:
    robust, strict, flexible = SCORES[text]
    assert verdict(text).scores == {"robust": robust, "strict": strict, "flexible": flexible}


@pytest.mark.parametrize("text", MISREAD)
def test_flexible_misreads_zeros_and_dots_that_robust_reads(text: str) -> None:
    assert verdict(text).scores == {"robust": 1.0, "strict": 0.0, "flexible": 0.0}


@pytest.mark.parametrize(
    ("text", "gold", "robust", "strict"),
    [
        ("#### 1,000", "1000", 1, 1),
        ("1000.0 people", "1000", 1, 0),
        ("#### 0.5", "0.5", 1, 1),
        ("one half, 1/2", "0.5", 1, 0),
        ("#### -5", "-5", 1, 1),
        ("minus five, \u22125", "-5", 1, 0),
    ],
)
def test_other_numbers(text: str, gold: str, robust: int, strict: int) -> None:
    scores = verdict(text, gold).scores
    assert (scores["robust"], scores["strict"]) == (robust, strict)


def test_what_was_found_is_kept_as_it_was_written() -> None:
    assert verdict("It is $18.00...").extracted == {"robust": "$18.00", "strict": None, "flexible": "$18.00..."}


def test_an_unfinished_text_is_judged_as_it_stands() -> None:
    assert verdict("2 * 9 = 18", finished=False).scores["robust"] == 1.0


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("#### 1,234.50.", "1,234.50.", "1,234.50."),
        ("5 and -7", None, "-7"),
        ("x5y", None, "5"),
        ("3.", None, "3."),
        (",,", None, ",,"),
        ("#### .", ".", None),
        ("no", None, None),
    ],
)
def test_what_the_harness_finds(text: str, strict: str | None, flexible: str | None) -> None:
    assert strict_number(text) == strict
    assert flexible_number(text) == flexible


def test_an_item_is_the_request_of_the_harness(tmp_path: Path) -> None:
    [item] = questions(tmp_path, ROW).items
    assert item.request == Generate("Question: What is twice 9?\nAnswer:", ("Question:", "</s>", "<|im_end|>"), 512)
    assert (item.id, item.gold, item.solution) == ("0", "18", "It is 2*9 = 18.\n#### 18")


def test_the_layout_of_the_run_is_asked_in_and_ends_texts_beside_the_harnesss_stops(tmp_path: Path) -> None:
    questions(tmp_path, ROW)
    [item] = GSM8K.questions(tmp_path, Template("Q: {text}\nA:")).items
    assert item.request == Generate("Q: What is twice 9?\nA:", ("Q:", "Question:", "</s>", "<|im_end|>"), 512)


def test_thousands_separators_are_no_part_of_the_right_answer(tmp_path: Path) -> None:
    [item] = questions(tmp_path, {**ROW, "answer": "#### 1,000,000"}).items
    assert item.gold == "1000000"


def test_a_row_without_an_answer_is_left_out_and_counted(tmp_path: Path) -> None:
    found = questions(
        tmp_path, {**ROW, "answer": "18"}, ROW, {**ROW, "answer": "#### 1.2.3"}, {**ROW, "answer": "#### ,"}
    )
    assert [item.id for item in found.items] == ["1"]
    assert found.notes == {NO_ANSWER: 3}


def test_platinum_has_a_file_of_its_own_with_the_columns_of_the_hub(tmp_path: Path) -> None:
    task = gsm8k_platinum()
    assert (task.name, task.place) == ("gsm8k_platinum", "gsm8k_platinum/test.jsonl")
    assert len(questions(tmp_path, {**ROW, "cleaning_status": "consensus"}, task=task).items) == 1


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"gsm8k/test\.jsonl"):
        Gsm8k().questions(tmp_path)


def test_an_outcome_of_another_kind_is_a_mistake() -> None:
    with pytest.raises(TypeError, match="not a generated text"):
        next(Gsm8k().verdicts([Item("0", Generate("", (), 1), "1")], [Likelihoods((0.0,), (True,), (1,))]))


def test_robust_stands_in_tables() -> None:
    assert next(iter(Gsm8k.metrics)) == "robust"
