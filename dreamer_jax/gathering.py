"""How the processes of a run find each other, before JAX's coordination service takes over the address of process 0.

JAX's own start does not notice a process that dies meanwhile, and after its time it aborts without a word on who is
missing. So the others call on process 0 first, and hold the line until they have joined JAX's service: a line that
breaks before that is a process that died.

A message is a list in JSON, on a line of its own. ["hello", number, count, name] is answered with ["welcome", name of
process 0] or ["no", why]; ["go", names] follows when all are here, and ["in"] comes from a process that has joined
JAX's service. ["there?"] is answered with ["here"]. Either side may say ["end", code, words] at any time.
"""

import contextlib
import errno
import json
import math
import os
import re
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from dreamer_jax.errors import DreamerError

NOTE_SECONDS = 15
"""After so long, a process that waits says for whom."""
PATIENCE_SECONDS = 15
"""How much longer the others wait than process 0, which can say who is missing."""
BUSY_SECONDS = 5
"""How long the address may still be in use, by a run that is ending; how long an answer may take."""
SHOW_SECONDS = 2
"""How long output may take."""
LONGEST = 1 << 16
"""Bytes of an unfinished message from a stranger."""
SHOWN = 20
"""Processes that a message lists."""


class DistributedError(DreamerError, RuntimeError):
    """Processes that cannot come together; the message names the cause and the fix."""


def show(text: str) -> None:
    """Write a line on stderr as far as that goes: output that is closed, full or stuck keeps no process from ending."""

    def write() -> None:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        with contextlib.suppress(Exception):
            left = f"{text}\n".encode(errors="backslashreplace")
            descriptor = sys.stderr.fileno()  # past the stream, whose lock the main thread may hold
            while left:
                left = left[os.write(descriptor, left) :]

    with contextlib.suppress(RuntimeError):  # no thread to be had
        thread = threading.Thread(target=write, name="show", daemon=True)
        thread.start()
        thread.join(SHOW_SECONDS)


def listed(items: Iterable[object]) -> str:
    """The first ones, with commas."""
    words = [str(item) for item in items]
    return ", ".join(words[:SHOWN]) + (f" and {len(words) - SHOWN} more" if len(words) > SHOWN else "")


class _Line:
    """A connection that carries messages."""

    def __init__(self, connection: socket.socket):
        self.socket, self.number = connection, 0
        self._rest, self._lock = b"", threading.RLock()  # a signal may come while it is held

    def say(self, *message: Any) -> None:
        """Send a message; a line that is broken is found by who listens."""
        with self._lock, contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def hear(self) -> list[list[Any]] | None:
        """Wait for messages; None when the line has ended, or speaks another language.

        Raises:
            TimeoutError: nothing came in the time of the socket.
        """
        try:
            data = self.socket.recv(LONGEST)
            *lines, self._rest = (self._rest + data).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except TimeoutError:
            raise
        except (OSError, ValueError, RecursionError):
            return None
        ours = all(isinstance(message, list) and message for message in messages)
        return messages if data and ours and len(self._rest) < LONGEST else None


class Host:
    """Process 0: waits for the others, tells all when they are here, and notices who dies."""

    def __init__(self, address: str, index: int, count: int, name: str, end: Callable[[int, str], None]):
        """Listens at once; `end` is called, in a thread, with code and words where one process ends all.

        Raises:
            DistributedError: the address cannot be had.
        """
        self.index, self.count, self._end, self._address = index, count, end, address
        self._names: dict[int, str] = {0: name}
        self._lines: dict[int, _Line] = {}
        self._all, self._inside, self._over = threading.Event(), set[int](), False
        self._seconds = self._deadline = math.inf
        self._heard: set[int] | None = None
        self._listener = _listen(address, count)
        self._listener.setblocking(False)  # who called may be gone
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        threading.Thread(target=self._serve, name="gathering", daemon=True).start()

    def wait(self, seconds: float) -> list[str]:
        """The names of all, when they are here.

        Raises:
            DistributedError: some have not come.
        """
        self._seconds = seconds
        if not self._all.wait(min(NOTE_SECONDS, seconds)):
            show(f"waiting for {self._missing()} of {self.count} at {self._address} ...")
        if not self._all.wait(max(seconds - NOTE_SECONDS, 0)):
            raise DistributedError(
                f"the processes did not come together within {seconds:g} s: {self._missing()} of {self.count} did not "
                f"come to {self._address}; here: {listed(self._names[i] for i in sorted(self._names))}. "
                f"Start all of them, each with its own number, and let them reach that address"
            )
        return [self._names[i] for i in range(self.count)]

    def announce(self, code: int, words: str) -> None:
        """Tell the others why this process ends."""
        self._over = True
        for line in list(self._lines.values()):
            line.say("end", code, words)

    def inside(self) -> None:
        """This process has joined JAX's service; the thread ends when all have."""

    def _missing(self) -> str:
        missing = [i for i in range(self.count) if i not in self._names]
        return f"process{'es' * (len(missing) > 1)} {listed(missing)}"

    def _serve(self) -> None:
        while len(self._inside) < self.count - 1:
            for key, _ in self._selector.select(1.0):
                if key.data is None:
                    self._accept()
                else:
                    self._attend(key.data)
            if time.monotonic() > self._deadline:
                self._find_silent()
        self._selector.close()
        for line in self._lines.values():
            line.socket.close()

    def _find_silent(self) -> None:
        """Some do not join JAX's service, which lets in all or none: ask who is there, and then name who is not."""
        if self._heard is None:
            self._heard, self._deadline = {0}, time.monotonic() + BUSY_SECONDS
            for line in self._lines.values():
                line.say("there?")
            return
        silent = listed(name for i, name in self._names.items() if i not in self._heard)
        self._close(1, f"{silent or 'a process'} died or is stopped: it no longer answers")

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            connection.settimeout(10)  # for what is sent
            self._selector.register(connection, selectors.EVENT_READ, _Line(connection))

    def _attend(self, line: _Line) -> None:
        messages = line.hear()
        for message in messages or []:
            match message:
                case ["hello", int(number), count, str(name)] if not line.number:
                    self._welcome(line, number, count, name)
                case ["in"] if line.number:
                    self._inside.add(line.number)
                case ["here"] if self._heard:
                    self._heard.add(line.number)
                case ["end", int(code), str(words)] if line.number:
                    self._close(code, words)
        if messages is None:
            self._selector.unregister(line.socket)
            line.socket.close()
            if line.number and line.number not in self._inside:
                self._close(1, f"{self._names[line.number]} died before the run began")

    def _welcome(self, line: _Line, number: int, count: Any, name: str) -> None:
        why = ""
        if count != self.count:
            why = f"it knows of {count} processes, and {self._names[0]} of {self.count}"
        elif number in self._names or not 0 < number < count:
            why = f"{self._names.get(number, self._names[0])} is there already; give each its own number"
        if why:
            line.say("no", why)
            show(f"{name} was not let in: {why}")
            return
        line.number = number
        self._names[number], self._lines[number] = name, line
        line.say("welcome", self._names[0])
        if len(self._names) == self.count:
            self._go()

    def _go(self) -> None:
        self._selector.unregister(self._listener)
        place = self._listener.getsockname()[:2]
        self._listener.close()  # JAX's service takes the address
        self._deadline = time.monotonic() + self._seconds
        self._all.set()
        names = [self._names[i] for i in range(self.count)]
        _await_service(place)
        for line in self._lines.values():
            line.say("go", names)

    def _close(self, code: int, words: str) -> None:
        if not self._over:
            self.announce(code, words)
            self._end(code, words)


class Guest:
    """Any other process: calls on process 0, and notices if that dies."""

    def __init__(self, address: str, index: int, count: int, name: str, end: Callable[[int, str], None]):
        """Nothing happens before `wait`; `end` as of `Host`."""
        self.index, self.count, self._address, self._end = index, count, address, end
        self._hello, self._host = ("hello", index, count, name), "process 0"
        self._line: _Line | None = None
        self._names: list[str] = []
        self._seconds = 0.0
        self._all, self._over = threading.Event(), False

    def wait(self, seconds: float) -> list[str]:
        """The names of all, when they are here.

        Raises:
            DistributedError: process 0 cannot be reached, does not let this process in, or does not answer.
        """
        self._seconds = seconds
        self._line = self._call(seconds)
        threading.Thread(target=self._listen, args=(self._line,), name="gathering", daemon=True).start()
        if not self._all.wait(seconds + PATIENCE_SECONDS):
            raise DistributedError(
                f"{self._host} at {self._address} died or is stopped: it no longer answers; start all processes anew"
            )
        return self._names

    def announce(self, code: int, words: str) -> None:
        """Tell process 0, which tells the others, why this process ends."""
        self._over = True
        if self._line:
            self._line.say("end", code, words)

    def inside(self) -> None:
        """This process has joined JAX's service."""
        self._over = True
        if self._line:
            self._line.say("in")

    def _call(self, seconds: float) -> _Line:
        """A line on which process 0 has said welcome; until then, whoever may sit at its address."""
        start, told = time.monotonic(), False
        while True:
            left = start + seconds - time.monotonic()
            try:
                line, problem = self._called(max(left, 0.1))
            except OSError as error:
                line, problem = None, str(error)
            if line:
                return line
            if left <= 0:
                raise DistributedError(
                    f"process 0 could not be reached at {self._address} within {seconds:g} s ({problem}): start it, "
                    f"or give all processes the address at which it is"
                )
            if not told and left < seconds - NOTE_SECONDS:
                told = True
                show(f"waiting for process 0 at {self._address} ({problem}) ...")
            time.sleep(0.2)

    def _called(self, seconds: float) -> tuple[_Line | None, str]:
        connection = socket.create_connection(host_and_port(self._address), timeout=min(seconds, 10))
        connection.settimeout(seconds)
        line = _Line(connection)
        line.say(*self._hello)
        while (messages := line.hear()) == []:  # a part of one
            pass
        match messages:
            case [["welcome", str(name)], *more]:
                connection.settimeout(None)
                self._host = name
                self._take(more, line)
                return line, ""
            case [["no", str(why)], *_]:
                raise DistributedError(f"process 0 at {self._address} does not let process {self.index} in: {why}")
        connection.close()
        return None, "who answers there is not process 0 of a run that begins"

    def _listen(self, line: _Line) -> None:
        why = "died before the run began"
        try:
            while (messages := line.hear()) is not None:
                self._take(messages, line)
        except TimeoutError:
            why = "died or is stopped: JAX's service does not answer"
        if not self._over:
            self._end(1, f"{self._host} {why}")
        line.socket.close()

    def _take(self, messages: list[list[Any]], line: _Line) -> None:
        for message in messages:
            match message:
                case ["go", list(names)]:
                    self._names = names
                    line.socket.settimeout(self._seconds + PATIENCE_SECONDS)
                    self._all.set()
                case ["there?"]:
                    line.say("here")
                case ["end", int(code), str(words)]:
                    self._end(code, words)


def _await_service(place: tuple[str, int]) -> None:
    """Wait until JAX's service listens: a process that called too early would try again only after a second."""
    until = time.monotonic() + BUSY_SECONDS
    while time.monotonic() < until:
        with contextlib.suppress(OSError), socket.create_connection(place, timeout=1):
            return
        time.sleep(0.01)


def host_and_port(address: str) -> tuple[str, int]:
    """Of host:port, where an address of IPv6 stands in brackets.

    Raises:
        DistributedError: it is something else.
    """
    found = re.fullmatch(r"(\[[^\s\[\]/]+\]|[^\s\[\]:/]+):([0-9]{1,5})", address)
    if not found or not 0 < int(found[2]) < 1 << 16:
        raise DistributedError(
            f"'{address}': give host:port with a port from 1 to 65535, such as 10.0.0.1:8476 or [::1]:8476"
        )
    return found[1].strip("[]"), int(found[2])


def _listen(address: str, count: int) -> socket.socket:
    """A socket where JAX's service will be; it waits for a run that is ending to leave."""
    given = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS")
    place = host_and_port(given or f"[::]:{host_and_port(address)[1]}")
    until = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            return _bound(place, count)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > until:
                raise DistributedError(
                    f"process 0 cannot listen on port {place[1]} of this machine ({error.strerror or error}): "
                    f"another run may be there; give the processes another port"
                ) from error
        time.sleep(0.2)


def _bound(place: tuple[str, int], count: int) -> socket.socket:
    if ":" not in place[0]:
        return socket.create_server(place, backlog=count + 16)
    everywhere = place[0] == "::" and socket.has_dualstack_ipv6()
    if place[0] == "::" and not everywhere:
        return socket.create_server(("0.0.0.0", place[1]), backlog=count + 16)
    return socket.create_server(place, family=socket.AF_INET6, backlog=count + 16, dualstack_ipv6=everywhere)
