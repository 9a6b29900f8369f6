"""Tokenizers: SentencePiece (trained here, or given) and Hugging Face tokenizer.json (made here of words, or given).

Text never becomes a special token, whatever it spells: only `bos` and `eos`, added by whoever lays out a document, are.
"""

import difflib
import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import sentencepiece
import tokenizers

from dreamer_jax.data.files import BOM, HEAD, DataError, check_file, expanded, foreign, reading
from dreamer_jax.files import write_whole

BOS_NAMES = (
    "<|begin_of_text|>",
    "<s>",
    "<bos>",
    "[BOS]",
    "<|endoftext|>",
    "<｜begin▁of▁sentence｜>",
    "<|bos|>",
    "<|startoftext|>",
    "<BOS>",
)
EOS_NAMES = (
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "[EOS]",
    "<|endoftext|>",
    "<｜end▁of▁sentence｜>",
    "<|eos|>",
    "<EOS>",
    "<|bos|>",  # for both in tokenizers that have it alone
)
FILES = ("tokenizer.model", "tokenizer.json")
"""What `Tokenizer.save` writes: one of these."""
MADE = ("train", "words")
"""Values of data.tokenizer that name no file: the preparation makes these tokenizers of its documents."""
ENDS_AND_UNKNOWN = ("<s>", "</s>", "<unk>")
"""The first entries of a tokenizer of words."""
TRAINING_LINES = 2_000_000
"""Lines that SentencePiece reads at most; it samples from more."""
GIVE = "give a SentencePiece .model or a Hugging Face tokenizer.json"


class UnknownCharacter(DataError):
    """A text that the tokenizer cannot put into tokens, not even into its unknown token."""


def find_tokenizer(folder: Path) -> Path | None:
    """The tokenizer's file in a folder, if there is one; what else lies there does not count."""
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back."""

    bos: int
    """Id that begins a document."""
    eos: int
    """Id that ends a document."""
    unknown: int | None
    """Id that stands for characters which the tokenizer does not know; None where there is none."""
    vocab_size: int
    """Ids are below this."""

    def encode(self, text: str) -> list[int]:
        """Ids of the text; none begins or ends a document.

        Raises:
            UnknownCharacter: a character that the tokenizer does not know, where it has no unknown token.
        """

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Text of the ids. Special tokens and ids outside the vocabulary are dropped.

        A character whose bytes are not all there shows as U+FFFD: a stream of tokens holds back a text that ends so.
        """

    def save(self, directory: str | Path) -> Path:
        """Copy the tokenizer's file into a folder, which `load_tokenizer` then reads."""


class SentencePieceTokenizer:
    """A SentencePiece `.model`."""

    def __init__(self, path: Path, content: bytes, special_tokens: Sequence[str]):
        """Of the content of a file; `special_tokens` name the beginning and the end of a document, if not usual ones.

        Raises:
            DataError: not a SentencePiece model, or one without these tokens.
        """
        self._path, self._content = path, content
        self._model = self._read(content)
        names = [self._model.id_to_piece(i) for i in range(self._model.vocab_size())]
        self.bos, self.eos = self._ends(names, special_tokens)
        if not all(self._model.is_control(i) for i in (self.bos, self.eos)):
            self._model = self._read(_as_control(content, (self.bos, self.eos)))
        self.unknown: int | None = self._model.unk_id()
        self.vocab_size: int = len(names)
        self._special = {i for i in range(len(names)) if self._model.is_control(i) or self._model.is_unknown(i)}

    def _read(self, content: bytes) -> Any:
        try:
            model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise DataError(f"tokenizer '{self._path}' is not a SentencePiece model ({error}); {GIVE}") from error
        if not model.vocab_size():
            raise DataError(f"tokenizer '{self._path}' is not a SentencePiece model (it has no entries); {GIVE}")
        return model

    def _ends(self, names: Sequence[str], special_tokens: Sequence[str]) -> tuple[int, int]:
        control = [name for i, name in enumerate(names) if self._model.is_control(i)]
        if special_tokens:
            begin, end = _chosen(special_tokens, control, names, self._path)
            return names.index(begin), names.index(end)
        bos, eos = self._model.bos_id(), self._model.eos_id()
        if eos < 0:
            raise DataError(f"tokenizer '{self._path}' says of no token that it ends a document; {_name_them(control)}")
        return (bos if bos >= 0 else eos), eos

    def encode(self, text: str) -> list[int]:
        """Ids of the text; control symbols spelt out in it are ordinary characters."""
        return self._model.encode(text)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Text of the ids, without special tokens."""
        return self._model.decode(_text_tokens(ids, self))

    def save(self, directory: str | Path) -> Path:
        """Copy the model to `tokenizer.model`."""
        return _saved(self._content, Path(directory) / "tokenizer.model")


def _as_control(content: bytes, ids: Iterable[int]) -> bytes:
    """A SentencePiece model in which these entries are control symbols, which no text becomes."""
    model = sentencepiece_parts(content)
    for i in ids:
        model.pieces[i].type = model.SentencePiece.CONTROL
    return model.SerializeToString()


def sentencepiece_parts(content: bytes) -> Any:
    """A SentencePiece model as its format has it: pieces, normalizer_spec, trainer_spec."""
    from sentencepiece import sentencepiece_model_pb2 as format

    model: Any = format.ModelProto()  # type: ignore[attr-defined]  # protobuf makes its classes at import
    model.ParseFromString(content)
    return model


class JsonTokenizer:
    """A Hugging Face `tokenizer.json`."""

    def __init__(self, path: Path, content: bytes, special_tokens: Sequence[str]):
        """Of the content of a file; `special_tokens` name the beginning and the end of a document, if not usual ones.

        Raises:
            DataError: not a tokenizer.json, or one without these tokens.
        """
        self._path, self._content = path, content
        description = _description(content, path)
        added = [token["content"] for token in description["added_tokens"]]
        names = _entries(description["model"])
        begin, end = _chosen(special_tokens, added, [*added, *names], path)
        unknown = _unknown_name(description["model"], names)
        special = {token["content"] for token in description["added_tokens"] if token.get("special")}
        hidden = sorted({*special, begin, end, *([] if unknown is None else [unknown])})
        disguise = {name: f"\0 \U0010fffe{n} \U0010fffe\0" for n, name in enumerate(hidden)}
        self._model = self._read(_disguised(description, disguise))
        ids: dict[str, int] = self._model.get_vocab(with_added_tokens=True)
        self.bos, self.eos = ids[disguise[begin]], ids[disguise[end]]
        self.unknown: int | None = None if unknown in (None, begin, end) else ids[disguise[unknown]]
        self.vocab_size: int = max(ids.values()) + 1
        self._special = {ids[name] for name in disguise.values() if name in ids}
        self._bytes, self._byte_of = _byte_tokens(description, ids)
        self._known = _known_characters(description, ids)

    def _read(self, description: dict[str, Any]) -> Any:
        try:
            model = tokenizers.Tokenizer.from_str(json.dumps(description))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"tokenizer '{self._path}' is not a tokenizer.json ({error}); {GIVE}") from error
        model.encode_special_tokens = True  # a special token spelt out in a text is split like any other text
        return model

    def encode(self, text: str) -> list[int]:
        """Ids of the text; special tokens spelt out in it are ordinary characters."""
        try:
            ids = self._model.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises bare Exception
            raise self._cannot(self._first_unknown(text), str(error)) from error
        if self._known is not None:
            unknown = set("".join(self._words(text))) - self._known
            if unknown:
                raise self._cannot(min(unknown), "it has neither an unknown token nor tokens for all bytes")
        if self.bos in ids or self.eos in ids:
            raise self._cannot(text[:40], "its unknown token is the one that begins or ends a document")
        return ids

    def _cannot(self, what: str, why: str) -> UnknownCharacter:
        return UnknownCharacter(f"tokenizer '{self._path}' has no token for {what!r} ({why})")

    def _words(self, text: str) -> list[str]:
        """What the model proper is given of a text."""
        normalizer, splitter = self._model.normalizer, self._model.pre_tokenizer
        text = normalizer.normalize_str(text) if normalizer else text
        return [word for word, _ in splitter.pre_tokenize_str(text)] if splitter else [text]

    def _first_unknown(self, text: str) -> str:
        """The first word, or character where characters are known or not, that the model refuses."""
        word = next((word for word in self._words(text) if not self._takes(word)), text[:40])
        by_character = isinstance(self._model.model, tokenizers.models.Unigram)
        return next((c for c in word if by_character and not self._takes(c)), word)

    def _takes(self, word: str) -> bool:
        try:
            self._model.model.tokenize(word)
        except Exception:  # the library raises bare Exception
            return False
        return True

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Text of the ids, without special tokens."""
        return self._model.decode(self._mended(_text_tokens(ids, self)), skip_special_tokens=False)

    def _mended(self, ids: list[int]) -> list[int]:
        """The ids with broken characters among the byte tokens replaced by U+FFFD.

        The library makes a U+FFFD of every byte of a run in which one is wrong, of whole characters before it too.
        """
        if not self._byte_of or self._byte_of.keys().isdisjoint(ids):
            return ids
        fixed: list[int] = []
        run = bytearray()
        for i in [*ids, -1]:
            if i in self._byte_of:
                run.append(self._byte_of[i])
                continue
            fixed += [self._bytes[byte] for byte in run.decode("utf-8", errors="replace").encode()]
            run.clear()
            fixed.append(i)
        return fixed[:-1]

    def save(self, directory: str | Path) -> Path:
        """Copy the file to `tokenizer.json`."""
        return _saved(self._content, Path(directory) / "tokenizer.json")


def _saved(content: bytes, path: Path) -> Path:
    write_whole(path, content)
    return path


def _text_tokens(ids: Iterable[SupportsIndex], tokenizer: SentencePieceTokenizer | JsonTokenizer) -> list[int]:
    """The ids that stand for text: neither special nor beyond the vocabulary (a model may have more rows than that)."""
    return [i for i in map(int, ids) if 0 <= i < tokenizer.vocab_size and i not in tokenizer._special]


def _chosen(special_tokens: Sequence[str], added: Sequence[str], names: Sequence[str], path: Path) -> tuple[str, str]:
    """The names of the tokens that begin and end a document, among `names`; of usual ones, the `added` come first.

    Raises:
        DataError: there are none; the message has those to choose from.
    """
    if len(special_tokens) > 2:
        raise DataError(f"data.special_tokens = {special_tokens}: give one name, or two, of the beginning and the end")
    known = set(names)
    for name in special_tokens:
        if name not in known:
            nearest = difflib.get_close_matches(name, names, n=1)
            guess = f"; did you mean '{nearest[0]}'?" if nearest else ""
            raise DataError(f"tokenizer '{path}' has no token '{name}'{guess} {_name_them(added)}")
    if special_tokens:
        return special_tokens[0], special_tokens[-1]
    end = next((name for some in (set(added), known) for name in EOS_NAMES if name in some), None)
    if end is None:
        raise DataError(f"no token of tokenizer '{path}' is known to end a document; {_name_them(added)}")
    return next((name for some in (set(added), known) for name in BOS_NAMES if name in some), end), end


def _name_them(added: Sequence[str]) -> str:
    """How to say which tokens begin and end a document, and which there are."""
    listed = ", ".join(added[:30]) + (f" and {len(added) - 30} more" if len(added) > 30 else "")
    return f"name them with --data.special_tokens BEGIN END (it has the special tokens: {listed or 'none'})"


def _description(content: bytes, path: Path) -> dict[str, Any]:
    """What a tokenizer.json says, as far as it matters for reading a text.

    Raises:
        DataError: not JSON, or not that of a tokenizer.
    """
    try:
        found = json.loads(content.removeprefix(BOM).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"tokenizer '{path}' is not a tokenizer.json: it is no JSON ({error}); {GIVE}") from error
    if not isinstance(found, dict) or not isinstance(found.get("model"), dict):
        raise DataError(
            f"tokenizer '{path}' is not a tokenizer.json but other JSON: it describes no model; give the "
            f"tokenizer.json that lies beside tokenizer_config.json"
        )
    added = found.get("added_tokens") or []
    vocab = found["model"].get("vocab")
    if not isinstance(vocab, dict | list) or not all(isinstance(t, dict) and "content" in t for t in added):
        raise DataError(f"tokenizer '{path}' is not a tokenizer.json: its vocabulary is damaged; fetch it again")
    # A document is one text: nothing is cut, filled up or, as in training with dropout, drawn at random.
    model = found["model"] | ({"dropout": None} if "dropout" in found["model"] else {})
    return found | {"added_tokens": added, "model": model, "truncation": None, "padding": None}


def _entries(model: dict[str, Any]) -> list[str]:
    """The entries of the model proper: by id where they are listed (Unigram), in any order else."""
    vocab = model["vocab"]
    return list(vocab) if isinstance(vocab, dict) else [str(entry[0]) for entry in vocab if entry]


def _unknown_name(model: dict[str, Any], names: list[str]) -> str | None:
    """The token that stands for characters that the model does not know."""
    if isinstance(model["vocab"], list):
        place = model.get("unk_id")
        return names[place] if isinstance(place, int) and 0 <= place < len(names) else None
    name = model.get("unk_token")
    return name if name in model["vocab"] else None


def _disguised(description: dict[str, Any], disguise: dict[str, str]) -> dict[str, Any]:
    """The description with some tokens renamed, so that no text becomes one of them.

    That a token is special does not suffice: it may also be an entry of the model proper, which then finds it in a
    text, and some files list the end of a document as an ordinary token.
    """
    model = dict(description["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {disguise.get(name, name): i for name, i in model["vocab"].items()}
    else:
        model["vocab"] = [[disguise.get(entry[0], entry[0]), *entry[1:]] for entry in model["vocab"] if entry]
    if model.get("unk_token") in disguise:
        model["unk_token"] = disguise[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if disguise.keys().isdisjoint(_involved(merge))]
    added = [
        token | ({"content": disguise[token["content"]], "special": True} if token["content"] in disguise else {})
        for token in description["added_tokens"]
    ]
    return description | {"model": model, "added_tokens": added}


def _involved(merge: str | list[str]) -> list[str]:
    """The two entries that a merge joins, and the one that it makes."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    return [*parts, "".join(parts)]


def _byte_tokens(description: dict[str, Any], ids: dict[str, int]) -> tuple[list[int], dict[int, int]]:
    """The tokens of single bytes by byte, and the bytes by token, where the decoder puts bytes together."""
    tokens = [ids.get(f"<0x{byte:02X}>", -1) for byte in range(256)]
    if "ByteFallback" not in json.dumps(description.get("decoder")) or -1 in tokens:
        return [], {}
    return tokens, {token: byte for byte, token in enumerate(tokens)}


def _known_characters(description: dict[str, Any], ids: dict[str, int]) -> set[str] | None:
    """The characters that a BPE model has; None where it loses no others in silence.

    BPE without an unknown token drops what it does not know, and says nothing.
    """
    model = description["model"]
    is_bpe = "merges" in model
    has_bytes = bool(model.get("byte_fallback")) and all(f"<0x{byte:02X}>" in ids for byte in range(256))
    if not is_bpe or has_bytes or _unknown_name(model, _entries(model)) is not None:
        return None
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    parts = {part for name in ids for part in (name, name.removeprefix(prefix), name.removesuffix(suffix))}
    known = {part for part in parts if len(part) == 1}
    by_bytes = "ByteLevel" in json.dumps([description.get("pre_tokenizer"), description.get("normalizer")])
    if by_bytes and known.issuperset(tokenizers.pre_tokenizers.ByteLevel.alphabet()):
        return None
    return known.union(*(token["content"] for token in description["added_tokens"]))


def load_tokenizer(path: str | Path, special_tokens: Sequence[str] = ()) -> Tokenizer:
    """Read a `.model` (SentencePiece) or `.json` (Hugging Face) file, or the folder that `save` wrote into.

    Args:
        path: the file or folder.
        special_tokens: names of the tokens that begin and end a document (one serves as both), where the tokenizer
            calls them by uncommon ones: `data.special_tokens` of the run.

    Raises:
        DataError: no such file, not a tokenizer, or one without such tokens.
    """
    path = expanded(str(path), "data.tokenizer")
    with reading(path, "data.tokenizer"):
        if path.is_dir():
            inside = find_tokenizer(path)
            if inside is None:
                raise DataError(f"folder '{path}' holds neither {' nor '.join(FILES)}")
            path = inside
        check_tokenizer_file(path)
        content = path.read_bytes()
    if path.suffix != ".json" and not content.removeprefix(BOM).lstrip().startswith(b"{"):
        return SentencePieceTokenizer(path, content, special_tokens)
    try:
        return JsonTokenizer(path, content, special_tokens)
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise DataError(f"tokenizer '{path}' is a damaged tokenizer.json ({error!r}); fetch it again") from error


def check_tokenizer_file(path: Path) -> None:
    """Make sure that a path is a file that may hold a tokenizer.

    Raises:
        DataError: it is absent, a folder, empty, or of a kind that holds none.
    """
    check_file(path, "data.tokenizer")
    with reading(path, "data.tokenizer"), path.open("rb") as file:
        head = file.read(HEAD)
    kind = foreign(head)
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", head):
        kind = "a list of tokens as tiktoken reads it (Llama 3 has such a tokenizer.model); " + GIVE
    elif head.startswith(b"#version"):
        kind = "a list of merges; give the tokenizer.json that belongs to it"
    if kind:
        raise DataError(f"tokenizer '{path}' is {kind}")


def train_sentencepiece(texts: Iterable[str], vocab: int) -> bytes:
    """Train a SentencePiece BPE model: byte fallback, digits apart, and a text's characters as they are.

    Raises:
        DataError: the texts do not yield `vocab` entries.
    """
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(0)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.split("\n") if line),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab,
            byte_fallback=True,
            split_digits=True,
            required_chars="0123456789",
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            input_sentence_size=TRAINING_LINES,
            max_sentence_length=1 << 16,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(
            f"cannot train a tokenizer of model.vocab = {vocab} entries on these documents: {_remedy(str(error))}"
        ) from error
    return model.getvalue()


def word_tokenizer(words: Iterable[str]) -> bytes:
    """A tokenizer.json with one entry for each distinct word, in alphabetical order after bos, eos and unknown.

    Texts are split at white space, and decoded with a space between two words.
    """
    entries = [*ENDS_AND_UNKNOWN, *sorted(set(words).difference(ENDS_AND_UNKNOWN))]
    vocab = {entry: number for number, entry in enumerate(entries)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=ENDS_AND_UNKNOWN[2]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(list(ENDS_AND_UNKNOWN))
    return made.to_str(pretty=True).encode()


def _remedy(said: str) -> str:
    """What to do about an error of SentencePiece's trainer."""
    most, least = re.search(r"a value <= (\d+)", said), re.search(r"required_chars\. \d+ vs (\d+)", said)
    if most:
        return f"they yield no more than {most[1]}; give --model.vocab {most[1]} or less, or more documents"
    if least:
        return f"their characters alone need {least[1]}; give --model.vocab {least[1]} or more"
    if "sentences_.empty()" in said:
        return "there is no line of text that it can learn from; give more documents, or a tokenizer as data.tokenizer"
    return f"{said}; give another --model.vocab, or a tokenizer as data.tokenizer"
