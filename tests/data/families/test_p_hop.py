"""p_hop: chains followed letter by letter, and what is asked of them."""

import itertools
from collections import Counter

import numpy as np
import pytest

from dreamer_jax.data.document import Document
from dreamer_jax.data.families import p_hop
from dreamer_jax.data.files import DataError

SETTINGS = p_hop.Settings()


def read(document: Document) -> tuple[int, list[str], dict[int, str]]:
    """p, the letters, and the answers by position."""
    number, *letters = document.prompt.replace(" .", "").split()
    answered = {len(letters) - 1: document.response}
    for given, answer in document.further:
        letters += given.replace(" .", "").split()
        answered[len(letters) - 1] = answer
    return int(number.removeprefix("p=")), letters, answered


def walked(letters: list[str], start: int, hops: int) -> str:
    """The answer, found by looking back again and again."""
    place = start
    for _ in range(hops):
        earlier = [j for j in range(place) if letters[j] == letters[place]]
        if not earlier:
            return "-"
        place = earlier[-1] + 1
    return letters[place].upper()


@pytest.mark.parametrize("asked", ["all", "some", "ends"])
def test_answers_are_those_of_walking_back_step_by_step(asked: str):
    for document in p_hop.train(p_hop.Settings(asked=asked), 30, 1):
        hops, letters, answered = read(document)
        for place, answer in answered.items():
            assert answer == walked(letters, place, hops)


def test_the_example_of_the_documentation():
    letters = np.array([0, 1, 0, 1, 2, 0, 1])  # a b a b c a b
    assert p_hop.hop(letters).tolist() == [7, 7, 1, 2, 7, 3, 4, 7]
    assert [p_hop.ANSWERS[i] for i in p_hop.answers(letters, 1)] == ["-", "-", "B", "A", "-", "B", "C"]
    assert [p_hop.ANSWERS[i] for i in p_hop.answers(letters, 2)] == ["-", "-", "-", "B", "-", "A", "-"]


def test_every_letter_is_asked_of_and_lengths_and_hops_are_those_of_the_settings():
    found = [read(document) for document in p_hop.train(SETTINGS, 300, 1)]
    assert {hops for hops, _, _ in found} == set(range(1, 17))
    lengths = [len(letters) for _, letters, _ in found]
    assert min(lengths) >= 64
    assert max(lengths) <= 128
    assert len(set(lengths)) > 50
    for _, letters, answered in found:
        assert sorted(answered) == list(range(len(letters)))
        assert any(answer != "-" for answer in answered.values())


def test_each_p_is_as_frequent_as_the_others_where_most_sequences_are_too_short_for_it():
    settings = p_hop.Settings(hops=(1, 8), length=(8, 24), test_hops=())
    counts = Counter(read(document)[0] for document in p_hop.train(settings, 800, 1))
    assert counts.keys() == set(range(1, 9))
    assert all(70 < count < 130 for count in counts.values())


def test_too_many_sequences_that_do_not_fit_are_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(p_hop, "TRIES", 2)
    settings = p_hop.Settings(hops=(24, 24), length=(60, 72))
    cause = r"of 2 sequences of length = \(60, 72\) none is for validation and has a chain of 24 hops: give a greater"
    with pytest.raises(DataError, match=cause):
        list(p_hop.validation(settings, 100, 1))


def test_letters_are_equally_frequent_and_never_twice_in_a_row():
    found = [read(document)[1] for document in p_hop.train(SETTINGS, 300, 1)]
    counts = Counter(letter for letters in found for letter in letters)
    assert all(0.23 < count / counts.total() < 0.27 for count in counts.values())
    first = Counter(letters[0] for letters in found)
    assert min(first[letter] for letter in p_hop.LETTERS) > 45
    assert all(one != other for letters in found for one, other in itertools.pairwise(letters))


def test_no_answer_is_much_more_frequent_than_the_others():
    for p in (1, 4, 16):
        given = [read(document) for document in p_hop.train(p_hop.Settings(hops=(p, p)), 100, 1)]
        counts = Counter(answer for _, _, answered in given for answer in answered.values() if answer != "-")
        assert counts.total() > 3000
        assert max(counts.values()) / counts.total() < 0.28


def test_ends_are_on_chains_of_their_own():
    for document in p_hop.train(p_hop.Settings(asked="ends"), 30, 1):
        _, letters, answered = read(document)
        once = p_hop.hop(np.array([p_hop.LETTERS.index(letter) for letter in letters])).tolist()
        chains = []
        for place in answered:
            chains.append({place})
            while (place := once[place]) < len(letters):
                chains[-1].add(place)
        assert len(chains) == 3
        assert len(set.union(*chains)) == sum(map(len, chains)) == len(letters) - 1


@pytest.mark.parametrize("asked", ["all", "some", "ends"])
def test_each_letter_is_followed_by_its_answer_or_by_a_dot(asked: str):
    for document in p_hop.train(p_hop.Settings(asked=asked), 30, 1):
        turns = [(document.prompt.partition(" ")[2], document.response), *document.further]
        words = " ".join([f"{given} {answer}" for given, answer in turns]).split()
        _, letters, answered = read(document)
        assert words[::2] == letters
        assert [place for place, word in enumerate(words[1::2]) if word != "."] == sorted(answered)


def test_a_share_of_the_answers_is_asked_for_that_differs_from_document_to_document():
    found = [read(document) for document in p_hop.train(p_hop.Settings(asked="some"), 300, 1)]
    shares = np.array([len(answered) / len(letters) for _, letters, answered in found])
    assert shares.min() < 0.1
    assert shares.max() > 0.95
    assert 0.45 < shares.mean() < 0.57


def test_two_documents_are_the_same_wherever_they_ask():
    all_asked, *others = (
        Document("p=2 a", "-", (("b", "-"), ("a", "-"))),
        Document("p=2 a . b", "-", (("a", "-"),)),
        Document("p=2 a . b . a", "-"),
    )
    assert {p_hop.same(document) for document in others} == {p_hop.same(all_asked)}
    assert p_hop.same(Document("p=1 a . b . a", "-")) != p_hop.same(all_asked)


def test_each_p_has_a_test_of_its_own_and_some_were_never_trained():
    settings = p_hop.Settings(hops=(2, 4), test_hops=(4, 7), test_size=5)
    tests = p_hop.tests(settings, 1)
    assert list(tests) == ["p=2", "p=3", "p=4", "p=7"]
    for name, documents in tests.items():
        assert len(documents) == 5
        assert {f"p={read(document)[0]}" for document in documents} == {name}


def test_p_may_be_spelt_by_marks():
    words, marks = (p_hop.Settings(hops=(3, 3), spelling=spelling) for spelling in ("word", "marks"))
    for one, other in zip(p_hop.train(words, 5, 1), p_hop.train(marks, 5, 1), strict=True):
        assert one.prompt.startswith("p=3 ")
        assert other == one._replace(prompt="> > > " + one.prompt.removeprefix("p=3 "))
