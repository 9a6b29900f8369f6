"""Streaming text: with a tokenizer of single bytes, one of pieces, and those that people bring."""

import io
import random

import pytest
import sentencepiece

from dreamer_jax.data.tokenizer import load_tokenizer
from dreamer_jax.inference.sample import GenerationError
from dreamer_jax.inference.text import TextStream
from tests.data.tokenizers_of_others import byte_level, llama, saved, unigram

PIECES = ["", "ab", "c", "\n", "Qu", "estion", ":", " x", "abc"]


def decode_bytes(ids):
    return bytes(ids).decode("utf-8", errors="replace")


def decode_pieces(ids):
    return "".join(PIECES[i] for i in ids)


def shown(stream, tokens):
    """What each token shows, and what is left at the end."""
    return [stream.push(token) for token in tokens], stream.finish()


def test_half_a_character_is_never_shown():
    text = "a€😀é."
    pieces, rest = shown(TextStream(decode_bytes), text.encode())
    assert pieces == ["a", "", "", "€", "", "", "", "😀", "", "é", "."]
    assert rest == ""


def test_a_character_cut_in_half_by_the_end_is_left_out():
    assert shown(TextStream(decode_bytes), "ab€".encode()[:-1]) == (["a", "b", "", ""], "")


def test_broken_bytes_are_shown_once_what_follows_is_whole():
    pieces, rest = shown(TextStream(decode_bytes), b"a\xe2b")
    assert pieces == ["a", "", "\ufffdb"]
    assert rest == ""


def test_a_stop_string_ends_the_text_across_token_boundaries():
    stream = TextStream(decode_pieces, ["\nQuestion:"])
    pieces, rest = shown(stream, [1, 3, 4, 5, 6, 2])
    assert pieces == ["ab", "", "", "", "", ""]
    assert rest == ""
    assert stream.ended


def test_what_only_began_like_a_stop_string_is_shown_after_all():
    stream = TextStream(decode_pieces, ["\nQuestion:"])
    assert shown(stream, [1, 3, 4, 5, 7, 3]) == (["ab", "", "", "", "\nQuestion x", ""], "\n")
    assert not stream.ended


def test_a_stop_string_inside_one_token_cuts_it():
    stream = TextStream(decode_pieces, ["b"])
    assert stream.push(8) == "a"
    assert stream.ended
    assert stream.finish() == ""


def test_the_first_of_several_stop_strings_counts():
    assert TextStream(decode_pieces, ["c", "ab"]).push(8) == ""
    assert TextStream(decode_pieces, ["c", "b"]).push(8) == "a"


def test_a_stop_string_that_overlaps_its_own_beginning_is_found():
    stream = TextStream(decode_bytes, ["aab"])
    pieces, _ = shown(stream, b"aaab")
    assert "".join(pieces) == "a"
    assert stream.ended


def test_a_stop_string_may_contain_long_characters():
    stream = TextStream(decode_bytes, ["€€"])
    pieces, rest = shown(stream, "1€2€€3".encode())
    assert "".join(pieces) + rest == "1€2"


def test_a_leading_space_that_a_tokenizer_drops_is_dropped_only_at_the_start():
    stream = TextStream(lambda ids: decode_pieces(ids).removeprefix(" "))
    assert shown(stream, [7, 7, 1]) == (["x", " x", "ab"], "")


def test_decoding_looks_at_a_few_tokens_however_long_the_text():
    longest = 0

    def decode(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return decode_bytes(ids)

    shown(TextStream(decode, ["zz"]), "aé€".encode() * 50)
    assert longest <= 6


def sentencepiece_file(folder, **options):
    """A model that puts a space in front of words, with a control symbol."""
    texts = (f"What is {n} + 3  and   spaces?" for n in range(40))
    settings = {"vocab_size": 300, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2} | options
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_writer=model, control_symbols="<c>", **settings
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder / "tokenizer.model"


@pytest.mark.parametrize(
    "make",
    [
        sentencepiece_file,
        lambda folder: sentencepiece_file(folder, remove_extra_whitespaces=False),
        lambda folder: sentencepiece_file(folder, treat_whitespace_as_suffix=True),
        lambda folder: saved(llama(), folder),
        lambda folder: saved(unigram(), folder),
        lambda folder: saved(byte_level("<|endoftext|>"), folder),
    ],
    ids=["spaces as one", "spaces kept", "spaces behind", "llama", "unigram", "bytes"],
)
def test_the_pieces_shown_are_the_text_of_all_tokens_whatever_they_are(tmp_path, make):
    tokenizer = load_tokenizer(make(tmp_path))
    draw = random.Random(0)
    for trial in range(400):
        if trial % 2:  # ids beyond the vocabulary are rows of a model that the tokenizer does not have
            few = [*draw.choices(range(tokenizer.vocab_size + 3), k=3), tokenizer.bos, 10**6]
            ids = draw.choices(few, k=draw.randrange(1, 12))
        else:
            ids = tokenizer.encode("What is  €3 é and")
            for _ in range(3):
                other = draw.choice([tokenizer.bos, 10**6, draw.randrange(tokenizer.vocab_size)])
                ids.insert(draw.randrange(len(ids) + 1), other)
        pieces, rest = shown(TextStream(tokenizer.decode), ids)
        assert "".join(pieces) + rest == tokenizer.decode(ids).rstrip("\ufffd"), ids


def test_an_empty_stop_string_is_refused():
    with pytest.raises(GenerationError, match="stop string is empty"):
        TextStream(decode_pieces, ["a", ""])
