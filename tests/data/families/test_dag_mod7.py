"""dag_mod7: values found by substitution, and questions with enough behind them."""

from collections import Counter

import pytest

from dreamer_jax.data.document import Document
from dreamer_jax.data.families import dag_mod7

SETTINGS = dag_mod7.Settings()


def parsed(document: Document) -> tuple[dict[str, list[str]], str]:
    """The words of each definition by its name, and what is asked for first at the end."""
    body, query = document.given.split(" ; ")
    words = [word for word in body.split() if word != "."]
    definitions: dict[str, list[str]] = {}
    while words:
        end = words.index("=")
        definitions[words[end + 1]], words = words[:end], words[end + 2 :]
    return definitions, query.split()[0]


def value(definitions: dict[str, list[str]], term: str) -> int:
    """The value of a name or number, by substitution."""
    if term not in definitions:
        return int(term)
    left, *rest = definitions[term]
    found = value(definitions, left)
    if rest:
        operator, right = rest[0], value(definitions, rest[1])
        found = found + right if operator == "+" else found - right if operator == "-" else found * right
    return found % 7


def behind(definitions: dict[str, list[str]], name: str) -> set[str]:
    """The other variables that a variable depends on."""
    direct = {word for word in definitions[name] if word in definitions}
    return direct.union(*(behind(definitions, other) for other in direct))


def depth(definitions: dict[str, list[str]], name: str) -> int:
    others = [word for word in definitions[name] if word in definitions]
    return max((1 + depth(definitions, other) for other in others), default=0)


@pytest.mark.parametrize("order", ["topological", "shuffled"])
def test_the_answer_is_the_value_of_what_is_asked_for(order: str):
    for document in dag_mod7.train(dag_mod7.Settings(order=order), 100, 1):
        definitions, query = parsed(document)
        assert document.response == str(value(definitions, query))
        assert not document.further


def test_the_example_of_the_documentation():
    document = Document("4 = v3 . v3 * 5 = v11 . v3 - v11 = v8 . v8 + 2 = v1 . ; v8", "5")
    definitions, query = parsed(document)
    assert (value(definitions, query), value(definitions, "v1")) == (5, 0)
    assert dag_mod7.shape_of(document.prompt) == (4, 2, 2)


@pytest.mark.parametrize("order", ["topological", "shuffled"])
def test_working_shows_values_where_they_belong_and_all_of_them_at_the_end(order: str):
    for document in dag_mod7.train(dag_mod7.Settings(asked="some", order=order), 100, 1):
        definitions, _ = parsed(document)
        turns = [(document.prompt, document.response), *document.further]
        at_line = [turn for turn in turns if "=" in turn[0] and ";" not in turn[0]]
        at_end = turns[len(at_line) :]
        names = [given.split()[-1] for given, _ in at_end]
        assert sorted(names) == sorted(definitions)
        assert all(answer == str(value(definitions, name)) for name, (_, answer) in zip(names, at_end, strict=True))
        assert all(answer == str(value(definitions, given.split()[-1])) for given, answer in at_line)
        assert document.given.count(".") == len(definitions) - len(at_line)


def test_a_share_of_the_lines_is_worked_that_differs_from_document_to_document():
    settings = dag_mod7.Settings(asked="some", definitions=(8, 8))
    hidden = Counter(document.given.count(".") for document in dag_mod7.train(settings, 300, 1))
    assert hidden.keys() == set(range(9))
    assert min(hidden.values()) > 15  # 33 of each number are expected, and one of 0 at equal shares


@pytest.mark.parametrize("order", ["topological", "shuffled"])
def test_the_shape_is_that_of_the_graph(order: str):
    settings = dag_mod7.Settings(order=order, test_size=10)
    for name, documents in dag_mod7.tests(settings, 1).items():
        for document in documents:
            definitions, query = parsed(document)
            ancestors = len(behind(definitions, query))
            assert dag_mod7.shape_of(document.prompt) == (len(definitions), depth(definitions, query), ancestors)
            assert name == f"definitions={len(definitions)}"
            assert 2 * ancestors >= len(definitions)


def test_definitions_follow_those_that_they_need_unless_they_are_shuffled():
    def is_in_order(document: Document) -> bool:
        definitions, _ = parsed(document)
        names = list(definitions)
        return all(behind(definitions, name) <= set(names[:place]) for place, name in enumerate(names))

    assert all(map(is_in_order, dag_mod7.train(SETTINGS, 50, 1)))
    shuffled = list(map(is_in_order, dag_mod7.train(dag_mod7.Settings(order="shuffled"), 50, 1)))
    assert sum(shuffled) < 25
    orders = [list(parsed(document)[0]) for document in dag_mod7.train(dag_mod7.Settings(order="shuffled"), 50, 1)]
    assert sum(names == sorted(names) for names in orders) < 25


def test_each_form_of_definition_occurs_and_none_multiplies_by_zero_or_by_a_variable():
    found: Counter[str] = Counter()
    for document in dag_mod7.train(SETTINGS, 300, 1):
        for words in parsed(document)[0].values():
            found[" ".join("v" if word[0] == "v" else "n" if word.isdigit() else word for word in words)] += 1
            assert words[-2:] not in (["*", "0"], ["*", "1"], ["+", "0"], ["-", "0"])
    assert found.keys() == {"n", "v + n", "v - n", "v * n", "v + v", "v - v"}
    assert min(found.values()) > 50


def test_answers_are_nearly_equally_frequent_for_each_number_of_definitions():
    train = list(dag_mod7.train(SETTINGS, 2000, 1))
    for size in range(2, 9):
        answers = Counter(document.response for document in train if document.prompt.count("=") == size)
        assert answers.total() > 200
        assert max(answers.values()) / answers.total() < 0.24
    answers = Counter(document.response for document in train)
    assert set(answers) == set("0123456")
    assert max(answers.values()) / answers.total() < 0.17


def test_all_names_are_used_and_no_document_uses_one_twice():
    names: Counter[str] = Counter()
    for document in dag_mod7.train(SETTINGS, 300, 1):
        definitions, _ = parsed(document)
        assert len(definitions) == document.prompt.count("=")
        names.update(list(definitions))
    assert names.keys() == {f"v{n}" for n in range(1, 21)}


def test_a_problem_is_the_same_with_other_names_in_another_order_and_wherever_it_asks():
    one = "3 = v1 . v1 * 2 = v2 . v1 + v2 = v3 . 5 = v4 . ; v3"
    same = (
        "5 = v4 . v7 + v8 = v9 . v8 * 2 = v7 . 3 = v8 . ; v9",
        "3 = v1 v1 * 2 = v2 . v1 + v2 = v3 5 = v4 . ; v4 v2 v1 v3",
        "3 = v1 . v1 * 2 = v2 . v1 + v2 = v3 . 5 = v4 . ; v2",
    )
    others = (
        "3 = v1 . v1 * 2 = v2 . v1 + v2 = v3 . 6 = v4 . ; v3",
        "3 = v1 . v1 * 2 = v2 . v1 - v2 = v3 . 5 = v4 . ; v3",
        "3 = v1 . v1 * 2 = v2 . v2 - v1 = v3 . 5 = v4 . ; v3",
        "3 = v1 . v1 * 2 = v2 . v4 + v2 = v3 . 5 = v4 . ; v3",
        "3 = v1 . v1 * 2 = v2 . v1 + v2 = v3 . ; v3",
    )
    key = dag_mod7.same(Document(one, ""))
    assert {dag_mod7.same(Document(prompt, "")) for prompt in same} == {key}
    assert len({key, *(dag_mod7.same(Document(prompt, "")) for prompt in others)}) == 6


@pytest.mark.parametrize("order", ["topological", "shuffled"])
def test_no_problem_of_a_test_is_trained_on_under_other_names_or_in_another_order(order: str):
    def without_names(document: Document) -> str:
        """The text, its lines in an order that follows from the question, its names by their first place in it."""
        definitions, query = parsed(document)
        known: dict[str, str] = {}
        lines, waiting = [], [query]
        while waiting:
            name = waiting.pop()
            if name not in known:
                known[name] = f"x{len(known)}"
                lines.append(name)
                waiting += [word for word in definitions[name] if word in definitions]
        assert len(known) == len(definitions)
        return " ; ".join(" ".join([known[n], *(known.get(word, word) for word in definitions[n])]) for n in lines)

    def is_used(document: Document) -> bool:
        definitions, query = parsed(document)
        return len(behind(definitions, query)) == len(definitions) - 1

    settings = dag_mod7.Settings(definitions=(2, 3), test_definitions=(3, 3), order=order)
    train = {without_names(document) for document in dag_mod7.train(settings, 2000, 1) if is_used(document)}
    tests = [document for documents in dag_mod7.tests(settings, 1).values() for document in documents]
    assert len(train) > 600
    assert len(tests) > 100
    assert not train & {without_names(document) for document in tests if is_used(document)}


def test_each_part_has_problems_of_two_definitions_and_all_of_them_once_in_its_test():
    settings = dag_mod7.Settings(definitions=(2, 2), test_definitions=(3, 3), test_size=30)
    every = [{dag_mod7.same(d) for d in part(settings, 900, 1)} for part in (dag_mod7.train, dag_mod7.validation)]
    tests = dag_mod7.tests(settings, 1)
    every.append({dag_mod7.same(document) for document in tests["definitions=2"]})
    assert sum(map(len, every)) == len(set.union(*every)) == 7 * 17
    assert list(map(len, every)) == [90, 14, 15]
    assert len(tests["definitions=3"]) == 30
