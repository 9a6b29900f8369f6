"""Documents: what is read, what is refused, what is left out and counted."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable

import pytest

from dreamer_jax.config import Config, DataConfig, Source
from dreamer_jax.data.sources import DataError, Document, documents, prompt_digest
from tests.data.conftest import sums

GOOD = b'{"question": "1 + 1?", "answer": "2"}\n'


def read(config: Config) -> tuple[list[tuple[str, Document]], Counter[str]]:
    skipped: Counter[str] = Counter()
    return list(documents(config.data.sources[0], config.data, skipped)), skipped


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        (b'{"question": "cut o', "not JSON"),
        (b'["question", "answer"]', "not a JSON object"),
        (b'{"question": "1 + 1?"}', "no field 'answer'"),
        (b'{"question": "1 + 1?", "answer": 2}', "field 'answer' is not text"),
        (b'{"question": " ", "answer": "2"}', "field 'question' is empty"),
        (b'{"question": "\xff", "answer": "2"}', "not UTF-8 text"),
        (b'{"question": "\\ud800", "answer": "2"}', "field 'question' has half a surrogate pair"),
    ],
)
def test_a_bad_row_is_named_or_counted(one_source: Callable[..., Config], line: bytes, cause: str):
    content = GOOD + b"\n" + line + b"\n" + GOOD
    with pytest.raises(DataError, match=rf"train\.jsonl, line 3: {cause}.*--data\.bad_rows skip"):
        read(one_source(content))
    found, skipped = read(one_source(content, bad_rows="skip"))
    assert [split for split, _ in found].count("train") == 2
    assert sum(skipped.values()) == 1
    assert next(iter(skipped)).startswith(cause)


def test_a_file_without_one_usable_row_is_an_error_even_when_skipping(one_source: Callable[..., Config]):
    with pytest.raises(DataError, match=r"not one usable row.*1 \(not JSON\)"):
        read(one_source(b"{\n", bad_rows="skip"))


def test_an_empty_or_missing_file_is_named(one_source: Callable[..., Config]):
    with pytest.raises(DataError, match=r"train\.jsonl' is empty"):
        read(one_source(b""))
    config = one_source(GOOD)
    gone = dataclasses.replace(config.data.sources[0], train=("elsewhere.jsonl",))
    with pytest.raises(DataError, match=r"elsewhere\.jsonl' does not exist"):
        list(documents(gone, config.data, Counter()))


@pytest.mark.parametrize(
    ("root", "cause"), [("$NO_SUCH_VARIABLE_1", "is not set"), ("/no/such/folder", "not a folder")]
)
def test_a_missing_root_is_named_with_its_mend(one_source: Callable[..., Config], root: str, cause: str):
    config = one_source(GOOD, root=root)
    with pytest.raises(DataError, match=rf"data\.root.*{cause}.*--data\.root"):
        read(config)


def test_the_root_may_name_an_environment_variable(one_source: Callable[..., Config], monkeypatch: pytest.MonkeyPatch):
    config = one_source(GOOD)
    monkeypatch.setenv("SOME_DATA", config.data.root)
    found, _ = read(dataclasses.replace(config, data=dataclasses.replace(config.data, root="$SOME_DATA")))
    assert found[0] == ("train", Document("1 + 1?", "2"))


def test_calculator_marks_are_dropped_or_kept(one_source: Callable[..., Config]):
    row = json.dumps({"question": "Half of 48?", "answer": "48/2 = <<48/2=24>>24\n#### 24"}).encode()
    assert read(one_source(row))[0][0][1].response == "48/2 = 24\n#### 24"
    assert read(one_source(row, calculator_marks="keep"))[0][0][1].response == "48/2 = <<48/2=24>>24\n#### 24"


def test_without_validation_files_the_text_decides_what_is_held_out(one_source: Callable[..., Config]):
    rows = sums(1000, seed=4)
    forward, backward = one_source(rows), rows[::-1]
    source = dataclasses.replace(forward.data.sources[0], validation=())
    once = set(documents(source, forward.data, Counter()))
    again = set(documents(source, one_source(backward).data, Counter()))
    assert once == again
    assert len(once) == 1000
    assert 5 <= sum(split == "validation" for split, _ in once) <= 40


def test_generated_splits_share_no_prompt_and_repeat_none():
    source = Source("maths", tasks=("lcm", "prime_factorization"), documents_per_task=500)
    skipped: Counter[str] = Counter()
    found = list(documents(source, DataConfig(), skipped))
    digests = [prompt_digest(document.prompt) for _, document in found]
    assert len(set(digests)) == len(digests)
    assert skipped["generated twice"] > 0
    assert len(found) + skipped["generated twice"] == 2 * (500 + 50)
    assert {split for split, _ in found} == {"train", "validation"}
    assert found == list(documents(source, DataConfig(), Counter()))


def test_generated_word_problems_carry_their_worked_answers():
    source = Source("words", tasks=("gsm_symbolic",), documents_per_task=20)
    for _, document in documents(source, DataConfig(), Counter()):
        *steps, result = document.response.split("\n")
        assert steps
        assert result.startswith("#### ")


def test_an_unknown_task_is_named():
    with pytest.raises(DataError, match=r"no task 'chain_some'; it has .*chain_sum"):
        list(documents(Source("x", tasks=("chain_some",), documents_per_task=1), DataConfig(), Counter()))


def test_prompts_that_differ_in_case_and_spaces_are_the_same():
    assert prompt_digest("What  is\n2?") == prompt_digest("what is 2?")
    assert prompt_digest("What is 2?") != prompt_digest("What is 3?")
