"""An evaluation's folder: taken up where it was left, judged as a whole, refused for another model."""

import dataclasses
import json

import pytest

from dreamer_jax.data.template import DEFAULT_TEMPLATE, Template
from dreamer_jax.evaluation.evaluation import Evaluation, Subject, limited, read_records
from dreamer_jax.evaluation.requests import (
    Choose,
    EvaluationError,
    Generate,
    Generated,
    Item,
    Likelihoods,
    Metric,
    Questions,
    Task,
    Verdict,
)

SUBJECT = Subject("run", "runs/run", 6, 3072, 4, 4, "DR+DA", 1000, "abc", "float32", 64)


METRICS = {"right": Metric("the number is there"), "chosen": Metric("the likeliest", chance=0.5)}


@dataclasses.dataclass(frozen=True)
class Sums(Task):
    """Says whether a text has the right number; a question and its options are two items."""

    name: str = "sums"
    metrics = METRICS
    rows: int = 4
    stop: str = "\n"

    def questions(self, root, template=DEFAULT_TEMPLATE):
        asked = [
            Item(f"text/{i}", Generate(template.asked(f"{i}+1="), (self.stop,), 8), str(i + 1), group="text")
            for i in range(self.rows)
        ]
        chosen = [Item(f"options/{i}", Choose(f"{i}+1=", ("1", "2")), 0, group="options") for i in range(self.rows)]
        return Questions([*asked, *chosen], {"odd rows": 1})

    def verdicts(self, items, outcomes):
        for item, outcome in zip(items, outcomes, strict=True):
            if isinstance(outcome, Generated):
                yield Verdict({"right": float(item.gold in outcome.text)}, {"number": outcome.text})
            else:
                yield Verdict({"chosen": float(outcome.nats[0] >= outcome.nats[1])})


class Model:
    """Answers like a poor student, and breaks down after some answers if told so."""

    def __init__(self, breaks_after=None):
        self.asked, self.breaks_after = [], breaks_after

    def can_read(self, request):
        return not isinstance(request, Generate) or "9" not in request.prompt

    def respond(self, requests):
        for number, request in reversed(list(enumerate(requests))):
            if len(self.asked) == self.breaks_after:
                raise KeyboardInterrupt
            self.asked.append(request)
            if isinstance(request, Choose):
                yield number, Likelihoods((-1.0, -0.5), (False, True), (1, 1))
            else:
                yield number, Generated("= 2\u2028", 4, finished=False, cut="3" in request.prompt)


def run(folder, task=None, model=None, limit=None, subject=SUBJECT):
    steps = []
    evaluation = Evaluation.opened(folder, subject)
    evaluation.run(
        task or Sums(),
        folder,
        model or Model(),
        template=Template("Sum: {text}"),
        limit=limit,
        progress=lambda done, total: steps.append((done, total)),
    )
    return json.loads((folder / "scores.json").read_text()), steps


def test_scores_have_intervals_groups_notes_and_a_hash_of_the_prompts(tmp_path):
    scores, steps = run(tmp_path / "e")
    task = scores["tasks"]["sums"]
    assert (scores["run"], scores["step"], scores["variant"], scores["weights"]) == ("run", 6, "DR+DA", "abc")
    assert task["metrics"]["right"] == pytest.approx(
        {"value": 0.25, "low": 0.0456, "high": 0.6994, "n": 4, "chance": None}, abs=1e-4
    )
    assert task["metrics"]["chosen"]["value"] == 0
    assert task["groups"]["options"]["chosen"]["chance"] == 0.5
    assert task["notes"] == {"odd rows": 1, "prompts cut to the context": 1, "answers that did not end": 4}
    assert (len(task["prompts"]), task["limit"]) == (64, None)
    assert steps == [(i, 8) for i in range(9)]


def test_every_item_has_a_line_with_prompt_outcome_and_verdict(tmp_path):
    run(tmp_path / "e")
    records = {record["id"]: record for record in read_records(tmp_path / "e" / "items.jsonl")}
    assert len(records) == 8
    record = records["text/1"]
    assert record["request"] == {"prompt": "Sum: 1+1=", "stop": ["\n"], "max_tokens": 8}
    assert record["outcome"] == {"text": "= 2\u2028", "tokens": 4, "finished": False, "cut": False}
    assert (record["gold"], record["scores"], record["extracted"]) == ("2", {"right": 1.0}, {"number": "= 2\u2028"})


def test_what_was_answered_before_an_interruption_is_not_asked_again(tmp_path):
    whole, _ = run(tmp_path / "whole")
    first, second = Model(breaks_after=5), Model()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "e", model=first)
    items = tmp_path / "e" / "items.jsonl"
    assert json.loads((tmp_path / "e" / "scores.json").read_text())["tasks"] == {}
    items.write_text(items.read_text()[:-7])  # the last line is cut in half
    scores, steps = run(tmp_path / "e", model=second)
    assert (len(first.asked), len(second.asked), steps[0]) == (5, 4, (4, 8))
    assert scores == whole
    third = Model()
    assert run(tmp_path / "e", model=third)[0] == whole
    assert third.asked == []


def test_a_prompt_that_changed_is_asked_again(tmp_path):
    before, _ = run(tmp_path / "e")
    model = Model()
    after, _ = run(tmp_path / "e", task=Sums(stop="."), model=model)
    assert len(model.asked) == 4
    assert after["tasks"]["sums"]["prompts"] != before["tasks"]["sums"]["prompts"]


def test_a_limit_counts_within_each_part_and_can_be_raised(tmp_path):
    scores, _ = run(tmp_path / "e", limit=2)
    assert (scores["tasks"]["sums"]["limit"], scores["tasks"]["sums"]["metrics"]["right"]["n"]) == (2, 2)
    model = Model()
    run(tmp_path / "e", model=model)
    assert len(model.asked) == 4
    assert [item.id for item in limited(Sums().questions(tmp_path).items, 1)] == ["text/0", "options/0"]


def test_a_task_that_is_asked_again_is_incomplete_until_it_is_judged(tmp_path):
    run(tmp_path / "e", limit=2)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "e", model=Model(breaks_after=1))
    assert json.loads((tmp_path / "e" / "scores.json").read_text())["tasks"] == {}


@pytest.mark.parametrize(("key", "value"), [("weights", "other"), ("depth", 5), ("context", 32), ("stride", 4)])
def test_results_of_another_model_or_setting_are_not_mixed(tmp_path, key, value):
    run(tmp_path / "e")
    with pytest.raises(EvaluationError, match=f"another model or setting .*{key} .*give another --out"):
        run(tmp_path / "e", subject=dataclasses.replace(SUBJECT, **{key: value}))
    run(tmp_path / "e", subject=dataclasses.replace(SUBJECT, checkpoint="elsewhere/run"))


def test_damaged_results_are_named(tmp_path):
    run(tmp_path / "e")
    items = tmp_path / "e" / "items.jsonl"
    lines = items.read_text().split("\n")
    items.write_text("\n".join([lines[0], '{"task": 3', *lines[2:]]))
    with pytest.raises(EvaluationError, match=r"items\.jsonl: line 2 is damaged; delete the file"):
        run(tmp_path / "e")
    (tmp_path / "e" / "scores.json").write_text("[]")
    with pytest.raises(EvaluationError, match=r"scores\.json is damaged"):
        run(tmp_path / "e")


def test_questions_that_the_tokenizer_cannot_read_are_left_out_and_counted(tmp_path):
    scores, _ = run(tmp_path / "e", task=Sums(rows=10))
    task = scores["tasks"]["sums"]
    assert (task["metrics"]["right"]["n"], task["metrics"]["chosen"]["n"]) == (9, 10)
    assert task["notes"]["left out: the tokenizer does not know a character"] == 1


def test_answers_whose_scores_were_lost_are_not_thrown_away(tmp_path):
    run(tmp_path / "e")
    items = (tmp_path / "e" / "items.jsonl").read_text()
    (tmp_path / "e" / "scores.json").unlink()
    with pytest.raises(EvaluationError, match=r"has items\.jsonl and no scores\.json"):
        run(tmp_path / "e")
    assert (tmp_path / "e" / "items.jsonl").read_text() == items


def test_a_lower_limit_leaves_no_scores_of_items_that_it_leaves_out(tmp_path):
    run(tmp_path / "e")
    run(tmp_path / "e", limit=2)
    records = read_records(tmp_path / "e" / "items.jsonl")
    assert (len(records), sum("scores" in record for record in records)) == (8, 4)


def test_a_task_without_questions_has_no_score(tmp_path):
    with pytest.raises(EvaluationError, match=r"sums: there is no question \(\{'odd rows': 1\}\)"):
        run(tmp_path / "e", task=Sums(rows=0))
