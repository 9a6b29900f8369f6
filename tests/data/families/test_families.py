"""All families: documents that follow from settings and seed, in parts that have nothing in common."""

import dataclasses
import itertools

import pytest

from dreamer_jax.data.document import Document
from dreamer_jax.data.families import FAMILIES, Family, check_disjoint
from dreamer_jax.data.files import DataError

SMALL = {
    "two_hop": {"entities": 30, "relations": 8, "out_degree": 5, "compositions": 3.0},
    "p_hop": {"hops": (1, 3), "length": (6, 14), "test_hops": (4,), "test_size": 15},
    "dag_mod7": {"definitions": (2, 4), "test_definitions": (5, 6), "test_size": 15},
}
CROWDED = {
    "p_hop": {"hops": (1, 1), "length": (4, 5), "test_hops": (), "test_size": 200},
    "dag_mod7": {"definitions": (2, 2), "test_definitions": (2, 2), "test_size": 100, "names": 8},
}
"""So few different documents that parts drawn at random would share some."""


@pytest.fixture(params=sorted(FAMILIES))
def small(request: pytest.FixtureRequest) -> tuple[Family, object]:
    """A family, and settings that keep it small."""
    family = FAMILIES[request.param]
    return family, family.settings(**SMALL[request.param])


def every_document(family: Family, settings: object, seed: int) -> list[Document]:
    tests = family.tests(settings, seed).values()
    return [*family.train(settings, 300, seed), *family.validation(settings, 50, seed), *itertools.chain(*tests)]


def test_the_same_seed_gives_the_same_documents_and_another_seed_others(small: tuple[Family, object]):
    family, settings = small
    assert every_document(family, settings, 1) == every_document(family, settings, 1)
    for part in (family.train, family.validation):
        one, other = (list(part(settings, 160, seed)) for seed in (1, 2))
        assert len(one) == len(other)
        assert len(set(one) & set(other)) < len(one) // 2
    one_test, another = (next(iter(family.tests(settings, seed).values())) for seed in (1, 2))
    assert one_test != another


def test_fewer_documents_are_the_first_of_more(small: tuple[Family, object]):
    family, settings = small
    for part in (family.train, family.validation):
        assert list(part(settings, 160, 1)) == list(part(settings, 250, 1))[:160]


@pytest.mark.parametrize("name", FAMILIES)
def test_no_test_asks_for_what_is_trained_on_or_for_what_another_asks(name: str):
    family = FAMILIES[name]
    settings = family.settings(**CROWDED.get(name, SMALL[name]))
    train, validation = list(family.train(settings, 500, 1)), list(family.validation(settings, 100, 1))
    check_disjoint(train, family.tests(settings, 1), family.same)
    check_disjoint(train, {"validation": validation}, family.same)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_test_asks_for_the_same_twice_and_it_is_smaller_where_there_is_too_little(name: str):
    family = FAMILIES[name]
    settings = family.settings(**CROWDED.get(name, SMALL[name]))
    for documents in family.tests(settings, 1).values():
        assert 0 < len({family.same(document) for document in documents}) == len(documents)
        assert name == "two_hop" or len(documents) < settings.test_size


def test_what_is_the_same_is_for_the_family_to_say():
    one, other = Document("a b", ""), Document("b a", "")
    check_disjoint([one], {"x": [other]})
    with pytest.raises(DataError, match="the test x has a document that the training documents have as well: 'b a'"):
        check_disjoint([one], {"x": [other]}, lambda document: " ".join(sorted(document.given)))


def test_a_document_in_two_parts_is_found_whatever_is_answered():
    one, other = Document("p=1 a", "-", (("b", "-"), ("a", "B"))), Document("p=1 a", "-", (("b", "-"),))
    check_disjoint([one], {"x": [other, other], "y": [Document("p=2 a", "-")]})
    again = Document("P=1  a", "B", (("b", "A"), ("a", "A")))
    with pytest.raises(
        DataError, match="the test x has a document that the training documents have as well: 'P=1  a b"
    ):
        check_disjoint([one], {"x": [other, again]})
    with pytest.raises(DataError, match="the test y has a document that x have as well"):
        check_disjoint([], {"x": [one], "y": [other, again]})


def test_a_family_names_exactly_the_words_of_its_documents(small: tuple[Family, object]):
    family, settings = small
    found: set[str] = set()
    for document in every_document(family, settings, 1):
        answers = (document.response, *(answer for _, answer in document.further))
        found.update(" ".join((document.given, *answers)).split())
    named = family.words(settings)
    assert len(set(named)) == len(named)
    assert found == set(named)


def test_the_texts_of_documents_are_words_with_a_space_between(small: tuple[Family, object]):
    family, settings = small
    for prompt, response, further in every_document(family, settings, 1):
        for text in (prompt, response, *itertools.chain(*further)):
            assert text == " ".join(text.split()) != ""


@pytest.mark.parametrize(
    ("name", "settings", "cause"),
    [
        ("two_hop", {"relations": 9}, "out_degree = 10 needs as many relations, and there are 9"),
        ("two_hop", {"held_out": 0.0}, "greater than 0"),
        ("p_hop", {"hops": (3, 1)}, r"the first of \(3, 1\) must not be greater than the second"),
        ("p_hop", {"hops": (0, 3)}, "greater than or equal to 1"),
        ("p_hop", {"hops": 4}, "valid tuple"),
        (
            "p_hop",
            {"hops": (1, 8), "length": (8, 23)},
            r"length = \(8, 23\) is too short for test_hops = \(18, 20, 22, 24\): 24 hops lead back 72 letters on "
            r"average; give a greatest length of 72 or more, or lower test_hops",
        ),
        (
            "p_hop",
            {"test_hops": (50,)},
            r"too short for test_hops = \(50,\): 50 hops lead back 150.* or lower test_hops",
        ),
        ("p_hop", {"length": (8, 23), "test_hops": ()}, r"for hops = \(1, 16\): 16 hops lead back 48 .* lower hops"),
        ("p_hop", {"spelling": "digits"}, "'word' or 'marks'"),
        ("dag_mod7", {"definitions": (1, 8)}, "one alone depends on no other; begin with 2"),
        ("dag_mod7", {"test_definitions": (1, 8)}, r"test_definitions = \(1, 8\): one alone depends on no other"),
        (
            "dag_mod7",
            {"names": 8},
            r"names = 8 do not suffice for test_definitions = \(9, 16\): give names = 16 or more, or lower test_def",
        ),
        ("dag_mod7", {"names": True}, "valid integer"),
    ],
)
def test_settings_that_cannot_be_are_refused(name: str, settings: dict[str, object], cause: str):
    with pytest.raises(ValueError, match=cause):
        FAMILIES[name].settings(**settings)


def test_settings_cannot_be_changed(small: tuple[Family, object]):
    _, settings = small
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(settings, dataclasses.fields(settings)[0].name, 3)
