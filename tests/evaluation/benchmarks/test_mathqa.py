"""MathQA's options come out of their text whole, or the row is left out and counted."""

import itertools
import json
from pathlib import Path

import pytest

from dreamer_jax.data.template import Template
from dreamer_jax.evaluation.benchmarks.mathqa import (
    AS_LIST,
    COMMA,
    LETTER_TWICE,
    NO_RIGHT_OPTION,
    UNREADABLE,
    MathQa,
    read_options,
)
from dreamer_jax.evaluation.benchmarks.mmlu import EQUAL, EQUAL_AND_RIGHT
from dreamer_jax.evaluation.requests import Choose, EvaluationError, Likelihoods, Questions

PLAIN = "a ) 38 , b ) 27.675 , c ) 30 , d ) data inadequate , e ) none of these"


def row(options: str = PLAIN, correct: str = "c", **more: str) -> dict[str, str]:
    return {"Problem": "how much is 5 x 6 ?", "options": options, "correct": correct, "category": "general", **more}


def questions(root: Path, *rows: dict[str, str]) -> Questions:
    (root / "mathqa").mkdir(exist_ok=True)
    (root / "mathqa" / "test.json").write_text(json.dumps(rows))
    return MathQa().questions(root)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (PLAIN, ["38", "27.675", "30", "data inadequate", "none of these"]),
        ("a ) 10,700 , b ) 1,000,000 , c ) 9 , d ) 8 , e ) 7", ["10,700", "1,000,000", "9", "8", "7"]),
        ("a ) 6 , 030,053 , b ) 1 , 512 , c ) 3 , d ) 4 , e ) 3,312", ["6 , 030,053", "1 , 512", "3", "4", "3,312"]),
        ("a ) 35 , 3 , b ) 25 , 5 , c ) 1 , d ) 5 , 30 , e ) 30 , 5", ["35 , 3", "25 , 5", "1", "5 , 30", "30 , 5"]),
        (
            "a ) 1 minute , 12 seconds , b ) 2 s , c ) 3 s , d ) 4 s , e ) 4 minutes , 12 seconds",
            ["1 minute , 12 seconds", "2 s", "3 s", "4 s", "4 minutes , 12 seconds"],
        ),
        ("a ) 5 : 9 , b ) 9:3 , c ) 1 : √ 2 , d ) 3 : 5 , e ) 5 : 3", ["5 : 9", "9:3", "1 : √ 2", "3 : 5", "5 : 3"]),
        ("a ) 3 / 6 , b ) 13 1 / 2 , c ) 1/3 , d ) 0 , e ) ½", ["3 / 6", "13 1 / 2", "1/3", "0", "½"]),
        (
            "a ) rs . 5,000 , b ) rs 50 , c ) $ 3 , d ) € 2.50 , e ) 4 p",
            ["rs . 5,000", "rs 50", "$ 3", "€ 2.50", "4 p"],
        ),
        ("a ) - 3 , b ) -4 , c ) – 5 , d ) + 6 , e ) 0", ["- 3", "-4", "– 5", "+ 6", "0"]),
        ("a ) 45 % , b ) 4.5% , c ) 7 , d ) 8 , e ) 100 %", ["45 %", "4.5%", "7", "8", "100 %"]),
        ("a ) none , b ) None , c ) 1 , d ) 2 , e ) none of these .", ["none", "None", "1", "2", "none of these ."]),
        (
            r"a ) \frac { 1 } { 2 } , b ) $x^2$ , c ) \sqrt{3} , d ) x_{1,2} , e ) 2 ^ { n , m }",
            [r"\frac { 1 } { 2 }", "$x^2$", r"\sqrt{3}", "x_{1,2}", "2 ^ { n , m }"],
        ),
        (
            "a ) ( v / 2 ) ^ ( 1 / 3 ) , b ) ( 2 v ) , c ) ( 5,280 ) ( 12 m ) / pt , d ) d , e ) ( e )",
            ["( v / 2 ) ^ ( 1 / 3 )", "( 2 v )", "( 5,280 ) ( 12 m ) / pt", "d", "( e )"],
        ),
        ("a ) x = a , b ) y = b , c ) a + b , d ) a b , e ) a > b", ["x = a", "y = b", "a + b", "a b", "a > b"]),
        (
            "a ) a ) 3 , b ) b ) 2 , c ) c ) 5 , d ) d ) 21 , e ) e ) 28",
            ["a ) 3", "b ) 2", "c ) 5", "d ) 21", "e ) 28"],
        ),
        ("a ) a ) 11 , b ) b ) 18 , c ) 24 , d ) d ) 29 , e ) d ) 36", ["a ) 11", "b ) 18", "24", "d ) 29", "d ) 36"]),
        ("a ) 3 , b ) 4.5 , c ) 4 , d ) d ) 5.5 , e ) e ) 14", ["3", "4.5", "4", "d ) 5.5", "e ) 14"]),
        ("a)1,b)2,c)3,d)4,e)5", ["1", "2", "3", "4", "5"]),
        ("a ) 1 , b ) 2 , c ) 3 , d ) 4 , e) 5", ["1", "2", "3", "4", "5"]),
        ("  a ) 1  ,  b ) 2 , c ) 3 ,d ) 4, e ) 5  \n", ["1", "2", "3", "4", "5"]),
        ("a ) 1\n, b ) 2\n3 , c ) 3 , d ) 4 , e ) 5", ["1", "2\n3", "3", "4", "5"]),
        ("a ) 4 , b ) 4 , c ) 4 , d ) 4 , e ) 4", ["4", "4", "4", "4", "4"]),
        ("a ) 1 . , b ) 2 , , c ) 3 , d ) 4 , e ) 5", ["1 .", "2 ,", "3", "4", "5"]),
        ("a ) 38 , b ) 27 , c ) 30 , d ) 4 , e ) of these", ["38", "27", "30", "4", "of these"]),
        ("a ) 4 π , b ) 2 ∏ √ 3 , c ) 16 π , d ) 10 — 100 , e ) 30 °", ["4 π", "2 ∏ √ 3", "16 π", "10 — 100", "30 °"]),
        ("a ) 2 : 30 p . m . , b ) 3 , c ) 4 , d ) 5 , e ) 6", ["2 : 30 p . m .", "3", "4", "5", "6"]),
        ("['a ) 4', 'b ) 4 π', 'c ) 16', 'd ) 8 π', 'e ) 16']", ["4", "4 π", "16", "8 π", "16"]),
        (
            "['a ) 15 m , 15 m', 'b ) 15 m , 90 m', 'c ) 1', 'd ) 2', 'e ) 15 m , 30 m']",
            ["15 m , 15 m", "15 m , 90 m", "1", "2", "15 m , 30 m"],
        ),
        (
            """["a ) 12'", 'b ) 5"', 'c ) \\\\frac{1}{2}', 'd ) 3', 'e ) none']""",
            ["12'", '5"', r"\frac{1}{2}", "3", "none"],
        ),
        (
            "['a ) a ) 160 degree', 'b ) b ) 198 degree', 'c ) 1', 'd ) 2', 'e ) 3']",
            ["a ) 160 degree", "b ) 198 degree", "1", "2", "3"],
        ),
    ],
)
def test_options_are_read_whole(text: str, options: list[str]) -> None:
    assert read_options(text) == tuple(options)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "38 , 27 , 30 , 4 , 5",
        "a ) 1 , b ) 2 , c ) 3 , d ) 4",
        "a ) 1 , b ) 2 , c ) 3 , d ) 4 , e",
        "a ) 1 , b ) 2 , c ) 3 , d ) 4 , e ) ",
        "a ) 1 , c ) 3 , d ) 4 , e ) 5",
        "a ) 1 , b ) 2 , d ) 4 , c ) 3 , e ) 5",
        "a ) 1 b ) 2 c ) 3 d ) 4 e ) 5",
        "b ) 2 , c ) 3 , d ) 4 , e ) 5",
        "a ) , b ) 2 , c ) 3 , d ) 4 , e ) 5",
        "a ) 1 , b ) 2 , c ) , d ) 4 , e ) 5",
        "a ) ( a , b ) , b ) ( b , c ) , c ) 1 , d ) 2 , e ) 3",
        "['a ) 4', 'b ) 5', 'c ) 16', 'd ) 8'",
        "['a ) 4', 'b ) 5', 'c ) 16', 'd ) 8']",
        "[ 4 , 5 , 16 , 8 , 9 ]",
        "[a, b]",
        "[" * 5000,
        "[" + "-" * 3000 + "1]",
        "[" + "-" * 100_000 + "1]",
    ],
    ids=itertools.count(),
)
def test_options_that_are_not_five_or_can_be_read_in_two_ways_are_not_read(text: str) -> None:
    assert read_options(text) is None


def test_the_cloze_request_is_the_harnesss_to_the_byte(tmp_path: Path) -> None:
    asked = questions(tmp_path, row(Problem=" how much ? "))
    assert asked.items[0].id == "cloze/0"
    assert asked.items[0].request == Choose(
        "Question:  how much ? \nAnswer:", (" 38", " 27.675", " 30", " data inadequate", " none of these")
    )
    assert asked.items[0].gold == [2]
    assert asked.items[0].group == "general"


def test_the_cloze_request_alone_has_the_layout_of_the_run(tmp_path: Path) -> None:
    usual = questions(tmp_path, row("a ) 1 , b ) 2 , c ) 3 , d ) 4 , e ) 5"))
    cloze, letters = MathQa().questions(tmp_path, Template("Q: {text}\nA:", "\n{text}")).items
    assert cloze.request == Choose("Q: how much is 5 x 6 ?\nA:", ("\n1", "\n2", "\n3", "\n4", "\n5"))
    assert letters == usual.items[1]


def test_the_lettered_request_has_the_layout_of_mmlu_with_five_options(tmp_path: Path) -> None:
    asked = questions(tmp_path, row()).items[1]
    assert asked.id == "letters/0"
    assert asked.request == Choose(
        "The following are multiple choice questions (with answers) about mathematics.\n\nhow much is 5 x 6 ?\n"
        "A. 38\nB. 27.675\nC. 30\nD. data inadequate\nE. none of these\nAnswer:",
        (" A", " B", " C", " D", " E"),
    )


def test_rows_that_cannot_be_read_are_left_out_and_counted_and_the_others_keep_their_ids(tmp_path: Path) -> None:
    found = questions(tmp_path, row("a ) 1 , b ) 2"), row(correct="f"), row(correct=""), row(correct=" C "))
    assert [item.id for item in found.items] == ["cloze/3", "letters/3"]
    assert found.notes == {UNREADABLE: 1, NO_RIGHT_OPTION: 2}
    assert found.items[0].gold == [2]


def test_odd_rows_that_stay_are_counted_by_what_is_odd(tmp_path: Path) -> None:
    found = questions(
        tmp_path,
        row(),
        row("['a ) 1', 'b ) 2', 'c ) 3', 'd ) 4', 'e ) 5']"),
        row("a ) 1 , 2 , b ) 2 , c ) 3 , d ) 4 , e ) 5"),
        row("a ) a ) 1 , b ) b ) 2 , c ) 3 , d ) 4 , e ) 5"),
        row("a ) 1 , b ) 1 , c ) 3 , d ) 4 , e ) 5"),
        row("a ) 1 , b ) 3 , c ) 3 , d ) 4 , e ) 5"),
        row("a ) 1,000 , b ) 3 , c ) 4 , d ) 5 , e ) 6"),
    )
    assert len(found.items) == 14
    assert found.notes == {AS_LIST: 1, COMMA: 1, LETTER_TWICE: 1, EQUAL: 2, EQUAL_AND_RIGHT: 1}


def test_of_equal_options_either_is_right_in_both_forms(tmp_path: Path) -> None:
    items = questions(tmp_path, row("a ) 1 , b ) 3 , c ) 3 , d ) 4 , e ) 5")).items
    outcome = Likelihoods((-9.0, -1.0, -2.0, -9.0, -9.0), (False,) * 5, (1,) * 5)
    cloze, letters = MathQa().verdicts(items, [outcome, outcome])
    assert cloze.scores == {"cloze": 1.0, "cloze_per_byte": 1.0}
    assert letters.scores == {"letters": 1.0}


def test_a_file_without_one_readable_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"test.json': no row has options that can be read"):
        questions(tmp_path, row("1 , 2"), row(correct="?"))


def test_a_row_without_a_category_has_no_group(tmp_path: Path) -> None:
    bare = row()
    del bare["category"]
    assert questions(tmp_path, bare).items[0].group == ""


def test_the_dev_split_is_a_task_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "mathqa").mkdir()
    (tmp_path / "mathqa" / "dev.jsonl").write_text(json.dumps(row()))
    assert len(MathQa("mathqa_dev", "dev").questions(tmp_path).items) == 2
    with pytest.raises(EvaluationError, match=r"no mathqa/test.json .*math-qa.github.io"):
        MathQa().questions(tmp_path)


def test_cloze_stands_in_tables_and_guessing_gives_a_fifth() -> None:
    assert list(MathQa().metrics) == ["cloze", "letters", "cloze_per_byte"]
    assert {metric.chance for metric in MathQa().metrics.values()} == {0.2}
