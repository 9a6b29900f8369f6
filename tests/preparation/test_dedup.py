"""Duplicates are found under a change of case, punctuation or a word, and rows that differ in what counts are kept."""

import random

import daft
import numpy as np
import pytest

from dreamer_jax.preparation.dedup import (
    Rule,
    band_keys,
    beyond_cap,
    candidates,
    canonical,
    canonical_text,
    components,
    exact_duplicates,
    jaccard,
    near_duplicates,
    ranked,
    shingles,
    without,
)

RULE = Rule()
WORDS = [
    "apple",
    "river",
    "stone",
    "cloud",
    "paper",
    "green",
    "window",
    "garden",
    "silver",
    "market",
    "orange",
    "letter",
]
FAMILIES = 60
"""Planted originals. Their ranks are lower than those of all that is made from them."""


@pytest.fixture(autouse=True, scope="module")
def quiet():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DAFT_PROGRESS_BAR", "0")
        yield


def sentence(rng: random.Random, words: int) -> str:
    """A sentence of words and numbers that no other sentence resembles."""
    return " ".join(str(rng.randrange(1000)) if i % 9 == 4 else rng.choice(WORDS) for i in range(words)) + "."


def originals() -> list[tuple[str, str]]:
    rng = random.Random(7)
    return [(sentence(rng, 40), sentence(rng, 60)) for _ in range(FAMILIES)]


def frame(pairs: list[tuple[str, str]]) -> daft.DataFrame:
    """Rows whose ranks are their places."""
    questions, answers = zip(*pairs, strict=True)
    return daft.from_pydict({"rank": list(range(len(pairs))), "question": list(questions), "answer": list(answers)})


def kept_instead(dropped: daft.DataFrame) -> dict[int, int]:
    """Each dropped rank with the rank that is kept."""
    columns = dropped.to_pydict()
    return dict(zip(columns["rank"], columns["keeper"], strict=True))


def exact(pairs: list[tuple[str, str]]) -> dict[int, int]:
    return kept_instead(exact_duplicates(canonical(frame(pairs))))


def near(pairs: list[tuple[str, str]], passes: int = 1) -> dict[int, int]:
    rows = canonical(frame(pairs)).collect()
    return kept_instead(near_duplicates(rows, band_keys(rows, RULE), RULE, passes))


def copies(change) -> list[tuple[str, str]]:
    """The originals, and after them what a change makes of each."""
    return originals() + [(change(question), change(answer)) for question, answer in originals()]


ALL_COPIES = {FAMILIES + place: place for place in range(FAMILIES)}


def reworded(text: str) -> str:
    words = text.split()
    return " ".join([*words[:20], "another", *words[21:]])


@pytest.mark.parametrize(
    "change",
    [str, str.upper, lambda text: "“" + text.replace(" ", ",  ") + "” !?", lambda text: f"**{text}**\n\n"],
    ids=["verbatim", "case", "punctuation", "markdown"],
)
def test_a_copy_is_an_exact_duplicate_in_whatever_case_and_punctuation(change):
    assert exact(copies(change)) == ALL_COPIES


def test_a_changed_word_in_a_long_text_makes_a_near_duplicate_and_no_exact_one():
    assert exact(copies(reworded)) == {}
    assert near(copies(reworded)) == ALL_COPIES


@pytest.mark.parametrize("number", ["977", "0.5", "twelve"])
def test_another_number_in_the_question_makes_another_row(number):
    changed = [(f"There are {number} of them. {question}", answer) for question, answer in originals()]
    same = [(f"There are 4 of them. {question}", answer) for question, answer in originals()]
    assert exact(same + changed) == near(same + changed) == {}


@pytest.mark.parametrize(
    ("one", "other"),
    [("3 + 5", "5 + 3"), ("x + 5", "x - 5"), ("x < 5", "x > 5"), ("1.5", "15"), ("find x", "find y"), ("3x", "3y")],
)
def test_what_a_question_computes_is_no_punctuation(one, other):
    question, answer = originals()[0]
    pairs = [(f"{question} {one}", answer), (f"{question} {other}", answer)]
    assert exact(pairs) == near(pairs) == {}


def test_brackets_make_another_question():
    asked = [("What is 88 / 4 / 2?", "It is 11."), ("What is 88 / (4 / 2)?", "It is 44.")]
    assert kept_instead(beyond_cap(canonical(frame(asked)), 1)) == {}


def test_a_short_question_that_is_another_is_no_duplicate_under_a_long_answer():
    solution = originals()[0][1]
    assert near([(f"Compute the {name} of 60 degrees.", solution) for name in ("sine", "cosine", "tangent")]) == {}


def test_a_short_answer_that_is_another_is_no_duplicate_after_a_long_question():
    question = originals()[0][0] * 3
    assert near([(question, "Add them all up to see it."), (question, "We draw a picture and count.")]) == {}


def test_another_result_in_the_answer_makes_another_row():
    assert near([(question, f"{answer} It is {n}") for question, answer in originals()[:9] for n in (5000, 6000)]) == {}


def test_another_solution_of_a_question_is_no_duplicate():
    rng = random.Random(8)
    pairs = originals() + [(question, sentence(rng, 60)) for question, _ in originals()]
    assert exact(pairs) == near(pairs) == {}


def test_rows_of_one_template_with_other_numbers_never_meet():
    template = "A farmer has {} cows and buys {} more. How many cows does the farmer have now, all in all?"
    pairs = [(template.format(n, n + 1), f"The farmer has {2 * n + 1} cows.") for n in range(300)]
    assert candidates(band_keys(canonical(frame(pairs)), RULE)).count_rows() == 0


def test_short_and_empty_rows_are_equal_only_to_their_like():
    pairs = [("2 + 2", "4"), ("...", "!"), ("2 + 3", "5"), ("", ""), ("2 + 2", "4."), ("why", ""), ("Why?", "")]
    assert exact(pairs) == {4: 0, 6: 5}
    assert near(pairs) == {4: 0, 6: 5}


def test_the_lowest_rank_is_kept_in_whatever_order_rows_come():
    rows = frame(copies(reworded) + copies(str.upper)).to_pandas()
    drops = []
    for seed in range(3):
        mixed = canonical(daft.from_pandas(rows.sample(frac=1, random_state=seed))).collect()
        drops.append(
            (
                kept_instead(exact_duplicates(mixed)),
                kept_instead(near_duplicates(mixed, band_keys(mixed, RULE), RULE)),
            )
        )
    assert drops[0] == drops[1] == drops[2]
    assert set(drops[0][1].values()) == set(range(FAMILIES))


def test_the_number_of_passes_changes_nothing():
    assert near(copies(reworded), passes=3) == near(copies(reworded))


def test_a_source_of_higher_priority_comes_first_whatever_its_row_numbers():
    columns = daft.from_pydict({"priority": [1, 0, 0], "row": [0, 10**12, 3]})
    ranks = columns.select(ranked(daft.col("priority"), daft.col("row")).alias("rank")).to_pydict()["rank"]
    assert sorted(ranks) == [ranks[2], ranks[1], ranks[0]]


def test_a_question_keeps_its_first_answers_up_to_the_cap():
    asked = [("What is 2 + 3?", f"answer {n}") for n in range(5)] + [("what is 2 + 3", "answer 9"), ("And 4?", "8")]
    assert kept_instead(beyond_cap(canonical(frame(asked)), 3)) == {3: 0, 4: 0, 5: 0}


def test_plain_text_without_a_question_has_no_cap():
    assert kept_instead(beyond_cap(canonical(frame([("", f"text {n}") for n in range(9)])), 2)) == {}


def test_dropped_rows_leave_a_frame_with_its_other_columns():
    rows = frame(copies(str.upper))
    left = without(rows, exact_duplicates(canonical(rows))).sort("rank").to_pydict()
    assert left == frame(originals()).to_pydict()


def test_a_chain_of_pairs_keeps_its_lowest_rank():
    rank, keeper = components(np.array([9, 7, 5, 40]), np.array([7, 5, 2, 30]))
    assert dict(zip(rank.tolist(), keeper.tolist(), strict=True)) == {5: 2, 7: 2, 9: 2, 40: 30}


def test_no_pairs_join_nothing():
    assert [part.size for part in components(np.zeros(0, np.int64), np.zeros(0, np.int64))] == [0, 0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It costs $1,200,300.50, i.e. A LOT...", "it costs 1200300.50 i e a lot"),
        ("a well-known x−y", "a well known x - y"),
        ("**Note:** 2*3=6", "note 2 * 3 = 6"),
        (r"\frac{1}{2}\cdot x^2 < .5", "frac 1 2 cdot x ^ 2 < .5"),
        ("f(2x), it's 88/(4/2)", "f ( 2 x ) its 88 / ( 4 / 2 )"),
        ("Привет, мир!", "привет мир"),
        (None, ""),
    ],
)
def test_words_numbers_and_operators_are_what_counts(text, expected):
    column = daft.from_pydict({"text": [text, "x"]}).select(canonical_text(daft.col("text")))
    assert column.to_pydict()["text"][0] == expected


def test_shingles_are_runs_of_words_and_a_short_text_is_one():
    assert shingles("a b c d", 3) == {("a", "b", "c"), ("b", "c", "d")}
    assert shingles("a b", 3) == {("a", "b")}


def test_similarity_is_the_share_of_common_shingles():
    assert jaccard("a b c d e", "a b c d f", 3) == pytest.approx(2 / 4)


def test_rows_at_the_threshold_are_compared_almost_surely_and_half_as_similar_rows_seldom():
    assert RULE.chance(RULE.threshold) > 0.99
    assert RULE.chance(RULE.threshold / 2) < 0.07
