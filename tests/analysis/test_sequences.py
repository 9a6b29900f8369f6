"""Rows of files: documents in their order, packed, cut where they are longer than the context."""

import json

import numpy as np
import pytest

from dreamer_jax.analysis import sequences
from dreamer_jax.analysis.captures import AnalysisError
from dreamer_jax.analysis.sequences import Sequences, held_out, of_files
from dreamer_jax.config import Config
from dreamer_jax.data.prepared import Prepared
from dreamer_jax.data.template import DEFAULT_TEMPLATE, Template


class Letters:
    """A tokenizer whose tokens are characters."""

    bos, eos, unknown, vocab_size = 1, 2, None, 128

    def encode(self, text):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(map(chr, ids))

    def save(self, directory):
        raise AssertionError("nothing is saved here")


def file_of(tmp_path, *rows):
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text_of(row):
    return "".join(chr(t) for t in row["tokens"] if t > 2)


def test_documents_are_packed_in_their_order(tmp_path):
    path = file_of(tmp_path, {"text": "ab"}, {"text": "cd"}, {"text": "efghi"})
    found = of_files([path], Letters(), DEFAULT_TEMPLATE, 8, 10)
    assert [text_of(found.rows[i]) for i in range(len(found))] == ["abcd", "efghi"]
    np.testing.assert_array_equal(found.rows[0]["segment_ids"], [1] * 4 + [2] * 4)
    np.testing.assert_array_equal(found.rows[0]["positions"], [0, 1, 2, 3] * 2)
    assert found.source == "some.jsonl"


def test_a_pair_is_laid_out_as_in_training(tmp_path):
    path = file_of(tmp_path, {"question": "a?", "answer": "b"})
    [row] = of_files([path], Letters(), Template("Q: {text}\nA:", " {text}."), 64, 10).rows
    assert text_of(row) == "Q: a?\nA: b."
    assert row["response_mask"].argmax() == 1 + len("Q: a?\nA:")


def test_a_long_document_is_cut(tmp_path):
    rows = of_files([file_of(tmp_path, {"text": "abcdefghij"})], Letters(), DEFAULT_TEMPLATE, 5, 10).rows
    assert [text_of(row) for row in rows] == ["abcd", "efghi", "j"]
    assert all(row["positions"][0] == 0 for row in rows)


def test_no_more_rows_than_asked_for(tmp_path):
    path = file_of(tmp_path, *[{"text": "abcdef"}] * 5)
    assert len(of_files([path], Letters(), DEFAULT_TEMPLATE, 8, 3)) == 3


def test_a_file_without_text_is_named(tmp_path):
    with pytest.raises(AnalysisError, match=r"some\.jsonl.*no row has a text"):
        of_files([file_of(tmp_path, {"words": "ab"})], Letters(), DEFAULT_TEMPLATE, 8, 3)


@pytest.mark.parametrize("text", ["", "  ", "a \ud800 b", 3, None])
def test_what_is_no_text_is_left_out(tmp_path, text):
    rows = of_files([file_of(tmp_path, {"text": text}, {"text": "ab"})], Letters(), DEFAULT_TEMPLATE, 8, 3).rows
    assert [text_of(row) for row in rows] == ["ab"]


def test_no_more_is_put_into_tokens_than_is_read(tmp_path):
    tokenizer, encoded = Letters(), []
    tokenizer.encode = lambda text: encoded.append(text) or [3] * 6
    of_files([file_of(tmp_path, *[{"text": "abcdef"}] * 50)], tokenizer, DEFAULT_TEMPLATE, 8, 3)
    assert len(encoded) < 5


def test_tables_are_no_documents(tmp_path):
    with pytest.raises(AnalysisError, match="not from CSV"):
        of_files([tmp_path / "a.csv"], Letters(), DEFAULT_TEMPLATE, 8, 3)


def test_held_out_rows_of_another_tokenizer_are_refused(tmp_path, monkeypatch):
    """Ids of another tokenizer would be read without an error, and mean nothing."""
    for name, content in (("run/tokenizer", b"one"), ("data", b"another")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "tokenizer.model").write_bytes(content)
    prepared = Prepared(tmp_path / "data", "key", tmp_path / "data" / "tokenizer.model", {}, {}, 1.0, {})
    monkeypatch.setattr(sequences, "prepare", lambda config: prepared)
    with pytest.raises(AnalysisError, match=r"its tokenizer is another one.*--data"):
        held_out(Config(name="run"), tmp_path / "run", 3)


def test_the_last_batch_is_filled_with_empty_rows(tmp_path):
    found = of_files([file_of(tmp_path, *[{"text": "abcdef"}] * 3)], Letters(), DEFAULT_TEMPLATE, 8, 10)
    assert isinstance(found, Sequences)
    first, last = found.batches(2)
    assert first.tokens.shape == last.tokens.shape == (2, 8)
    assert last.segment_ids[1].sum() == 0
