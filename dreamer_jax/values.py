"""One mechanism for the values of a config: a key's type and range stand at its field, and hold wherever it is made.

    @section("train")
    class TrainConfig:
        steps: Count = 1000

makes a frozen dataclass whose values pydantic checks: from a Python file, the command line, the JSON of a checkpoint.
Nothing is guessed: True is no number, 6.0 no whole number, "6" neither. Lists become tuples.
"""

import difflib
import functools
import json
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass
from pydantic.fields import FieldInfo
from pydantic_core import ArgsKwargs, ErrorDetails

from dreamer_jax.errors import DreamerError

Made = TypeVar("Made")

LIST = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
"""Of a tuple that may be written as a list."""
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
"""How many of something that there is."""
CountOrZero = Annotated[int, Field(ge=0, le=2**31 - 1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
"""A part of a whole, which it never is."""
Text = Annotated[str, Field(pattern=r"^[^\x00]*$", description="text (Unicode, without NUL)")]
Word = Annotated[str, Field(pattern=r"^[^\x00]+$", description="text that is not empty (Unicode, without NUL)")]
Texts = Annotated[tuple[Text, ...], LIST]
Words = Annotated[tuple[Word, ...], LIST]

LONGEST = 80
"""Characters of a value that an error shows."""
_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class ConfigError(DreamerError, ValueError):
    """A config that cannot be used; the message names the key and the fix."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with this message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def section(key: str, label: str = "") -> Callable[[type[Made]], type[Made]]:
    """Decorate a class as a section of the config, whose values are checked when it is made.

    Args:
        key: what stands before its keys in errors: "train"; empty for the whole config.
        label: one of its keys, whose value tells its instances apart in errors.
    """

    def decorate(cls: type[Made]) -> type[Made]:
        made: Any = checked_dataclass(frozen=True, config=_STRICT)(cls)
        validate = made.__init__

        @functools.wraps(validate)
        def __init__(self: Any, *values: Any, **named: Any) -> None:
            try:
                validate(self, *values, **named)
            except ValidationError as error:
                given = {**dict(zip((f.name for f in fields(made)), values, strict=False)), **named}
                where = f"{key}[{shown(given[label])}]" if label in given else key
                raise ConfigError("\n".join(sentences(error, made, where))) from None

        made.__init__ = __init__
        return made

    return decorate


def from_dict(cls: type[Made], values: Any, where: str = "") -> Made:
    """Section `cls` of stored values: nested dicts and lists, as JSON gives them.

    Args:
        cls: a class made by `section`.
        values: by key.
        where: what stands before keys in errors, such as "model".

    Raises:
        ConfigError: a line for each unknown key (the nearest is named), value that is not allowed, or missing key.
    """
    try:
        # As text, because only of JSON a dict is taken for a section, and all the rest is as strict as in Python.
        text = json.dumps(values)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where or 'config'}: JSON cannot hold it: {error}") from None
    try:
        return TypeAdapter(cls).validate_json(text)
    except ValidationError as error:
        raise ConfigError("\n".join(sentences(error, cls, where))) from None


def renewed(values: Any, renew: Callable[[dict[str, Any], bool], dict[str, Any]]) -> Any:
    """For `pydantic.model_validator(mode="before")`: a section's values with the keys that `renew` makes of its keys.

    `renew` gets the keys, and whether they were stored: then sections within are dicts, and else instances.
    """
    if isinstance(values, ArgsKwargs):
        return ArgsKwargs(values.args, renew(dict(values.kwargs or {}), False))
    return renew(dict(values), True) if isinstance(values, Mapping) else values


def sentences(error: ValidationError, cls: Any, where: str) -> Iterator[str]:
    """A line for each fault: the key, its value, what is allowed, and the nearest right key or value."""
    for fault in error.errors(include_url=False):
        yield _sentence(fault, cls, where)


def _sentence(fault: ErrorDetails, cls: Any, where: str) -> str:
    reason = fault.get("ctx", {}).get("error")
    if isinstance(reason, ConfigError):  # of a check across keys: it names them
        return str(reason)
    names = [f.name for f in fields(cls)]
    loc, kind, value = fault["loc"], fault["type"], fault["input"]
    if kind == "json_invalid":
        return f"{where or 'config'}: {fault['msg']}"
    if kind == "unexpected_positional_argument":
        return f"{where or 'config'}: {len(names)} values at most go without a key; {shown(value)} is one more"
    if loc and isinstance(loc[0], int):  # given without a key
        loc = (names[loc[0]], *loc[1:])
    key = _key(where, loc)
    if kind == "unexpected_keyword_argument":
        return f"unknown key '{key}'{_nearest_key(_at(cls, loc[:-1]), str(loc[-1]), _key(where, loc[:-1]))}"
    if kind == "multiple_argument_values":
        return f"{key} is given twice, with a key and without"
    annotation = _at(cls, loc)
    if kind == "missing":
        return f"missing key '{key}': give {allowed(annotation)}"
    if reason is not None and str(reason):
        return f"{key} = {shown(value)}: {reason}"
    fix = _fix(annotation, value) if kind.endswith(("_type", "literal_error")) else ""
    return f"{key or 'config'} = {shown(value)}: must be {allowed(annotation)}{fix}"


def _key(where: str, loc: tuple[int | str, ...]) -> str:
    # A key of a text may be anything: it is shown as values are.
    steps = "".join(f"[{step}]" if isinstance(step, int) else f".{shown(step)[1:-1]}" for step in loc)
    return f"{where}{steps}".removeprefix(".")


def _nearest_key(cls: Any, name: str, where: str) -> str:
    """What to write for an unknown key: one of the section, or of a section in it, or else the choice."""
    own = [f.name for f in fields(cls)]
    below = {key.rpartition(".")[2]: key for key in reversed(keys_of(cls))}  # of several, the first
    for known in ({name: name for name in own}, below):
        if close := difflib.get_close_matches(name[:LONGEST], known, n=1):
            return f"; did you mean '{_key(where, (known[close[0]],))}'?"
    return f"; there are {', '.join(own)}"


def keys_of(cls: Any, prefix: str = "") -> dict[str, Any]:
    """Annotations by dotted key, of a section and those in it."""
    keys: dict[str, Any] = {}
    for name, annotation in annotations(cls).items():
        inner, _ = bare(annotation)
        keys |= keys_of(inner, f"{prefix}{name}.") if is_dataclass(inner) else {f"{prefix}{name}": annotation}
    return keys


def annotations(cls: Any) -> dict[str, Any]:
    """Of a section's fields, with their ranges."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in fields(cls)}


def bare(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without its ranges, and those."""
    if typing.get_origin(annotation) is Annotated:
        return annotation.__origin__, annotation.__metadata__
    return annotation, ()


def _at(cls: Any, loc: tuple[int | str, ...]) -> Any:
    """The annotation of the key, or of the entry of a list, at `loc`; of what holds it, if it is of no such kind."""
    found = cls
    for step in loc:
        inner, _ = bare(found)
        if is_dataclass(inner) and step in annotations(inner):
            found = annotations(inner)[step]
        elif typing.get_origin(inner) is tuple:
            found = typing.get_args(inner)[0]
    return found


def allowed(annotation: Any) -> str:
    """What values an annotation takes, in words that go after "must be"."""
    kind, notes = bare(annotation)
    infos = [note for note in notes if isinstance(note, FieldInfo)]
    described = [info.description for info in infos if info.description]
    if described:
        return described[-1]
    if isinstance(kind, type) and is_dataclass(kind):
        return f"a section (in Python: {kind.__name__}(...))"
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, typing.get_args(kind)))}"
    if typing.get_origin(kind) is tuple:
        return f"a list, each entry {allowed(typing.get_args(kind)[0])}"
    if kind is bool:
        return "True or False"
    if kind not in (int, float):
        return f"of the type {getattr(kind, '__name__', kind)}"
    limits = {name: limit for info in infos for note in info.metadata for name, limit in _limits(note)}
    return ("a whole number" if kind is int else "a finite number") + _range(limits)


def _limits(note: Any) -> list[tuple[str, float | int]]:
    return [(name, getattr(note, name)) for name in ("gt", "ge", "lt", "le", "multiple_of") if hasattr(note, name)]


def _range(limits: Mapping[str, float | int]) -> str:
    words = {"gt": "above {:.15g}", "ge": "of at least {:.15g}", "lt": "below {:.15g}", "le": "at most {:.15g}"}
    given = [text.format(limits[name]) for name, text in words.items() if name in limits]
    multiple = f", a multiple of {limits['multiple_of']}" if "multiple_of" in limits else ""
    if {"ge", "le"} <= limits.keys():
        return f" from {limits['ge']:.15g} to {limits['le']:.15g}{multiple}"
    return f" {' and '.join(given)}{multiple}" if given else multiple


def _fix(annotation: Any, value: Any) -> str:
    """How to write what was probably meant, after the sentence that says what is allowed."""
    kind, _ = bare(annotation)
    if typing.get_origin(kind) is Literal:
        close = difflib.get_close_matches(value, typing.get_args(kind), n=1) if isinstance(value, str) else []
        return f"; did you mean {close[0]!r}?" if close else ""
    if typing.get_origin(kind) is tuple:
        return f" (write ({shown(value)},))" if isinstance(value, str) else ""
    meant = _meant(kind, value)
    return f" (write {meant!r})" if meant is not None and _fits(annotation, meant) else ""


def _meant(kind: Any, value: Any) -> Any:
    """The value of this type that another one stands for; None for a value of the type, or one that stands for none."""
    if kind is bool:
        return {"true": True, "false": False, "1": True, "0": False}.get(str(value).lower())
    if kind is str:
        return str(value) if type(value) in (int, float) else None
    if kind not in (int, float) or isinstance(value, kind):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    if kind is float:
        return number
    return int(number) if number.is_integer() and abs(number) < 2**53 else None


def _fits(annotation: Any, value: Any) -> bool:
    try:
        TypeAdapter(annotation, config=_STRICT).validate_python(value)
    except ValidationError:
        return False
    return True


def shown(value: Any) -> str:
    """A value in an error: in one line, and not too long."""
    try:
        text = " ".join(repr(value).split())
    except (ValueError, RecursionError):  # a number of too many digits; lists in lists
        text = f"a very long {type(value).__name__}"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
