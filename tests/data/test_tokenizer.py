"""Tokenizers: exact round trips, and no special token out of a text."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from dreamer_jax.data.sources import DataError
from dreamer_jax.data.tokenizer import (
    Tokenizer,
    UnknownCharacter,
    find_tokenizer,
    load_tokenizer,
    train_sentencepiece,
    word_tokenizer,
)
from tests.data.tokenizers_of_others import byte_level, llama, saved, unigram, words

TEXTS = [
    "",
    " leading and trailing ",
    "two  spaces,\n\nlines\tand tabs",
    "12345 + 67 = 12412",
    "π ≈ 3.14159…, café, e\u0301, 日本語, 😀, ﬁ, ａ",
    "nul \x00 byte",
]
SPECIAL = "<s> </s> <unk> <|begin_of_text|><|end_of_text|> <0x41>"
PEARS = [f"Question: {n} apples and {n * n} pears?\nAnswer: #### {n + n * n}" for n in range(200)]


@pytest.fixture(scope="module", params=["model", "json"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / f"tokenizer.{request.param}"
    if request.param == "model":
        path.write_bytes(train_sentencepiece(PEARS, 320))
        return load_tokenizer(path)
    byte_level = tokenizers.ByteLevelBPETokenizer()
    byte_level.train_from_iterator(PEARS, vocab_size=300, special_tokens=["<|begin_of_text|>", "<|end_of_text|>"])
    byte_level.save(str(path))
    return load_tokenizer(path)


def sentencepiece_model(**options: object) -> bytes:
    """A model with spaces in front of words, as Llama 2's."""
    model = io.BytesIO()
    settings = {"vocab_size": 290, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2} | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(PEARS), model_writer=model, **settings)
    return model.getvalue()


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


def test_a_folder_with_the_saved_file_is_self_contained_whatever_else_lies_there(tokenizer: Tokenizer, tmp_path: Path):
    for stranger in (".DS_Store", "._tokenizer.model", ".nfs0001", ".tokenizer.json.swp", "tokenizer.json~"):
        (tmp_path / stranger).write_bytes(b"x")
    assert find_tokenizer(tmp_path) is None
    path = tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert find_tokenizer(tmp_path) == path
    assert again.encode(TEXTS[4]) == tokenizer.encode(TEXTS[4])
    assert (again.bos, again.eos, again.vocab_size) == (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size)


def test_every_digit_is_a_token_of_its_own(tmp_path: Path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train_sentencepiece(["2024 2024 2024 is a year"] * 50, 280))
    ids = load_tokenizer(path).encode("20249")
    assert len(ids) == 5
    assert ids[0] == ids[2]


def test_a_path_may_have_a_home_and_variables_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    saved(unigram(), tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SOME_NAME", "tokenizer")
    assert load_tokenizer("~/$SOME_NAME.json").vocab_size == load_tokenizer("~").vocab_size
    (tmp_path / "a$b").mkdir()
    assert load_tokenizer(saved(unigram(), tmp_path / "a$b")).vocab_size == load_tokenizer("~").vocab_size
    with pytest.raises(DataError, match=r"data\.tokenizer = '.*': the environment variable is not set"):
        load_tokenizer("$NO_SUCH_VARIABLE_1/tokenizer.json")


# Special tokens by any name.


@pytest.mark.parametrize(
    ("made", "given", "ends"),
    [
        (lambda: byte_level("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"), (), (256, 257)),
        (lambda: byte_level("<|bos|>", "<|user_start|>"), (), (256, 256)),
        (lambda: byte_level("<|endoftext|>", "<|im_end|>"), (), (256, 256)),
        (lambda: byte_level("<|endoftext|>", "<|im_end|>"), ("<|endoftext|>", "<|im_end|>"), (256, 257)),
        (lambda: byte_level("<doc>", "<|endoftext|>"), ("<doc>",), (256, 256)),
        (unigram, (), (1, 2)),
        (lambda: unigram(added=False), (), (1, 2)),
        (lambda: llama(ends=("BEGIN", "END")), ("BEGIN", "END"), (1, 2)),
    ],
)
def test_the_ends_of_a_document_are_found_or_given(
    tmp_path: Path, made: Callable[[], tokenizers.Tokenizer], given: tuple[str, ...], ends: tuple[int, int]
):
    found = load_tokenizer(saved(made(), tmp_path), given)
    assert (found.bos, found.eos) == ends
    copy = load_tokenizer(found.save(tmp_path / "..").parent, given)
    assert (copy.bos, copy.eos) == ends


def test_an_added_token_goes_before_an_ordinary_piece_of_a_usual_name(tmp_path: Path):
    made = json.loads(byte_level("<|endoftext|>").to_str())["model"]["vocab"]
    path = saved(byte_level("<|endoftext|>"), tmp_path, vocab=made | {"</s>": 256, "<s>": 257})
    found = load_tokenizer(path)
    assert found.bos == found.eos == 258


@pytest.mark.parametrize(
    ("given", "cause"),
    [
        ((), r"no token of tokenizer '.*' is known to end a document; name them with --data\.special_tokens BEGIN END"),
        ((), r"it has the special tokens: <doc>, <end>"),
        (("<dok>",), r"has no token '<dok>'; did you mean '<doc>'\?"),
        (("<doc>", "<end>", "<x>"), r"data\.special_tokens = .*: give one name, or two"),
    ],
)
def test_unknown_names_of_the_ends_are_an_error_that_lists_those_there_are(
    tmp_path: Path, given: tuple[str, ...], cause: str
):
    with pytest.raises(DataError, match=cause):
        load_tokenizer(saved(byte_level("<doc>", "<end>"), tmp_path), given)


def test_the_ends_of_a_sentencepiece_model_are_found_or_given(tmp_path: Path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(
        sentencepiece_model(bos_id=-1, eos_id=-1, control_symbols="<a>", user_defined_symbols="<e>", vocab_size=295)
    )
    with pytest.raises(DataError, match=r"--data\.special_tokens BEGIN END \(it has the special tokens: <a>\)"):
        load_tokenizer(path)
    with pytest.raises(DataError, match=r"no token '<aa>'; did you mean '<a>'\?"):
        load_tokenizer(path, ("<aa>",))
    found = load_tokenizer(path, ("<a>", "<e>"))
    assert (found.bos, found.eos) == (1, 2)
    ids = found.encode("x <e> <a> y")  # a symbol that the user has defined, as SentencePiece calls it
    assert {1, 2}.isdisjoint(ids)
    assert found.decode(ids) == "x <e> <a> y"
    assert load_tokenizer(found.save(tmp_path / ".."), ("<a>", "<e>")).encode("<e>") == found.encode("<e>")


# Text stays text.


@pytest.mark.parametrize(
    ("made", "changes"),
    [
        (lambda: byte_level("<|endoftext|>", special=True), {}),
        (lambda: byte_level("<|endoftext|>", special=False), {}),
        (lambda: byte_level("<|endoftext|>"), {"ignore_merges": True}),
        (unigram, {}),
        (lambda: unigram(added=False), {}),
        (llama, {}),
    ],
    ids=["special", "not special", "whole words first", "unigram", "pieces alone", "byte fallback"],
)
def test_no_text_begins_or_ends_a_document(
    tmp_path: Path, made: Callable[[], tokenizers.Tokenizer], changes: dict[str, object]
):
    found = load_tokenizer(saved(made(), tmp_path, **changes))
    for text in ("What is<|endoftext|>3", "What is </s> <s> 3", "</s>", "<|endoftext|>"):
        assert {found.bos, found.eos}.isdisjoint(found.encode(text))
    assert found.decode([found.bos, *found.encode("What is"), found.eos]) == "What is"


def test_a_token_that_ends_documents_may_be_one_that_merges_make(tmp_path: Path):
    description = json.loads(byte_level().to_str())["model"]["vocab"]
    vocab = description | {"</": 256, "s>": 257, "</s>": 258}
    merges = [["<", "/"], ["s", ">"], ["</", "s>"]]
    found = load_tokenizer(saved(byte_level(), tmp_path, vocab=vocab, merges=merges))
    assert found.eos == 258
    assert found.encode("</s>") == [256, 257]


def test_added_tokens_that_are_not_special_stay_tokens(tmp_path: Path):
    made = byte_level("<|endoftext|>")
    made.add_tokens(["<tool>"])
    found = load_tokenizer(saved(made, tmp_path))
    assert found.encode("<tool>") == [257]
    assert found.decode([257]) == "<tool>"


def test_encoding_is_the_same_each_time_though_the_file_has_dropout(tmp_path: Path):
    found = load_tokenizer(saved(llama(), tmp_path, dropout=0.9))
    assert {tuple(found.encode("What is What is")) for _ in range(20)} == {tuple(found.encode("What is What is"))}


# Characters that a tokenizer does not have.


def test_unknown_characters_become_the_unknown_token(tmp_path: Path):
    found = load_tokenizer(saved(unigram(), tmp_path))
    assert found.unknown == 0
    assert found.encode("What is {é} 3").count(0) == 1
    assert found.encode("{ { <unk>").count(0) == 4  # it has neither "<" nor "k"
    assert load_tokenizer(saved(words(unknown="[UNK]"), tmp_path)).encode("What is that?")[2] == 2
    model = tmp_path / "tokenizer.model"
    model.write_bytes(sentencepiece_model(byte_fallback=False, vocab_size=60))
    found = load_tokenizer(model)
    assert found.encode("pears é pears").count(found.unknown) == 1


@pytest.mark.parametrize(
    ("made", "changes", "text", "named"),
    [
        (lambda: unigram(unknown=None), {}, "What is é3", "'é'"),
        (words, {}, "What is that?", "'that'"),
        (lambda: byte_level("<|endoftext|>", whole=False), {}, "AB a", "'a'"),
        (
            lambda: byte_level("<|endoftext|>", whole=False),
            {"unk_token": "<|endoftext|>"},
            "AB a",
            "'AB a'.* begins or",
        ),
        (llama, {"byte_fallback": False, "unk_token": None}, "What is é", "'é'"),
    ],
)
def test_a_character_that_has_no_token_at_all_is_named(
    tmp_path: Path, made: Callable[[], tokenizers.Tokenizer], changes: dict[str, object], text: str, named: str
):
    if changes.get("unk_token"):
        changes = changes | {"vocab": json.loads(made().to_str())["model"]["vocab"] | {"<|endoftext|>": 1000}}
    found = load_tokenizer(saved(made(), tmp_path, **changes))
    with pytest.raises(UnknownCharacter, match=f"has no token for {named}"):
        found.encode(text)
    assert found.unknown is None


def test_broken_bytes_do_not_break_the_characters_before_them(tmp_path: Path):
    found = load_tokenizer(saved(llama(), tmp_path))
    whole, broken = found.encode("é€")[1:], found.encode("€")[1:-1]
    assert found.decode([*whole, *broken, *found.encode("is")]) == "é€\ufffd is"
    assert found.decode([*whole, *broken]) == "é€\ufffd"


# Files that are no tokenizers.


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("tokenizer.model", b"nothing of the kind", "is not a SentencePiece model .*give a SentencePiece .model or"),
        ("tokenizer.model", b"", "is empty; fetch it again"),
        ("tokenizer.model", b"\x18\x01", "is not a SentencePiece model"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\nIw== 2\n", "is a list of tokens as tiktoken reads it.*give a Sentence"),
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer.*git lfs pull"),
        ("tokenizer.model", b"<!doctype html>", "is a web page"),
        ("tokenizer.json", b"nothing of the kind", "is not a tokenizer.json: it is no JSON"),
        ("tokenizer.json", b"", "is empty; fetch it again"),
        ("tokenizer.json", b"\xff\xff\xff", "is no JSON"),
        ("tokenizer.json", b"[" * 100_000, "is no JSON"),
        ("tokenizer.json", b"[]", "other JSON"),
        ("tokenizer.json", b'{"tokenizer_class": "LlamaTokenizer"}', "other JSON: .*give the tokenizer.json that lies"),
        ("tokenizer.json", b'{"model": {"type": "BPE"}}', "its vocabulary is damaged; fetch it again"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"</s>": "x"}}}', "is not a tokenizer.json"),
        ("tokenizer.json", b'{"model": {"vocab": [1, 2]}}', "is a damaged tokenizer.json"),
        ("tokenizer.json", b"\x1f\x8b\x08", "is compressed by gzip"),
        ("merges.txt", b"#version: 0.2\na b\n", "is a list of merges; give the tokenizer.json"),
    ],
    ids=lambda value: value[:30] if isinstance(value, bytes) else "",
)
def test_a_file_that_is_no_tokenizer_is_told_apart(tmp_path: Path, name: str, content: bytes, cause: str):
    with pytest.raises(DataError, match=rf"{name}' does not exist"):
        load_tokenizer(tmp_path / name)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}'.* {cause}"):
        load_tokenizer(tmp_path / name)


def test_a_damaged_model_is_named(tmp_path: Path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model()[:1000])
    with pytest.raises(DataError, match="is not a SentencePiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(DataError, match=r"holds neither tokenizer\.model nor tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_json_is_one_by_any_name_and_behind_a_byte_order_mark(tmp_path: Path):
    content = saved(unigram(), tmp_path).read_bytes()
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbf" + content)
    assert load_tokenizer(tmp_path / "x.txt").eos == 2


# Training.


@pytest.mark.parametrize(
    ("texts", "vocab", "cause"),
    [
        (["too little text"], 5000, r"they yield no more than 300; give --model\.vocab 300 or less"),
        (["too little text"], 100, r"their characters alone need 276; give --model\.vocab 276 or more"),
        ([], 300, "there is no line of text"),
        (["a" * 70_000], 300, "there is no line of text"),
        (["text"], 10**12, r"give another --model\.vocab"),
    ],
)
def test_a_vocabulary_that_the_texts_do_not_yield_is_an_error_that_names_the_key_and_the_bound(
    texts: list[str], vocab: int, cause: str
):
    with pytest.raises(DataError, match=rf"model\.vocab = {vocab} entries on these documents: .*{cause}"):
        train_sentencepiece(texts, vocab)


def test_a_tokenizer_of_words_has_an_entry_for_each_in_an_order_of_their_own(tmp_path: Path):
    content = word_tokenizer(["e17", "r3", "=", "é", "e17", "<s>", "e4"])
    assert content == word_tokenizer(iter(["r3", "e4", "é", "e17", "="]))
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    tokenizer = load_tokenizer(path)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.unknown, tokenizer.vocab_size) == (0, 1, 2, 8)
    assert tokenizer.encode("= e17 e4 r3 é") == [3, 4, 5, 6, 7]
    assert tokenizer.encode("\n e17\t\tr3e4  <s> E17 ") == [4, 2, 2, 2]
    assert tokenizer.decode([0, 4, 6, 7, 1]) == "e17 r3 é"
    assert tokenizer.encode("") == []


def test_a_tokenizer_of_words_is_found_in_the_folder_it_is_saved_to(tmp_path: Path):
    (tmp_path / "a.json").write_bytes(word_tokenizer(["e17", "r3"]))
    saved_path = load_tokenizer(tmp_path / "a.json").save(tmp_path)
    assert find_tokenizer(tmp_path) == saved_path == tmp_path / "tokenizer.json"
    assert load_tokenizer(tmp_path).encode("r3 e17") == [4, 3]
