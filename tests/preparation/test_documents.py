"""From rows to documents of token ids: how they are laid out, where the response begins, and what cannot be spelt."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from dreamer_jax.data import dataset
from dreamer_jax.data.files import DataError
from dreamer_jax.data.prepared import ShardReport
from dreamer_jax.data.template import Template
from dreamer_jax.data.tokenizer import load_tokenizer
from dreamer_jax.preparation.documents import (
    STEM,
    UNKNOWN_CHARACTER,
    Done,
    examples,
    pack_shard,
    tokenize_shard,
    write_tokenizer,
)
from tests.preparation.conftest import draft, write_rows

LETTERS = "abcdefghij QA:?\n0123456789"
TEMPLATE = Template("Q: {text}?\nA:", " {text}")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token for each letter, and for no other character."""
    vocab = {name: i for i, name in enumerate(["<s>", "</s>", *dict.fromkeys(LETTERS)])}
    made = Library(models.BPE(vocab, []))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens(["<s>", "</s>"])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


def tokenize(tmp_path: Path, tokenizer: Path, *pairs: tuple[str, str]) -> tuple[Path, Done]:
    shard = write_rows(tmp_path / "shard.parquet", pairs)
    made = draft(tmp_path)
    return made, tokenize_shard(made, shard, tokenizer, "digest", (), TEMPLATE)


def documents(folder: Path) -> list[tuple[list[int], int]]:
    stored = dataset.Documents(folder / f"{STEM}.array_record")
    return [(stored[n]["tokens"].tolist(), int(stored[n]["response_start"])) for n in range(len(stored))]


def test_a_document_is_a_question_and_an_answer_in_their_templates(tmp_path: Path, tokenizer: Path):
    folder, (counts, facts) = tokenize(tmp_path, tokenizer, ("add 1", "2"))
    [(tokens, start)] = documents(folder)
    library = load_tokenizer(tokenizer)
    assert (tokens[0], tokens[-1]) == (library.bos, library.eos)
    assert library.decode(tokens[:start]) == "Q: add 1?\nA:"
    assert library.decode(tokens[start:]) == " 2"
    assert counts == {"in": 1, "out": 1, "tokens": len(tokens)}
    assert facts["report"]["tokens"] == len(tokens)


def test_plain_text_is_all_response_with_nothing_around_it(tmp_path: Path, tokenizer: Path):
    folder, _ = tokenize(tmp_path, tokenizer, ("", "abc"))
    [(tokens, start)] = documents(folder)
    assert start == 1
    assert load_tokenizer(tokenizer).decode(tokens) == "abc"
    assert len(tokens) == 5


def test_a_row_with_a_character_that_the_tokenizer_does_not_know_is_left_out_and_counted(
    tmp_path: Path, tokenizer: Path
):
    folder, (counts, _) = tokenize(tmp_path, tokenizer, ("a", "b"), ("a", "é"), ("ß", "b"), ("c", "d"))
    assert len(documents(folder)) == 2
    assert (counts["in"], counts["out"], counts[UNKNOWN_CHARACTER]) == (4, 2, 2)
    samples = json.loads((folder / "samples.json").read_text())[UNKNOWN_CHARACTER]
    assert [sample["answer"] for sample in samples] == ["é", "b"]
    assert "é" in samples[0]["because"]


def test_a_tokenizer_that_replaced_another_under_its_name_is_read_anew(tmp_path: Path, tokenizer: Path):
    path = tmp_path / "tokenizer.json"
    shard = write_rows(tmp_path / "shard", [("", "ab")])
    lengths = []
    for content in (tokenizer.read_text(), tokenizer.read_text().replace('"merges": []', '"merges": [["a", "b"]]')):
        description = json.loads(content)
        description["model"]["vocab"]["ab"] = len(description["model"]["vocab"])
        description["pre_tokenizer"] = None
        path.write_text(json.dumps(description))
        counts, _ = tokenize_shard(draft(tmp_path), shard, path, content, (), TEMPLATE)
        lengths.append(counts["tokens"])
    assert lengths == [4, 3]


# Packing


def test_documents_are_packed_for_any_context_without_being_tokenized_again(tmp_path: Path, tokenizer: Path):
    folder, (counts, facts) = tokenize(tmp_path, tokenizer, ("a", "b"), ("a", "b" * 40), ("c", "d"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    rows = {}
    for context in (128, 32):
        made = draft(tmp_path)
        found, packed = pack_shard(made, folder / STEM, facts["report"], context)
        rows[context] = ShardReport(**packed["report"])
        assert (found["in"], found["out"]) == (3, 3 if context == 128 else 2)
        assert found["dropped: longer than the context"] == 3 - found["out"]
        assert (made / f"{STEM}.array_record").samefile(folder / f"{STEM}.array_record")
    assert counts["tokens"] == rows[128].packed_tokens > rows[32].packed_tokens
    assert (rows[128].context, rows[32].context) == (128, 32)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_no_documents_are_packed_too(tmp_path: Path, tokenizer: Path):
    folder, (counts, facts) = tokenize(tmp_path, tokenizer)
    found, _ = pack_shard(draft(tmp_path), folder / STEM, facts["report"], 32)
    assert (counts["in"], +found) == (0, Counter())


# Tokenizers


def test_a_given_tokenizer_is_taken_as_it_is(tmp_path: Path, tokenizer: Path):
    counts, _ = write_tokenizer(folder := draft(tmp_path), tokenizer, (), 5, {}, TEMPLATE)
    assert [path.name for path in folder.iterdir()] == ["tokenizer.json"]
    assert (folder / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
    assert counts == {}


def test_a_file_that_is_no_tokenizer_is_an_error(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        write_tokenizer(draft(tmp_path), tmp_path / "tokenizer.json", (), 5, {}, TEMPLATE)


def test_a_trained_tokenizer_has_seen_its_part_of_each_source_in_the_template(tmp_path: Path):
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("klmnoprstu"), 6)) for _ in range(40)]
    pairs = [(" ".join(rng.choice(words, 8)), " ".join(rng.choice(words, 8))) for _ in range(300)]
    shards = {name: [write_rows(tmp_path / name, pairs, first=n << 40)] for n, name in enumerate(("all", "some", "no"))}
    sample = {"all": (1.0, shards["all"]), "some": (0.2, shards["some"]), "no": (0.0, shards["no"])}
    counts, _ = write_tokenizer(folder := draft(tmp_path), None, (), 400, sample, Template("¿{text}?", "{text}"))
    assert counts["rows of all"] == 300
    assert 30 < counts["rows of some"] < 90
    assert counts["rows of no"] == 0
    library = load_tokenizer(folder / "tokenizer.model")
    assert library.vocab_size == 400
    assert len(library.encode("¿")) <= 2  # a character of its own, and not two bytes behind a space
    again = draft(tmp_path)
    write_tokenizer(again, None, (), 400, sample, Template("¿{text}?", "{text}"))
    assert (again / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()


# Examples


def test_examples_are_the_first_questions_and_no_plain_text(tmp_path: Path):
    shards = [
        write_rows(tmp_path / "a", [("", "text"), ("1?", "1!")]),
        write_rows(tmp_path / "b", [("2?", "2!"), ("3?", "3!")]),
    ]
    assert examples(shards, 2) == [{"prompt": "1?", "response": "1!"}, {"prompt": "2?", "response": "2!"}]
    assert examples(shards[:1], 2) == [{"prompt": "1?", "response": "1!"}]
