"""Documents: what is read, what is refused, what is left out and counted."""

import dataclasses
import gzip
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from dreamer_jax.config import Config, DataConfig, Source
from dreamer_jax.data.rows import ROW_BYTES
from dreamer_jax.data.sources import DataError, Document, Found, documents, prompt_digest
from tests.data.conftest import MARKS, sums

GOOD = b'{"question": "1 + 1?", "answer": "2"}\n'


def read(config: Config) -> tuple[list[Found], Counter[str]]:
    skipped: Counter[str] = Counter()
    return list(documents(config.data.sources[0], config.data, skipped)), skipped


def with_source(config: Config, **values: object) -> Config:
    changed = dataclasses.replace(config.data.sources[0], **values)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, sources=(changed,)))


def training(config: Config) -> list[Document]:
    return [found.document for found in read(config)[0] if found.split == "train"]


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        (b'{"question": "cut o', r"not JSON \(Unterminated string starting at character 14\)"),
        (b"question,answer", "not JSON"),
        (b"[" * 100_000, "JSON that is nested too deep"),
        (b'{"question": ' + b'{"a":' * 100_000, "JSON that is nested too deep"),
        (b'["question", "answer"]', r"not a JSON object \(a list\)"),
        (b'"question"', r"not a JSON object \(a text\)"),
        (b"NaN", r"not a JSON object \(a number\)"),
        (b"1" * 5000, r"not a JSON object \(a number\)"),
        (b"null", r"not a JSON object \(null\)"),
        (b"{}", r"no field 'question' \(the row has no fields\)"),
        (b'{"question": "1 + 1?"}', r"no field 'answer' \(the row has 'question'; set response_field"),
        (
            b'{"question": "1 + 1?", "Answers": "2", "id": 3}',
            r"no field 'answer' \(the row has 'question', 'Answers', 'id'; did you mean 'Answers'\? Set response_field",
        ),
        (b'{"question": "1 + 1?", "\\ud800": "2"}', r"no field 'answer' \(the row has 'question', '\\ud800'"),
        (b'{"question": NaN, "answer": "2"}', r"field 'question' is not text \(it is a number\)"),
        (b'{"question": null, "answer": "2"}', r"field 'question' is not text \(it is null\)"),
        (b'{"question": true, "answer": "2"}', r"field 'question' is not text \(it is true or false\)"),
        (b'{"question": ["a"], "answer": "2"}', r"field 'question' is not text \(it is a list\)"),
        (b'{"question": {"a": "b"}, "answer": "2"}', r"field 'question' is not text \(it is an object\)"),
        (b'{"question": " ", "answer": "2"}', "field 'question' is empty"),
        (b'{"question": "1?", "answer": "<<1=1>>"}', "field 'answer' is empty"),
        (b'{"question": "\xff", "answer": "2"}', r"not UTF-8 text \(from byte 15 on\)"),
        (b'{"question": "\xed\xa0\x80", "answer": "2"}', "not UTF-8 text"),
        (b'{"question": "\\ud800", "answer": "2"}', "field 'question' has half a surrogate pair"),
        (b'{"question": "1\x00", "answer": "2"}', "NUL bytes"),
        (b"\x00" * 50, "NUL bytes"),
        (b'{"question": "' + b"a" * ROW_BYTES + b'", "answer": "2"}', "longer than 16 MiB"),
    ],
    ids=lambda value: value[:40],
)
def test_a_bad_row_is_named_or_counted(one_source: Callable[..., Config], line: bytes, cause: str):
    content = GOOD + b"\n" + line + b"\n" + GOOD
    with pytest.raises(DataError, match=rf"train\.jsonl, line 3: {cause}.*--data\.bad_rows skip"):
        read(one_source(content))
    found, skipped = read(one_source(content, bad_rows="skip"))
    assert [split for split, _, _ in found].count("train") == 2
    assert sum(skipped.values()) == 1


@pytest.mark.parametrize(
    "row",
    [
        b'{"question": "1 + 1?", "answer": "2", "seed": ' + b"7" * 5000 + b"}",
        b'{"question": "1 + 1?", "answer": "2", "score": NaN, "limit": -Infinity}',
        b'{"question": "1 + 1?", "answer": "2", "embedding": [' + b"0.125, " * 500_000 + b"0]}",
        b'  {"answer": "2", "question": "  1 + 1?\\n"}  \r',
        b'\xef\xbb\xbf{"question": "1 + 1?", "answer": "2"}',
    ],
    ids=["long integer", "no numbers", "megabytes", "spaces", "byte order mark"],
)
def test_a_row_with_its_prompt_and_answer_is_used_whatever_else_it_has(one_source: Callable[..., Config], row: bytes):
    assert training(one_source(row + b"\n" + GOOD)) == [Document("1 + 1?", "2")] * 2


@pytest.mark.parametrize(
    "content",
    [
        b'[{"question": "1 + 1?", "answer": "2"}]',
        b'{\n  "question": "1 + 1?",\n  "answer": "2"\n}\n',
        gzip.compress(GOOD),
        pyarrow.compress(GOOD, codec="zstd", asbytes=True),
        b'{"question": "1 + 1?", "answer": 2}',
    ],
    ids=["array", "object over several lines", "gzip", "zstd", "number"],
)
def test_what_people_have_is_read_as_it_is(one_source: Callable[..., Config], content: bytes):
    assert training(one_source(content)) == [Document("1 + 1?", "2")]


def test_numbers_are_answers_as_they_are_written(one_source: Callable[..., Config]):
    spellings = ["42", "-3.50", "1e400", "2" * 5000]
    lines = "".join(f'{{"question": "{len(number)}?", "answer": {number}}}\n' for number in spellings)
    assert [document.response for document in training(one_source(lines.encode()))] == spellings


def test_parquet_rows_are_documents_and_a_bad_one_has_its_number(one_source: Callable[..., Config]):
    table = pyarrow.table({"question": ["1 + 1?", "2 + 2?"], "answer": ["2", None]})
    config = one_source(GOOD, bad_rows="skip")
    pyarrow.parquet.write_table(table, Path(config.data.root) / "train.jsonl")
    assert training(config) == [Document("1 + 1?", "2")]
    assert read(config)[1] == {"field 'answer' is not text": 1}
    strict = dataclasses.replace(config, data=dataclasses.replace(config.data, bad_rows="error"))
    with pytest.raises(DataError, match=r"train\.jsonl, row 2: field 'answer' is not text \(it is null\); fix the row"):
        read(strict)


def test_a_field_within_fields_is_named_with_dots_and_the_first_value_counts(one_source: Callable[..., Config]):
    def of(row: dict[str, object]) -> Config:
        fields = {"prompt_field": "meta.question", "response_field": "responses.text"}
        return with_source(one_source([{"meta": {"question": "1 + 1?"}} | row]), validation=(), **fields)

    assert read(of({"responses": [{"text": "2"}, {"text": "two"}]}))[0][0].document == Document("1 + 1?", "2")
    with pytest.raises(DataError, match=r"line 1: field 'responses\.text' is empty"):
        read(of({"responses": []}))


def test_a_conversation_gives_its_first_question_and_answer(one_source: Callable[..., Config]):
    turns = [{"from": "user", "value": " 1 + 1?"}, {"from": "assistant", "value": "<<1+1=2>>2"}]
    lone = {"turns": turns[:1]}
    config = with_source(one_source([{"turns": turns}, lone], bad_rows="skip"), turns_field="turns", validation=())
    found, skipped = read(config)
    assert [document for _, document, _ in found] == [Document("1 + 1?", "2")]
    assert skipped == {"field 'turns' has no answer": 1}
    with pytest.raises(DataError, match=r"no field 'turn' .*did you mean 'turns'\? Set turns_field of the source"):
        read(with_source(one_source([lone]), turns_field="turn"))


def test_every_document_says_where_it_comes_from(one_source: Callable[..., Config]):
    config = one_source(b"\n" + GOOD)
    assert read(config)[0][0].origin == f"{config.data.root}/train.jsonl, line 2"


def test_causes_are_few_however_many_kinds_of_rows_there_are(one_source: Callable[..., Config]):
    rows = [{"question": "1?", f"answer {n}": "2"} for n in range(50)]
    _, skipped = read(one_source(GOOD + b"".join(json.dumps(row).encode() + b"\n" for row in rows), bad_rows="skip"))
    assert skipped == {"no field 'answer'": 50}


@pytest.mark.parametrize("bad_rows", ["error", "skip"])
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "a Git LFS pointer.*git lfs pull"),
        (b"BZh91AY", "compressed by bzip2"),
        (b"\xfd7zXZ\x00", "compressed by xz"),
        (b"PK\x03\x04\x14", "a zip archive"),
        (b"ARROW1\x00\x00", "an Arrow file"),
        (b"<!DOCTYPE html>\n<html>", "a web page"),
        (b"\n<html lang='en'>", "a web page"),
        (GOOD.decode().encode("utf-16"), "text in UTF-16"),
        (GOOD.decode().encode("utf-16-be"), "text in UTF-16"),
        (GOOD.decode().encode("utf-32-le"), "text in UTF-16 or UTF-32"),
        (b"\x00" * 4096, "nothing but NUL bytes"),
    ],
    ids=lambda value: value[:20] if isinstance(value, bytes) else "",
)
def test_a_file_that_has_no_rows_is_told_apart(
    one_source: Callable[..., Config], content: bytes, what: str, bad_rows: str
):
    with pytest.raises(DataError, match=rf"'sums' .*: '.*/train\.jsonl' has no rows, but is {what}"):
        read(one_source(content, bad_rows=bad_rows))


def test_a_file_without_one_usable_row_is_an_error_even_when_skipping(one_source: Callable[..., Config]):
    with pytest.raises(DataError, match=r"not one usable row.*1 \(not JSON\).*the first is line 2: not JSON"):
        read(one_source(b"\n{\n", bad_rows="skip"))
    with pytest.raises(DataError, match="not one usable row for data source 'sums'; it has no rows"):
        read(one_source(b"\xef\xbb\xbf\n \n"))


def test_what_is_no_file_with_something_in_it_is_named(one_source: Callable[..., Config]):
    with pytest.raises(DataError, match=r"train\.jsonl' is empty"):
        read(one_source(b""))
    config = one_source(GOOD)
    os.mkfifo(Path(config.data.root) / "pipe.jsonl")
    for name, cause in (
        ("elsewhere.jsonl", r"elsewhere\.jsonl' does not exist"),
        ("train.jsonl/x", "x' does not exist"),
        ("../raw", r"raw' is a folder; give a file, such as .*train\.jsonl"),
        ("pipe.jsonl", "is a pipe or a device"),
        ("x" * 300, "cannot be read.*too long"),
    ):
        with pytest.raises(DataError, match=f"'sums'.*{cause}"):
            read(with_source(config, train=(name,)))


@pytest.mark.parametrize("fails", ["stat", "open"])
def test_a_file_that_may_not_be_read_is_named(
    one_source: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, fails: str
):
    config, real = one_source(GOOD), getattr(Path, fails)

    def refuse(path: Path, *arguments: object, **options: object) -> object:
        if path.name == "train.jsonl":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, fails, refuse)
    with pytest.raises(
        DataError, match=r"'sums' \(see data\.root.*train\.jsonl' cannot be read \(Permission denied\); change"
    ):
        read(config)


@pytest.mark.parametrize(
    ("root", "cause"),
    [
        ("$NO_SUCH_VARIABLE_1", "is not set"),
        ("${NO_SUCH_VARIABLE_1}/x", "is not set"),
        ("~no-such-user-1/x", "no such user"),
        ("/no/such/folder", "not a folder"),
        ("", "is empty"),
    ],
)
def test_a_missing_root_is_named_with_its_mend(one_source: Callable[..., Config], root: str, cause: str):
    config = one_source(GOOD, root=root)
    with pytest.raises(DataError, match=rf"data\.root.*{cause}.*--data\.root"):
        read(config)


def test_the_root_may_name_an_environment_variable(one_source: Callable[..., Config], monkeypatch: pytest.MonkeyPatch):
    config = one_source(GOOD)
    monkeypatch.setenv("SOME_DATA", config.data.root)
    found, _ = read(dataclasses.replace(config, data=dataclasses.replace(config.data, root="$SOME_DATA")))
    assert found[0][:2] == ("train", Document("1 + 1?", "2"))


def test_a_source_takes_out_what_it_says_and_another_nothing(one_source: Callable[..., Config]):
    row = {"question": "Half of 48?", "answer": "48/2 = <<48/2=24>>24, 5 << 2 >> 1\n#### 24"}
    config = one_source([row])
    assert training(with_source(config, remove=MARKS))[0].response == "48/2 = 24, 5  1\n#### 24"
    assert training(with_source(config, remove=""))[0] == Document(*map(str, row.values()))
    assert training(with_source(config, remove=r"^Half |\n####.*"))[0] == Document(
        "of 48?", row["answer"].split("\n")[0]
    )


def test_generated_documents_are_treated_as_those_of_files_are():
    source = Source("x", tasks=("lcm",), documents_per_task=5, remove="#### ")
    assert all("#" not in found.document.response for found in documents(source, DataConfig(), Counter()))


def test_without_validation_files_the_text_decides_what_is_held_out(one_source: Callable[..., Config]):
    rows = sums(1000, seed=4)
    forward, backward = one_source(rows), rows[::-1]
    source = dataclasses.replace(forward.data.sources[0], validation=())
    once = {found[:2] for found in documents(source, forward.data, Counter())}
    again = {found[:2] for found in documents(source, one_source(backward).data, Counter())}
    assert once == again
    assert len(once) == 1000
    assert 5 <= sum(split == "validation" for split, _ in once) <= 40


def test_generated_splits_share_no_prompt_and_repeat_none():
    source = Source("maths", tasks=("lcm", "prime_factorization"), documents_per_task=500)
    skipped: Counter[str] = Counter()
    found = list(documents(source, DataConfig(), skipped))
    digests = [prompt_digest(document.prompt) for _, document, _ in found]
    assert len(set(digests)) == len(digests)
    assert skipped["generated twice"] > 0
    assert len(found) + skipped["generated twice"] == 2 * (500 + 50)
    assert {split for split, _, _ in found} == {"train", "validation"}
    assert found == list(documents(source, DataConfig(), Counter()))


def test_generated_word_problems_carry_their_worked_answers():
    source = Source("words", tasks=("gsm_symbolic",), documents_per_task=20)
    for _, document, _ in documents(source, DataConfig(), Counter()):
        *steps, result = document.response.split("\n")
        assert steps
        assert result.startswith("#### ")


def test_generated_exercises_without_an_answer_are_left_out():
    skipped: Counter[str] = Counter()
    assert not list(documents(Source("x", tasks=("rush_hour",), documents_per_task=2), DataConfig(), skipped))
    assert skipped == {"generated without a prompt or an answer": 3}


def test_prompts_that_differ_in_case_and_spaces_are_the_same():
    assert prompt_digest("What  is\n2?") == prompt_digest("what is 2?")
    assert prompt_digest("What is 2?") != prompt_digest("What is 3?")
