"""Tasks go by their names, and evaluations that asked the same have the same hash."""

import dataclasses
import hashlib
from typing import Any

import pytest

from dreamer_jax.evaluation.benchmarks.tasks import TASKS, named, prompts_hash
from dreamer_jax.evaluation.requests import Choose, EvaluationError, Generate, Item, Read, Request

REQUESTS: list[Request] = [
    Generate("Question: 1 + 1?\nAnswer:", ("Q:", "\n\n"), 256),
    Choose("Question: 1 + 1?\nAnswer:", (" 2", " 3")),
    Read("1 + 1 = 2"),
]


def items(*requests: Request) -> list[Item]:
    return [Item(str(i), request) for i, request in enumerate(requests)]


def test_the_papers_five_stand_first_in_the_order_of_its_table() -> None:
    assert list(TASKS)[:5] == ["ppl", "gsm8k", "math", "mmlu_math", "mathqa"]


def test_every_task_goes_by_its_own_name_and_has_metrics() -> None:
    for name, task in zip(TASKS, named(list(TASKS)), strict=True):
        assert task.name == name
        assert task.metrics
        assert all(metric.about and "\n" not in metric.about for metric in task.metrics.values())


def test_tasks_come_in_the_order_in_which_they_are_named() -> None:
    assert [task.name for task in named(["mathqa", "gsm8k"])] == ["mathqa", "gsm8k"]
    with pytest.raises(EvaluationError, match="no task is named"):
        named([])


@pytest.mark.parametrize(
    ("name", "nearest"), [("gsm8", "gsm8k"), ("GSM8K", "gsm8k"), ("mmlu", "mmlu_math"), ("math-qa", "mathqa")]
)
def test_of_an_unknown_task_the_nearest_is_named_and_all_are_listed(name: str, nearest: str) -> None:
    with pytest.raises(EvaluationError) as caught:
        named(["ppl", name])
    assert f"unknown task '{name}'; did you mean '{nearest}'?" in str(caught.value)
    assert ", ".join(TASKS) in str(caught.value)


def test_of_a_task_that_is_like_none_all_are_listed() -> None:
    with pytest.raises(EvaluationError, match=r"unknown task 'zzz'; there are ppl, "):
        named(["zzz"])


def test_a_task_that_is_named_twice_is_refused() -> None:
    with pytest.raises(EvaluationError, match="'gsm8k' is named twice"):
        named(["gsm8k", "ppl", "gsm8k"])


def changes(request: Request) -> list[Request]:
    """The request with a character more or another, or a number more, in every place of every field."""
    changed: list[Request] = []
    for field in dataclasses.fields(request):
        value: Any = getattr(request, field.name)
        if isinstance(value, int):
            values = [value + 1, value - 1]
        elif isinstance(value, str):
            values = texts(value)
        else:
            values = [(*value[:i], text, *value[i + 1 :]) for i in range(len(value)) for text in texts(value[i])]
            values += [value[::-1], value[1:], (*value, "x"), ("".join(value),)]
        changed += [dataclasses.replace(request, **{field.name: new}) for new in values]
    return changed


def texts(text: str) -> list[str]:
    at = range(len(text))
    return [text[:i] + "\u00e9" + text[i + 1 :] for i in at] + [text[:i] + text[i + 1 :] for i in at] + [f"{text} "]


def test_the_hash_changes_with_any_character_of_a_request_and_with_any_number() -> None:
    hashes = [prompts_hash(items(*REQUESTS))]
    for i, request in enumerate(REQUESTS):
        hashes += [prompts_hash(items(*REQUESTS[:i], new, *REQUESTS[i + 1 :])) for new in changes(request)]
    assert len(hashes) > 140
    originals = [new for request in REQUESTS for new in changes(request)]
    assert len(set(hashes)) == 1 + len(set(originals))


def test_the_hash_changes_with_the_order_the_number_and_the_kind_of_requests() -> None:
    lists = [REQUESTS, REQUESTS[::-1], REQUESTS[:-1], [*REQUESTS, REQUESTS[0]], [], [Read("a")], [Read("a"), Read("")]]
    assert len({prompts_hash(items(*requests)) for requests in lists}) == len(lists)
    assert prompts_hash(items(Generate("a", (), 1))) != prompts_hash(items(Choose("a", ())))


def test_the_hash_is_of_the_requests_alone_and_the_same_in_every_version() -> None:
    named_otherwise = [Item(f"x{i}", request, gold=[i], group="g") for i, request in enumerate(REQUESTS)]
    assert prompts_hash(named_otherwise) == prompts_hash(items(*REQUESTS))
    lines = (
        r'{"kind": "Generate", "max_tokens": 256, "prompt": "Question: 1 + 1?\nAnswer:", "stop": ["Q:", "\n\n"]}',
        r'{"context": "Question: 1 + 1?\nAnswer:", "kind": "Choose", "options": [" 2", " 3"]}',
        r'{"kind": "Read", "text": "1 + 1 = 2"}',
    )
    written = "".join(f"{line}\n" for line in lines)
    assert prompts_hash(items(*REQUESTS)) == hashlib.sha256(written.encode()).hexdigest()
