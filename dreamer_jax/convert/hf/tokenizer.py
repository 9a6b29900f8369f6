"""The run's tokenizer as transformers reads it: a tokenizer.json as it is, a SentencePiece model turned into one."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from dreamer_jax.data.files import BOM
from dreamer_jax.data.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer, sentencepiece_parts
from dreamer_jax.errors import DreamerError

SPACE = "▁"
"""How SentencePiece writes a space."""
NEVER = -1e6
"""The score of an entry that no text may become."""
SAMPLES = (
    "Natalia sold clips to 48 of her friends in April.\nHow many in May? $3 * 12 = <<3*12=36>>36",
    "  two spaces, a\ttab and a space at the end ",
    "\n\n    def f(x):\n        return x**2  # ½ ≤ π",
    "naïve Zoë 数学 🙂👩‍👩‍👧 \u200b ﬁ Ⅷ",
    "▁▁ a▁b",
    "aaaaaaa 0000000000 ..........",
    "",
    " ",
)
"""Texts that a converted tokenizer is tried on."""
SPELT = "<s></s><unk><pad> <0x0A> <|begin_of_text|>"
"""Another: names of tokens, which are ordinary characters to the original. Where its own vocabulary lacks one of these
characters, a Unigram tokenizer of the tokenizers library takes them for the token all the same."""


class TokenizerError(DreamerError, ValueError):
    """A tokenizer that transformers could not use in the same way."""


class Exported(NamedTuple):
    """A tokenizer of transformers' kind."""

    files: dict[str, str]
    """By name: tokenizer.json and tokenizer_config.json."""
    bos: int
    eos: int


def exported(path: Path, special_tokens: tuple[str, ...], prompt: str, response: str, context: int) -> Exported:
    """The files of a tokenizer, whose ids equal those of the one at `path`.

    Args:
        path: the tokenizer's file.
        special_tokens: `data.special_tokens` of the run.
        prompt: what is put around a question, which goes where {text} stands.
        response: what is put around an answer.
        context: tokens that the model was trained on at once.

    Raises:
        TokenizerError: it cannot be converted so that ids are equal.
        DataError: it cannot be read.
    """
    original = load_tokenizer(path, special_tokens)
    content = path.read_bytes()
    if isinstance(original, SentencePieceTokenizer):
        converted = from_pieces(content, original)
    else:
        converted = tokenizers.Tokenizer.from_buffer(_without_mark(content))
    is_changed = _begin_documents(converted, original) or isinstance(original, SentencePieceTokenizer)
    is_unigram = isinstance(converted.model, models.Unigram)
    check_ids(converted, original, path, SAMPLES if is_unigram else (*SAMPLES, SPELT))
    bos, eos = (converted.id_to_token(i) for i in (original.bos, original.eos))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": eos,
        "unk_token": None if original.unknown is None else converted.id_to_token(original.unknown),
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "chat_template": chat_template(prompt, response),
    }
    config = {key: value for key, value in config.items() if value is not None}
    files = {
        "tokenizer.json": converted.to_str() if is_changed else _without_mark(content).decode(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
    }
    return Exported(files, original.bos, original.eos)


def check_ids(converted: tokenizers.Tokenizer, original: Tokenizer, path: Path, texts: tuple[str, ...]) -> None:
    """Raise TokenizerError for a text of which the two make different ids."""
    different = difference(converted, original, texts)
    if different is not None:
        text, expected, actual = different
        raise TokenizerError(
            f"tokenizer '{path}' cannot be converted: of {text!r} it makes {expected[:12]}, and tokenizer.json "
            f"{actual[:12]}; give the run's tokenizer as a tokenizer.json"
        )


def difference(
    converted: tokenizers.Tokenizer, original: Tokenizer, texts: tuple[str, ...]
) -> tuple[str, list[int], list[int]] | None:
    """The first text of which the two make different ids, and these: the original's, the other's."""
    converted.encode_special_tokens = True  # as the original reads special tokens that are spelt out
    every = ((text, original.encode(text), converted.encode(text, add_special_tokens=False).ids) for text in texts)
    found = next((one for one in every if one[1] != one[2]), None)
    converted.encode_special_tokens = False
    return found


def _without_mark(content: bytes) -> bytes:
    """A JSON file without the byte order mark that some editors put before it."""
    return content.removeprefix(BOM)


def _begin_documents(converted: tokenizers.Tokenizer, original: Tokenizer) -> bool:
    """Let each text begin as a document does, and end where it ends; whether that changed the tokenizer."""
    bos = converted.id_to_token(original.bos)
    is_cut = converted.truncation is not None or converted.padding is not None
    converted.no_truncation()
    converted.no_padding()
    if converted.encode("a").ids == [original.bos, *original.encode("a")]:
        return is_cut
    converted.post_processor = processors.TemplateProcessing(
        single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, original.bos)]
    )
    return True


def from_pieces(content: bytes, original: SentencePieceTokenizer) -> tokenizers.Tokenizer:
    """A SentencePiece model, BPE or Unigram, as a tokenizer of the tokenizers library."""
    model = sentencepiece_parts(content)
    kinds, spec = model.SentencePiece, model.normalizer_spec
    ends = {original.bos, original.eos}
    is_bpe = model.trainer_spec.model_type == model.trainer_spec.BPE
    text_kinds = (kinds.NORMAL, kinds.USER_DEFINED)
    textual = {p.piece: p.score for i, p in enumerate(model.pieces) if p.type in text_kinds and i not in ends}
    core = _bpe(model, textual) if is_bpe else _unigram(model, textual)
    result = tokenizers.Tokenizer(core)
    result.normalizer = normalizers.Sequence(_normalizers(spec))
    strip = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    result.decoder = decoders.Sequence(parts)
    special = [p.piece for i, p in enumerate(model.pieces) if p.type in (kinds.CONTROL, kinds.UNKNOWN) or i in ends]
    result.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    own = [p.piece for i, p in enumerate(model.pieces) if p.type == kinds.USER_DEFINED and i not in ends]
    result.add_tokens([AddedToken(piece, normalized=False) for piece in own])
    return result


def _normalizers(spec: Any) -> list[Any]:
    """What SentencePiece does to a text first, in its order."""
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(tokenizers.Regex(r"\A +| +\z|(?<= ) +"), ""))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return [*steps, normalizers.Replace(" ", SPACE)]


def _bpe(model: Any, textual: dict[str, float]) -> Any:
    """The merges are not in the file: two pieces merge where their text is a piece, the best score first."""
    merges = []
    for piece, score in textual.items():
        # Of one piece's merges, that of the longest left part comes first, as text is merged from the left.
        cuts = ((piece[:cut], piece[cut:]) for cut in range(len(piece) - 1, 0, -1))
        merges += [(score, pair) for pair in cuts if pair[0] in textual and pair[1] in textual]
    merges.sort(key=lambda merge: -merge[0])  # stable
    vocab = {p.piece: i for i, p in enumerate(model.pieces)}
    return models.BPE(
        vocab=vocab,
        merges=[pair for _, pair in merges],
        unk_token=model.trainer_spec.unk_piece,
        fuse_unk=True,
        byte_fallback=bool(model.trainer_spec.byte_fallback),
    )


def _unigram(model: Any, textual: dict[str, float]) -> Any:
    """Control tokens and bytes are in the vocabulary as well, but at a score that no text takes."""
    return models.Unigram(
        [(p.piece, textual.get(p.piece, NEVER)) for p in model.pieces],
        unk_id=model.trainer_spec.unk_id,
        byte_fallback=bool(model.trainer_spec.byte_fallback),
    )


def chat_template(prompt: str, response: str) -> str:
    """The layout of the training documents in Jinja: the texts around a question and an answer, and their ends."""
    before, after = (_quoted(part) for part in prompt.split("{text}"))
    lead, trail = (_quoted(part) for part in response.split("{text}"))
    return (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ " + before + " + message['content'] + " + after + " }}"
        "{% elif message['role'] == 'assistant' %}{{ " + lead + " + message['content'] + " + trail + " + eos_token }}"
        "{% else %}{{ raise_exception('this model knows the roles user and assistant') }}{% endif %}{% endfor %}"
    )


def templates_of(chat: str) -> tuple[str, str] | None:
    """The texts around a question and an answer, {text} in each; None if `chat_template` did not write this."""
    parts = [f"part {n}" for n in range(4)]
    pattern = re.escape(chat_template(*("{text}".join(pair) for pair in (parts[:2], parts[2:]))))
    for part in parts:
        pattern = pattern.replace(re.escape(_quoted(part)), r'("(?:[^"\\]|\\.)*")')
    found = re.fullmatch(pattern, chat.strip())
    if found is None:
        return None
    before, after, lead, trail = (json.loads(quoted) for quoted in found.groups())
    return f"{before}{{text}}{after}", f"{lead}{{text}}{trail}"


def _quoted(text: str) -> str:
    """A string of Jinja's."""
    return json.dumps(text, ensure_ascii=False)
