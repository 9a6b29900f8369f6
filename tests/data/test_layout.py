"""Fields, values and conversations as public sets have them, and what is said of those that do not fit."""

from decimal import Decimal
from typing import Any

import pytest

from dreamer_jax.data.layout import UnusableRow, exchange, text_of, values_at
from dreamer_jax.data.rows import Number

OPEN_THOUGHTS_2: dict[str, Any] = {
    "conversations": [
        {"from": "user", "value": "Find the largest prime divisor of $9$.\n"},
        {"from": "assistant", "value": "<think>\nOkay\n</think>\n\nIt is $3$."},
    ],
    "source": None,
}
NUMINA_MATH = {
    "problem": "Solve $4y = 8$.",
    "messages": [{"content": "Solve $4y = 8$.", "role": "user"}, {"content": "$y = 2$", "role": "assistant"}],
}
NATURAL_REASONING = {
    "question": "Why?",
    "reference_answer": "",
    "responses": [{"response_model": "Llama", "response": "Thus."}, {"response_model": "Qwen", "response": "So."}],
}
OPEN_R1 = {"generations": ["<think>a</think> 1", "<think>b</think> 2"], "correctness_math_verify": [True, False]}
DEEP_MATH = {"question": "Evaluate.", "final_answer": Number("0"), "difficulty": 4.5, "r1_solution_1": "Okay"}
AMPS = {"problem": "4, 10, 16?", "hints": ["Add", "$6$"]}


@pytest.mark.parametrize(
    ("row", "path", "values"),
    [
        (NATURAL_REASONING, "responses.response", ["Thus.", "So."]),
        (NATURAL_REASONING, "reference_answer", [""]),
        (NUMINA_MATH, "messages.content", ["Solve $4y = 8$.", "$y = 2$"]),
        (OPEN_R1, "generations", [OPEN_R1["generations"]]),
        (DEEP_MATH, "r1_solution_1", ["Okay"]),
        (AMPS, "hints", [["Add", "$6$"]]),
        (OPEN_THOUGHTS_2, "source", [None]),
        (OPEN_THOUGHTS_2, "source.name", []),
        ({"a": []}, "a.b", []),
        ({"a": [{"b": 1}, {"c": 2}, None, [{"b": 3}]]}, "a.b", [1, 3]),
        ({"a.b": 1, "a": {"b": 2}}, "a.b", [1]),
        ({"a.b": {"c.d": 1}, "a": {"b": 2}}, "a.b.c.d", [1]),
        ({"a": {"b.c": 1}}, "a.b.c", [1]),
    ],
)
def test_a_path_leads_to_its_values(row: dict[str, Any], path: str, values: list[Any]):
    assert values_at(row, path) == values


@pytest.mark.parametrize(
    ("row", "path", "detail"),
    [
        ({}, "a", "the row has no fields"),
        (
            {"problem": "", "answer": ""},
            "Answer",
            "the row has 'problem', 'answer'; did you mean 'answer'? Set the key",
        ),
        ({"problem": ""}, "text", "the row has 'problem'; set the key"),
        (
            NATURAL_REASONING,
            "responses.respons",
            "'responses' has 'response_model', 'response'; did you mean 'response'? Set the key",
        ),
        ({"a": {"b": {}}}, "a.b.c", "'a.b' has no fields"),
        (AMPS, "hints.text", "'hints' is a text; set the key"),
        (
            {"x" * 99: 1} | dict.fromkeys("abcdefghijkl"),
            "q",
            f"the row has '{'x' * 40}', {str(list('abcdefghi'))[1:-1]}",
        ),
    ],
)
def test_a_missing_field_is_told_with_those_that_are_there(row: dict[str, Any], path: str, detail: str):
    with pytest.raises(UnusableRow) as caught:
        values_at(row, path, "the key")
    assert caught.value.fault.cause == f"no field '{path}'"
    assert caught.value.fault.detail.startswith(detail)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("π \n", "π \n"),
        ("", ""),
        (Number("3.50"), "3.50"),
        (Number("1e400"), "1e400"),
        (42, "42"),
        (-4.5, "-4.5"),
        (Decimal("3.50"), "3.50"),
    ],
)
def test_texts_and_numbers_are_as_they_are_written(value: Any, text: str):
    assert text_of(value) == text
    assert type(text_of(value)) is str


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "field 'a' is not text (it is null)"),
        (True, "field 'a' is not text (it is true or false)"),
        (float("nan"), "field 'a' is not text (it is a number)"),
        (["x"], "field 'a' is not text (it is a list)"),
        ({}, "field 'a' is not text (it is an object)"),
        (b"x", "field 'a' is not text (it is bytes)"),
        ("\ud800", "field 'a' has half a surrogate pair, which is no Unicode text"),
    ],
)
def test_what_is_no_text_is_told_by_its_kind(value: Any, said: str):
    with pytest.raises(UnusableRow) as caught:
        text_of(value, "a")
    assert str(caught.value) == said


def talk(*texts: str) -> list[dict[str, str]]:
    """Turns of "role: text"."""
    return [dict(zip(("role", "content"), text.split(": "), strict=True)) for text in texts]


@pytest.mark.parametrize(
    ("turns", "question", "answer"),
    [
        (
            OPEN_THOUGHTS_2["conversations"],
            "Find the largest prime divisor of $9$.",
            "<think>\nOkay\n</think>\n\nIt is $3$.",
        ),
        (NUMINA_MATH["messages"], "Solve $4y = 8$.", "$y = 2$"),
        ([["human", "1?"], ["gpt", "2"]], "1?", "2"),
        ([{"role": "user", "content": [{"type": "text", "text": "1"}, {"text": "?"}]}, ("bot", 2)], "1?", "2"),
        ([{"role": None, "content": None, "from": "prompter", "value": "1?"}, ["Model ", "2"]], "1?", "2"),
        (talk("system: Be brief", "user: 1?", "assistant: 2", "user: 3?", "assistant: 4"), "1?", "2"),
        (talk("assistant: Hello", "user: 1?", "assistant: 2"), "1?", "2"),
        (talk("user: Given", "user: 1?", "assistant: Well", "assistant: 2"), "Given\n\n1?", "Well\n\n2"),
        ([*talk("user: 1?"), {"role": "assistant", "content": None}, *talk("tool: x", "assistant: 2")], "1?", "2"),
        (talk("user: 1?", "assistant: let me run it", "tool: x", "assistant: 2"), "1?", "2"),
        (talk("user: 1?", "assistant: 2", "user: 3?", "martian: 4"), "1?", "2"),
    ],
)
def test_the_first_question_goes_with_the_answer_that_follows_it(turns: Any, question: str, answer: str):
    assert exchange(turns) == (question, answer)


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([], "field 'turns' has no question (its turns: none)"),
        (talk("system: 1?", "assistant: 2"), "field 'turns' has no question (its turns: system, assistant)"),
        (talk("user: 1?", "system: 2"), "field 'turns' has no answer (its turns: user, system)"),
        (talk("assistant: 2", "user: 1?"), "field 'turns' has no answer (its turns: assistant, user)"),
        (talk("user:  ", "assistant: 2"), "field 'turns' has no question (its turns: user, assistant)"),
        (talk("user: 1?", "assistant:  ", "user: 2?", "assistant: 3"), "field 'turns' has no answer"),
        (talk("user: 1?", "assistant: 2", "tool: 3"), "field 'turns' has no answer (its turns: user, assistant, tool)"),
        (talk("user: 1?", "assistant: x", "tool: y", "user: 2?", "assistant: 3"), "field 'turns' has no answer"),
        (talk("martian: 1?"), "field 'turns' has a turn of an unknown role ('martian'; known are user, human,"),
        ([[1, "x"]], "field 'turns' has a turn of an unknown role ('1'"),
        ("user: 1?", "field 'turns' is no list of turns (it is a text)"),
        (
            ["1?"],
            "field 'turns' has a turn without a role (it is a text; known are {role, content} and {from, value} and",
        ),
        ([{"speaker": "x"}], "field 'turns' has a turn without a role (it has 'speaker'; known are"),
        ([{"role": "user", "content": {}}], "field 'turns.content' is not text (it is an object)"),
        ([["user", [{"type": "image"}]]], "field 'turns' has a part that is no text (image)"),
        ([["user", ["x"]]], "field 'turns' has a part that is no text (a text)"),
    ],
)
def test_a_conversation_without_question_or_answer_is_told_with_its_turns(turns: Any, said: str):
    with pytest.raises(UnusableRow) as caught:
        exchange(turns, "turns")
    assert str(caught.value).startswith(said)
