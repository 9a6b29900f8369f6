"""Streaming text, with a tokenizer of single bytes and one of pieces."""

import pytest

from dreamer_jax.inference.sample import GenerationError
from dreamer_jax.inference.text import TextStream

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


def test_an_empty_stop_string_is_refused():
    with pytest.raises(GenerationError, match="stop string is empty"):
        TextStream(decode_pieces, ["a", ""])
