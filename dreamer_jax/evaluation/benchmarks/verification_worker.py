"""One process that compares answers with math-verify until its input ends.

A program, not a module to import: `verification.py` runs this file by its path, so that neither JAX nor anything else
of this package is loaded. It reads a JSON array [gold, answer, seconds] a line and writes a line for each: `equal`,
`different`, or `failed` if memory was short. The first line it writes is `ready`.
"""

import contextlib
import json
import logging
import math
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from itertools import product
from typing import Any

Parts = list[Any]
"""What math-verify reads in a text: expressions of SymPy, and the text itself."""


def main(memory: int) -> None:
    """Serve standard input, with at most `memory` bytes of address space."""
    replies = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints is no reply
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this process ends it
    logging.disable()  # math-verify warns that it has no time limit of its own
    with contextlib.suppress(ValueError, OSError):  # not every platform has this limit
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    read, equal = _math_verify()
    _compare(r"\frac{1}{2}", "0.5", read, equal)  # the first comparison builds tables, which no time limit should count
    os.write(replies, b"ready\n")
    for line in sys.stdin:
        gold, answer, seconds = json.loads(line)
        # The other process ends a comparison that takes too long. If it is gone, this signal does.
        signal.alarm(math.ceil(seconds) + 5)
        reply = _compare(gold, answer, read, equal)
        signal.alarm(0)
        os.write(replies, f"{reply}\n".encode())


def _math_verify() -> tuple[Callable[[str], Parts], Callable[[Any, Any], bool]]:
    """How a text is read, and whether two things read are the same, the right one first; without time limits."""
    from math_verify import parse, verify

    # Its own limits are alarms, which SymPy's handlers of exceptions can swallow and C code never sees.
    return (
        lambda text: parse(text, parsing_timeout=None),
        lambda gold, answer: verify(gold, answer, timeout_seconds=None, raise_on_error=True),
    )


def _compare(gold: str, answer: str, read: Callable[[str], Parts], equal: Callable[[Any, Any], bool]) -> str:
    try:
        pairs = product(read(_delimited(gold)), read(_delimited(answer)))
        return "equal" if any(_same(*pair, equal) for pair in pairs) else "different"
    except MemoryError:
        return "failed"


def _same(gold: Any, answer: Any, equal: Callable[[Any, Any], bool]) -> bool:
    try:
        return bool(equal(gold, answer))
    except MemoryError:
        raise
    except Exception:  # SymPy raises what it likes on things it cannot compare
        return False


def _delimited(latex: str) -> str:
    r"""LaTeX as math-verify looks for it in a text, without what it cannot read in a number, as in `20,\!000`."""
    plain = re.sub(r"(?<=\d)(?:\{,\}|,?\s*\\!)\s*(?=\d{3})", "", latex)
    return f"${plain}$"


if __name__ == "__main__":
    main(int(sys.argv[1]))
