"""How a question and its answer become the text of a document: in training, in generation and in evaluation alike."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from dreamer_jax.config import PROMPT_TEMPLATE, RESPONSE_TEMPLATE, TEXT_MARK, DataConfig


class Template(NamedTuple):
    """What is put around questions and answers."""

    prompt: str = PROMPT_TEMPLATE
    response: str = RESPONSE_TEMPLATE

    @staticmethod
    def of(data: DataConfig) -> "Template":
        """That of a run, by `data.prompt_template` and `data.response_template`."""
        return Template(data.prompt_template, data.response_template)

    def asked(self, question: str) -> str:
        """The text that a model reads before it answers."""
        return self.prompt.replace(TEXT_MARK, question)

    def answered(self, answer: str) -> str:
        """The text that follows `asked`: by default it begins with the space that separates the two."""
        return self.response.replace(TEXT_MARK, answer)

    def stops(self, others: Sequence[str]) -> tuple[str, ...]:
        """The strings that end an answer: what begins another question, such as "Question:", and `others`.

        Only a label counts, words with a sign behind them: a bare word or a bare sign may stand in an answer, too.
        """
        beginning = self.prompt.partition(TEXT_MARK)[0].strip()
        label = [beginning] if re.search(r"\w\W+$", beginning) else []
        return tuple(dict.fromkeys([*label, *others]))


DEFAULT_TEMPLATE = Template()
"""That of runs which name no other."""
