"""From a row to its texts: a field by its path, a value as text, a conversation as a question and its answer."""

import difflib
import math
from decimal import Decimal
from typing import Any, Literal, NamedTuple

from dreamer_jax.data.rows import Fault, Number, Row, kind_of
from dreamer_jax.errors import DreamerError

Role = Literal["user", "assistant", "system", "tool"]
ROLES: dict[str, Role] = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
}
"""Who speaks, by the names that public sets use, in small letters."""
TURN_FIELDS = (("role", "content"), ("from", "value"))
"""Fields of a turn: who speaks, and the text."""


class UnusableRow(DreamerError, LookupError):
    """A row that has not what its layout says. `fault` is why, and the message."""

    def __init__(self, cause: str, detail: str = ""):
        self.fault = Fault(cause, detail)
        super().__init__(str(self.fault))


def values_at(row: Row, path: str, key: str = "") -> list[Any]:
    """The values of a field.

    Args:
        row: a row.
        path: the field's name, or names with dots between for a field within a field: "meta.answer". Lists on the way
            are walked through: "responses.response" has a value for each of the responses. A list at the end is one
            value. A name that has dots itself is tried first.
        key: what gives the path in the user's config, for errors: "prompt_field of the source".

    Returns:
        The values; none if a list or an object on the way is empty or null.

    Raises:
        UnusableRow: no such field. Named are the fields that are there and the nearest one.
    """
    if path in row:
        return [row[path]]
    return _values_in(row, path, "", path, key)


def _values_in(value: Any, path: str, behind: str, whole: str, key: str) -> list[Any]:
    """The values at `path` within the value of `behind`; together they are the `whole`."""
    if value is None:
        return []
    if isinstance(value, list):
        return _values_in_list(value, path, behind, whole, key)
    if not isinstance(value, dict):
        raise UnusableRow(f"no field '{whole}'", _hint(f"'{behind}' is {kind_of(value)}", "", key))
    names = path.split(".")
    for count in range(len(names), 0, -1):
        name, rest = ".".join(names[:count]), ".".join(names[count:])
        if name in value:
            there = f"{behind}.{name}".removeprefix(".")
            return _values_in(value[name], rest, there, whole, key) if rest else [value[name]]
    raise UnusableRow(f"no field '{whole}'", _fields(value, names[0], behind, key))


def _values_in_list(values: list[Any], path: str, behind: str, whole: str, key: str) -> list[Any]:
    """The values in all elements; it suffices that one of them has any."""
    found: list[Any] = []
    missing = None
    for value in values:
        try:
            found += _values_in(value, path, behind, whole, key)
        except UnusableRow as fault:
            missing = missing or fault
    if missing and not found:
        raise missing
    return found


def _fields(fields: dict[str, Any], name: str, behind: str, key: str) -> str:
    """What is there instead of a field."""
    owner = f"'{behind}'" if behind else "the row"
    if not fields:
        return f"{owner} has no fields"
    nearest = next(iter(difflib.get_close_matches(name, list(fields), n=1)), "")
    return _hint(f"{owner} has {_listed(fields)}", nearest, key)


def _listed(fields: dict[str, Any]) -> str:
    return ", ".join(repr(field[:40]) for field in list(fields)[:10])


def _hint(found: str, nearest: str, key: str) -> str:
    guess = f"; did you mean {nearest!r}?" if nearest else ""
    remedy = (f" Set {key}" if guess else f"; set {key}") if key else ""
    return found + guess + remedy


def text_of(value: Any, field: str = "") -> str:
    """A text as it is, or a number as it is written; `field` says in errors where it is.

    Raises:
        UnusableRow: anything else, or half a surrogate pair, which no file can hold.
    """
    if type(value) is str:
        return value if value.isascii() else _unicode(value, field)
    if isinstance(value, Number | int | Decimal) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(value)
    raise UnusableRow(f"{_named(field)} is not text", f"it is {kind_of(value)}")


def _unicode(text: str, field: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UnusableRow(f"{_named(field)} has half a surrogate pair, which is no Unicode text") from None
    return text


def _named(field: str) -> str:
    return f"field '{field}'" if field else "the value"


# Conversations


class _Turn(NamedTuple):
    role: Role
    text: str


def exchange(turns: Any, field: str = "") -> tuple[str, str]:
    """The first question of a conversation and the answer that follows it.

    A system turn is an instruction and no question: it is left out, even where no user speaks. Turns of one speaker in
    a row are one text, with a blank line between. Where tools are used on the way to the answer, it is what follows the
    last of them. The rest of the conversation, from the next question on, is left out.

    Args:
        turns: [{"role": ..., "content": ...}], [{"from": ..., "value": ...}] or [[role, text]], in order. A text may be
            given in parts: [{"type": "text", "text": ...}].
        field: says in errors where it is.

    Raises:
        UnusableRow: no list of such turns, an unknown role, no question, or no answer to it.
    """
    if not isinstance(turns, list | tuple):
        raise UnusableRow(f"{_named(field)} is no list of turns", f"it is {kind_of(turns)}")
    question: list[str] = []
    answer: list[str] = []
    heard: list[Role] = []
    answered = False
    for role, text in (_turn(turn, field) for turn in turns):
        if role == "user" and answered:
            break
        heard.append(role)
        if role == "user":
            question.append(text)
        elif role == "assistant" and question:
            answer.append(text)
            answered = True
        elif role == "tool":
            answer.clear()
    return _joined(question, "question", heard, field), _joined(answer, "answer", heard, field)


def _joined(texts: list[str], what: str, heard: list[Role], field: str) -> str:
    """The texts as one; `what` they are and who spoke is for errors."""
    if text := "\n\n".join(text for text in texts if text):
        return text
    raise UnusableRow(f"{_named(field)} has no {what}", f"its turns: {', '.join(heard[:10]) or 'none'}")


def _turn(turn: Any, field: str) -> _Turn:
    if isinstance(turn, list | tuple) and len(turn) == 2:
        return _Turn(_role(turn[0], field), _content(turn[1], field))
    fields = turn if isinstance(turn, dict) else {}
    for speaker, text in TURN_FIELDS:
        if fields.get(speaker) is not None:
            return _Turn(_role(fields[speaker], field), _content(fields.get(text), field))
    found = f"has {_listed(fields)}" if fields else f"is {kind_of(turn)}"
    raise UnusableRow(f"{_named(field)} has a turn without a role", f"it {found}; known are {_known_turns()}")


def _known_turns() -> str:
    return " and ".join(f"{{{speaker}, {text}}}" for speaker, text in TURN_FIELDS) + " and pairs"


def _role(value: Any, field: str) -> Role:
    role = ROLES.get(value.strip().casefold()) if isinstance(value, str) else None
    if role is None:
        roles = f"{str(value)[:40]!r}; known are {', '.join(ROLES)}"
        raise UnusableRow(f"{_named(field)} has a turn of an unknown role", roles)
    return role


def _content(value: Any, field: str) -> str:
    """The text of a turn, without white space around it; empty where a tool is called without a word."""
    if value is None:
        return ""
    if isinstance(value, list):
        return "".join(_part(part, field) for part in value).strip()
    return text_of(value, f"{field}.content".removeprefix(".")).strip()


def _part(part: Any, field: str) -> str:
    fields = part if isinstance(part, dict) else {}
    if fields.get("type", "text") != "text" or "text" not in fields:
        raise UnusableRow(f"{_named(field)} has a part that is no text", str(fields.get("type", kind_of(part)))[:40])
    return text_of(fields["text"], f"{field}.content.text".removeprefix("."))
