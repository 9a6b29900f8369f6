"""Tokenizers: exact round trips, and no special token out of a text."""

from pathlib import Path

import pytest
import tokenizers

from dreamer_jax.data.sources import DataError
from dreamer_jax.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece

TEXTS = [
    "",
    " leading and trailing ",
    "two  spaces,\n\nlines\tand tabs",
    "12345 + 67 = 12412",
    "π ≈ 3.14159…, café, e\u0301, 日本語, 😀, ﬁ, ａ",
    "nul \x00 byte",
]
SPECIAL = "<s> </s> <unk> <|begin_of_text|><|end_of_text|> <0x41>"


@pytest.fixture(scope="module", params=["model", "json"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / f"tokenizer.{request.param}"
    texts = [f"Question: {n} apples and {n * n} pears?\nAnswer: #### {n + n * n}" for n in range(200)]
    if request.param == "model":
        path.write_bytes(train_sentencepiece(texts, 320))
        return load_tokenizer(path)
    byte_level = tokenizers.ByteLevelBPETokenizer()
    byte_level.train_from_iterator(texts, vocab_size=300, special_tokens=["<|begin_of_text|>", "<|end_of_text|>"])
    byte_level.save(str(path))
    return load_tokenizer(path)


@pytest.mark.parametrize("text", [*TEXTS, SPECIAL])
def test_decoding_gives_the_text_back(tokenizer: Tokenizer, text: str):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_spelt_out_in_a_text_stay_text(tokenizer: Tokenizer):
    assert {tokenizer.bos, tokenizer.eos}.isdisjoint(tokenizer.encode(SPECIAL))
    assert tokenizer.bos != tokenizer.eos


def test_decoding_drops_special_and_unknown_ids(tokenizer: Tokenizer):
    ids = tokenizer.encode("7 pears")
    assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos, tokenizer.vocab_size + 5, -1]) == "7 pears"


def test_a_character_cut_in_its_bytes_shows_as_a_replacement_until_it_is_whole(tokenizer: Tokenizer):
    ids = tokenizer.encode("x😀")
    assert tokenizer.decode(ids[:-1]).endswith("\ufffd")
    assert tokenizer.decode(ids) == "x😀"


def test_a_folder_with_the_saved_file_is_self_contained(tokenizer: Tokenizer, tmp_path: Path):
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.encode(TEXTS[4]) == tokenizer.encode(TEXTS[4])
    assert (again.bos, again.eos, again.vocab_size) == (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size)


def test_every_digit_is_a_token_of_its_own(tmp_path: Path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train_sentencepiece(["2024 2024 2024 is a year"] * 50, 280))
    ids = load_tokenizer(path).encode("20249")
    assert len(ids) == 5
    assert ids[0] == ids[2]


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path, name: str):
    with pytest.raises(DataError, match="does not exist"):
        load_tokenizer(tmp_path / name)
    (tmp_path / name).write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=f"{name}' is not a"):
        load_tokenizer(tmp_path / name)


def test_a_vocabulary_beyond_the_text_is_an_error_that_names_the_key():
    with pytest.raises(DataError, match=r"model\.vocab = 5000"):
        train_sentencepiece(["too little text"], 5000)
