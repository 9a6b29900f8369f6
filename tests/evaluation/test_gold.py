"""A task's own answers are right, and another question's are not."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from dreamer_jax.data.template import DEFAULT_TEMPLATE, Template
from dreamer_jax.evaluation.benchmarks.gsm8k import NO_ANSWER, Gsm8k
from dreamer_jax.evaluation.benchmarks.hendrycks_math import Math
from dreamer_jax.evaluation.gold import check, gold_outcomes, shuffled_outcomes
from dreamer_jax.evaluation.requests import (
    Choose,
    EvaluationError,
    Generate,
    Generated,
    Item,
    Likelihoods,
    Metric,
    Outcome,
    Questions,
    Read,
    Task,
    Verdict,
)

METRICS = {"first": Metric("likeliest option", 0.25), "second": Metric("the same of half of them")}


@dataclass(frozen=True)
class Letters(Task):
    """Questions with four options, the first of which is never right; every other one has a second form."""

    name: str = "letters"
    metrics = METRICS
    count: int = 400

    def questions(self, root: Path, template: Template = DEFAULT_TEMPLATE) -> Questions:
        request = Choose("Q", (" a", " b", " c", " d"))
        return Questions([Item(str(n), request, gold=[1 + n % 3]) for n in range(self.count)])

    def verdicts(self, items: Sequence[Item], outcomes: Sequence[Outcome]) -> Iterator[Verdict]:
        for item, outcome in zip(items, outcomes, strict=True):
            assert isinstance(outcome, Likelihoods)
            score = float(outcome.nats.index(max(outcome.nats)) in item.gold)
            yield Verdict({"first": score, "second": score} if int(item.id) % 2 else {"first": score})


def texts(count: int) -> list[Item]:
    return [Item(str(n), Generate("", (), 1), n, solution=f"#### {n}") for n in range(count)]


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_gsm8k_answer_is_right_by_all_metrics_and_no_other_question_s_is(tmp_path: Path) -> None:
    rows = [{"question": "?", "answer": f"{n} = <<{n}*1000={n}000>>{n},000\n#### {n},000"} for n in range(1, 30)]
    write(tmp_path / "gsm8k" / "test.jsonl", [*rows, {"question": "?", "answer": "none"}])
    found = check(Gsm8k(), tmp_path)
    assert (found.items, found.exceptions, found.notes) == (29, {}, {NO_ANSWER: 1})
    assert found.gold == {"robust": 1.0, "strict": 1.0, "flexible": 1.0}
    assert found.shuffled == {"robust": 0.0, "strict": 0.0, "flexible": 0.0}


def test_an_answer_that_its_own_solution_misses_is_told(tmp_path: Path) -> None:
    solutions = [r"\boxed{1}", r"\boxed{2}", r"\boxed{3}", r"\boxed{4}"]
    rows = [{"problem": "?", "solution": text, "answer": text[7]} for text in solutions]
    write(tmp_path / "math" / "test.jsonl", [*rows, {"problem": "?", "solution": "five", "answer": "5"}])
    found = check(Math(), tmp_path)
    assert found.gold == {"verified": 0.8, "normalised": 0.8}
    assert found.exceptions == {"verified": ["4"], "normalised": ["4"]}
    assert found.shuffled == {"verified": 0.0, "normalised": 0.0}


def test_right_options_are_likeliest_and_shuffled_ones_are_near_chance(tmp_path: Path) -> None:
    found = check(Letters(), tmp_path)
    assert (found.gold, found.exceptions) == ({"first": 1.0, "second": 1.0}, {})
    assert found.shuffled == pytest.approx({"first": 1 / 3, "second": 1 / 3}, abs=0.1)


def test_a_right_option_is_certain_and_the_others_are_not() -> None:
    item = Item("0", Choose("", (" a", " bb", " ccc")), gold=1)
    assert gold_outcomes([item]) == [Likelihoods((-1000.0, 0.0, -1000.0), (False, True, False), (1, 1, 1))]


def test_a_right_text_follows_the_prompt_as_in_training() -> None:
    assert gold_outcomes(texts(1)) == [Generated(" #### 0", 0, True)]


def test_shuffling_gives_each_answer_once_and_none_to_its_own_question() -> None:
    given = [outcome.text for outcome in shuffled_outcomes(texts(50), seed=0) if isinstance(outcome, Generated)]
    own = [f" #### {n}" for n in range(50)]
    assert sorted(given) == sorted(own)
    assert all(one != other for one, other in zip(given, own, strict=True))


def test_shuffling_depends_on_the_seed_alone() -> None:
    assert shuffled_outcomes(texts(50), seed=1) == shuffled_outcomes(texts(50), seed=1)
    assert shuffled_outcomes(texts(50), seed=1) != shuffled_outcomes(texts(50), seed=2)


def test_shuffling_keeps_kinds_of_requests_apart() -> None:
    options = [Item(f"o{n}", Choose("", (" a", " b", " c")[: 2 + n]), gold=2 * n) for n in range(2)]
    outcomes = shuffled_outcomes([options[0], *texts(3), options[1]], seed=0)
    assert [type(outcome) for outcome in outcomes] == [Likelihoods, Generated, Generated, Generated, Likelihoods]
    assert isinstance(outcomes[0], Likelihoods)
    assert outcomes[0].nats == (0.0, -1000.0)  # the third option of another question, of two


@pytest.mark.parametrize(
    "item", [Item("7", Read("text")), Item("7", Generate("", (), 1), gold="5"), Item("7", Choose("", (" a",)))]
)
def test_an_item_without_a_right_answer_is_an_error_that_names_it(item: Item) -> None:
    with pytest.raises(EvaluationError, match="item 7: no right answer"):
        gold_outcomes([item])


def test_a_single_item_has_no_other_answer_to_take() -> None:
    with pytest.raises(EvaluationError, match="item 0: no other item's answer"):
        shuffled_outcomes(texts(1), seed=0)


def test_a_task_without_items_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="letters: no row has an answer"):
        check(Letters(count=0), tmp_path)
