"""Reasoning traces: what is cut, what stays, and which rows have no answer left."""

import pytest

from dreamer_jax.preparation.reasoning import DEEPMATH, OPEN_THOUGHTS, THINK, How, Marks, is_unproved, stripped


@pytest.mark.parametrize(
    ("text", "left", "how"),
    [
        ("  Two and two is 4.\n", "Two and two is 4.", How.UNTOUCHED),
        ("<think>\nHmm, 2 + 2.\n</think>\n\nIt is 4.", "It is 4.", How.BLOCKS),
        ("First. <think>a</think> Second. <think>b</think> Third.", "First.\n\nSecond.\n\nThird.", How.BLOCKS),
        ("<think>a <think>b</think> c</think> It is 4.", "It is 4.", How.NESTED),
        ("Okay, 2 + 2.\n</think>\nIt is 4.", "It is 4.", How.UNOPENED),
        ("Okay.</think>Is it 5?</think>It is 4.", "It is 4.", How.UNOPENED),
        ("<think>a</think> Wait, more. </think> It is 4.", "It is 4.", How.UNOPENED),
    ],
)
def test_what_lies_outside_of_traces_is_left(text: str, left: str, how: How) -> None:
    result = stripped(text, THINK)
    assert (result.text, result.how) == (left, how)


@pytest.mark.parametrize(
    ("text", "how"),
    [
        ("<think>\nOkay, so I need to", How.UNCLOSED),
        ("It may be 4. <think>Or is it", How.UNCLOSED),
        ("<think>a <think>b</think> It is 4.", How.UNCLOSED),
        ("<think>It is 4.</think>\n", How.NO_ANSWER),
        ("Okay, it is 4.</think>", How.NO_ANSWER),
        ("<think>a</think> It is 4. </think>", How.NO_ANSWER),
    ],
)
def test_a_text_without_an_answer_is_emptied_and_says_why(text: str, how: How) -> None:
    result = stripped(text, THINK)
    assert (result.text, result.how) == ("", how)
    assert result.cut


@pytest.mark.parametrize(
    "text",
    [
        "<THINK>no</THINK>yes",
        "< think >no</ think >yes",
        "<\nthink>no<\t/think>yes",
        "<thought>no</thought>yes",
        "<thinking>no</thinking>yes",
        "<thinking>no</think>yes",
    ],
)
def test_marks_are_known_in_every_spelling(text: str) -> None:
    assert stripped(text, THINK).text == "yes"


@pytest.mark.parametrize(
    "text",
    [
        "The model writes `<think>` first and `</think>` last.",
        'It begins with "<think>".',
        "It begins with (`<think>`).",
        "It ends with “</think>”.",
        "If a <thinker> has x < think, then think > y.",
        "I think that $a<b>c$.",
    ],
)
def test_marks_that_are_words_of_a_text_stay(text: str) -> None:
    assert stripped(text, THINK) == (text, "", How.UNTOUCHED)


def test_a_trace_may_end_in_a_quotation() -> None:
    assert stripped('<think>They ask for "4"</think>"4"', THINK).text == '"4"'


def test_the_cut_part_can_be_looked_at() -> None:
    result = stripped("<think>one</think> A <think>two</think> B", THINK)
    assert result.cut == "one\n\ntwo"


def test_a_deepmath_solution_follows_the_last_closing_mark() -> None:
    result = stripped("Okay, so the limit... </think> Not yet. </think>\n\nThe limit is \\(0\\).", DEEPMATH)
    assert result == ("The limit is \\(0\\).", "Okay, so the limit...\n\nNot yet.", How.UNOPENED)


def test_a_deepmath_solution_without_a_mark_is_a_trace_that_was_cut_off() -> None:
    assert stripped("Okay, so I have this limit to evaluate...", DEEPMATH).how == How.NO_MARK


@pytest.mark.parametrize(
    ("text", "left", "how"),
    [
        (
            "<|begin_of_thought|>a<|end_of_thought|>\n<|begin_of_solution|>\n4\n<|end_of_solution|>",
            "4",
            How.BLOCKS,
        ),
        ("<|begin_of_thought|>a<|end_of_thought|> So 4.", "So 4.", How.BLOCKS),
        ("<|begin_of_thought|>a<|end_of_thought|> So 4. <|end_of_solution|>", "So 4.", How.BLOCKS),
        ("<|begin_of_thought|>a<|end_of_thought|><|begin_of_solution|>So", "", How.UNCLOSED_ANSWER),
        ("<|begin_of_thought|>a", "", How.UNCLOSED),
        ("<|begin_of_solution|>4<|end_of_solution|>", "4", How.UNTOUCHED),
        ("<|begin_of_solution|> <|end_of_solution|>", "", How.NO_ANSWER),
    ],
)
def test_a_marked_solution_is_taken_out_of_its_marks(text: str, left: str, how: How) -> None:
    result = stripped(text, OPEN_THOUGHTS)
    assert (result.text, result.how) == (left, how)


def test_a_source_may_name_its_own_marks() -> None:
    marks = Marks(("[reasoning]",), ("[/reasoning]",))
    assert stripped("[reasoning]a[/reasoning] <think> 4", marks).text == "<think> 4"


def test_a_long_trace_with_many_marks_takes_no_long_time() -> None:
    assert stripped("<think>a</think>" * 20_000 + "4", THINK).text == "4"


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        ("Prove that $\\sqrt{2}$ is irrational.", "$\\sqrt{2}$ is irrational."),
        ("Let n be even. Show that n^2 is even.", "proven"),
        ("For all n > 0 prove: n < 2^n.", "n < 2^n"),
        (
            "A circle touches the sides of triangle ABC in D, E and F. Prove that the lines AD, BE and CF "
            "meet in one single point of the plane.",
            "The lines AD, BE and CF meet in one single point of the plane of triangle ABC.",
        ),
        ("Find a proof of the lemma.", "See above."),
    ],
)
def test_a_proof_question_with_a_few_words_or_its_own_statement_is_unproved(prompt: str, response: str) -> None:
    assert is_unproved(prompt, response)


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        (
            "Prove that the sum of two even numbers is even.",
            "Let the numbers be 2a and 2b. Their sum is 2a + 2b = 2(a + b), twice an integer, hence even.",
        ),
        ("What is 1 + 1?", "2"),
        ("How much alcohol is in a litre of 80 proof vodka?", "0.4 litres"),
        ("How many cards must he name in order to show that he does not guess?", "59"),
        ("The graph shows that x grows. What is x?", "5"),
    ],
)
def test_proofs_and_short_answers_to_other_questions_stay(prompt: str, response: str) -> None:
    assert not is_unproved(prompt, response)
