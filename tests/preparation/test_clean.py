"""Cleaning: what is repaired, what is left alone, and which rule drops a row."""

import pytest

from dreamer_jax.preparation.clean import Cleaned, Dropped, Limits, Repair, Rule, cleaned, repaired

QUESTION = "What is 1 + 1?"
NO_LIMITS = Limits(1 << 20, 1 << 20)


def clean(prompt: str, response: str, limits: Limits = NO_LIMITS) -> Cleaned | Dropped:
    return cleaned(prompt, response, limits)


def rule(response: str, prompt: str = QUESTION) -> Rule | None:
    result = clean(prompt, response)
    return result.rule if isinstance(result, Dropped) else None


@pytest.mark.parametrize(
    ("text", "mended", "repair"),
    [
        ("2 Ã— 3 â‰¤ 7", "2 × 3 ≤ 7", Repair.ENCODING),
        ("donâ€™t", "don’t", Repair.ENCODING),
        ("\f" + "rac{1}{2} \t" + "imes \b" + "oxed{3}", r"\frac{1}{2} \times \boxed{3}", Repair.ESCAPES),
        ("\\left( x \r" + "ight) \a" + "lpha \v" + "ec{x}", r"\left( x \right) \alpha \vec{x}", Repair.ESCAPES),
        ("\t" + "extbf{(A)} 5", r"\textbf{(A)} 5", Repair.ESCAPES),
        ("1\u200b0\ufeff \x000\xad", "10 0", Repair.INVISIBLE),
        ("a\u200db", "ab", Repair.INVISIBLE),
        ("a \r\nb\rc\u2028d", "a\nb\nc\nd", Repair.SPACE),
        ("a\xa0b\u2009c", "a b c", Repair.SPACE),
        ("a\n\n\n\n\n\nb", "a\n\n\nb", Repair.SPACE),
        ("\n  a  \n", "a", Repair.SPACE),
        ("cafe\u0301", "café", Repair.COMPOSED),
    ],
)
def test_a_fault_is_mended_and_named(text: str, mended: str, repair: Repair) -> None:
    assert repaired(text) == (mended, {repair})


@pytest.mark.parametrize(
    "text",
    [
        r"\[ \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} \]",
        "x² + y₁ ≤ ½ · √3 − ∞ ∈ ℝ",
        "“It’s” 5′ long",
        "（１）全角",
        "â · b̂ and â × ĉ, but amanhã — não",
        "the operator Â – λ and Â ψ",
        "2 ×² 3, π Å, 5 ×“two”",
        "if a &lt; b &amp;&amp; c:",
        "def f(x):\n    if x:\n        return x  # x\n\n\ndef g():\n\treturn 1",
        "a\t1\tan apple\there",
        "می‌خواهم",
        "👨‍👩‍👧",
        r"$\$5 \times 2$",
        r"\neq",
    ],
)
def test_mathematics_code_and_other_scripts_stay_as_they_are(text: str) -> None:
    assert repaired(text) == (text, set())


def test_repairing_twice_changes_nothing_more() -> None:
    once, _ = repaired("\ufeff 2 Ã— 3\r\n\f" + "rac{1}{2}\xa0 \u200b\n")
    assert repaired(once) == (once, set())


def test_the_repairs_of_question_and_answer_are_listed_together() -> None:
    assert clean("1\u200b + 1?", "2\xa0or 10") == ("1 + 1?", "2 or 10", (Repair.INVISIBLE, Repair.SPACE))


@pytest.mark.parametrize(("prompt", "response"), [("", "2"), (" \n", "2"), (QUESTION, ""), (QUESTION, "\u200b\r\n")])
def test_an_empty_text_drops_the_row(prompt: str, response: str) -> None:
    assert rule(response, prompt) == Rule.EMPTY


@pytest.mark.parametrize(
    "response",
    [
        "x = â ˆ š 16 = 4",
        "x = 2 â \x81 „ 5",
        "108 ã — 108",
        "area = ï € r 2",
        "x \ufffd 2",
        "x \uf0b4 2",
        "x = \ud835",
        "r = Î ± 2",
    ],
)
def test_signs_that_cannot_be_known_again_drop_the_row(response: str) -> None:
    assert rule(response) == Rule.MOJIBAKE
    assert rule("2", prompt=response) == Rule.MOJIBAKE


def test_the_detail_of_lost_signs_can_be_written_to_a_file() -> None:
    result = clean(QUESTION, "x = \ud835")
    assert isinstance(result, Dropped)
    assert result.detail.encode()


@pytest.mark.parametrize(
    "response",
    [
        "None",
        "N/A",
        "nan.",
        "$null$",
        "####",
        "Work: 1 + 1\n#### None",
        "The answer is: N/A",
        "See solution.",
        "Please see the attached image",
        "refer to the solution above",
        "not provided",
        "-",
        "???",
        r"So it is $\boxed{}$.",
    ],
)
def test_a_placeholder_is_no_answer(response: str) -> None:
    assert rule(response) == Rule.MISSING


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        ("Which of these is prime: 4, 6, or none of them?", "None"),
        ("Which sign is missing, + or - ?", "-"),
        ("Which metal is in salt?", "Na"),
        ("Solve x = x + 1.", "no solution"),
        ("What is 1/0?", "undefined"),
        ("Solve |x| < 0.", r"$\emptyset$"),
        ("How many?", "0"),
        ("Which letter?", "a"),
        ("Is it so?", "None of the cases holds, so it is not."),
    ],
)
def test_short_answers_stay(prompt: str, response: str) -> None:
    assert rule(response, prompt) is None


def test_a_text_above_the_limit_drops_the_row() -> None:
    limits = Limits(prompt=20, response=5)
    assert clean(QUESTION, "12345", limits) == (QUESTION, "12345", ())
    assert clean(QUESTION, "123456", limits) == (Rule.OVERSIZED, "the answer has 6 characters")
    assert clean("?" * 21, "2", limits) == (Rule.OVERSIZED, "the question has 21 characters")


@pytest.mark.parametrize("response", ["iVBORw0KGgo4A9Zz" * 20, "data:image/png;base64," + "aB3/" * 60, "=-" * 40])
def test_encoded_bytes_and_mere_signs_are_no_text(response: str) -> None:
    assert rule(response) == Rule.NOT_TEXT


@pytest.mark.parametrize(
    "response",
    [
        "9" * 1000,
        "0x" + "ff" * 300,
        r"\{(-1,1),(1,-1),(-1,-1),(1,1),(0,0)\}",
        "<=",
        "[[], [[]], [[], [[]]]]",
        "a" * 500,
    ],
)
def test_long_numbers_and_short_signs_are_text(response: str) -> None:
    assert rule(response) is None


@pytest.mark.parametrize(
    "response",
    [
        r"So the answer is $\boxed{\frac{1}{2}",
        r"So we get \[ x = 2 + 3",
        r"So \(x = 2",
        "\\begin{align*} x &= 2 \\\\ y",
        "Code:\n```python\nprint(2)",
        r"and so $x = \frac{1}",
        "First we take the",
        "Then x + 1 =",
    ],
)
def test_an_answer_that_stops_within_something_is_truncated(response: str) -> None:
    assert rule(response) == Rule.TRUNCATED


@pytest.mark.parametrize(
    "response",
    [
        r"$\boxed{\{1, 2\}}$",
        r"\[ \left\{ x \right. \]",
        "\\begin{pmatrix} 1 \\\\[2pt] 2 \\end{pmatrix}",
        "\\[ a \\\\[1ex] b \\]",
        "She pays $5 and keeps $3 and $2",
        r"She pays $5 in all, so $x = 0.5 \cdot 10$, or \(5\)",
        r"She pays $5. So \(x = 5\) and $x = 5$.",
        "[0, 1)",
        "answer : a",
        "print(solve())",
        "```\nx = 1\n```",
        "=",
        "the",
    ],
)
def test_whole_answers_are_not_truncated(response: str) -> None:
    assert rule(response) is None


def test_an_answer_of_the_length_at_which_its_source_cuts_must_end_with_a_sign() -> None:
    limits = Limits(cut_at=12)
    assert clean(QUESTION, "1 and one ma", limits) == (Rule.TRUNCATED, "1 and one ma")
    assert isinstance(clean(QUESTION, "1 and one: 2.", limits), Cleaned)
    assert isinstance(clean(QUESTION, "It is 2", limits), Cleaned)


def test_every_rule_and_repair_has_a_key_of_its_own() -> None:
    keys = [str(name) for kind in (Rule, Repair) for name in kind]
    assert len(set(keys)) == len(keys) == 11
