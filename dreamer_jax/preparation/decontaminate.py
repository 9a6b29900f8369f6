"""Which benchmark questions a training row contains.

A text is compared as tokens: words, numbers and signs. Case, white space, punctuation, drawings and the layout commands
of LaTeX make no difference; numbers do. Three rules find a question:

- "whole prompt": the row's prompt is the question.
- "contained": the question stands somewhere in the prompt or in the response. One of few tokens says little, so it has
  to stand there as sentences of its own and hold a number; one of very few counts only as a whole prompt.
- "n-grams": most runs of n tokens of the question are found, and with them a third of its words and all its numbers.
  The length n grows with the question. The same question with other numbers is no hit, nor is one that shares a
  template or a formula.

Solutions are never looked for. A question in other words is not found, nor one with line numbers between its words.
"""

import functools
import itertools
import math
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

Rule = Literal["whole prompt", "contained", "n-grams"]
Part = Literal["prompt", "response"]
Tokens = tuple[str, ...]

SENTENCE_TOKENS = 3
"""A shorter question counts only as a whole prompt."""
LONG_TOKENS = 8
"""A shorter question counts only as sentences of their own, or as a whole prompt."""
GRAM_LENGTHS = ((40, 8), (LONG_TOKENS, 5), (SENTENCE_TOKENS, 3))
"""Length of n-grams by the least number of tokens that a question has, longest first."""
HEAD_LENGTH = min(length for _, length in GRAM_LENGTHS)
GRAM_SHARE = 0.6
"""Share of a question's n-grams that have to be found. A changed word costs n of them."""
GRAM_SHARE_WITHOUT_NUMBERS = 0.9
"""The same for a question without numbers: there a template is filled in with words."""
NUMBER_LENGTH = 3
"""Length of the run of tokens in which each number has to be found."""
WORD_SHARE = 1 / 3
"""Share of a question's different words, LaTeX apart, that lie in those n-grams. A shared formula is no question."""

_FIGURE = re.compile(r"\[asy\].*?\[/asy\]", re.DOTALL)
_PERCENT = " percent "
_SUPERSCRIPTS = str.maketrans(dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹", (f"^{digit}" for digit in range(10)), strict=True)))
_GREEK = "alpha beta gamma delta epsilon theta lambda mu pi rho sigma tau phi omega"
_CHARACTERS = str.maketrans(
    dict(zip("αβγδεθλμπρστφω", (f" {name} " for name in _GREEK.split()), strict=True))
    | {"−": "-", "–": "-", "—": "-", "×": "*", "·": "*", "⋅": "*", "÷": "/", "⁄": "/", "’": "'", "‘": "'"}
    | {"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "√": r"\sqrt ", "∞": r"\infty ", "∠": r"\angle ", "△": r"\triangle "}
    | {"%": _PERCENT, "°": " degrees "}
)
_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\[!,;: ]|\\(?:left|right|[bB]igg?[lr]?|(?:display|text)style|q?quad|limits)(?![a-z])|\\\\|~", " "),
        (r"\\(?:begin|end)\s*\{\s*[a-z]*\*?\s*\}", " "),
        (r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)(?![a-z])", " "),
        (r"(?m)^[ \t]*(?:>|#+|[-*](?=[ \t]+[a-z]{2}))[ \t]+|\*\*", " "),
        (r"\\[dt](frac|binom)(?![a-z])", r"\\\1"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac \1 \2"),
        (r"\\(?:times|cdot)(?![a-z])", "*"),
        (r"\\div(?![a-z])", "/"),
        (r"\\([lgn])eq(?![a-z])", r"\\\1e"),
        (r"\^\s*(?:\{\s*)?\\circ(?![a-z])\s*\}?", " degrees "),
        (r"\\(?:[lc]?dots)(?![a-z])", " "),
        (r"\{,\}(?<=\d\{,\})(?=\d)", ","),  # what a pattern begins with is searched for fast
        (r"([1-9](?<![\d,.][1-9])\d{0,2}(?:,\d{3})+)(?![\d,]*\d)", lambda found: found[1].replace(",", "")),
        (r"'(?<=[a-z]{2}')(?=[a-z])", ""),
    )
)
_TOKEN = re.compile(r"[^\W\d_]+|\d+(?:\.\d+)?|\.\d+|[+=<>^]|[-*/](?=\s*(?:[\d\\({.]|[b-z](?![a-z])))")
_BREAK = re.compile(r"[?!:;\n]|\.(?!\d)")
_WORD = re.compile(r"(?<![\\a-z])[a-z]{3,}")
_SIGNS = frozenset("+-=<>")
_SPELLED = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million dozen half third "
    "quarter fourth fifth once twice thrice double triple"
)
_NUMBER_WORDS = frozenset(_SPELLED.split())


class Question(NamedTuple):
    """A question of a benchmark, without the options of a multiple choice."""

    benchmark: str
    id: str
    text: str


class Hit(NamedTuple):
    """A question that a row contains."""

    question: Question
    rule: Rule
    overlap: float
    """Share of the question that was found."""
    part: Part
    """Where it was found."""


class Index(NamedTuple):
    """Questions, and the n-grams by which a row finds those that it may contain."""

    questions: tuple[Question, ...]
    tokens: tuple[Tokens, ...]
    """Of each question."""
    wholes: Mapping[Tokens, list[int]]
    """Questions by all their tokens."""
    seeds: Mapping[int, Mapping[Tokens, list[int]]]
    """Questions by some of their n-grams, for each n. A row that contains a question has at least one of these."""
    heads: frozenset[Tokens]
    """The first tokens of these n-grams, as many as all of them have. Most runs of tokens of a row are none of them."""

    @classmethod
    def of(cls, questions: Iterable[Question]) -> "Index":
        """An index of questions. One without a word or a number is never found."""
        kept = tuple(questions)
        tokens = tuple(tokens_of(question.text) for question in kept)
        wholes: dict[Tokens, list[int]] = defaultdict(list)
        for number, sequence in enumerate(tokens):
            if sequence:
                wholes[sequence].append(number)
        seeds = _seeds(tokens)
        heads = frozenset(gram[:HEAD_LENGTH] for grams in seeds.values() for gram in grams)
        return cls(kept, tokens, dict(wholes), seeds, heads)

    def hits(self, prompt: str, response: str) -> list[Hit]:
        """The questions that a row contains, each once, in the order of the index."""
        found: dict[int, Hit] = {}
        parts: tuple[tuple[Part, str], ...] = (("prompt", prompt), ("response", response))
        for part, text in parts:
            for number, rule, overlap in _found(self, part, _Text(text)):
                if number not in found or overlap > found[number].overlap:
                    found[number] = Hit(self.questions[number], rule, overlap, part)
        return [found[number] for number in sorted(found)]


def tokens_of(text: str) -> Tokens:
    """The words, numbers and operators of a text, without regard to how they are set."""
    return tuple(map(sys.intern, _TOKEN.findall(_plain(text))))


def _plain(text: str) -> str:
    """The text in lower case, with one spelling for what LaTeX and Unicode spell in many ways."""
    text = _FIGURE.sub(" ", text)
    if text.isascii():  # the same as below, and fast
        text = text.lower().replace("%", _PERCENT)
    else:
        text = unicodedata.normalize("NFKC", text.translate(_SUPERSCRIPTS)).casefold().translate(_CHARACTERS)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text


def _seeds(questions: tuple[Tokens, ...]) -> dict[int, dict[Tokens, list[int]]]:
    """For each question its rarest n-grams, as many as a row that is hit cannot lack altogether."""
    seeds: dict[int, dict[Tokens, list[int]]] = {length: defaultdict(list) for _, length in GRAM_LENGTHS}
    frequency = Counter(gram for tokens in questions for gram in set(_grams(tokens, _gram_length(tokens))))
    for number, tokens in enumerate(questions):
        length = _gram_length(tokens)
        grams = sorted(_grams(tokens, length), key=frequency.__getitem__)
        for gram in dict.fromkeys(grams[: len(grams) - _needed(tokens, len(grams)) + 1]):
            seeds[length][gram].append(number)
    return {length: dict(numbers) for length, numbers in seeds.items() if numbers}


def _gram_length(tokens: Tokens) -> int:
    """The length of a question's n-grams; 0 where it has too few tokens to be looked for within a text."""
    if len(tokens) < LONG_TOKENS and not any(map(_is_number, tokens)):
        return 0
    return next((length for least, length in GRAM_LENGTHS if len(tokens) >= least), 0)


def _grams(tokens: Tokens, length: int) -> Iterator[Tokens]:
    """All runs of so many tokens."""
    return zip(*(tokens[start:] for start in range(length)), strict=False)


def _needed(question: Tokens, grams: int) -> int:
    """How many of a question's n-grams have to be found."""
    return math.ceil(grams * (GRAM_SHARE if any(map(_is_number, question)) else GRAM_SHARE_WITHOUT_NUMBERS))


def _is_number(token: str) -> bool:
    return token[-1].isdigit() or token in _NUMBER_WORDS


class _Text:
    """A prompt or a response, and what several questions ask of it."""

    def __init__(self, text: str):
        self.plain = _plain(text)
        self.tokens: Tokens = tuple(_TOKEN.findall(self.plain))

    @functools.cached_property
    def grams(self) -> dict[int, frozenset[Tokens]]:
        """All its n-grams, for each n that is used."""
        lengths = {length for _, length in GRAM_LENGTHS} | {NUMBER_LENGTH}
        return {length: frozenset(_grams(self.tokens, length)) for length in lengths}

    @functools.cached_property
    def exact(self) -> Counter[str]:
        """How often each number and sign occurs."""
        return _exact(self.tokens)

    @functools.cached_property
    def ends(self) -> frozenset[int]:
        """The places between tokens where a sentence ends."""
        sentences = (len(_TOKEN.findall(sentence)) for sentence in _BREAK.split(self.plain))
        return frozenset(itertools.accumulate(sentences, initial=0))


def _found(index: Index, part: Part, text: _Text) -> Iterator[tuple[int, Rule, float]]:
    """The questions that one text contains: number, rule and overlap of each."""
    wholes = index.wholes.get(text.tokens, []) if part == "prompt" else []
    yield from ((number, "whole prompt", 1.0) for number in wholes)
    heads = _grams(text.tokens, HEAD_LENGTH)
    starts = list(itertools.compress(itertools.count(), map(index.heads.__contains__, heads)))
    for length, seeds in index.seeds.items():
        grams = (text.tokens[start : start + length] for start in starts)
        for number in sorted({number for gram in grams for number in seeds.get(gram, ())} - set(wholes)):
            tokens = index.tokens[number]
            found = [gram in text.grams[length] for gram in _grams(tokens, length)]
            if all(found) and _contains(text, tokens):
                yield number, "contained", 1.0
            elif sum(found) >= _needed(tokens, len(found)) and _is_same(text, tokens, index.questions[number].text):
                yield number, "n-grams", sum(found) / len(found)


def _contains(text: _Text, question: Tokens) -> bool:
    """Whether the tokens of a question stand in the text, where they are few: as sentences of their own."""
    size, tokens = len(question), text.tokens
    starts = (i for i in range(len(tokens) - size + 1) if tokens[i] == question[0] and tokens[i : i + size] == question)
    return any(size >= LONG_TOKENS or (start in text.ends and start + size in text.ends) for start in starts)


def _is_same(text: _Text, question: Tokens, question_text: str) -> bool:
    """Whether a text that has most n-grams of a question has its numbers, signs and words as well."""
    if len(question) < LONG_TOKENS or not _exact(question) <= text.exact:
        return False
    numbers = {place for place, token in enumerate(question) if _is_number(token)}
    if not numbers <= _covered(question, text, NUMBER_LENGTH):
        return False
    words = set(_WORD.findall(_plain(question_text)))
    words_found = words & {question[place] for place in _covered(question, text, _gram_length(question))}
    return bool(words) and len(words_found) >= WORD_SHARE * len(words)


def _covered(question: Tokens, text: _Text, length: int) -> set[int]:
    """The places of a question that lie in one of its n-grams that the text has, too."""
    starts = (start for start, gram in enumerate(_grams(question, length)) if gram in text.grams[length])
    return {start + place for start in starts for place in range(length)}


def _exact(tokens: Tokens) -> Counter[str]:
    """How often each number and sign occurs: those that no other may stand for."""
    return Counter(token for token in tokens if token in _SIGNS or _is_number(token))
