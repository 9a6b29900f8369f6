"""two_hop: right answers, and held-out facts that no composition of the training has."""

from collections import Counter

import numpy as np
import pytest

from dreamer_jax.data.document import Document
from dreamer_jax.data.families import two_hop
from dreamer_jax.data.files import DataError

SETTINGS = two_hop.Settings()
SEED = 3


@pytest.fixture(scope="module")
def train() -> list[Document]:
    return list(two_hop.train(SETTINGS, 0, SEED))


@pytest.fixture(scope="module", name="tests")
def documents_of_the_tests() -> dict[str, list[Document]]:
    return two_hop.tests(SETTINGS, SEED)


def facts_of(documents: list[Document]) -> dict[tuple[str, str], str]:
    """What the facts among some documents say: by entity and relation, where it leads."""
    pairs = [(tuple(document.prompt.split()), document.response) for document in documents]
    return {prompt: answer for prompt, answer in pairs if len(prompt) == 2}


def compositions_of(documents: list[Document]) -> list[tuple[str, str, str, str]]:
    """Entity, both relations and answer."""
    prompts = [(*document.prompt.split(), document.response) for document in documents]
    return [prompt for prompt in prompts if len(prompt) == 4]


def test_there_are_as_many_documents_as_the_settings_say(train: list[Document], tests: dict[str, list[Document]]):
    facts, compositions = facts_of(train), compositions_of(train)
    assert len(facts) == 200 * 10
    assert Counter(entity for entity, _ in facts) == {f"e{i}": 10 for i in range(200)}
    assert {relation for _, relation in facts} == {f"r{i}" for i in range(20)}
    assert len(compositions) == 7 * 2000 == len(set(compositions))
    assert len(train) == 16_000
    assert sum(map(len, tests.values())) == 2000 * 10 - 14_000
    assert all(entity != tail for (entity, _), tail in facts.items())


def test_a_composition_leads_where_its_two_facts_lead(train: list[Document], tests: dict[str, list[Document]]):
    facts = facts_of(train)
    for documents in (train, *tests.values()):
        for entity, first, second, answer in compositions_of(documents):
            assert facts[facts[entity, first], second] == answer


def test_the_tests_hold_out_what_their_names_say(train: list[Document], tests: dict[str, list[Document]]):
    facts = facts_of(train)

    def used(documents: list[Document]) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
        found = [(entity, first, second) for entity, first, second, _ in compositions_of(documents)]
        return {(e, first) for e, first, _ in found}, {(facts[e, first], second) for e, first, second in found}

    trained = set.union(*used(train))
    held_out = facts.keys() - trained
    assert len(held_out) == 100
    for name, (first_is, second_is) in {
        "in_distribution": (False, False),
        "first_held_out": (True, False),
        "second_held_out": (False, True),
        "both_held_out": (True, True),
    }.items():
        firsts, seconds = used(tests[name])
        assert firsts
        assert {fact in held_out for fact in firsts} == {first_is}, name
        assert {fact in held_out for fact in seconds} == {second_is}, name
    assert list(tests) == ["in_distribution", "first_held_out", "second_held_out", "both_held_out"]


def test_validation_is_the_beginning_of_the_test_in_distribution(tests: dict[str, list[Document]]):
    assert list(two_hop.validation(SETTINGS, 0, SEED)) == tests["in_distribution"][:500]
    assert list(two_hop.validation(SETTINGS, 30, SEED)) == tests["in_distribution"][:30]


def test_a_part_of_the_training_has_all_facts_and_then_compositions(train: list[Document]):
    some = list(two_hop.train(SETTINGS, 2500, SEED))
    assert facts_of(some) == facts_of(train)
    assert len(facts_of(some)) == 2000
    assert len(compositions_of(some)) == 500
    assert some == train[:2500]


def test_fewer_documents_than_facts_are_refused():
    assert len(list(two_hop.train(SETTINGS, 2000, SEED))) == 2000
    with pytest.raises(
        DataError, match=r"1999 documents do not hold the 2000 facts, .* documents_per_task = 2000 or m"
    ):
        two_hop.train(SETTINGS, 1999, SEED)


def test_another_seed_is_another_graph_with_other_facts_held_out():
    one, other = (two_hop.graph(SETTINGS, seed) for seed in (1, 2))
    for array, changed in zip(one[1:], other[1:], strict=True):
        assert (array != changed).mean() > 0.05


@pytest.mark.parametrize(
    ("values", "cause"),
    [
        (
            {"compositions": 9.5},
            r"are 19000, and of facts that are not held out there are 18\d\d\d, .* greater out_degree",
        ),
        (
            {"entities": 2, "relations": 1, "out_degree": 1},
            r"there are 0, of which one at least must be left to test with: give a greater out_degree or a small",
        ),
    ],
)
def test_more_compositions_than_the_graph_has_are_refused(values: dict[str, float], cause: str):
    with pytest.raises(DataError, match=cause):
        two_hop.train(two_hop.Settings(**values), 0, SEED)


def test_the_number_of_compositions_that_the_message_gives_is_accepted():
    values = {"entities": 50, "relations": 6, "out_degree": 3}
    with pytest.raises(DataError) as refused:
        two_hop.train(two_hop.Settings(**values, compositions=5.0), 0, SEED)
    most = float(str(refused.value).split("compositions = ")[1].split(",")[0])
    assert two_hop.tests(two_hop.Settings(**values, compositions=most), SEED)["in_distribution"]


def test_guessing_from_a_part_of_the_prompt_is_of_little_use(train: list[Document], tests: dict[str, list[Document]]):
    for key in (0, 1, 2):
        by: dict[str, Counter[str]] = {}
        for composition in compositions_of(train):
            by.setdefault(composition[key], Counter())[composition[3]] += 1
        asked = compositions_of(tests["in_distribution"])
        right = [by[composition[key]].most_common(1)[0][0] == composition[3] for composition in asked]
        assert np.mean(right) < 0.06
