"""What is repaired in a question and its answer, and by which rule a row is dropped.

Repairs leave mathematics and code as they are: quotes stay curly, full-width and superscript signs stay what they are,
and spaces within a line, which indent code, are not touched. A rule drops a row only for a fault that can be pointed at
in its text. Whether a text is good is not judged here: measures of that kind are made for web pages, and turn away
short mathematics.
"""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import ftfy


class Rule(StrEnum):
    """Why a row is dropped; the value is the key it is counted under."""

    EMPTY = "empty question or answer"
    MOJIBAKE = "signs that were lost in a wrong encoding"
    MISSING = "a placeholder for an answer"
    OVERSIZED = "longer than the limit"
    NOT_TEXT = "not text"
    TRUNCATED = "an answer that was cut off"


class Repair(StrEnum):
    """What was changed in a row that stays; the value is the key it is counted under."""

    ENCODING = "wrong encoding undone"
    ESCAPES = "LaTeX commands restored from control characters"
    INVISIBLE = "invisible characters removed"
    SPACE = "line ends and white space"
    COMPOSED = "Unicode composed"


@dataclass(frozen=True)
class Limits:
    """The longest texts that are kept, in characters."""

    prompt: int = 16_384
    response: int = 32_768
    cut_at: int | None = None
    """The length at which the source cut its answers, if it did. One of this length that ends in a word was cut."""
    question: bool = True
    """Whether a row needs a question. Plain text has none."""


class Cleaned(NamedTuple):
    """A row that stays."""

    prompt: str
    response: str
    repairs: tuple[Repair, ...]


class Dropped(NamedTuple):
    """A row that goes."""

    rule: Rule
    detail: str
    """The part of the row that the rule is about, for a person to look at."""


def cleaned(prompt: str, response: str, limits: Limits) -> Cleaned | Dropped:
    """A question and its answer as they are trained on, or the first rule that drops them."""
    if fault := _oversized(prompt, response, limits) or _cut_off(response, limits):
        return fault
    prompt, asked = repaired(prompt)
    response, answered = repaired(response)
    if missing := _empty(prompt, response, limits):
        return Dropped(Rule.EMPTY, missing)
    for rule, found in _RULES:
        if detail := found(prompt, response):
            return Dropped(rule, detail)
    return Cleaned(prompt, response, tuple(repair for repair in Repair if repair in asked | answered))


def _oversized(prompt: str, response: str, limits: Limits) -> Dropped | None:
    """The first rule, because it bounds the time of all others."""
    for name, text, limit in (("question", prompt, limits.prompt), ("answer", response, limits.response)):
        if len(text) > limit:
            return Dropped(Rule.OVERSIZED, f"the {name} has {len(text):,} characters")
    return None


def _cut_off(response: str, limits: Limits) -> Dropped | None:
    """An answer that ends where its source cut."""
    if limits.cut_at is None or len(response) < limits.cut_at or not response[-1:].isalnum():
        return None
    return Dropped(Rule.TRUNCATED, response[-_SHOWN:])


def repaired(text: str) -> tuple[str, set[Repair]]:
    """A text with what can be mended mended, and what was done."""
    done = set()
    for repair, mend in _REPAIRS:
        mended = mend(text)
        if mended != text:
            done.add(repair)
        text = mended
    return text, done


_CODEPAGE = "€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
"""What Windows-1252 makes of the bytes 0x80 to 0x9f, which continue a character in UTF-8."""
_TAIL = rf"[\x80-\xa0¡-¿{_CODEPAGE}]"
_APART = re.compile(rf"(?<![^\W\d_])(?:[ãÃïÎÏ] {_TAIL}|â(?: {_TAIL}){{2}}|â [¢£°º¼½¾])")
"""Mojibake with spaces inside, like the `â ˆ š` of MathQA. An â needs more than one sign: `â · b` is a product."""
_UNEXPECTED = re.compile("[^\\x00-\\x7f¡-Ͽ\u2000-\u27ff\u2900-\u2bff\U0001d400-\U0001d7ff]")
"""What no repair should bring in: anything but Latin and Greek letters, punctuation and the signs of mathematics."""
_LOST = re.compile(
    rf"[\x80-\x9f\ud800-\udfff\ufffd\ue000-\uf8ff]|â{_TAIL}{{2}}|(?<![^\W\d_])[ÂÃÎÏ]{_TAIL}|{_APART.pattern}"
)
"""Signs of which nobody can say what they were: no character, of one font only, or in a wrong encoding."""


def _undo_encoding(text: str) -> str:
    """UTF-8 that was once read as something else, read again.

    ftfy does more than this on request. On mathematics the rest does harm: it straightens quotes, resolves `&lt;` in
    code and turns full-width signs into narrow ones. It also takes formulas for mojibake now and then: `×²` becomes a
    Hebrew letter, the operator in `Â ψ` a space. Such repairs are not taken.
    """
    if text.isascii():
        return text
    mended = ftfy.fix_encoding(text)
    return text if _UNEXPECTED.search("".join(set(mended) - set(text))) else mended


_ESCAPED = {"\a": "a", "\b": "b", "\t": "t", "\v": "v", "\f": "f", "\r": "r"}
_ESCAPE = re.compile(
    r"\a(?=lpha\b|ngle\b|pprox\b|rc|st\b)|\x08(?=eta\b|oxed\b|egin\b|inom\b|ar\b|ig|mod\b|f\b|ullet\b|ecause\b)"
    r"|\t(?=imes\b|ext\w*\{|heta\b|frac\b|riangle\b|herefore\b|an\b\s*[\\(^{])|\v(?=ec\b|arepsilon\b|arphi\b|ert\b|dots\b)"
    r"|\f(?=rac\b|orall\b|box\b|loor\b)|\r(?=ight\b|ho\b|floor\b|ceil\b|angle\b)"
)


def _restore_commands(text: str) -> str:
    r"""Commands like `\frac` whose first two signs a JSON reader took for one control character.

    Only commands whose remainder is no word are known here. `\neq` and its like are lost: they begin a new line.
    """
    return _ESCAPE.sub(lambda match: "\\" + _ESCAPED[match[0]], text)


_INVISIBLE = re.compile(r"[\x00-\x08\x0e-\x1f\x7f\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]+")
"""Control characters of ASCII, zero-width ones and direction marks. The other controls are rests of lost signs."""
_JOINER = re.compile(r"(?<![^\x00-\x7f])[\u200c\u200d]+|[\u200c\u200d]+(?![^\x00-\x7f])")
"""Zero-width joiners beside Latin letters or nothing. Between letters of other scripts they are spelling, and stay."""


def _remove_invisible(text: str) -> str:
    text = _INVISIBLE.sub("", text)
    return text if text.isascii() else _JOINER.sub("", text)


_LINE_END = re.compile(r"\r\n?|[\v\f\x85\u2028\u2029]")
_SPACE = re.compile(r"[\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_BLANK_LINES = re.compile(r"\n{4,}")


def _tidy_space(text: str) -> str:
    """One kind of line end, one kind of space, nothing at the ends of lines, at most two blank lines in a row."""
    text = _SPACE.sub(" ", _LINE_END.sub("\n", text))
    lines = "\n".join(line.rstrip() for line in text.split("\n"))
    return _BLANK_LINES.sub("\n\n\n", lines).strip()


def _compose(text: str) -> str:
    return unicodedata.normalize("NFC", text)


_REPAIRS: tuple[tuple[Repair, Callable[[str], str]], ...] = (
    (Repair.ENCODING, _undo_encoding),
    (Repair.ESCAPES, _restore_commands),
    (Repair.INVISIBLE, _remove_invisible),
    (Repair.SPACE, _tidy_space),
    (Repair.COMPOSED, _compose),
)
"""In this order: the control characters are parts of characters and commands, which are to be restored first."""


def _empty(prompt: str, response: str, limits: Limits) -> str:
    return "the question" if limits.question and not prompt else "the answer" if not response else ""


def _lost(prompt: str, response: str) -> str:
    for text in (prompt, response):
        if not text.isascii() and (match := _LOST.search(text)):
            return _around(text, match.start()).encode(errors="backslashreplace").decode()
    return ""


_FRAME = re.compile(
    r"^(?:####|(?:the\s+)?(?:final\s+)?answer(?:\s+is)?\s*:?)\s*|^[\s$\"'*`]+|[\s$\"'*`.]+$", re.IGNORECASE
)
_PLACEHOLDER = re.compile(
    r"|-+|\?+|…|none|null|nan|n/a|n\.a|not (?:available|applicable|provided|given|found)|no (?:answer|response|data)"
    r"|(?:no )?answer not (?:available|provided|given|found)|to ?do|tbd|proof|omitted|proof omitted"
    r"|(?:please )?(?:see|refer to) (?:the )?"
    r"(?:solutions?|answers?|proof|explanations?|above|below|attache?(?:d|ment)\b.*|figure|image|picture|diagram)"
    r"(?: (?:above|below))?",
    re.IGNORECASE,
)
_UNFILLED = re.compile(r"\\boxed\{\s*\}[.$\s]*\Z|####\s*\Z|####\s*(?:none|null|nan|n/a)\s*\Z", re.IGNORECASE)


def _missing(prompt: str, response: str) -> str:
    """A word in the place of an answer, unless the question offers it as one. "No solution" is an answer."""
    if match := _UNFILLED.search(response):
        return match[0].strip()
    if len(response) > 60:
        return ""
    bare = _FRAME.sub("", _FRAME.sub("", response))
    offered = bool(bare) and re.search(rf"(?<!\w){re.escape(bare)}(?!\w)", prompt, re.IGNORECASE)
    return response if _PLACEHOLDER.fullmatch(bare) and not offered else ""


_ENCODED_LENGTH = 200
_ENCODED = re.compile(rf"[A-Za-z0-9+/]{{{_ENCODED_LENGTH},}}")
_FEWEST_SIGNS = 40
"""A shorter text may be all signs: it is a formula, an inequality or an empty set."""
_LEAST_ALPHANUMERIC = 0.15
_ALPHANUMERIC = re.compile(r"[^\W_]+")


def _not_text(prompt: str, response: str) -> str:
    """Encoded bytes, or a text that is nearly all signs, with neither words nor numbers between them."""
    for text in (prompt, response):
        words = text.split()
        for word in words:
            if len(word) >= _ENCODED_LENGTH and _is_encoded(word):
                return word[:_SHOWN]
        signs = sum(map(len, words))
        if signs >= _FEWEST_SIGNS and sum(map(len, _ALPHANUMERIC.findall(text))) < _LEAST_ALPHANUMERIC * signs:
            return text[:_SHOWN]
    return ""


def _is_encoded(word: str) -> bool:
    """Whether a long word holds bytes as base64. A long number does not: letters of both cases must be there."""
    return any(
        all(re.search(kind, match[0]) for kind in ("[a-z]", "[A-Z]", "[0-9]")) for match in _ENCODED.finditer(word)
    )


_ENVIRONMENT = re.compile(r"\\(begin|end)\s*\{(\w+\*?)\}")
_DANGLING = re.compile(
    r"(?:\\(?:frac|sqrt|cdot|times|left|right|text|boxed)|[=(\[{,^\\]|\b(?:the|of|and|which|because))\Z"
)
_LONGEST_DANGLING = 10


def _truncated(prompt: str, response: str) -> str:
    r"""An answer that stops within something it began.

    Only the last thing that was opened counts, and only of a kind that has to be closed: `\boxed{`, `\[`, `\(`, an
    environment, a fence of code, a formula in dollars. Single dollars are also money, so an odd one tells something
    only where a LaTeX command follows it and no sentence ends. A last word like "the" or a last `=` tells as much, a
    missing full stop nothing: many sources write none. Where a source says why its models stopped, its column is the
    better witness.
    """
    for found in (_open_box, _open_display, _open_environment, _open_fence, _open_dollar, _dangling):
        place = found(response)
        if place is not None:
            return _around(response, place)
    return ""


def _open_box(text: str) -> int | None:
    """The last `\\boxed{` if its brace is never closed."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text[start + len("\\boxed") :], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth <= 0 and match[0] == "}":
            return None
    return start


def _open_display(text: str) -> int | None:
    r"""The last `\[` or `\(` if nothing closes it. `\\[2pt]` is a line of a matrix, not a formula."""
    for opening, closing in ((r"\[", r"\]"), (r"\(", r"\)")):
        start = text.rfind(opening)
        while start >= 0 and _is_escaped(text, start):
            start = text.rfind(opening, 0, start)
        if start >= 0 and text.find(closing, start) < 0:
            return start
    return None


def _is_escaped(text: str, place: int) -> bool:
    """Whether an odd number of backslashes stands before a place."""
    return (place - len(text[:place].rstrip("\\"))) % 2 == 1


def _open_environment(text: str) -> int | None:
    found = list(_ENVIRONMENT.finditer(text))
    if found and found[-1][1] == "begin":
        return found[-1].start()
    return None


def _open_fence(text: str) -> int | None:
    fences = [match.start() for match in re.finditer(r"^[ \t]*```", text, re.MULTILINE)]
    return fences[-1] if len(fences) % 2 else None


def _open_dollar(text: str) -> int | None:
    places = [match.start() for match in re.finditer(r"(?<!\\)\$", text)]
    if len(places) % 2 == 0:
        return None
    formula = text[places[-1] + 1 :]
    _, backslash, rest = formula.rpartition("\\")
    ends = "\n" in formula or re.search(r"[.!?](?:\s|\Z)", rest)
    return places[-1] if backslash and rest[:1].isalpha() and not ends else None


def _dangling(text: str) -> int | None:
    """The end, where it is a sign or a word that something has to follow."""
    start = max(len(text) - _LONGEST_DANGLING, 0)
    match = _DANGLING.search(text, start)
    return match.start() if match and " " in text else None


_SHOWN = 60


def _around(text: str, place: int) -> str:
    """A few characters on both sides of a place."""
    return text[max(place - _SHOWN // 2, 0) : place + _SHOWN // 2]


_RULES: tuple[tuple[Rule, Callable[[str, str], str]], ...] = (
    (Rule.MOJIBAKE, _lost),
    (Rule.MISSING, _missing),
    (Rule.NOT_TEXT, _not_text),
    (Rule.TRUNCATED, _truncated),
)
