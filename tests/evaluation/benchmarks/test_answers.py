"""Answers are found where they stand, and answers that are written alike are the same."""

import time
from fractions import Fraction

import pytest

from dreamer_jax.evaluation.benchmarks.answers import math_answer, normalised, number_value, robust_number

NUMBERS = {
    # where it stands
    "9 * 2 = 18\n#### 18": 18,
    "####18": 18,
    "#### $18.00": 18,
    r"#### \$18": 18,
    "#### 18 (that is 20 - 2)": 18,
    "#### 9*2 = 18": 18,
    "#### 18\n#### 19": 18,
    "#### eighteen\nHe has 18": 18,
    r"so $\boxed{18}$, twice 9": 18,
    r"\boxed{18\text{ dollars}} for 3 days": 18,
    r"\boxed{x = 18}": 18,
    r"\boxed{9 \times 2 = 18}": 18,
    r"#### \boxed{18}": 18,
    "The answer is 18, because 20 - 2 is 18 and not 19.": 18,
    "The answer is 9 * 2 = 18. I checked it 3 times.": 18,
    "**Answer:** 18\nThe other 3 are left.": 18,
    "The final answer is $18$. I hope it is correct, as 1 + 1 = 2.": 18,
    "The answer to the 1st question is 18 and not 5": 18,
    "answer 3 questions in 18": 18,
    "She makes 9 * 2 = $<<9*2=18>>18 every day": 18,
    "She makes 9 * 2 = $18 every day": 18,
    # how it is written
    "$18.00": 18,
    "It is 18...": 18,
    "It is 18.": 18,
    "**18**": 18,
    r"\$18": 18,
    r"18\text{ dollars}": 18,
    "1,000,000 people": 1_000_000,
    "$1,000.50": Fraction(2001, 2),
    "1{,}000": 1000,
    r"1,\!000": 1000,
    r"1\,000": 1000,
    "1\u202f000": 1000,
    "3,4": 4,
    "50%": 50,
    r"50\%": 50,
    ".5": Fraction(1, 2),
    "-5": -5,
    "\u22125": -5,
    "-$5": -5,
    "$-5.50": Fraction(-11, 2),
    "(-3)": -3,
    "20-18": 18,
    "20 - 18": 18,
    "(2)(19)-18": 18,
    "- 18 apples": 18,
    "a 5-year-old": 5,
    "1/2": Fraction(1, 2),
    "-1/2": Fraction(-1, 2),
    "2 1/2 cups": Fraction(5, 2),
    r"\frac{1}{2}": Fraction(1, 2),
    r"2\frac{1}{2}": Fraction(5, 2),
    r"The answer is $-\frac{10}{2}$.": -5,
    r"\boxed{x = -\dfrac{3}{4}}": Fraction(-3, 4),
    r"$3 - \frac{1}{2}$": Fraction(1, 2),
    r"$3-\frac{1}{2}$": Fraction(1, 2),
    "18/day": 18,
    "5/0": 0,
    "57.1/2": 2,
    "18 cm^2": 18,
    "18 m2": 18,
    "x_1 is 18 and x_{2} is unknown": 18,
    "€5": 5,
    "3.14.15": Fraction(157, 50),
}


@pytest.mark.parametrize("text", NUMBERS)
def test_the_robust_number_of_a_text(text: str) -> None:
    number = robust_number(text)
    assert number is not None
    assert number_value(number) == NUMBERS[text]


@pytest.mark.parametrize("text", ["", "No idea.", "####", r"\boxed{}", "x_1", "The answer is unknown", "..."])
def test_a_text_without_a_number_has_none(text: str) -> None:
    assert robust_number(text) is None


def test_a_number_is_given_as_it_is_written() -> None:
    assert robust_number("That makes -$1,000.50.") == "-$1,000.50"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so it is $\boxed{5}$.", "5"),
        (r"\boxed{4}, no, \boxed{5}", "5"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\left\{ 1, 2 \right\}}", r"\left\{ 1, 2 \right\}"),
        (r"\boxed{\left\{ x \right.} and {", r"\left\{ x \right."),
        (r"\boxed {17}.", "17"),
        (r"\boxed 5", "5"),
        (r"thus $\boxed 12.$ Good", "12"),
        (r"\boxed\frac{1}{2}$", r"\frac{1}{2}"),
        (r"\fbox{5}", "5"),
        (r"\boxed{4} \fbox{5}", "5"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{5} and then \boxed{6", "5"),
        (r"\boxed{5} and \boxed{}", "5"),
        ("The final answer is $24$. I hope it is correct.", "24"),
        ("The answer is 24. I hope so.", "24"),
        ("The answer is 2.5.", "2.5"),
        (r"the answer is therefore $\frac{1}{2}$, not 3", r"\frac{1}{2}"),
        (r"The answer is \(x = 5\).", "x = 5"),
        (r"The answer is \[x = 5\]", "x = 5"),
        ("The answer is $$5$$", "5"),
        ("**Answer:** (C)", "(C)"),
        ("Answer: 4\nAnswer: 5\n", "5"),
        ("so\n#### 5\nend", "5"),
        ("The answer is 4\n#### 5", "5"),
        (r"The answer is 4, that is \boxed{5}", "5"),
    ],
)
def test_the_answer_in_a_text(text: str, answer: str) -> None:
    assert math_answer(text) == answer


@pytest.mark.parametrize(
    "text", ["", "It is 5.", r"\boxed{12", r"\boxed{}", r"The answer is $\boxed{12", "Answer:", "####"]
)
def test_a_text_without_an_answer_or_with_one_that_is_cut_off_has_none(text: str) -> None:
    assert math_answer(text) is None


ALIKE = [
    (r"\frac12", r"\frac{1}{2}", r"\dfrac{1}{2}", r"\tfrac{1}2", r"\frac1{2}", "1/2", "$1/2$", r"\frac {1} {2}"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}", "-1/2", "\u22121/2"),
    (r"\frac\pi2", r"\frac{\pi}{2}", r"\pi/2", "π/2", "pi/2"),
    (r"\sqrt2", r"\sqrt{2}", r"\sqrt 2", "sqrt(2)"),
    (r"\frac{5\sqrt{3}}{3}", r"5\sqrt{3}/3", "5sqrt(3)/3", r"\frac{5\sqrt3}3"),
    ("0.5", ".5", "0.50", "$.5$"),
    ("5", "5.0", "5.", "{5}", "+5", "$5$", r"\(5\)", "x=5", "x = 5", r"\alpha=5", "f(x) = 5", "x_1 = 5"),
    (
        "5",
        r"5\text{ cm}",
        r"5\text{ cm}^2",
        r"5 \mathrm{cm}",
        "5 cm",
        "5 square feet",
        r"5\mbox{ units}",
        "5 miles per hour",
    ),
    ("90", r"90^\circ", r"90^{\circ}.", "90°", "90 degrees", r"90\degree"),
    ("50", r"50\%", "50%", "50 percent"),
    ("18.9", r"\$18.90", "$18.90", "18.90 dollars"),
    ("10000", r"10,\!000", "10{,}000", "10,000", r"10, \! 000"),
    ("1234567.5", "1,234,567.5"),
    ("C", "(C)", r"\text{(C)}", r"\text{C}", r"\textbf{(C)}"),
    (r"\text{Evelyn}", "evelyn", "Evelyn", r"\mathrm{Evelyn}"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})", r"(3,\,\dfrac{\pi}{2})", r"\bigl(3, \frac\pi2\bigr)"),
    (r"(-\infty,3]", r"\left(-\infty, 3\right]", r"x \in (-\infty,3]", r"(-\infty, 3]"),
    (r"1,2", "1, 2", "1 and 2", r"1 \text{ and } 2", r"1\text{ or }2", "1, and 2"),
    (r"x\leq 5", r"x \le 5", "x <= 5", "x≤5", r"x\leqslant5"),
    ("2516_8", "2516_{8}"),
    ("2516_{12}", "2516_12"),
    ("x^2", "x^{2}", "x ^ 2"),
    (r"3\cdot 4", r"3 \times 4", "3*4", "3×4"),
    (r"\begin{pmatrix} 1 \\ -2 \end{pmatrix}", r"\begin{pmatrix}1\\-2\end{pmatrix}"),
    (r"\emptyset", r"\varnothing", r"\{\}"),
    ("2i", r"2\mathbf{i}", r"2\mathrm{i}"),
    (r"\displaystyle\frac{1}{3}", r"\frac{1}{3}"),
    (r"(0,1) \cup (2,3)", "(0,1)∪(2,3)"),
    (r"p - q", "p-q", "p\u2212q"),
]
"""The forms of one answer."""
UNLIKE = [
    ("5", "-5"),
    ("5", "0.5"),
    ("5", "50"),
    ("0.5", r"\frac{1}{2}"),
    (r"\frac{2}{4}", r"\frac{1}{2}"),
    ("1,200", "(1,200)"),
    ("1, 200", "1200"),
    ("(1,2)", "[1,2]"),
    ("(1,2)", "(2,1)"),
    ("12xy", "12"),
    ("12xyz", "12"),
    ("4!", "4"),
    ("2i", "2"),
    (r"2\mathrm{i}", "2"),
    ("2x+3", "2x"),
    ("x^2", "x2"),
    ("x<5", r"x\leq5"),
    (r"\sqrt{12}", r"\sqrt{1}2"),
    ("10_2", "10"),
    ("1.05", "1.5"),
    ("100", "1"),
    ("A", "a"),
    (r"\text{even}", r"\text{odd}"),
    ("1", "11"),
    ("x=1, y=2", "x=2, y=1"),
]


@pytest.mark.parametrize("forms", ALIKE, ids=lambda forms: forms[0])
def test_answers_that_are_written_alike_are_the_same(forms: tuple[str, ...]) -> None:
    assert {normalised(form) for form in forms} == {normalised(forms[0])}


@pytest.mark.parametrize(("one", "other"), UNLIKE)
def test_answers_that_differ_stay_different(one: str, other: str) -> None:
    assert normalised(one) != normalised(other)


@pytest.mark.parametrize("forms", ALIKE, ids=lambda forms: forms[0])
def test_what_is_normalised_stays_as_it_is(forms: tuple[str, ...]) -> None:
    assert normalised(normalised(forms[0])) == normalised(forms[0])


@pytest.mark.parametrize(
    "text",
    ["{", "$", r"\frac", r"\boxed{", "5 abc ", "5 " + "a" * 30, "answer is ", "1/2", "1,000", " ", r"\text{", "####"],
)
def test_a_long_text_without_sense_takes_no_time(text: str) -> None:
    start = time.process_time()
    for function in (robust_number, math_answer, normalised):
        function(text * (4000 // len(text)) + "!")
    assert time.process_time() - start < 2
