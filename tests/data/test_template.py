"""A template lays a question and its answer out, and tells where the next question begins."""

import pytest

from dreamer_jax.config import DataConfig
from dreamer_jax.data.template import DEFAULT_TEMPLATE, Template


def test_the_usual_layout_is_that_of_harnesses() -> None:
    assert Template.of(DataConfig()) == DEFAULT_TEMPLATE
    assert DEFAULT_TEMPLATE.asked("1 + 1?") + DEFAULT_TEMPLATE.answered("2") == "Question: 1 + 1?\nAnswer: 2"


def test_a_run_lays_texts_out_as_its_config_says() -> None:
    template = Template.of(DataConfig(prompt_template="<q>{text}</q>", response_template="\n{text}."))
    assert template.asked("1 + 1?") + template.answered("2") == "<q>1 + 1?</q>\n2."


def test_the_mark_within_a_text_is_text() -> None:
    assert DEFAULT_TEMPLATE.answered("{text} {0}") == " {text} {0}"


@pytest.mark.parametrize(
    ("prompt", "stops"),
    [
        ("Question: {text}\nAnswer:", ("Question:", "</s>")),
        ("\n### Task:\n{text}\n", ("### Task:", "</s>")),
        ("[INST] {text} [/INST]", ("[INST]", "</s>")),
        ("</s>{text}", ("</s>",)),
        ("{text}\nAnswer:", ("</s>",)),
        ("## {text}\n", ("</s>",)),  # an answer of GSM8K begins with "#### "
        ("Solve {text}", ("</s>",)),
    ],
)
def test_an_answer_ends_before_the_label_of_another_question(prompt: str, stops: tuple[str, ...]) -> None:
    assert Template(prompt).stops(("</s>",)) == stops
