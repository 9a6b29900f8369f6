"""MATH's answers are equal as text or by what they mean, and a comparison that goes wrong counts nothing."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from dreamer_jax.data.template import Template
from dreamer_jax.evaluation.benchmarks import hendrycks_math
from dreamer_jax.evaluation.benchmarks.hendrycks_math import NO_ANSWER, STOPS, Math, math500
from dreamer_jax.evaluation.benchmarks.verification import Comparison
from dreamer_jax.evaluation.requests import EvaluationError, Generate, Generated, Item, Likelihoods, Questions, Verdict

ROW = {
    "problem": " What is $2 + 3$?\n",
    "level": "Level 1",
    "type": "Counting & Probability",
    "solution": r"It is $\boxed{5}$.",
}
SCORES: list[tuple[str, str, int, int]] = [
    # gold, text: verified, normalised
    ("5", r"so $\boxed{5}$.", 1, 1),
    ("5", "The answer is $x = 5$.", 1, 1),
    ("5", r"\boxed{6}", 0, 0),
    ("5", r"\boxed{-5}", 0, 0),
    ("5", r"\boxed{5", 0, 0),
    ("5", "It is 5.", 0, 0),
    ("5", "", 0, 0),
    ("5", r"\boxed{\text{five}}", 0, 0),
    (r"\frac{1}{2}", r"\boxed{\frac12}", 1, 1),
    (r"\frac{1}{2}", r"\boxed{1/2}", 1, 1),
    (r"\frac{1}{2}", r"\boxed{0.5}", 1, 0),
    (r"\frac{1}{2}", r"\boxed{\frac{2}{4}}", 1, 0),
    (r"\frac{1}{3}", r"\boxed{0.333}", 0, 0),
    (r"3\frac{1}{2}", r"\boxed{\frac{7}{2}}", 1, 0),
    (r"\frac{\sqrt{3}}{3}", r"\boxed{\frac{1}{\sqrt{3}}}", 1, 0),
    (r"2\sqrt{2}", r"\boxed{\sqrt8}", 1, 0),
    (r"\sqrt{2}", r"\boxed{1.414}", 0, 0),
    (r"\pi", r"\boxed{3.14}", 0, 0),
    ("x+1", r"\boxed{1+x}", 1, 0),
    ("(x+1)^2", r"\boxed{x^2+2x+1}", 1, 0),
    ("x^2", r"\boxed{x^3}", 0, 0),
    (r"\sin^2 x", r"\boxed{1-\cos^2 x}", 1, 0),
    ("12xy", r"\boxed{12yx}", 1, 0),
    ("12xy", r"\boxed{12}", 0, 0),
    ("y = 2x+3", r"\boxed{2x+3}", 1, 1),
    ("3+4i", r"\boxed{4i+3}", 1, 0),
    ("(1,2)", r"\boxed{\left(1,\,2\right)}", 1, 1),
    ("(1,2)", r"\boxed{(2,1)}", 0, 0),
    ("[1,2]", r"\boxed{(1,2)}", 0, 0),
    ("1,2", r"\boxed{2,1}", 1, 0),
    ("1,2,3", r"\boxed{1,2}", 0, 0),
    ("1,2", r"\boxed{x = 1 \text{ or } x = 2}", 1, 0),
    (r"1 \pm \sqrt{2}", r"\boxed{1+\sqrt{2}, 1-\sqrt{2}}", 1, 0),
    (r"(2,3) \cup (4,5)", r"\boxed{(4,5)\cup(2,3)}", 1, 0),
    ("x > 3", r"\boxed{3 < x}", 1, 0),
    ("10,\\!000", r"\boxed{10{,}000}", 1, 1),
    (r"\dfrac{2469}{20,\!000}", r"\boxed{0.12345}", 1, 0),
    ("1000000", r"\boxed{10^6}", 1, 0),
    ("24", r"\boxed{4!}", 1, 0),
    ("4", r"\boxed{4!}", 0, 0),
    ("10", r"\boxed{\binom{5}{2}}", 1, 0),
    ("3", r"\boxed{\log_2 8}", 1, 0),
    (r"90^\circ", r"\boxed{90}", 1, 1),
    (r"50\%", r"\boxed{50}", 1, 1),
    (r"6\text{ cm}^2", r"\boxed{6}", 1, 1),
    (r"\$5.50", r"\boxed{5.5}", 1, 1),
    (r"\text{(C)}", r"\boxed{C}", 1, 1),
    (r"\text{Evelyn}", "The answer is Evelyn.", 1, 1),
    (r"\text{even}", r"\boxed{\text{odd}}", 0, 0),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{bmatrix}1\\2\end{bmatrix}}", 1, 0),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{pmatrix}2\\1\end{pmatrix}}", 0, 0),
    ("2516_8", r"\boxed{2516_{8}}", 1, 1),
    ("0", r"\boxed{\frac{1}{0}}", 0, 0),
]


MATH = Math()


def questions(root: Path, *rows: dict[str, str], task: Math = MATH) -> Questions:
    path = root / task.place
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return task.questions(root)


def verdicts(*pairs: tuple[str, str]) -> list[Verdict]:
    items = [Item(str(number), Generate("", STOPS, 9), gold) for number, (gold, _) in enumerate(pairs)]
    return list(Math().verdicts(items, [Generated(text, 9, True) for _, text in pairs]))


@pytest.fixture(scope="module")
def judged() -> list[Verdict]:
    """All of them at once, since the processes take a second to start."""
    return verdicts(*((gold, text) for gold, text, _, _ in SCORES))


@pytest.mark.parametrize("number", range(len(SCORES)), ids=lambda number: " ".join(SCORES[number][:2]))
def test_both_metrics_of_a_text(judged: list[Verdict], number: int) -> None:
    _, _, verified, normalised = SCORES[number]
    assert judged[number].scores == {"verified": verified, "normalised": normalised}


def test_what_was_found_is_kept_and_nothing_is_none() -> None:
    assert [verdict.extracted for verdict in verdicts(("5", r"\boxed{x=5}"), ("5", "5"))] == [
        {"answer": "x=5"},
        {"answer": None},
    ]


def test_equal_texts_need_no_comparison_and_equal_pairs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[str, str]] = []

    def compare(pairs: Sequence[tuple[str, str]]) -> list[Comparison]:
        compared.extend(pairs)
        return [Comparison(gold == "5") for gold, _ in pairs]

    monkeypatch.setattr(hendrycks_math, "compare", compare)
    found = verdicts(("5", r"\boxed{6}"), ("5", r"\boxed{5}"), ("7", r"\boxed{6}"), ("5", r"\boxed{6}"), ("5", "6"))
    assert compared == [("5", "6"), ("7", "6")]
    assert [verdict.scores["verified"] for verdict in found] == [1.0, 1.0, 0.0, 1.0, 0.0]


def test_a_comparison_that_went_wrong_counts_nothing_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    faults = [Comparison(False, "killed"), Comparison(False, "failed"), Comparison(False)]
    monkeypatch.setattr(hendrycks_math, "compare", lambda pairs: faults)
    found = verdicts(("5", r"\boxed{6}"), ("5", r"\boxed{7}"), ("5", r"\boxed{8}"))
    assert [verdict.scores["verified"] for verdict in found] == [0.0] * 3
    assert [verdict.extracted.get("verification") for verdict in found] == ["killed", "failed", None]


def test_an_item_of_the_whole_test_set(tmp_path: Path) -> None:
    [item] = questions(tmp_path, ROW).items
    stops = ("Question:", "Problem:", "</s>", "<|im_end|>")
    assert item.request == Generate("Question: What is $2 + 3$?\nAnswer:", stops, 1024)
    assert (item.id, item.gold, item.solution) == ("0", "5", ROW["solution"])
    assert item.group == "counting_and_probability"


def test_the_layout_of_the_run_is_asked_in_and_ends_texts(tmp_path: Path) -> None:
    questions(tmp_path, ROW)
    [item] = MATH.questions(tmp_path, Template("Q: {text}\nA:")).items
    assert item.request == Generate("Q: What is $2 + 3$?\nA:", ("Q:", *STOPS), 1024)


def test_math500_takes_the_answer_that_its_rows_have(tmp_path: Path) -> None:
    task = math500()
    row = {**ROW, "answer": r"5\text{ m}", "subject": "Number Theory"}
    [item] = questions(tmp_path, row, task=task).items
    assert (task.name, task.place, item.gold, item.group) == (
        "math500",
        "math/math500.jsonl",
        r"5\text{ m}",
        "number_theory",
    )


def test_a_row_without_an_answer_is_left_out_and_counted(tmp_path: Path) -> None:
    found = questions(tmp_path, {**ROW, "solution": r"So it is $\boxed{}$."}, ROW)
    assert ([item.id for item in found.items], found.notes) == (["1"], {NO_ANSWER: 1})


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"math/test\.jsonl"):
        Math().questions(tmp_path)


def test_an_outcome_of_another_kind_is_a_mistake() -> None:
    with pytest.raises(TypeError, match="not a generated text"):
        next(Math().verdicts([Item("0", Generate("", (), 1), "1")], [Likelihoods((0.0,), (True,), (1,))]))


def test_verified_stands_in_tables() -> None:
    assert next(iter(Math.metrics)) == "verified"
