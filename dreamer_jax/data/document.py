"""What a document is: the texts that are given and those to be produced, and the split that it belongs to."""

import hashlib
import re
from typing import Literal, NamedTuple

from dreamer_jax.config import Source

Split = Literal["train", "validation"]


class Document(NamedTuple):
    """One exercise: the text that is given and the text to be produced, and perhaps further turns of the same kind."""

    prompt: str
    response: str
    further: tuple[tuple[str, str], ...] = ()
    """More pairs (given, answered) that follow the response. No template is put around them."""

    @property
    def given(self) -> str:
        """All that is given: by this, documents are known again."""
        return " ".join([self.prompt, *(given for given, _ in self.further)])


class Found(NamedTuple):
    """A document of a source."""

    split: Split
    document: Document
    origin: str
    """File and line or row, or the task that generated it."""


def prompt_digest(prompt: str) -> int:
    """64 bits of the prompt without regard to case and white space: what makes two prompts the same."""
    normalised = " ".join(prompt.casefold().split())
    return int.from_bytes(hashlib.blake2b(normalised.encode(), digest_size=8).digest(), "little")


def without(source: Source, text: str) -> str:
    """The text without what the source removes and without white space around it."""
    return (re.sub(source.remove, "", text) if source.remove else text).strip()
