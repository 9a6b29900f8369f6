"""Decontamination: which rows contain a benchmark question, by which rule, and which only look like it."""

import pickle
import textwrap

import pytest

from dreamer_jax.preparation.decontaminate import Hit, Index, Question, tokens_of

BAKER = Question(
    "stories",
    "baker",
    "A baker's oven holds 24 loaves. She fills it 5 times a day and sells each loaf for $3, except for 17 loaves that "
    "she gives away. How much money, in dollars, does she take in 6 days?",
)
ROOTS = Question(
    "competition",
    "roots",
    r"Let $r$ and $s$ be the roots of $x^2 - \frac{7}{2} x + 1 = 0.$ Compute $\left(r - 1\right)^2 \cdot (s - 1)^2.$",
)
IDENTITY = Question("competition", "identity", r"Prove that $\sin^2 x + \cos^2 x = 1$.")
LETTERS = Question("competition", "letters", "Determine the number of ways to arrange the letters of the word GIRAFFE.")
SHORT = Question("choice", "short", r"Simplify $\sqrt{242}$.")
PERCENT = Question("choice", "percent", "what is 35 % of 1,240 ?")
VAGUE = Question("choice", "vague", "Which of the following is true?")
CHOICE = Question("choice", "ring", "What is the order of the subgroup of Z_60 that 25 generates?")
QUESTIONS = (BAKER, ROOTS, IDENTITY, LETTERS, SHORT, PERCENT, VAGUE, CHOICE)
INDEX = Index.of(QUESTIONS)

BEFORE = "We met on Monday and went through the old sheets. Then the teacher wrote a new one on the board.\n" * 30
BEHIND = "\nNobody had an idea at first. Then somebody drew a table, and after that it went quickly." * 30

FULL_SIZE = pytest.mark.parametrize("question", [BAKER, ROOTS, IDENTITY, LETTERS, CHOICE], ids=lambda q: q.id)
ANY_SIZE = pytest.mark.parametrize("question", QUESTIONS, ids=lambda q: q.id)


def found(prompt: str, response: str = "42") -> list[Question]:
    return [hit.question for hit in INDEX.hits(prompt, response)]


def rules(prompt: str, response: str = "42") -> list[tuple[str, str, str]]:
    return [(hit.question.id, hit.rule, hit.part) for hit in INDEX.hits(prompt, response)]


@ANY_SIZE
def test_a_verbatim_question_is_a_hit_of_any_length(question: Question) -> None:
    assert INDEX.hits(question.text, "42") == [Hit(question, "whole prompt", 1.0, "prompt")]


@ANY_SIZE
def test_white_space_and_line_breaks_make_no_difference(question: Question) -> None:
    assert found("\n\n  " + question.text.replace(" ", " \n ")) == [question]


@pytest.mark.parametrize("question", [BAKER, LETTERS, PERCENT, VAGUE, CHOICE], ids=lambda q: q.id)
def test_case_makes_no_difference(question: Question) -> None:
    assert rules(question.text.upper()) == [(question.id, "whole prompt", "prompt")]


@pytest.mark.parametrize(
    ("text", "question"),
    [
        (BAKER.text.replace(",", " –").replace("?", "").replace("'", "’").replace("$", r"\$"), BAKER),
        (r"Let \(r\) and \(s\) be the roots of \[x^{2}-\dfrac72x+1=0\] Compute \((r-1)^2\times(s-1)^{2}\)", ROOTS),
        (r"**Let** $r$, and $s$, be the roots of $$x² − \tfrac{7}{2}\,x + 1 = 0$$ **Compute** $(r-1)²·(s-1)²$", ROOTS),
        (r"Prove that: $$\displaystyle \sin^{2}x+\cos^{2}x \;=\; 1$$", IDENTITY),
        ("Simplify: √242", SHORT),
        (r"What is $35\%$ of 1240", PERCENT),
        (r"What is 35 percent of $1{,}240$?", PERCENT),
        ("What is the order of the subgroup of $Z_{60}$, that 25 generates", CHOICE),
    ],
)
def test_punctuation_and_the_setting_of_formulas_make_no_difference(text: str, question: Question) -> None:
    assert rules(text) == [(question.id, "whole prompt", "prompt")]


@FULL_SIZE
def test_a_question_is_found_inside_a_long_text(question: Question) -> None:
    text = f"{BEFORE} {question.text} {BEHIND}"
    assert rules(text) == [(question.id, "contained", "prompt")]
    assert rules("Go on.", text) == [(question.id, "contained", "response")]


@FULL_SIZE
@pytest.mark.parametrize("margin", ["", "> ", "    "])
def test_a_question_broken_over_short_lines_is_found(question: Question, margin: str) -> None:
    lines = textwrap.wrap(question.text, 24, break_long_words=False)
    assert found(BEFORE + "\n".join(margin + line for line in lines) + BEHIND) == [question]


def test_known_miss_a_question_with_line_numbers_between_its_words() -> None:
    lines = textwrap.wrap(BAKER.text, 24)
    assert found("\n".join(f"{number}) {line}" for number, line in enumerate(lines, 1))) == []


def test_a_multiple_choice_question_is_found_with_its_options() -> None:
    assert rules(f"{CHOICE.text}\n(A) 5 (B) 12 (C) 25 (D) 60") == [("ring", "contained", "prompt")]


@pytest.mark.parametrize("question", [SHORT, PERCENT], ids=lambda q: q.id)
def test_a_short_question_has_to_stand_as_sentences_of_its_own(question: Question) -> None:
    alone = f"Question: {question.text}\nPut the answer into a box."
    assert rules(alone) == [(question.id, "contained", "prompt")]
    assert rules("Go on.", f"The next one. {question.text} That is easy.") == [(question.id, "contained", "response")]
    assert found(f"Try to {question.text.rstrip(' .?')} times 2 and tell me the result.") == []


def test_a_short_question_without_a_number_counts_only_as_a_whole_prompt() -> None:
    assert found(VAGUE.text) == [VAGUE]
    assert found(f"A set has two parts. {VAGUE.text} (A) It is open. (B) It is closed.") == []


@pytest.mark.parametrize(
    ("text", "question"),
    [
        (BAKER.text.replace("She fills it", "The woman fills it"), BAKER),
        (BAKER.text.replace("How much money, in dollars, does she take in", "What are her takings in"), BAKER),
        (ROOTS.text.replace("Compute", "What is the value of"), ROOTS),
        (CHOICE.text.replace("What is", "Find"), CHOICE),
    ],
)
def test_a_question_with_a_few_other_words_is_a_hit_by_its_n_grams(text: str, question: Question) -> None:
    (hit,) = INDEX.hits(BEFORE + text, "42")
    assert (hit.question, hit.rule) == (question, "n-grams")
    assert 0.6 <= hit.overlap < 1


def test_known_miss_a_question_in_other_words() -> None:
    paraphrase = (
        "24 loaves fit into the oven of a woman who bakes. It is filled 5 times daily. 17 loaves go to friends, all "
        "others bring $3. What does she earn within 6 days?"
    )
    assert found(paraphrase) == []


@pytest.mark.parametrize(
    ("number", "other"),
    [("24", "36"), ("5 times", "4 times"), ("$3", "$2.50"), ("17", "seventeen"), ("6 days", "a week")],
)
def test_one_changed_number_makes_another_question(number: str, other: str) -> None:
    assert number in BAKER.text
    assert found(BAKER.text.replace(number, other)) == []


@pytest.mark.parametrize(
    "text",
    [
        ROOTS.text.replace("7", "5"),
        ROOTS.text.replace("r - 1", "r - 2"),
        ROOTS.text.replace("+ 1", "- 1"),
        CHOICE.text.replace("25", "24"),
        CHOICE.text.replace("60", "600"),
        SHORT.text.replace("242", "24.2"),
        PERCENT.text.replace("1,240", "1,24"),
    ],
)
def test_another_number_or_sign_in_a_formula_makes_another_question(text: str) -> None:
    assert found(text) == []


def test_a_number_that_stands_elsewhere_in_the_row_does_not_count() -> None:
    assert found(BAKER.text.replace("24 loaves", "36 loaves") + " Her sister is 24.") == []


def test_a_shared_template_is_no_hit() -> None:
    template = BAKER.text.replace("24", "36").replace("5", "3").replace("17", "40").replace("baker", "potter")
    assert found(template.replace("oven", "kiln").replace("loaves", "pots").replace("loaf", "pot")) == []
    assert found(LETTERS.text.replace("GIRAFFE", "BANANA")) == []


def test_a_shared_formula_is_no_hit() -> None:
    solution = r"Since $\sin^2 x + \cos^2 x = 1$, the roots of $x^2 - \frac{7}{2} x + 1 = 0$ have the product 1."
    assert found(r"Find the least value of $\sin^4 x + \cos^4 x$.", solution) == []


def test_stock_phrases_of_solutions_are_no_hit() -> None:
    solution = (
        "Let $r$ and $s$ be the roots of the equation. In 6 days she takes 24 times 5 times $3. The answer is 42."
    )
    assert found("Solve the equation.", solution) == []


def test_a_row_that_contains_several_questions_names_each_once_in_the_order_of_the_index() -> None:
    assert found(f"{CHOICE.text}\n{BAKER.text}", f"{BAKER.text}\n{SHORT.text}") == [BAKER, SHORT, CHOICE]


def test_the_better_of_two_finds_is_reported() -> None:
    changed = BAKER.text.replace("She fills", "The woman fills")
    assert INDEX.hits(changed, BAKER.text) == [Hit(BAKER, "contained", 1.0, "response")]
    assert INDEX.hits(BAKER.text, changed) == [Hit(BAKER, "whole prompt", 1.0, "prompt")]


def test_two_benchmarks_with_the_same_question_are_both_named() -> None:
    twin = Question("other", "1", BAKER.text.lower())
    index = Index.of([BAKER, twin])
    assert [hit.question for hit in index.hits(BAKER.text, "")] == [BAKER, twin]
    assert [hit.question for hit in index.hits(BEFORE + BAKER.text, "")] == [BAKER, twin]


def test_a_drawing_is_no_part_of_a_question() -> None:
    drawn = Question(
        "competition", "drawn", "What is the area of triangle $ABC$ if $AB = 8$? [asy] draw((0,0)--(8,0)); [/asy]"
    )
    index = Index.of([drawn])
    assert index.hits("What is the area of triangle ABC if AB = 8?", "")[0].rule == "whole prompt"
    assert not index.hits("Draw it.", "[asy] draw((0,0)--(8,0)); [/asy]")


@pytest.mark.parametrize("text", ["", " \n", "$$", "...?"])
def test_texts_without_words_and_numbers_hit_nothing(text: str) -> None:
    assert INDEX.hits(text, text) == []
    assert Index.of([Question("empty", "1", text)]).hits(text, "") == []


def test_an_index_without_questions_finds_nothing() -> None:
    assert Index.of([]).hits(BAKER.text, BAKER.text) == []


def test_an_index_can_be_sent_to_other_processes() -> None:
    copy = pickle.loads(pickle.dumps(INDEX))
    for question in QUESTIONS:
        assert copy.hits(question.text, BEFORE) == INDEX.hits(question.text, BEFORE)


def test_tokens_are_words_numbers_and_signs() -> None:
    tokens = tokens_of(r"The 2-digit sum: $\dfrac{1}{2} + 3.50\,x \le 1,000$!")
    assert " ".join(tokens) == "the 2 digit sum frac 1 2 + 3.50 x le 1000"
