"""Tasks of a source: how they are written, and where they are looked for."""

import zlib
from collections import Counter

import pytest
from reasoning_gym.factory import DATASETS

from dreamer_jax.config import DataConfig, Source
from dreamer_jax.data.document import Document, Found
from dreamer_jax.data.exercises import Task, exercises, family_task, parsed, words_of
from dreamer_jax.data.families import FAMILIES, p_hop
from dreamer_jax.data.files import DataError
from dreamer_jax.data.sources import documents


def generated(*tasks: str, count: int = 20, **values: object) -> list[Found]:
    return list(exercises(Source("x", tasks=tasks, documents_per_task=count, **values), Counter()))


@pytest.mark.parametrize(
    ("text", "task"),
    [
        ("lcm", Task("lcm", {})),
        (" lcm() ", Task("lcm", {})),
        ("p_hop(hops=(1, 16), length=[64, 128])", Task("p_hop", {"hops": (1, 16), "length": [64, 128]})),
        ("x(a=-1.5, b='c d', e=None, f=True)", Task("x", {"a": -1.5, "b": "c d", "e": None, "f": True})),
    ],
)
def test_a_task_is_a_name_with_settings_if_need_be(text: str, task: Task):
    assert parsed(text) == task


@pytest.mark.parametrize(
    "text",
    [
        "chain-sum",
        "lcm(3)",
        "lcm(a=b)",
        "lcm(**{'a': 1})",
        "lcm(a=1",
        "a.lcm()",
        "lcm(a=1)(b=2)",
        "lcm; lcm",
        "'lcm'",
        " ",
        "(",
    ],
)
def test_what_is_no_name_with_settings_is_refused(text: str):
    with pytest.raises(DataError, match=r"cannot be read: write a name, .* as in 'chain_sum\(min_terms=3\)'"):
        parsed(text)


def test_nothing_in_a_task_is_run():
    with pytest.raises(DataError, match="cannot be read"):
        parsed("lcm(a=__import__('os').getcwd())")


@pytest.mark.parametrize(
    ("task", "cause"),
    [
        ("chain_some", r"no task 'chain_some'; there are our own dag_mod7, p_hop, two_hop, and .*chain_sum"),
        ("composite", "task 'composite' cannot be used"),
        ("chain_sum(terms=3)", r"has no setting 'terms'; it has allow_negation, .*min_terms"),
        ("chain_sum(seed=3)", "has no setting 'seed'"),
        ("chain_sum(min_terms=9)", r"'chain_sum\(min_terms=9\)' cannot be used .*max_terms must be >= min_terms"),
        ("p_hop(hop=3)", "has no setting 'hop'; it has asked, hops, length, seed, spelling, test_hops, test_size"),
        ("p_hop(hops=(0, 3))", r"'p_hop\(hops=\(0, 3\)\)': hops\.0: Input should be greater than or equal to 1"),
        ("p_hop(hops=(4, 3))", "hops: the first of"),
        ("p_hop(hops=(40, 50))", r"': length = \(64, 128\) is too short for hops = \(40, 50\): 50 hops lead back 150"),
        ("p_hop(seed=-1)", "seed = -1 must be a whole number that is not negative"),
        ("p_hop(seed=True)", "seed = True must be"),
    ],
)
def test_a_task_or_setting_that_cannot_be_used_is_named_with_what_there_is(task: str, cause: str):
    with pytest.raises(DataError, match=cause):
        generated("dag_mod7", task)


def test_settings_reach_the_generators():
    sums = [found.document.prompt for found in generated("chain_sum(min_terms=5, max_terms=5)")]
    assert {prompt.count("+") + prompt.count(" - ") for prompt in sums} == {4}
    hops = {found.document.prompt.split()[0] for found in generated("p_hop(hops=(2, 3))")}
    assert hops == {"p=2", "p=3"}


def test_a_list_is_as_good_as_a_tuple():
    lists, tuples = (
        family_task(f"p_hop(hops={one}, test_hops={other})") for one, other in ([[1, 8], [9]], ["(1, 8)", "(9,)"])
    )
    assert lists == tuples
    assert lists is not None
    hash(lists.settings)


def test_a_task_of_reasoning_gym_without_settings_gives_what_it_always_gave():
    import reasoning_gym

    drawn = reasoning_gym.create_dataset("chain_sum", size=20, seed=zlib.crc32(b"chain_sum") % 2**30)
    expected = [Document(exercise["question"], f"#### {exercise['answer']}") for exercise in drawn]
    found = [found.document for found in generated("chain_sum") if found.split == "train"]
    assert found == expected[: len(found)]
    assert len(found) == 20


def test_no_family_of_ours_hides_a_task_of_reasoning_gym():
    assert FAMILIES.keys().isdisjoint(DATASETS)


def test_a_family_gives_its_documents_to_both_splits():
    task = family_task("p_hop(hops=(1, 4), seed=7)")
    assert task is not None
    assert task == (FAMILIES["p_hop"], p_hop.Settings(hops=(1, 4)), 7)
    found = generated("p_hop(hops=(1, 4), seed=7)", count=30)
    assert [f.document for f in found if f.split == "train"] == list(p_hop.train(task.settings, 30, 7))
    assert [f.document for f in found if f.split == "validation"] == list(p_hop.validation(task.settings, 3, 7))
    assert found != generated("p_hop(hops=(1, 4))", count=30)
    assert family_task("chain_sum") is None


def test_only_a_finite_family_may_leave_the_number_of_documents_out():
    graph = "two_hop(entities=20, relations=6, out_degree=4, compositions=2.0)"
    whole = Counter(found.split for found in generated(graph, count=0))
    assert whole["train"] == 20 * 4 * 3
    assert Counter(found.split for found in generated(graph, count=90)) == {"train": 90, "validation": 9}
    for task in ("lcm", "p_hop"):
        with pytest.raises(DataError, match=f"'x': documents_per_task must be positive for task '{task}'"):
            generated(graph, task, count=0)


def test_documents_whose_prompts_alone_are_equal_are_different():
    skipped: Counter[str] = Counter()
    source = Source("x", tasks=("p_hop(hops=(1, 1))",), documents_per_task=50)
    found = list(documents(source, DataConfig(), skipped))
    assert len(found) == 55
    assert len({f.document.prompt for f in found}) == 4
    assert not skipped


def test_what_a_source_removes_is_taken_out_of_further_turns():
    plain, changed = (generated("p_hop(hops=(1, 1))", count=3, remove=remove) for remove in ("", "p=1|D"))
    for one, other in zip(plain, changed, strict=True):
        assert other.document.prompt == one.document.prompt.removeprefix("p=1 ")
        assert other.document.further == tuple(
            (given, answer.replace("D", "")) for given, answer in one.document.further
        )


def test_a_source_has_the_words_of_all_its_families():
    found = list(words_of(Source("x", tasks=("p_hop(test_hops=(30,))", "lcm", "dag_mod7"))))
    assert {"p=1", "p=30", "a", "A", "-", "v20", "6", ";"} <= set(found)
    assert "p=18" not in found
