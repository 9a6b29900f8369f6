"""Text from a stream of tokens: whole characters only, and nothing from a stop string on."""

from collections.abc import Callable, Sequence

from dreamer_jax.inference.sample import GenerationError

INCOMPLETE = "\ufffd"
"""What tokenizers decode an unfinished character to."""


class TextStream:
    """The text of one completion as its tokens come."""

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()):
        """`decode` turns token ids into text; the text ends before the first of the `stop` strings.

        Raises:
            GenerationError: an empty stop string, which would end every text at once.
        """
        if "" in stop:
            raise GenerationError("a stop string is empty")
        self.ended = False
        """Whether a stop string has come."""
        self._decode, self._stop = decode, tuple(stop)
        self._tokens: list[int] = []
        """The latest tokens: some that are shown, which the text of the others depends on, and the others."""
        self._shown, self._length = 0, 0
        """Of these, the tokens that are shown, and the length of their text."""
        self._text = ""

    def push(self, token: int) -> str:
        """The text that can be shown after one more token; empty while a character or a stop string may go on."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        if self.ended or text.endswith(INCOMPLETE):
            return ""
        new, latest = text[self._length :], self._tokens[self._shown :]
        alone = self._decode(latest)
        if alone.strip():
            # They can stand for all before them. Without a word of text they cannot: some tokenizers drop the spaces
            # in front of the first word, and some tokens have no text at all.
            self._tokens, text = latest, alone
        self._shown, self._length = len(self._tokens), len(text)
        return self._release(new)

    def finish(self) -> str:
        """The text that was still held back, when no token follows. A character cut in half is left out."""
        if self.ended:
            return ""
        return self._release(self._decode(self._tokens)[self._length :].rstrip(INCOMPLETE), last=True)

    def _release(self, new: str, *, last: bool = False) -> str:
        text = self._text + new
        stops = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        self.ended = bool(stops)
        ready = min(stops) if stops else len(text) - (0 if last else self._held(text))
        self._text = text[ready:]
        return text[:ready]

    def _held(self, text: str) -> int:
        """Characters at the end of `text` that may be the beginning of a stop string."""
        beginnings = (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return max(beginnings, default=0)
