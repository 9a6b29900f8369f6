"""MMLU's questions are asked as the harness asks them, and the likeliest option is the answer."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from dreamer_jax.data.template import Template
from dreamer_jax.evaluation.benchmarks.mmlu import EQUAL, EQUAL_AND_RIGHT, SUBJECTS, Mmlu
from dreamer_jax.evaluation.requests import Choose, EvaluationError, Generated, Item, Likelihoods, Outcome, Verdict


def files(root: Path, split: str = "test", **rows: str) -> Path:
    """MMLU's files below `root`, with one row of every subject but those given."""
    (root / "mmlu_math").mkdir(exist_ok=True)
    for subject in SUBJECTS:
        (root / "mmlu_math" / f"{subject}_{split}.csv").write_text(rows.get(subject, "1 + 1 = ?,1,2,3,4,B\n"))
    return root


def item(root: Path, id: str) -> Item:
    return next(item for item in Mmlu().questions(root).items if item.id == id)


def likelihoods(*nats: float) -> Likelihoods:
    return Likelihoods(tuple(map(float, nats)), (False,) * len(nats), (1,) * len(nats))


def judged(item: Item, outcome: Outcome) -> Verdict:
    return next(Mmlu().verdicts([item], [outcome]))


def cloze(options: Sequence[str], *right: int) -> Item:
    return Item("cloze/x/0", Choose("Question: ?\nAnswer:", tuple(options)), list(right))


def test_the_lettered_request_is_the_harnesss_to_the_byte(tmp_path: Path) -> None:
    root = files(tmp_path, high_school_statistics='" Cost of paint, in $?\n",$22 ,"1,5",π,None,C\n')
    asked = item(root, "letters/high_school_statistics/0")
    assert asked.request == Choose(
        "The following are multiple choice questions (with answers) about high school statistics.\n\n"
        "Cost of paint, in $?\nA. $22 \nB. 1,5\nC. π\nD. None\nAnswer:",
        (" A", " B", " C", " D"),
    )
    assert asked.gold == [2]
    assert asked.group == "high_school_statistics"


def test_the_cloze_request_has_the_layout_of_training_and_the_bare_texts_of_the_options(tmp_path: Path) -> None:
    root = files(tmp_path, abstract_algebra='" Cost of paint?\n",$22 ,"1,5",π,None,C\n')
    asked = item(root, "cloze/abstract_algebra/0")
    assert asked.request == Choose("Question: Cost of paint?\nAnswer:", (" $22", " 1,5", " π", " None"))
    assert asked.gold == [2]


def test_the_cloze_request_alone_has_the_layout_of_the_run(tmp_path: Path) -> None:
    root = files(tmp_path)
    letters, asked = Mmlu().questions(root, Template("Q: {text}\nA:", "\n{text}")).items[:2]
    assert asked.request == Choose("Q: 1 + 1 = ?\nA:", ("\n1", "\n2", "\n3", "\n4"))
    assert letters == Mmlu().questions(root).items[0]


def test_each_row_is_asked_in_both_forms_under_an_id_of_its_own(tmp_path: Path) -> None:
    items = Mmlu().questions(files(tmp_path, abstract_algebra="a,1,2,3,4,A\nb,1,2,3,4,D\n")).items
    assert [i.id for i in items][:4] == [
        "letters/abstract_algebra/0",
        "cloze/abstract_algebra/0",
        "letters/abstract_algebra/1",
        "cloze/abstract_algebra/1",
    ]
    assert len({i.id for i in items}) == len(items) == 12


def test_equal_options_are_counted_and_either_is_right(tmp_path: Path) -> None:
    root = files(tmp_path, abstract_algebra="a,12,-4,4,12,A\nb,12,12,4,5,D\nc,1,2,3,4,A\n")
    questions = Mmlu().questions(root)
    assert questions.notes == {EQUAL: 2, EQUAL_AND_RIGHT: 1}
    assert questions.items[0].gold == [0, 3]
    assert judged(questions.items[0], likelihoods(-3, -3, -3, -1)).scores == {"letters": 1.0}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("q,1,2,3,4,E\n", "row 2: the answer is 'E'"),
        ("q,1,2,3,4,\n", "row 2: the answer is ''"),
        ("q,1, ,3,4,A\n", "row 2: the question or an option is empty"),
        (",1,2,3,4,A\n", "row 2: the question or an option is empty"),
        ("q,1,2,3,A\n", "row 2: 5 columns"),
    ],
)
def test_a_row_that_is_no_question_is_named(tmp_path: Path, row: str, said: str) -> None:
    root = files(tmp_path, elementary_mathematics="q,1,2,3,4,A\n" + row)
    with pytest.raises(EvaluationError, match=f"elementary_mathematics_test.csv', {said}"):
        Mmlu().questions(root)


def test_a_folder_with_only_the_val_files_is_told_which_task_takes_them(tmp_path: Path) -> None:
    root = files(tmp_path, split="val")
    with pytest.raises(EvaluationError, match="only the val files of MMLU; evaluate them as mmlu_math_val"):
        Mmlu().questions(root)
    assert len(Mmlu("mmlu_math_val", "val").questions(root).items) == 10


def test_a_folder_with_only_the_test_files_is_told_too(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="only the test files of MMLU; evaluate them as mmlu_math,"):
        Mmlu("mmlu_math_val", "val").questions(files(tmp_path))


def test_one_missing_subject_is_named(tmp_path: Path) -> None:
    (files(tmp_path) / "mmlu_math" / "college_mathematics_test.csv").unlink()
    with pytest.raises(EvaluationError, match=r"no mmlu_math/college_mathematics_test.csv"):
        Mmlu().questions(tmp_path)


def test_the_likeliest_letter_is_the_answer(tmp_path: Path) -> None:
    asked = item(files(tmp_path), "letters/abstract_algebra/0")
    assert judged(asked, likelihoods(-2, -1, -3, -4)) == Verdict({"letters": 1.0}, {"letters": 1})
    assert judged(asked, likelihoods(-1, -2, -3, -4)) == Verdict({"letters": 0.0}, {"letters": 0})


def test_of_options_that_are_equally_likely_the_first_is_taken() -> None:
    asked = cloze([" a", " b"], 1)
    assert judged(asked, likelihoods(-1, -1)).extracted == {"cloze": 0, "cloze_per_byte": 0}


def test_likelihood_per_byte_leaves_out_the_space_and_counts_bytes_not_characters() -> None:
    # With their spaces "a" and "abc" have 2 and 4 bytes, without 1 and 3.
    assert judged(cloze([" a", " abc"], 1), likelihoods(-1.0, -2.5)).scores == {"cloze": 0.0, "cloze_per_byte": 1.0}
    assert judged(cloze(["\na", "\nabc"], 1), likelihoods(-1.0, -2.5)).scores["cloze_per_byte"] == 1.0
    # "ππ" has 2 characters and 4 bytes: -2 / 4 is above -0.6, and -2 / 2 below.
    assert judged(cloze([" a", " ππ"], 1), likelihoods(-0.6, -2.0)).scores == {"cloze": 0.0, "cloze_per_byte": 1.0}


def test_an_impossible_option_loses_and_a_likelihood_that_is_no_number_stops_the_evaluation() -> None:
    asked = cloze([" a", " b"], 1)
    assert judged(asked, likelihoods(-math.inf, -9)).scores == {"cloze": 1.0, "cloze_per_byte": 1.0}
    with pytest.raises(EvaluationError, match="cloze/x/0: a log-likelihood is not a number"):
        judged(asked, likelihoods(-1, math.nan))


def test_an_outcome_of_another_kind_is_a_bug() -> None:
    with pytest.raises(TypeError, match="cloze/x/0"):
        judged(cloze([" a", " b"], 1), Generated("a", 1, True))
    with pytest.raises(ValueError, match="shorter"):
        list(Mmlu().verdicts([cloze([" a"], 0)], []))


def test_both_tasks_have_the_chance_of_four_options() -> None:
    assert {metric.chance for metric in Mmlu().metrics.values()} == {0.25}
    assert list(Mmlu().metrics) == ["letters", "cloze", "cloze_per_byte"]
