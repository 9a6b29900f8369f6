"""What a row is without its reasoning trace, and which rows have no answer once the trace is gone.

Which source needs what:

- OpenThoughts2, OpenR1-Math and OpenMathReasoning write `<think> trace </think> solution`: `THINK`.
- DeepMath writes `trace </think> solution`, mostly without the opening mark: `DEEPMATH`.
- OpenThoughts-114k marks trace and solution alike: `OPEN_THOUGHTS`.
- Where trace and solution are two columns (message_thinking and message_content), the source names the column of the
  solution, and nothing is to be cut.
- OpenThoughts-114k-math, OpenR1-Math and natural_reasoning give short answers to some proof questions:
  `is_unproved`.

Only responses are read here. A question that speaks of such marks keeps them.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import NamedTuple


class How(StrEnum):
    """What was done to a text; the value is the key it is counted under."""

    UNTOUCHED = "no trace"
    BLOCKS = "marked traces cut"
    NESTED = "nested traces cut"
    UNOPENED = "cut up to a closing mark without an opening one"
    NO_MARK = "dropped: no mark where each trace has one"
    UNCLOSED = "dropped: a trace without an end"
    UNCLOSED_ANSWER = "dropped: a solution without an end"
    NO_ANSWER = "dropped: no answer beside the trace"


@dataclass(frozen=True)
class Marks:
    """How a source marks its traces. Case, and white space inside of a mark, do not matter."""

    opening: tuple[str, ...]
    """The marks that begin a trace."""
    closing: tuple[str, ...]
    """The marks that end one. Any of them ends what any opening mark began: models mix them up."""
    required: bool = False
    """Whether every text has a trace. A text without a mark is then a trace that was cut off."""
    answer: tuple[str, str] | None = None
    """The marks around the solution, where it has its own."""


_NAMES = ("think", "thinking", "thought", "thoughts")

THINK = Marks(tuple(f"<{name}>" for name in _NAMES), tuple(f"</{name}>" for name in _NAMES))
"""The marks of DeepSeek-R1 and of the models that follow it."""
DEEPMATH = Marks(THINK.opening, THINK.closing, required=True)
"""DeepMath's solution columns: all of them begin with a trace."""
OPEN_THOUGHTS = Marks(
    ("<|begin_of_thought|>",), ("<|end_of_thought|>",), answer=("<|begin_of_solution|>", "<|end_of_solution|>")
)
"""The marks of OpenThoughts-114k."""


class Stripped(NamedTuple):
    """A text without its traces."""

    text: str
    """What is left; empty where the row is to be dropped."""
    cut: str
    """What was taken away, for a person to look at."""
    how: How


class _Kept(NamedTuple):
    """The parts of a text that lie outside and inside of traces."""

    outside: list[str]
    """Not one part where the row is to be dropped."""
    inside: list[str]
    how: How


def stripped(text: str, marks: Marks) -> Stripped:
    """A response without its reasoning traces.

    The solution is what lies outside of all traces. A closing mark that nothing opened ends a trace that began with the
    text, so only what follows the last of them stays. A trace that never ends has used up the model's length: whatever
    stands before it is no finished solution, and the row is dropped. Dropping it costs one row, keeping it would teach
    the trace. A mark in quotes or back-ticks is a word of the text, not a mark.
    """
    kept = _parts(text, marks)
    if kept.outside and marks.answer:
        kept = _answer(kept, *marks.answer)
    answer, cut = _joined(kept.outside), _joined(kept.inside)
    return Stripped(answer, cut, How.NO_ANSWER if kept.outside and not answer else kept.how)


def _parts(text: str, marks: Marks) -> _Kept:
    """Walk over the marks of a text and sort what lies between them."""
    outside: list[str] = []
    inside: list[str] = []
    depth, end, how = 0, 0, How.UNTOUCHED
    for opens, match in _found(text, marks):
        (inside if depth else outside).append(text[end : match.start()])
        end = match.end()
        if opens:
            depth += 1
            how = How.NESTED if depth > 1 else how
        elif depth:
            depth -= 1
            how = How.BLOCKS if how == How.UNTOUCHED else how
        else:
            inside.extend(outside)
            outside.clear()
            how = How.UNOPENED
    if depth:
        return _Kept([], [text], How.UNCLOSED)
    if not end and marks.required:
        return _Kept([], [text], How.NO_MARK)
    return _Kept([*outside, text[end:]], inside, how)


def _found(text: str, marks: Marks) -> Iterator[tuple[bool, re.Match[str]]]:
    """The marks of a text in order, each with whether it opens a trace."""
    for match in _pattern(marks.opening, marks.closing).finditer(text):
        if not _quoted(text, match):
            yield match["opening"] is not None, match


def _quoted(text: str, match: re.Match[str]) -> bool:
    """Whether a mark is spoken of: it stands in quotes or back-ticks. A quote right after a word closes another one."""
    before, after = text[max(match.start() - 2, 0) : match.start()], text[match.end() : match.end() + 1]
    return before[-1:] + after in ("``", "''", '""', "“”", "‘’") and (before[:-1].isspace() or before[:-1] in "([{")


@cache
def _pattern(opening: tuple[str, ...], closing: tuple[str, ...]) -> re.Pattern[str]:
    """An expression that finds both kinds of marks."""
    either = f"(?P<opening>{'|'.join(map(_loose, opening))})|(?P<closing>{'|'.join(map(_loose, closing))})"
    return re.compile(either, re.IGNORECASE)


def _loose(mark: str) -> str:
    """An expression for one mark that allows white space between its words and signs."""
    return r"\s{0,8}".join(map(re.escape, re.findall(r"\w+|[^\w\s]", mark)))


def _answer(kept: _Kept, first: str, last: str) -> _Kept:
    """What lies in the marks of the solution; all of the rest where there are none."""
    text = "".join(kept.outside)
    found = list(_pattern((first,), (last,)).finditer(text))
    opening = next((match for match in found if match["opening"]), None)
    closing = next((match for match in reversed(found) if match["closing"]), None)
    start = opening.end() if opening else 0
    if opening and (closing is None or closing.start() < start):
        return _Kept([], [*kept.inside, text], How.UNCLOSED_ANSWER)
    end = closing.start() if closing else len(text)
    return _Kept([text[start:end]], kept.inside, kept.how)


def _joined(parts: list[str]) -> str:
    """Parts as one text, with a blank line where something stood between them."""
    return "\n\n".join(part.strip() for part in parts if part.strip())


UNPROVED = "dropped: a proof question without a proof"
"""The key under which the rows of `is_unproved` are counted."""
FEW_WORDS = 12
"""A proof has more words than this."""
REPEATED = 0.9
"""Share of the answer's words that stand in the question, from which on it repeats the question."""

_PROOF = re.compile(
    r"(?:^|[.!?:;,)\]$]\s*|\b(?:(?<!order )to|and|then|please|also)\s+)(?:prove|(?:show|demonstrate|verify)\s+that)\b"
    r"|\b(?:prove|proof)\s+that\b|\bprove:|\b(?:give|write|provide|find)\s+an?\s+(?:\w+\s+)?proof\b",
    re.IGNORECASE | re.MULTILINE,
)


def is_unproved(prompt: str, response: str) -> bool:
    """Whether a question asks for a proof and the response is none: a few words, or the statement over again.

    Such rows come of collections that have a column of short answers and fill it for proofs too.
    """
    if not _PROOF.search(prompt):
        return False
    if len(response.split()) <= FEW_WORDS:
        return True
    asked, answered = Counter(_words(prompt)), Counter(_words(response))
    return (asked & answered).total() >= REPEATED * answered.total()


def _words(text: str) -> list[str]:
    """The words and numbers of a text without regard to case."""
    return re.findall(r"\w+", text.casefold())
