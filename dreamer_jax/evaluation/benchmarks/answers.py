r"""The answer in a generated text, a number or LaTeX, and the form in which answers that are written alike are equal.

Where the answer stands: after `####`, as GSM8K writes it, in `\boxed{}`, as MATH does, or after "the answer is".
"""

import re
from collections import deque
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import TypeVar

Found = TypeVar("Found")

CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")
"""What GSM8K's solutions call a calculator with, as in `2*3 = <<2*3=6>>6`."""
STATEMENT = re.compile(
    r"\banswers?\b(?: (?:to|for) [^.:\n]{1,60}?)?[\s*_]*(?:\bis\b|\bare\b|=|:)[\s:*_]*", re.IGNORECASE
)
"""What comes before an answer in words."""
HASHES = re.compile(r"####\s*")
BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")


def robust_number(text: str) -> str | None:
    r"""The number that a text gives as its answer, as it is written there; None if there are no numbers.

    It is the one after the first `####`, else in the last `\boxed{}`, else after the last "answer is", else the last of
    all. An equation counts by its last side. `number_value` gives its value.
    """
    text = _plain_numbers(text)
    for place in _places(text):
        if (number := _stated_number(place)) is not None:
            return number
    return _last(_numbers(text))


def number_value(number: str) -> Fraction:
    """The value of what `robust_number` found: `-$1,000.50`, `1/2`, `2 1/2`.

    Raises:
        ValueError: it is no such number.
    """
    digits = re.sub(r"[,$€£]", "", number)
    sign = -1 if digits.startswith("-") else 1
    parts = re.split(r"(?<=\d)\s+(?=\d)", digits.lstrip("-"))
    return sign * sum((Fraction(re.sub(r"\s", "", part)) for part in parts), Fraction(0))


def math_answer(text: str) -> str | None:
    r"""The LaTeX that a text gives as its answer; None if it gives none.

    It is the content of the last `\boxed{}` or `\fbox{}` that is not empty and is closed, else what follows the last
    `####`, else what follows the last "answer is".
    """
    if boxed := _last(_boxes(text)):
        return boxed
    if hashes := _last(HASHES.finditer(text)):
        return _first_formula(text[hashes.end() :].split("\n")[0])
    statement = _last(STATEMENT.finditer(text))
    return _first_formula(text[statement.end() :]) if statement else None


def normalised(latex: str) -> str:
    r"""LaTeX without what makes no difference to an answer, so that answers that are written alike become equal.

    Gone or the same for all: spaces and sizes; units, `$`, `%` and degrees; the variable in front of `=`; thousands
    separators and zeros that say nothing; `\frac12`, `\dfrac{1}{2}` and `1/2`. Values are not computed: 0.5 is not 1/2.
    """
    text = latex.translate(SAME_CHARACTERS)
    for pattern, replacement in SPACED_RULES:
        text = pattern.sub(replacement, text)
    text = re.sub(r"\s+", "", text)
    for pattern, replacement in CLOSE_RULES:
        text = pattern.sub(replacement, text)
    return text.casefold() if re.fullmatch(r"[A-Za-z]{2,}", text) else text


# Numbers

SAME_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2013\ufe63\uff0d", "-"),
        **dict.fromkeys("\u00a0\u2009\u202f", " "),
        "×": r"\times ",
        "·": r"\cdot ",
        "π": r"\pi ",
        "∞": r"\infty ",
        "≤": r"\leq ",
        "≥": r"\geq ",
        "≠": r"\neq ",
        "∪": r"\cup ",
        "°": r"^\circ ",
    }
)
"""Characters that stand for others, or for commands: minus signs, spaces, symbols."""
WHOLE = r"(?: \d{1,3}(?:,\d{3})+(?!\d) | \d+ )"
NUMBER = re.compile(
    rf"""
    (?<![A-Za-z_^\d]) (?<![_^]\{{) (?<!\d\.)    # no exponent, no index, no part of a name or number
    (?: (?<![)\]}}]) - )? [$€£]?                 # a sign, and not that of a difference
    (?: {WHOLE} (?: \s+\d+ )? \s*/\s* [1-9]\d* (?!\d|\.\d)   # 1/2, 2 1/2
      | {WHOLE} (?: \.\d+ )?                                 # 1,000.50
      | (?<![\w.]) \.\d+ )                                   # .5
    """,
    re.VERBOSE | re.ASCII,
)


SIGN = re.compile(r"(?:^|[^\w)\]}])-$")
"""A minus at the end that is not that of a difference."""


def _plain_numbers(text: str) -> str:
    """The text without the marks of a calculator and of LaTeX in its numbers."""
    text = re.sub(r"(?<=\d)(?:\{,\}|,?\\[!,]|[\u00a0\u2009\u202f])\s*(?=\d{3})", "", CALCULATOR_MARK.sub("", text))
    text = text.translate(SAME_CHARACTERS)
    text = re.sub(r"\\[dtc]?frac\s*\{\s*(-?)\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}", _fraction, text)
    return re.sub(r"\\(?:times|cdot|div)(?![A-Za-z])", "*", text).replace(r"\$", "$")


def _fraction(found: re.Match[str]) -> str:
    """1/2 for LaTeX's; apart from a number in front of it, and not from a sign."""
    space = "" if SIGN.search(found.string[max(0, found.start() - 2) : found.start()]) else " "
    return f"{space}{found[1]}{found[2]}/{found[3]}"


def _places(text: str) -> Iterator[str]:
    """Where an answer may stand, the surest first."""
    if hashes := HASHES.search(text):
        yield text[hashes.end() :].split("\n")[0]
    if boxed := _last(_boxes(text)):
        yield boxed
    if statement := _last(STATEMENT.finditer(text)):
        yield text[statement.end() :]


def _stated_number(text: str) -> str | None:
    """The number that a text begins with: in an equation the last one's, and behind words the first there is."""
    formula = re.split(r"[A-Za-z\n]", text)[0]
    return next((number for part in (formula.split("=")[-1], formula, text) for number in _numbers(part)), None)


def _numbers(text: str) -> Iterator[str]:
    return (match[0] for match in NUMBER.finditer(text))


def _last(found: Iterable[Found]) -> Found | None:
    return next(iter(deque(found, maxlen=1)), None)


# Places in LaTeX


def _boxes(text: str) -> Iterator[str]:
    """What stands in boxes that are closed and not empty."""
    closing = _braces(text)
    for box in BOX.finditer(text):
        start = box.end()
        braced = text[start : start + 1] == "{"
        content = text[start + 1 : closing.get(start, start)] if braced else _bare(text[start:])
        if content.strip():
            yield content.strip()


def _braces(text: str) -> dict[int, int]:
    """Where each brace that is closed is closed, by where it is opened."""
    closing: dict[int, int] = {}
    opened: list[int] = []
    for token in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if token[0] == "{":
            opened.append(token.start())
        elif token[0] == "}" and opened:
            closing[opened.pop()] = token.start()
    return closing


def _bare(text: str) -> str:
    r"""What follows a box without braces, as in `\boxed 5`: the rest of the formula."""
    return re.split(r"\$|\n|\\\)|\\\]", text)[0].strip().rstrip(".,")


def _first_formula(text: str) -> str | None:
    """The formula that a text begins with, or, if it is not marked as one, the first sentence."""
    formula = re.match(r"[A-Za-z\s*]{0,30}(?:\$\$?(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\])", text, re.DOTALL)
    found = next(filter(None, formula.groups()), "") if formula else re.split(r"\n|\.(?:\s|$)", text)[0]
    answer = found.strip(" \t\n*")
    return answer if answer and not BOX.search(answer) else None  # a box that is empty or cut off has no answer


# LaTeX

UNIT = r"(?:\s+[A-Za-z]{3,}|\s*(?:cm|mm|km|ft|in|kg|lb|mi|hr|oz))\b(?:[\s./]*[A-Za-z]+\b)*"
"""The unit behind a number, in one word or more: no product of variables looks like it."""
POWER = r"(?:\^\s*\{?\s*\d\s*\}?)?"
GROUP = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"
"""Braces with what stands in them, and in braces in them, three deep."""


def _rules(*rules: tuple[str, str]) -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in rules)


SPACED_RULES = _rules(
    (r"(?<!\\)\\[()\[\]]", ""),
    (r"(?<=\d)\s*(?:\{,\}|,\s*\\!)\s*(?=\d{3})", ""),  # 1{,}000
    (r"\\(?:left|right)\s*\.", ""),
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits)(?![A-Za-z])", ""),
    (r"(?<!\\)\\[!,;:>\s]|\\q?quad(?![A-Za-z])|~", " "),
    (r"\s+", " "),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\?[$%]", ""),
    (r"\s*\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})|\\degree(?![A-Za-z])", ""),
    (r"\s*,?\s*\\(?:text|textrm|mbox|mathrm)\s*\{\s*(?:and|or)\s*\}\s*", ","),
    (rf"(?<=[\w)}}])\s*\\(?:text\w*|mbox|hbox)\s*\{{[^{{}}]*\}}{POWER}[\s.]*$", ""),  # 5\text{ cm}^2
    (rf"(?<=[\w)}}])\s*\\mathrm\s*\{{\s*[A-Za-z]{{2,}}[^{{}}]*\}}{POWER}[\s.]*$", ""),
    (r"\\(?:text\w*|mbox|hbox|mathrm|mathbf|mathit|mathsf|mathbb|operatorname)\s*\{([^{}]*)\}", r" \1 "),
    (r"\s*,?\s+(?:and|or)\s+", ","),
    (r"(?<![A-Za-z\\])(pi|infty|sqrt)(?![A-Za-z])", r"\\\1 "),
    (r"(?<![A-Za-z\\])infinity(?![A-Za-z])", r"\\infty "),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (rf"^(\s*-?[\d.,/]*\d){UNIT}{POWER}\s*$", r"\1"),  # 5 square feet
    (r"^[\s{]*(?:\\?[A-Za-z]+(?:_\w|'|\(\w\))?)\s*(?:=|\\in(?![a-z]))([^=]+)$", r"\1"),  # x = 5
    (r"[\s.,;:]+$", ""),
    (r"^\s*(-?\d{1,3}),(\d{3})(?:,(\d{3}))?(?:,(\d{3}))?(\.\d+)?\s*$", r"\1\2\3\4\5"),  # 1,000
    (r"<\s*=|\\leq?(?:slant)?(?![A-Za-z])", r"\\leq "),
    (r">\s*=|\\geq?(?:slant)?(?![A-Za-z])", r"\\geq "),
    (r"\\neq?(?![A-Za-z])", r"\\neq "),
    (r"\\varnothing(?![A-Za-z])|\\\{\s*\\\}", r"\\emptyset "),
    (r"\\times(?![A-Za-z])|\*", r"\\cdot "),
)
"""What to replace while spaces still part words, in this order."""
CLOSE_RULES = _rules(
    (r"(?<!\d)\.(?=\d)", "0."),
    (r"(?<=\d)\.0+(?!\d)|(?<=\.)(\d*[1-9])0+(?!\d)", r"\1"),  # 5.00, 0.50
    (r"\\(frac|sqrt)([\dA-Za-z]|\\[A-Za-z]+)", r"\\\1{\2}"),  # \frac1{2}, \sqrt2
    (rf"(\\frac{GROUP})([\dA-Za-z]|\\[A-Za-z]+)", r"\1{\2}"),  # \frac{1}2
    (r"(?<![\w}).^])(\d+)/(\d+)(?![\w({.])", r"\\frac{\1}{\2}"),  # 1/2
    (r"^(-?)([^-/+(),=<>]+)/([\w\\{}]+)$", r"\1\\frac{\2}{\3}"),  # \pi/2
    (r"(^|[(,=\[])\\frac\{-([^-{}+]*)\}", r"\1-\\frac{\2}"),
    (r"([_^])\{(\w)\}", r"\1\2"),
    (r"([_^])\{(\d+)\}$", r"\1\2"),
    (r"(?<=[(,\[])\+|^\+", ""),
    (r"^\{([^{}]*)\}$", r"\1"),
    (r"^\(([A-Za-z])\)$", r"\1"),  # the letter of an option
)
"""What to replace after that."""
