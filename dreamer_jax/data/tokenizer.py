"""Tokenizers: SentencePiece (trained here, or given) and Hugging Face tokenizer.json, behind one small interface.

Text never becomes a special token, whatever it spells: only `bos` and `eos`, added by whoever lays out a document, are.
"""

import io
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, SupportsIndex, runtime_checkable

import sentencepiece
import tokenizers

from dreamer_jax.data.sources import DataError

BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|endoftext|>")
EOS_NAMES = ("<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|endoftext|>")
FILES = ("tokenizer.model", "tokenizer.json")
"""What `Tokenizer.save` writes: one of these."""
TRAINING_LINES = 2_000_000
"""Lines that SentencePiece reads at most; it samples from more."""


def find_tokenizer(folder: Path) -> Path | None:
    """The tokenizer's file in a folder, if there is one."""
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back."""

    bos: int
    """Id that begins a document."""
    eos: int
    """Id that ends a document."""
    vocab_size: int
    """Ids are below this."""

    def encode(self, text: str) -> list[int]:
        """Ids of the text; none is a special token."""

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Text of the ids. Special tokens and ids outside the vocabulary are dropped.

        A character whose bytes are not all there shows as U+FFFD: a stream of tokens holds back a text that ends so.
        """

    def save(self, directory: str | Path) -> Path:
        """Copy the tokenizer's file into a folder, which `load_tokenizer` then reads."""


class SentencePieceTokenizer:
    """A SentencePiece `.model`."""

    def __init__(self, path: Path):
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except RuntimeError as error:
            raise DataError(f"tokenizer '{path}' is not a SentencePiece model: {error}") from error
        self._path = path
        self.vocab_size: int = self._model.vocab_size()
        self.eos: int = self._model.eos_id()
        if self.eos < 0:
            raise DataError(f"tokenizer '{path}' has no end-of-document token; train it with eos_id")
        self.bos: int = self._model.bos_id() if self._model.bos_id() >= 0 else self.eos
        self._special = {i for i in range(self.vocab_size) if self._model.is_control(i) or self._model.is_unknown(i)}

    def encode(self, text: str) -> list[int]:
        """Ids of the text; control symbols spelt out in it are ordinary characters."""
        return self._model.encode(text)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Text of the ids, without special tokens."""
        return self._model.decode(_text_tokens(ids, self))

    def save(self, directory: str | Path) -> Path:
        """Copy the model to `tokenizer.model`."""
        return Path(shutil.copyfile(self._path, Path(directory) / "tokenizer.model"))


class JsonTokenizer:
    """A Hugging Face `tokenizer.json`."""

    def __init__(self, path: Path):
        try:
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"tokenizer '{path}' is not a tokenizer.json: {error}") from error
        self._path = path
        self._model.encode_special_tokens = True  # a special token spelt out in a text is split like any other text
        self._model.no_truncation()
        self._model.no_padding()
        self._special = {i for i, token in self._model.get_added_tokens_decoder().items() if token.special}
        self.vocab_size: int = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
        self.eos: int = self._named(EOS_NAMES)
        self.bos: int = self._named(BOS_NAMES + EOS_NAMES)

    def _named(self, names: Sequence[str]) -> int:
        for name in names:
            token = self._model.token_to_id(name)
            if token is not None:
                self._special.add(token)
                return token
        raise DataError(f"tokenizer '{self._path}' has none of the special tokens {', '.join(names)}")

    def encode(self, text: str) -> list[int]:
        """Ids of the text; special tokens spelt out in it are ordinary characters."""
        ids = self._model.encode(text, add_special_tokens=False).ids
        if not self._special.isdisjoint(ids):
            raise DataError(f"tokenizer '{self._path}' makes a special token of the text {text[:200]!r}")
        return ids

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Text of the ids, without special tokens."""
        return self._model.decode(_text_tokens(ids, self), skip_special_tokens=False)

    def save(self, directory: str | Path) -> Path:
        """Copy the file to `tokenizer.json`."""
        return Path(shutil.copyfile(self._path, Path(directory) / "tokenizer.json"))


def _text_tokens(ids: Iterable[SupportsIndex], tokenizer: SentencePieceTokenizer | JsonTokenizer) -> list[int]:
    """The ids that stand for text: neither special nor beyond the vocabulary (a model may have more rows than that)."""
    return [i for i in map(int, ids) if 0 <= i < tokenizer.vocab_size and i not in tokenizer._special]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a `.model` (SentencePiece) or `.json` (Hugging Face) file, or the folder that `save` wrote into.

    Raises:
        DataError: no such file, or not a tokenizer.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        inside = [path / name for name in ("tokenizer.model", "tokenizer.json") if (path / name).is_file()]
        if not inside:
            raise DataError(f"folder '{path}' holds neither tokenizer.model nor tokenizer.json")
        path = inside[0]
    if not path.is_file():
        raise DataError(f"tokenizer '{path}' does not exist; give a .model or a tokenizer.json, or 'train'")
    return JsonTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)


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
    except RuntimeError as error:
        raise DataError(
            f"cannot train a tokenizer of model.vocab = {vocab} entries on these documents: {error}"
        ) from error
    return model.getvalue()
