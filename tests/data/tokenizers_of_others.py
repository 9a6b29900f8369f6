"""Small tokenizers of the kinds that people bring, made here."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

LETTERS = "▁Whatis0123+?.\n:QuestionAwer"
SPECIAL = ("<unk>", "<s>", "</s>")


def unigram(*, unknown: int | None = 0, added: bool = True) -> Tokenizer:
    """As T5's, without byte fallback; with `added` False its special tokens are pieces alone."""
    pieces = [(name, 0.0) for name in SPECIAL] + [(letter, -3.0) for letter in dict.fromkeys(LETTERS)]
    made = Tokenizer(models.Unigram([*pieces, ("▁is", -2.0)], unk_id=unknown))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    if added:
        made.add_special_tokens(list(SPECIAL))
    return made


def llama(*, ends: tuple[str, str] = ("<s>", "</s>")) -> Tokenizer:
    """As Llama 2's: BPE with byte fallback, and a space in front of the first word, which decoding drops."""
    vocab = {name: i for i, name in enumerate(["<unk>", *ends, *(f"<0x{byte:02X}>" for byte in range(256))])}
    for entry in [*LETTERS, "▁W", "▁i", "▁is", "at", "▁▁"]:
        vocab.setdefault(entry, len(vocab))
    merges = [("▁", "W"), ("▁", "i"), ("▁i", "s"), ("a", "t"), ("▁", "▁")]
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", *ends])
    return made


def byte_level(*added: str, special: bool = True, whole: bool = True) -> Tokenizer:
    """As GPT-2's; with `whole` False it lacks the bytes from "a" on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {byte: i for i, byte in enumerate(alphabet) if whole or byte < "a"}
    made = Tokenizer(models.BPE(vocab, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_tokens([AddedToken(name, special=special, normalized=False) for name in added])
    return made


def words(*, unknown: str | None = None) -> Tokenizer:
    """Whole words only."""
    vocab = {name: i for i, name in enumerate(["[BOS]", "[EOS]", "[UNK]", "What", "is", "3", "+", "?"])}
    made = Tokenizer(models.WordLevel(vocab, unk_token=unknown) if unknown else models.WordLevel(vocab))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def saved(made: Tokenizer, folder: Path, **changes: Any) -> Path:
    """The tokenizer.json of a tokenizer; `changes` replace parts of its model."""
    description = json.loads(made.to_str())
    description["model"] |= changes
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(description), encoding="utf-8")
    return path
