"""Recipes: which sources are used, what no recipe may say, and what the command line changes of one."""

from pathlib import Path
from typing import Any

import pytest

from dreamer_jax.config import ConfigError, load_as
from dreamer_jax.preparation.recipe import (
    PAPER_BENCHMARKS,
    Benchmark,
    Keep,
    RawSource,
    Recipe,
    TokensConfig,
    included,
    licences,
)

FILE = """
from dreamer_jax.preparation.recipe import *

def get_config():
    return Recipe(
        sources=(
            RawSource("first", "owner/first", licence="MIT", prompt=("q",), response=["a"], keep=[Keep("x", ("1",))]),
            RawSource("second", files=("second/*",), licence="CC-BY-NC-4.0", commercial=False, turns="talk"),
            RawSource("third", hub="owner/third", text="text", gated=True),
        ),
    )
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    written = tmp_path / "recipe.py"
    written.write_text(FILE)
    return written


def load(path: Path, *overrides: str) -> Recipe:
    return load_as(Recipe, path, overrides)


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# From a file and a command line


def test_a_file_gives_a_recipe(path: Path):
    recipe = load(path)
    assert [source.name for source in recipe.sources] == ["first", "second", "third"]
    assert recipe.sources[0].response == ("a",)
    assert recipe.sources[0].keep == (Keep("x", ("1",)),)
    assert recipe.decontaminate.benchmarks == PAPER_BENCHMARKS


def test_the_command_line_changes_keys_of_sections_and_of_listed_sources(path: Path):
    overrides = "--sources.1.cap 5 --work.workers 1 --tokens.vocab 300 --sources.0.share 0.5 --duplicates.near False"
    recipe = load(path, *overrides.split(), "--exclude", "third", "gated", "--decontaminate.benchmarks.0.question", "Q")
    assert [source.cap for source in recipe.sources] == [0, 5, 0]
    assert [source.share for source in recipe.sources] == [0.5, 1, 1]
    assert (recipe.work.workers, recipe.tokens.vocab, recipe.duplicates.near) == (1, 300, False)
    assert recipe.exclude == ("third", "gated")
    assert recipe.decontaminate.benchmarks[0] == Benchmark("gsm8k", ("gsm8k/test.jsonl*",), "Q")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("--sources.1.cap=-5", "cap = -5: must be"),
        ("--work.workers=many", "--work.workers"),
        ("--tokens.vocab=0", "tokens.vocab = 0: must be"),
        ("--tokens.context=1", "tokens.context = 1: must be"),
        ("--sources.0.share=0", "share = 0.0: must be"),
        ("--duplicates.threshold=1.5", "duplicates.threshold = 1.5: must be"),
        ("--tokens.prompt_template=Q", "tokens.prompt_template = 'Q': must hold {text} once"),
        ("--sources.0.remove=(", "remove = '('"),
        ("--work.engine=spark", "--work.engine"),
        ("--exclude=fourth", "exclude: there is no ['fourth']; there are first, gated, non-commercial, second, third"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(path: Path, capsys: pytest.CaptureFixture[str], override: str, said: str):
    with pytest.raises((ConfigError, SystemExit)) as caught:
        load(path, override)
    assert said in f"{caught.value}{capsys.readouterr().err}"


def test_an_unknown_key_ends_with_the_nearest_one(path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        load(path, "--sources.1.capp", "5")
    assert "--sources.1.cap" in capsys.readouterr().err


def test_an_unknown_key_in_a_file_is_a_line(path: Path):
    path.write_text(FILE.replace("gated=True", "gate=True"))
    assert refused(path) == "unknown key 'sources['third'].gate'; did you mean 'sources['third'].gated'?"


def test_a_config_of_a_training_is_no_recipe(path: Path):
    path.write_text("from dreamer_jax.config import *\ndef get_config():\n    return Config('x')\n")
    assert refused(path) == f"get_config() of '{path}' returned Config, not Recipe"


# What no recipe may say


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"prompt": ("q",)}, "source 'a': give either prompt and response, or turns, or text"),
        ({"prompt": ("q",), "response": ("a",), "text": "t"}, "give either prompt and response, or turns, or text"),
        ({}, "give either prompt and response, or turns, or text"),
        ({"text": "t", "files": ()}, "source 'a': give its hub id, or patterns of its files"),
        ({"text": "t", "held_out": 1.0}, "held_out = 1.0: must be"),
        ({"text": "t", "name": "A b"}, "must be a name of small letters"),
        ({"text": "t", "traces": "thinking"}, "traces = 'thinking': must be"),
    ],
)
def test_a_source_that_cannot_be_read_is_refused(values: dict[str, Any], said: str):
    with pytest.raises(ConfigError) as caught:
        RawSource(**{"name": "a", "files": ("*",)} | values)
    assert said in str(caught.value)


def test_a_recipe_names_sources_and_each_once():
    with pytest.raises(ConfigError, match="sources: name at least one raw set"):
        Recipe()
    source = RawSource("a", files=("*",), text="text")
    with pytest.raises(ConfigError, match=r"sources: names are not distinct: \['a', 'a'\]"):
        Recipe(sources=(source, source))


@pytest.mark.parametrize("template", ["{text}", "Q: {text}\n", "{question} {text}"])
def test_a_template_holds_the_text_once(template: str):
    assert TokensConfig(prompt_template=template).prompt_template == template
    with pytest.raises(ConfigError, match=r"must hold \{text\} once"):
        TokensConfig(response_template=template + template)


# Which sources are used


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ((), [0, 1, 2]),
        (("first",), [1, 2]),
        (("non-commercial",), [0, 2]),
        (("gated",), [0, 1]),
        (("gated", "non-commercial"), [0]),
    ],
)
def test_sources_are_left_out_by_name_or_by_licence_and_keep_their_places(
    path: Path, exclude: tuple[str, ...], left: list[int]
):
    recipe = load(path, *(["--exclude", *exclude] if exclude else []))
    assert list(included(recipe)) == left
    assert [source for source in recipe.sources if source in included(recipe).values()] == list(
        included(recipe).values()
    )


def test_no_source_at_all_is_an_error(path: Path):
    with pytest.raises(ConfigError, match="exclude: leaves no source"):
        included(load(path, "--exclude", "first", "second", "third"))


def test_licences_are_listed_with_what_they_allow(path: Path):
    first, second, third = licences(load(path, "--exclude", "gated")).splitlines()
    assert first.split() == ["first", "MIT", "owner/first"]
    assert second.split(maxsplit=2) == ["second", "CC-BY-NC-4.0", "no commercial use"]
    assert third.endswith("owner/third  access has to be asked for  left out")
