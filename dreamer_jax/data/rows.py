"""From a file to its rows, one after another: JSON lines, a JSON array, one JSON object, or Parquet.

What a file is follows from its first bytes, not from its name. JSON may be packed by gzip or zstd. No more than a row
and a chunk of a file is held in memory.
"""

import codecs
import contextlib
import gzip
import io
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

from dreamer_jax.data.files import BOM, HEAD, DataError, foreign, reading

ROW_BYTES = 1 << 24
"""Longest row. A longer one is hardly a row, and is never held in memory."""
CHUNK = 1 << 16
"""Bytes that are read at once where a file has no lines."""
GZIP, ZSTD, PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
"""How files of these kinds begin."""
SPACE = re.compile(r"[ \t\n\r]*")
"""White space between the parts of JSON."""
KINDS = {dict: "an object", list: "a list", bool: "true or false", type(None): "null", str: "a text", bytes: "bytes"}
"""What a value is that is no number, for errors."""
UNREADABLE = (ValueError, OverflowError)
"""What pyarrow raises where Python cannot hold a value."""


class Fault(NamedTuple):
    """Why a row cannot be used."""

    cause: str
    """The same for all rows that share it, which are counted under it."""
    detail: str
    """What is special to this row; may be empty."""

    def __str__(self) -> str:
        return f"{self.cause} ({self.detail})" if self.detail else self.cause


class Number(str):
    """A number of JSON, spelt as in the file: 3.50 and 1e400 stay what they are, as do thousands of digits."""

    __slots__ = ()


Row = dict[str, Any]
_DECODER = json.JSONDecoder(parse_int=Number, parse_float=Number)


def rows_of(path: Path, what: str) -> Iterator[tuple[str, Row | Fault]]:
    """All rows of a file, in its order.

    Args:
        path: the file.
        what: names the file's key in errors.

    Yields:
        (place, row), such as "/data/x.jsonl, line 3" or "/data/x.parquet, row 7"; for a row that cannot be used, its
        fault. Numbers of JSON come as `Number`, those of Parquet as Python's.

    Raises:
        DataError: a file that cannot be read, has no rows but is something else, or is damaged so that its further rows
            cannot be told apart. The error comes after the rows in front of the damage, but for some of the last chunk.
    """
    with reading(path, what):
        with path.open("rb") as file:
            is_parquet = file.read(len(PARQUET)) == PARQUET
        if is_parquet:
            yield from _parquet_rows(path, what)
            return
        with unpacked(path) as stream:
            head = stream.read(HEAD)
        if kind := foreign(head):
            raise DataError(f"{what}: '{path}' has no rows, but is {kind}")
        with unpacked(path) as stream:
            yield from _json_rows(stream, head.removeprefix(BOM).lstrip(), path, what)


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[io.BufferedReader]:
    """The content of a file; if its first bytes are those of gzip or zstd, what is packed in it.

    Raises:
        OSError, EOFError, zlib.error: it cannot be read, or is damaged; `files.reading` makes a DataError of them.
    """
    with path.open("rb") as file:
        beginning = file.read(len(ZSTD))
        file.seek(0)
        if not beginning.startswith((GZIP, ZSTD)):
            yield file
            return
        with io.BufferedReader(_decompressor(file, beginning), CHUNK) as stream:
            yield stream


def _decompressor(file: io.BufferedReader, beginning: bytes) -> Any:
    if beginning.startswith(GZIP):
        return gzip.GzipFile(fileobj=file)
    import pyarrow  # takes a while, and most files need none of it

    return pyarrow.CompressedInputStream(file, "zstd")


def kind_of(value: Any) -> str:
    """What a value is, for errors: "a list", "a number"."""
    return KINDS.get(type(value)) or ("a number" if isinstance(value, Number | int | float) else type(value).__name__)


# JSON


def _json_rows(stream: io.BufferedReader, beginning: bytes, path: Path, what: str) -> Iterator[tuple[str, Row | Fault]]:
    if beginning.startswith(b"["):
        yield from _array_rows(stream, path, what)
    elif _is_spread(beginning):
        yield f"{path}, row 1", _only_row(stream, path, what)
    else:
        yield from _line_rows(stream, f"{path}, line ")


def _is_spread(beginning: bytes) -> bool:
    """Whether a file begins with an object over several lines: the first line stops where a field may follow."""
    first, _, rest = beginning.partition(b"\n")
    first = first.rstrip()
    return first.startswith(b"{") and first.endswith((b"{", b",")) and rest.lstrip().startswith(b'"')


def _only_row(stream: io.BufferedReader, path: Path, what: str) -> Row | Fault:
    """The one object of a file."""
    row = _row(stream.read(ROW_BYTES + 1).removeprefix(BOM))
    if isinstance(row, Fault) and row.detail.startswith("Extra data"):
        remedy = "write one object a line: jq -c . FILE > FILE.jsonl"
        raise DataError(f"{what}: '{path}' has several JSON objects, each over several lines; {remedy}")
    return row


def _line_rows(stream: io.BufferedReader, place: str) -> Iterator[tuple[str, Row | Fault]]:
    """The rows of all lines but blank ones; of a line that is too long only the beginning is kept."""
    for number in itertools.count(1):
        line = stream.readline(ROW_BYTES + 1)
        if not line:
            return
        rest = line
        while len(rest) > ROW_BYTES and not rest.endswith(b"\n"):
            rest = stream.readline(ROW_BYTES + 1)
        line = line.removeprefix(BOM)
        if not line.isspace():
            yield f"{place}{number}", _row(line)


def _row(text: bytes) -> Row | Fault:
    """The one object that a text consists of."""
    if len(text) > ROW_BYTES:
        return Fault(f"longer than {ROW_BYTES >> 20} MiB", "")
    if b"\0" in text:
        return Fault("NUL bytes", "a crash leaves them behind; fetch the file again")
    try:
        value = _DECODER.decode(text.rstrip().decode("utf-8"))
    except UnicodeDecodeError as error:
        return Fault("not UTF-8 text", f"from byte {error.start + 1} on")
    except json.JSONDecodeError as error:
        return Fault("not JSON", f"{_said(error)} at character {error.pos + 1}")
    except RecursionError:
        return Fault("JSON that is nested too deep", "")
    return value if type(value) is dict else _object(value)


def _object(value: Any) -> Row | Fault:
    return value if type(value) is dict else Fault("not a JSON object", kind_of(value))


def _said(error: json.JSONDecodeError) -> str:
    return error.msg.removesuffix(" at")


def _array_rows(stream: io.BufferedReader, path: Path, what: str) -> Iterator[tuple[str, Row | Fault]]:
    """The elements of an array, parsed one by one."""
    number, text = 1, _Text(stream)
    try:
        text.take("[")
        while text.next() != "]":
            if number > 1:
                text.take(",")
            yield f"{path}, row {number}", _object(text.value())
            number += 1
        text.take("]")
        if text.next():
            text.fail("more after the array's end")
    except _Damage as damage:
        remedy = "the rows from there on cannot be told apart; fetch the file again, or mend it"
        raise DataError(f"{what}: '{path}', row {number}: {damage}; {remedy}") from None


class _Damage(Exception):
    """An array that is not JSON from some character on."""


class _Text:
    """A file's text, of which a window is held: enough for the value that is being parsed."""

    def __init__(self, stream: io.BufferedReader):
        self._stream, self._decoder = stream, codecs.getincrementaldecoder("utf-8-sig")()
        self._window, self._at, self._passed, self._ended = "", 0, 0, False

    def next(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            self._at = cast(re.Match[str], SPACE.match(self._window, self._at)).end()
            if self._at < len(self._window) or self._ended:
                return self._window[self._at : self._at + 1]
            self._read()

    def take(self, sign: str) -> None:
        """Go beyond this sign."""
        if self.next() != sign:
            self.fail(f"not JSON (expecting '{sign}')")
        self._at += 1

    def value(self) -> Any:
        """Parse the next value, and go beyond it."""
        self.next()
        earlier = ("", -1)
        while True:
            try:
                value, end = _DECODER.raw_decode(self._window, self._at)
                if end < len(self._window) or self._ended:  # else it may be a number of which the rest is to come
                    self._at = end
                    return value
            except json.JSONDecodeError as error:
                fault = (_said(error), error.pos - self._at)
                # A text that does not end keeps its fault however much is read, and so does what is no JSON.
                if self._ended or (fault == earlier and not fault[0].startswith("Unterminated string")):
                    self.fail(f"not JSON ({fault[0]})", fault[1])
                earlier = fault
            except RecursionError:
                self.fail("JSON that is nested too deep")
            if len(self._window) - self._at > ROW_BYTES:
                self.fail(f"longer than {ROW_BYTES >> 20} MiB, or a text without end")
            self._read()

    def fail(self, cause: str, offset: int = 0) -> NoReturn:
        """Raise _Damage at the present place, or `offset` characters from there."""
        raise _Damage(f"{cause} at character {self._passed + self._at + offset + 1} of the file") from None

    def _read(self) -> None:
        """Drop what is behind, and read as much again as lies ahead: a long value is parsed a few times, not often."""
        ahead = len(self._window) - self._at
        data = self._stream.read(min(max(CHUNK, ahead), ROW_BYTES + CHUNK - ahead))
        try:
            more = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            self.fail("not UTF-8 text", ahead + len(error.object[: error.start].decode()))
        self._passed += self._at
        self._window, self._at, self._ended = self._window[self._at :] + more, 0, not data


# Parquet


def _parquet_rows(path: Path, what: str) -> Iterator[tuple[str, Row | Fault]]:
    number = itertools.count(1)
    for batch in _batches(path, what):
        names = batch.schema.names
        try:
            rows: Iterator[Row | Fault] = map(dict, map(zip, itertools.repeat(names), _cells(batch)))
        except UNREADABLE:
            rows = (_row_alone(batch.slice(n, 1), names) for n in range(len(batch)))
        for row in rows:
            yield f"{path}, row {next(number)}", row


def _batches(path: Path, what: str) -> Iterator[Any]:
    """The file's record batches, each of about a row's largest size."""
    import pyarrow
    import pyarrow.parquet

    try:
        # With pre_buffer a whole row group would be read at once: often the whole file.
        with pyarrow.parquet.ParquetFile(path, buffer_size=CHUNK, pre_buffer=False) as file:
            for group in range(file.num_row_groups):
                described = file.metadata.row_group(group)
                row_bytes = max(1, described.total_byte_size // max(1, described.num_rows))
                rows = min(max(1, ROW_BYTES // row_bytes), 1024)
                yield from file.iter_batches(rows, row_groups=[group], use_threads=False)
    except pyarrow.ArrowException as error:
        said = " ".join(str(error).split())
        raise DataError(f"{what}: '{path}' is a Parquet file that is damaged ({said}); fetch it again") from error


def _cells(batch: Any) -> Iterator[tuple[Any, ...]]:
    """The values of each row.

    Raises:
        ValueError, OverflowError: a value that Python cannot hold, such as a text that is not UTF-8.
    """
    return zip(*[column.to_pylist() for column in batch.columns], strict=True)


def _row_alone(batch: Any, names: list[str]) -> Row | Fault:
    try:
        return dict(zip(names, next(_cells(batch)), strict=True))
    except UnicodeDecodeError:
        return Fault("not UTF-8 text", "")
    except UNREADABLE as error:
        return Fault("a value that Python cannot hold", str(error))
