r"""Does every stage of a preparation find what it should, and nothing else? Raw sets with planted cases, and their key.

    python benchmarks/planted.py RAW --make 200000 --data DATA
    python -m dreamer_jax.prepare --config benchmarks/planted.py --root RAW --decontaminate.root RAW/data --out OUT
    python benchmarks/planted.py RAW --score OUT
    python benchmarks/planted.py RAW --kill OUT2 --like OUT

`--make` writes word problems as three raw sets of several kinds of files, in which some rows are planted: duplicates,
leaks of benchmark questions, traces, damaged texts, and others that only look like these. RAW/key says of each row what
must become of it. DATA has gsm8k/, math/, mathqa/, mmlu_math/, openmathinstruct2/ and cot_traces/, which the recipe
below takes beside the planted sets. `--score` compares the key with what a preparation did. `--kill` prepares again,
kills all its processes in the middle of each stage, goes on, and compares the result with that of OUT.
"""

import argparse
import base64
import csv
import gzip
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dreamer_jax.preparation.decontaminate import LONG_TOKENS, tokens_of
from dreamer_jax.preparation.dedup import RANK_BITS
from dreamer_jax.preparation.raw import ROW_BITS, files_of, groups_of
from dreamer_jax.preparation.recipe import (
    PAPER_BENCHMARKS,
    DecontaminateConfig,
    RawSource,
    Recipe,
    TokensConfig,
    WorkConfig,
)

FILES = {
    "pairs": ("0.jsonl.gz", "1.jsonl", "2.json"),
    "chat": ("0.parquet", "1.parquet", "2.jsonl.gz"),
    "columns": ("0.parquet", "1.json", "2.jsonl"),
}
"""Of each planted set."""
KNOWN = " (known)"
"""End of the names of cases that a rule is known to miss, or to find without cause. They are counted apart."""
STAGES = ("strip", "clean", "exact", "near", "answers", "leak")
CAP = 32
"""Answers to a question, as in recipe.DuplicatesConfig."""


def get_config() -> Recipe:
    """The planted sets, beside the real ones of DATA."""
    return Recipe(
        root="$RAW",
        sources=(
            RawSource(
                "gsm8k",
                files=("data/gsm8k/train.jsonl",),
                licence="MIT",
                prompt=("question",),
                response=("answer",),
                remove=r"<<[^<>]*>>",
                held_out=0.02,
            ),
            RawSource(
                "math",
                files=("data/math/train.jsonl",),
                licence="MIT",
                prompt=("problem",),
                response=("solution",),
                held_out=0.02,
            ),
            RawSource(
                "mathqa",
                files=("data/mathqa/dev.json",),
                licence="Apache-2.0",
                prompt=("Problem",),
                response=("Rationale",),
                held_out=0.02,
            ),
            RawSource(
                "openmathinstruct2",
                files=("data/openmathinstruct2/*.jsonl",),
                licence="CC-BY-4.0",
                prompt=("problem",),
                response=("generated_solution",),
            ),
            RawSource(
                "cot_traces",
                files=("data/cot_traces/*.json",),
                licence="Apache-2.0",
                prompt=("problem",),
                response=("message_content",),
                traces="think",
            ),
            RawSource("pairs", files=("pairs/*",), prompt=("question",), response=("answer",)),
            RawSource("chat", files=("chat/*",), turns="messages", traces="think"),
            RawSource("columns", files=("columns/*",), prompt=("problem",), response=("message_content",)),
        ),
        # MathQA's dev set is trained on here. Of the others' test sets, those at hand are taken.
        decontaminate=DecontaminateConfig(
            root="$RAW/data", benchmarks=tuple(b for b in PAPER_BENCHMARKS if b.name != "mathqa"), partial=True
        ),
        tokens=TokensConfig(vocab=2000, sample=50_000, context=512, budget=100),
        work=WorkConfig(shard_rows=10_000),
    )


# Exercises


class Exercise(NamedTuple):
    """A word problem, and two right solutions in different words."""

    question: str
    answer: str
    other: str


TEMPLATES = (
    Exercise(
        "{name} runs a small {place} and sells {thing} there. {opening} Every morning {a} boxes are delivered, "
        "and each of them holds {b} {thing}. Before the doors open, {c} damaged pieces are sorted out and given back "
        "to the driver. How many {thing} can {name} put on the shelves on one morning?",
        "We first find how many {thing} are delivered: {a} boxes with {b} pieces each give {a} * {b} = {ab} {thing}. "
        "{middle} Since {c} damaged pieces are sorted out, we subtract them from the delivery, which leaves "
        "{ab} - {c} = {left} {thing} for the shelves. {closing} #### {left}",
        "Let x be the number of {thing} on the shelves. The delivery is the product of boxes and pieces, so x + {c} "
        "must equal {ab}. Solving this equation for x yields x = {left}, hence exactly that many go on sale. "
        "#### {left}",
    ),
    Exercise(
        "In the {place} of {name} there are {a} rows of tables, and every row has {b} seats. {opening} For tonight's "
        "concert {c} further chairs are carried in from the cellar and placed along the wall. How many guests can sit "
        "down at the same time during the concert, if nobody has to stand and each guest needs one seat?",
        "The tables alone offer {a} times {b} seats, which makes {ab} seats in the whole room. {middle} The {c} "
        "chairs from the cellar come on top of that number, so the room has {ab} + {c} = {sum} seats altogether. "
        "{closing} The answer is {sum}.",
        "Count the wall first: {c} people. A single row takes {b} people and the same holds for all {a} rows, thus "
        "another {ab} people. Both groups together are {sum} people. The answer is {sum}.",
    ),
    Exercise(
        "A train leaves the station near {name}'s {place} and travels for {a} hours at a constant speed of {b} "
        "kilometers per hour. {opening} After a short break it goes on over the mountains for another {c} kilometers "
        "until it reaches the harbour. What is the total length of the journey in kilometers?",
        "Distance is speed multiplied by time. On the first part the train covers {b} * {a} = {ab} kilometers. "
        "{middle} To this we add the part over the mountains, and obtain {ab} + {c} = {sum} kilometers for the journey "
        "from the station to the harbour. {closing} So the journey is \\boxed{{{sum}}} kilometers long.",
        "Work backwards from the harbour. The last stretch is known, namely {c}. What comes before takes {a} hours, "
        "each contributing {b}, therefore {ab}. Total: \\boxed{{{sum}}}.",
    ),
    Exercise(
        "Consider the linear function $f(x) = {a}x + {b}$, which {name} found in an old book. {opening} Suppose that "
        "the graph is moved upwards by {c} units without turning it, and call the new function $g$. Find the value of "
        "$g({b})$, and write it as an integer.",
        "Moving the graph upwards adds a constant to the function, so $g(x) = {a}x + {b} + {c}$. {middle} We "
        "substitute the argument and get $g({b}) = {a} \\cdot {b} + {b} + {c} = {ab} + {bc} = {all}$. {closing} "
        "Therefore the value is $\\boxed{{{all}}}$.",
        "First evaluate the original: $f({b}) = {ab} + {b}$. A shift upwards changes each value by the same amount "
        "{c}; the result becomes {all} after the shift. Hence $\\boxed{{{all}}}$.",
    ),
    Exercise(
        "{name} saves money for new {thing}. {opening} For {a} weeks in a row {name} puts {b} dollars into a jar, and "
        "an uncle gives {c} dollars as a present at the end of this time. In the {place} nearby, the {thing} cost "
        "exactly what the jar then holds. What is the price of the {thing} in dollars?",
        "During the {a} weeks the jar receives {b} dollars each week, that is {a} * {b} = {ab} dollars. {middle} "
        "Together with the present of {c} dollars the jar holds {ab} + {c} = {sum} dollars, and the price is just as "
        "high. {closing} The price is {sum} dollars.",
        "The present covers {c} dollars of the price. All the rest, {ab} dollars, comes from equal weekly amounts of "
        "{b}, paid {a} times. Adding up gives a price of {sum} dollars.",
    ),
)
WORDS = {
    "name": "Amara|Bruno|Chiara|Dmitri|Elif|Farid|Greta|Hugo|Ines|Jonas|Kwame|Lena|Milan|Noor|Omar|Paula",
    "place": "bakery|library|workshop|garden|museum|theatre|market|harbour|office|school",
    "thing": "apples|lamps|pencils|candles|bottles|baskets|shirts|books|cups|kites",
    "opening": "It is a busy season for everybody in the town.|"
    "The weather has been fine since the beginning of spring.|"
    "Nobody expected that so much would change within a year.|All of this was written down carefully in a notebook.|"
    "Two friends help whenever they find the time.",
    "middle": "This is the part that does not depend on anything else.|"
    "It is a good habit to write such a result down before going on.|So much for the larger part of the calculation.|"
    "Nothing has been taken away or added so far.",
    "closing": "A quick estimate shows that this is plausible.|No further step is necessary here.|"
    "We can check the result by calculating in the opposite direction.|This agrees with what one would expect.",
}
"""What templates are filled with."""


def exercise(draw: random.Random, serial: int) -> Exercise:
    """One of its own: no two serial numbers, of which there are millions, give the same three numbers."""
    template = TEMPLATES[serial % len(TEMPLATES)]
    words = drawn_words(draw)
    return filled(template, words, serial)


def drawn_words(draw: random.Random) -> dict[str, str]:
    return {slot: draw.choice(some.split("|")) for slot, some in WORDS.items()}


def filled(template: Exercise, words: dict[str, str], serial: int) -> Exercise:
    """A template with its words and the numbers of a serial number."""
    rest, place = divmod(serial, 89)
    c, b = divmod(rest, 97)
    a, b, c = place + 5, b + 7, c + 2
    numbers = {"a": a, "b": b, "c": c, "ab": a * b, "left": a * b - c, "sum": a * b + c}
    numbers |= {"bc": b + c, "all": a * b + b + c}
    return Exercise(*(text.format(**words, **numbers) for text in template))


# Cases


class Case(NamedTuple):
    """A row, and what must become of it."""

    kind: str
    fate: str
    """The stage that drops it, or "kept"."""
    question: str
    answer: str
    left: str = ""
    """What the preparation must make of the answer; empty if that is not looked at."""
    source: str = ""
    """Where it has to stand; empty for any."""
    group: int = -1
    """Equal for rows of which the first one, or CAP of them, stay."""
    trace: str = ""
    """Of a source that has a column for it."""


class Makings(NamedTuple):
    """What cases are made from."""

    draw: random.Random
    serials: Iterator[int]
    questions: list[str]
    """Of benchmarks, long enough to be looked for within texts."""
    short: list[str]
    """The others."""

    def exercise(self) -> Exercise:
        """A new one."""
        return exercise(self.draw, next(self.serials))

    def leak(self, pattern: str = "") -> str:
        """A question of a benchmark that has the pattern."""
        return self.draw.choice([question for question in self.questions if re.search(pattern, question)])


Maker = Callable[[str, Makings], list[Case]]


def plain(kind: str, makings: Makings) -> list[Case]:
    """Nothing special."""
    made = makings.exercise()
    return [Case(kind, "kept", made.question, made.answer, left=made.answer)]


def copies(fate: str, change: Callable[[random.Random, Exercise], Exercise]) -> Maker:
    """An exercise, and the same after a change, which is dropped; whichever comes first is kept."""

    def make(kind: str, makings: Makings) -> list[Case]:
        made = makings.exercise()
        group = next(makings.serials)
        changed = change(makings.draw, made)
        return [Case(kind, fate, x.question, x.answer, group=group) for x in (made, changed)]

    return make


def across(kind: str, makings: Makings) -> list[Case]:
    """The same row in two sources."""
    first, second = copies("exact", lambda draw, made: made)(kind, makings)
    return [first._replace(source="pairs"), second._replace(source="columns")]


def repunctuated(draw: random.Random, made: Exercise) -> Exercise:
    """Another case, other punctuation, other white space."""
    question = made.question.replace(", ", "  ").replace("?", " ?!").upper()
    return made._replace(question=question, answer="\n".join(made.answer.replace(". ", " ; ").split(" ")))


def reworded(count: int) -> Callable[[random.Random, Exercise], Exercise]:
    """Some words of the question changed."""

    def change(draw: random.Random, made: Exercise) -> Exercise:
        words = made.question.split(" ")
        places = [i for i, word in enumerate(words) if word.isalpha() and len(word) > 4 and word.islower()]
        for place in draw.sample(places, count):
            words[place] = draw.choice(("certain", "usual", "simply", "ordinary"))
        return made._replace(question=" ".join(words))

    return change


def longer(draw: random.Random, made: Exercise) -> Exercise:
    """A sentence more."""
    return made._replace(answer=made.answer + " I hope that this explanation was helpful.")


def other_numbers(kind: str, makings: Makings) -> list[Case]:
    """The same words with other numbers."""
    serial = next(makings.serials)
    words = drawn_words(makings.draw)
    template = TEMPLATES[serial % len(TEMPLATES)]
    both = (filled(template, words, serial), filled(template, words, next(makings.serials)))
    return [Case(kind, "kept", made.question, made.answer) for made in both]


def other_solution(kind: str, makings: Makings) -> list[Case]:
    """The same question with two right solutions."""
    made = makings.exercise()
    return [Case(kind, "kept", made.question, answer) for answer in (made.answer, made.other)]


def opposite(kind: str, makings: Makings) -> list[Case]:
    """One operator, and so another result."""
    n, m = (next(makings.serials) + 1000 for _ in range(2))
    question = f"{WORDS['name'][n % 16]} writes two numbers on the board of the classroom. The result of {n} {{}} {m}?"
    answer = "We do as the question says and look at the numbers once more. The result is {}."
    return [
        Case(kind, "kept", question.format(sign), answer.format(result))
        for sign, result in (("+", n + m), ("*", n * m))
    ]


def many_answers(kind: str, makings: Makings) -> list[Case]:
    """A question with more answers than it needs."""
    question = makings.exercise().question
    group = next(makings.serials)
    return [Case(kind, "answers", question, makings.exercise().answer, group=group) for _ in range(CAP + 8)]


def leaks(fate: str, change: Callable[[random.Random, str], str], pattern: str = "") -> Maker:
    """A benchmark's question, changed, as the question of a row."""

    def make(kind: str, makings: Makings) -> list[Case]:
        question = makings.leak(pattern)
        return [Case(kind, fate, change(makings.draw, question), makings.exercise().answer)]

    return make


def embedded(draw: random.Random, question: str) -> str:
    """In a longer text."""
    return (
        "You are a patient teacher of mathematics, and I am a student who prepares for an exam. Here is an exercise "
        f"from the last lesson that I could not solve alone. {question} Please explain each of your steps, tell me "
        "which theorem you use, and put the result at the end of your explanation."
    )


def respaced(draw: random.Random, question: str) -> str:
    """LaTeX that is set in another way."""
    question = re.sub(r"\$([^$]+)\$", r"\\( \1 \\)", question).replace(r"\frac{", r"\dfrac{").replace(r"\left", "")
    return re.sub(r"([{}^=+])", r" \1 ", question.replace(r"\right", ""))


def broken(draw: random.Random, question: str) -> str:
    """Over short lines."""
    return "\n".join(textwrap.wrap(question, 24))


def numbered(draw: random.Random, question: str) -> str:
    """Over short lines with numbers before them."""
    return "\n".join(f"{i} {line}" for i, line in enumerate(textwrap.wrap(question, 24), start=1))


def renumbered(draw: random.Random, question: str) -> str:
    """All its numbers changed."""
    return re.sub(r"\d+", lambda match: str(int(match[0]) + 11), question)


def in_response(kind: str, makings: Makings) -> list[Case]:
    """The question stands in the answer."""
    made = makings.exercise()
    return [Case(kind, "leak", made.question, f"{made.answer} A similar exercise for you: {makings.leak()}")]


def short_leak(change: Callable[[random.Random, str], str]) -> Maker:
    """A question of very few words."""

    def make(kind: str, makings: Makings) -> list[Case]:
        question = change(makings.draw, makings.draw.choice(makings.short))
        return [Case(kind, "leak", question, makings.exercise().answer)]

    return make


def formula_bait(kind: str, makings: Makings) -> list[Case]:
    """The formulas of a benchmark's question in another one."""
    formulas = re.findall(r"\$[^$]{12,}\$", makings.leak(r"\$[^$]{12,}\$"))
    made = makings.exercise()
    return [Case(kind, "kept", f"{made.question} On the way home they talk about {formulas[0]}.", made.answer)]


def identity_bait(kind: str, makings: Makings) -> list[Case]:
    """Formulas that everybody writes."""
    identities = (
        r"$x = \frac{-b \pm \sqrt{b^2 - 4ac}}{2a}$",
        r"$\sin^2 \theta + \cos^2 \theta = 1$",
        r"$1 + 2 + \dots + n = \frac{n(n+1)}{2}$",
        r"$\log_b a = \frac{\ln a}{\ln b}$",
    )
    made = makings.exercise()
    return [Case(kind, "kept", made.question, f"Remember {' and '.join(identities)}. {made.answer}")]


def template_bait(kind: str, makings: Makings) -> list[Case]:
    """The last sentence of a benchmark's question after another story."""
    made = makings.exercise()
    story = made.question.rpartition(". ")[0]
    sentences = re.split(r"(?<=[.?!])\s+", makings.leak(r"[.?!]\s+\S"))
    return [Case(kind, "kept", f"{story}. {sentences[-1]}", made.answer)]


def traced(fate: str, layout: str, source: str = "chat") -> Maker:
    """An answer with a trace, as `layout` says."""

    def make(kind: str, makings: Makings) -> list[Case]:
        made = makings.exercise()
        trace = f"Okay, let me see. {made.other} Wait, maybe not. Let me check that again."
        answer = layout.format(trace=trace, answer=made.answer)
        return [Case(kind, fate, made.question, answer, left=made.answer if fate == "kept" else "", source=source)]

    return make


def quoted(kind: str, makings: Makings) -> list[Case]:
    """A mark that is only spoken of."""
    made = makings.exercise()
    answer = f"{made.answer} Some models write `<think>` before and `</think>` after their notes."
    return [Case(kind, "kept", made.question, answer, left=answer, source="chat")]


def column(kind: str, makings: Makings) -> list[Case]:
    """A trace in a column of its own."""
    made = makings.exercise()
    return [Case(kind, "kept", made.question, made.answer, made.answer, "columns", trace=f"Hmm. {made.other}")]


def proof(fate: str, answer: str) -> Maker:
    """A question that asks for a proof."""

    def make(kind: str, makings: Makings) -> list[Case]:
        n, m = next(makings.serials) + 3, makings.draw.randrange(100, 999)
        statement = f"the number {n} + {m} is larger than {n} whenever both of its parts are positive integers"
        return [Case(kind, fate, f"Prove that {statement}.", answer.format(statement=statement, n=n, m=m))]

    return make


def damaged(fate: str, change: Callable[[random.Random, str], str], source: str = "") -> Maker:
    """An answer with a fault. If it is kept, it has to come out whole."""

    def make(kind: str, makings: Makings) -> list[Case]:
        made = makings.exercise()
        whole = f"Let α ≥ β, and see $\\frac{{1}}{{2}}$ of it — ‘half’. {made.answer}"
        left = whole if fate == "kept" else ""
        return [Case(kind, fate, made.question, change(makings.draw, whole), left, source)]

    return make


def short_answer(kind: str, makings: Makings) -> list[Case]:
    """Little, and enough."""
    made = makings.exercise()
    answers = ("No solution", "x", "0", "True", "It is $5 off.", "(A)", "n", "\\emptyset", "-3 < x")
    return [Case(kind, "kept", made.question, makings.draw.choice(answers))]


def encoded(draw: random.Random, answer: str) -> str:
    """Bytes as letters."""
    return f"data:image/png;base64,{base64.b64encode(draw.randbytes(600)).decode()}"


KINDS: dict[str, tuple[float, Maker]] = {
    "exact: verbatim": (8, copies("exact", lambda draw, made: made)),
    "exact: verbatim, across sources": (8, across),
    "exact: case, punctuation, space": (8, copies("exact", repunctuated)),
    "near: one word": (8, copies("near", reworded(1))),
    "near: two words": (8, copies("near", reworded(2))),
    "near: one more sentence": (8, copies("near", longer)),
    "no duplicate: other numbers": (8, other_numbers),
    "no duplicate: other solution": (8, other_solution),
    "no duplicate: other operator": (4, opposite),
    "answers: 8 too many": (0.1, many_answers),
    "leak: verbatim": (1, leaks("leak", lambda draw, text: text)),
    "leak: upper case": (1, leaks("leak", lambda draw, text: text.upper(), r"^[^\\]*$")),
    "leak: LaTeX set otherwise": (1, leaks("leak", respaced, r"\$.*\\")),
    "leak: in a longer question": (1, leaks("leak", embedded)),
    "leak: in the answer": (1, in_response),
    "leak: over short lines": (1, leaks("leak", broken)),
    "leak: over numbered lines" + KNOWN: (1, leaks("leak", numbered)),
    "leak: of few words, verbatim": (0.5, short_leak(lambda draw, text: text)),
    "leak: of few words, in a longer question" + KNOWN: (0.5, short_leak(embedded)),
    "no leak: other numbers": (1, leaks("kept", renumbered, r"\d")),
    "no leak: well-known formulas": (1, identity_bait),
    "no leak: formula of a question" + KNOWN: (1, formula_bait),
    "no leak: last sentence of a question" + KNOWN: (1, template_bait),
    "trace: block": (5, traced("kept", "<think>\n{trace}\n</think>\n\n{answer}")),
    "trace: nested": (3, traced("kept", "<think>{trace} <think>{trace}</think> So.</think>{answer}")),
    "trace: not opened": (3, traced("kept", "{trace}\n</think>\n{answer}")),
    "trace: other case and space": (2, traced("kept", "< THINK >{trace}</ Think >{answer}")),
    "trace: not closed": (3, traced("strip", "<think>{trace} {answer}")),
    "trace: nothing else": (3, traced("strip", "<think>{trace} {answer}</think>  ")),
    "trace: only spoken of": (2, quoted),
    "trace: in a column": (3, column),
    "proof: a short answer": (2, proof("strip", "{n} + {m} > {n}")),
    "proof: the statement again": (2, proof("strip", "{statement}.")),
    "proof: with a proof": (
        2,
        proof(
            "kept", "Both parts are positive, so {m} > 0. Adding {n} on both sides of this inequality yields the claim."
        ),
    ),
    "text: wrong encoding": (3, damaged("kept", lambda draw, text: text.encode().decode("cp1252"))),
    "text: control characters": (2, damaged("kept", lambda draw, text: text.replace("\\frac", "\frac"))),
    "text: invisible characters": (2, damaged("kept", lambda draw, text: text.replace(" of ", " \u200bof\ufeff "))),
    "text: white space": (2, damaged("kept", lambda draw, text: f"\r\n {text}\xa0\r\n\n\n\n")),
    "text: lost signs": (2, damaged("clean", lambda draw, text: text.replace("e", "\ufffd", 3))),
    "text: empty answer": (2, damaged("clean", lambda draw, text: " \n", "pairs")),
    "text: a placeholder": (
        2,
        damaged("clean", lambda draw, text: draw.choice(("N/A", "See solution.", "None", "TBD"))),
    ),
    "text: cut off": (2, damaged("clean", lambda draw, text: f"{text} Therefore it is \\boxed{{")),
    "text: cut off at a sign": (2, damaged("clean", lambda draw, text: f"{text} Hence we obtain y =")),
    "text: too long": (0.5, damaged("clean", lambda draw, text: f"{text} " * 200)),
    "text: bytes as letters": (1, damaged("clean", encoded)),
    "text: signs only": (1, damaged("clean", lambda draw, text: "#-=|" * 40)),
    "text: a short answer": (3, short_answer),
}
"""Cases: how many of a thousand are of this kind, and how they are made. All others are plain."""


def cases(rows: int, questions: Sequence[str], seed: int) -> Iterator[Case]:
    """So many rows, or a few more."""
    short = [text for text in questions if len(tokens_of(text)) < LONG_TOKENS]
    long = [text for text in questions if len(tokens_of(text)) >= LONG_TOKENS]
    makings = Makings(random.Random(seed), itertools.count(), long, short)
    shares = {"plain": 1000 - sum(share for share, _ in KINDS.values())} | {k: share for k, (share, _) in KINDS.items()}
    kinds, weights = list(shares), list(itertools.accumulate(shares.values()))
    count = 0
    while count < rows:
        [kind] = makings.draw.choices(kinds, cum_weights=weights)
        made = plain(kind, makings) if kind == "plain" else KINDS[kind][1](kind, makings)
        count += len(made)
        yield from made


def benchmark_questions(data: Path) -> list[str]:
    """Those of GSM8K, MATH-500 and MMLU's mathematics."""
    lines = [("gsm8k/test.jsonl", "question"), ("math/math500.jsonl", "problem")]
    questions = [json.loads(line)[field] for name, field in lines for line in (data / name).open(encoding="utf-8")]
    for path in sorted((data / "mmlu_math").glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            questions += [cells[0] for cells in csv.reader(file)]
    return questions


# Files


def make(raw: Path, rows: int, data: Path, seed: int) -> None:
    """Write the planted sets and their key, beside a link to the real data."""
    shutil.rmtree(raw, ignore_errors=True)
    for folder in (*FILES, "key"):
        (raw / folder).mkdir(parents=True)
    (raw / "data").symlink_to(data.resolve())
    draw = random.Random(seed + 1)
    paths = [raw / source / f"{name}.draft" for source, names in FILES.items() for name in names]
    drafts = {path: path.open("w", encoding="utf-8") for path in paths}
    keys = {path: key_path(raw, path.parent.name, path.stem).open("w", encoding="utf-8") for path in paths}
    for case in cases(rows, benchmark_questions(data), seed):
        path = draw.choice([path for path in paths if case.source in ("", path.parent.name)])
        drafts[path].write(json.dumps(laid_out(case, path.parent.name)) + "\n")
        keys[path].write(json.dumps([case.kind, case.fate, case.left, case.group]) + "\n")
    for file in (*drafts.values(), *keys.values()):
        file.close()
    for path in paths:
        convert(path, path.with_suffix(""))
        path.unlink()


def key_path(raw: Path, source: str, name: str) -> Path:
    return raw / "key" / f"{source}-{name}.jsonl"


def laid_out(case: Case, source: str) -> dict[str, Any]:
    """The row as its source has it."""
    if source == "chat":
        turns = (("system", "You solve exercises."), ("user", case.question), ("assistant", case.answer))
        return {"messages": [{"role": role, "content": content} for role, content in turns]}
    if source == "columns":
        return {"problem": case.question, "message_thinking": case.trace, "message_content": case.answer}
    return {"question": case.question, "answer": case.answer}


def convert(lines: Path, path: Path) -> None:
    """JSON lines as the kind of file that the name says."""
    if path.suffix == ".gz":
        with lines.open("rb") as source, gzip.open(path, "wb", compresslevel=1) as target:
            shutil.copyfileobj(source, target)
    elif path.suffix == ".parquet":
        write_parquet(lines, path)
    elif path.suffix == ".json":
        with lines.open(encoding="utf-8") as source, path.open("w", encoding="utf-8") as target:
            target.write("[\n")
            target.writelines(f"{', ' if number else ''}{line}" for number, line in enumerate(source))
            target.write("]\n")
    else:
        shutil.copyfile(lines, path)


def write_parquet(lines: Path, path: Path) -> None:
    with lines.open(encoding="utf-8") as source:
        parts = iter(lambda: [json.loads(line) for line in itertools.islice(source, 8192)], [])
        tables = map(pa.Table.from_pylist, parts)
        first = next(tables)
        with pq.ParquetWriter(path, first.schema) as writer:
            for table in itertools.chain([first], tables):
                writer.write_table(table)


# The score


class Keyed(NamedTuple):
    """The key, as columns in the order of the ranks."""

    ranks: np.ndarray
    kinds: np.ndarray
    fates: np.ndarray
    left: np.ndarray


def key_of(raw: Path) -> Keyed:
    """What must become of each row, by its rank."""
    ranks: list[int] = []
    lines: list[Any] = []
    for place, source in enumerate(get_config().sources):
        if source.name not in FILES:
            continue
        for group in groups_of(files_of(source, raw)):
            found = [json.loads(x) for path in group.paths for x in key_path(raw, source.name, path.name).open()]
            first = (place << RANK_BITS) + (group.number << ROW_BITS)
            ranks += range(first, first + len(found))
            lines += found
    kinds, fates, left, groups = zip(*lines, strict=True)
    return Keyed(np.array(ranks), np.array(kinds, object), first_stay(fates, groups), np.array(left, object))


def first_stay(fates: Sequence[str], groups: Sequence[int]) -> np.ndarray:
    """The fates of rows in the order of their ranks: of each group, the first is kept, or the first CAP are."""
    seen: dict[int, int] = defaultdict(int)
    found = []
    for fate, group in zip(fates, groups, strict=True):
        stays = group >= 0 and seen[group] < (CAP if fate == "answers" else 1)
        seen[group] += 1
        found.append("kept" if stays else fate)
    return np.array(found, object)


def ranks_in(folder: Path, pattern: str) -> np.ndarray:
    """All ranks in the shards of a stage."""
    paths = sorted(folder.glob(pattern))
    return np.concatenate([np.zeros(0, np.int64), *(pq.read_table(p, columns=["rank"])["rank"] for p in paths)])


def actual_fates(work: Path, ranks: np.ndarray) -> np.ndarray:
    """The stage that dropped each row; "held out" for those of validation, "kept" for the others."""

    def among(stage: str, pattern: str) -> np.ndarray:
        return np.isin(ranks, ranks_in(work / stage, pattern))

    dropped = {kind: among("duplicates", f"{kind}.parquet") for kind in ("exact", "near", "answers")}
    tests = {
        "read": ~among("read", "*/*.parquet"),
        "strip": ~among("strip", "*/*.parquet"),
        "clean": ~among("clean", "*/*.parquet"),
        **dropped,
        "held out": ~among("unique", "*/*.train.parquet"),
        "leak": ~among("decontaminate", "*/*.parquet"),
    }
    return np.select(list(tests.values()), list(tests), "kept").astype(object)


def texts_differ(work: Path, key: Keyed) -> np.ndarray:
    """Whether an answer that is kept is another than the key's."""
    wanted = {rank: text for rank, text in zip(key.ranks.tolist(), key.left, strict=True) if text}
    differ = set()
    for path in sorted((work / "decontaminate").glob("*/*.parquet")):
        if not path.name.endswith(".hits.parquet"):
            table = pq.read_table(path, columns=["rank", "response"])
            for rank, text in zip(table["rank"].to_pylist(), table["response"].to_pylist(), strict=True):
                if wanted.get(rank, text).split() != text.split():
                    differ.add(rank)
    return np.isin(key.ranks, np.array(sorted(differ), np.int64))


def score(raw: Path, out: Path) -> str:
    """Two tables in Markdown: recall and precision of each stage, and what became of each kind."""
    key = key_of(raw)
    found = actual_fates(out / "work", key.ranks)
    found[(found == "kept") & texts_differ(out / "work", key)] = "another text"
    counted = found != "held out"
    known = np.array([kind.endswith(KNOWN) for kind in key.kinds])
    lines = [
        "| stage | rows to drop | dropped | recall | precision | precision with known cases |",
        "|---|---|---|---|---|---|",
    ]
    for stage in STAGES:
        lines.append(stage_line(stage, key.fates, found, counted & ~known, counted))
    lines += ["", "| kind | rows | as it should be | else |", "|---|---|---|---|"]
    for kind in ("plain", *KINDS):
        lines.append(kind_line(kind, key, found, (key.kinds == kind) & counted))
    return "\n".join(lines)


def stage_line(stage: str, wanted: np.ndarray, found: np.ndarray, judged: np.ndarray, counted: np.ndarray) -> str:
    def precision(rows: np.ndarray) -> str:
        dropped = rows & (found == stage)
        return share((dropped & (wanted == stage)).sum(), dropped.sum())

    to_drop, dropped = judged & (wanted == stage), judged & (found == stage)
    recall = share((to_drop & dropped).sum(), to_drop.sum())
    return (
        f"| {stage} | {to_drop.sum():,} | {dropped.sum():,} | {recall} | {precision(judged)} | {precision(counted)} |"
    )


def kind_line(kind: str, key: Keyed, found: np.ndarray, rows: np.ndarray) -> str:
    right = rows & (found == key.fates)
    fates, numbers = np.unique(found[rows & ~right].astype(str), return_counts=True)
    others = ", ".join(f"{fate} {number:,}" for fate, number in zip(fates, numbers, strict=True))
    return f"| {kind} | {rows.sum():,} | {share(right.sum(), rows.sum())} | {others} |"


def share(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else "-"


# Killed and resumed


RECORDS = "*/*[0-9].json"
MIDDLES = (
    *((stage, RECORDS) for stage in ("read", "strip", "clean", "keys")),
    *(("duplicates", before) for before in ("", "exact.json", "near.json")),
    ("choose", ""),
    ("unique", RECORDS),
    ("questions", ""),
    ("decontaminate", RECORDS),
    ("tokenizer", ""),
    ("documents", RECORDS),
    ("packing", RECORDS),
)
"""A stage is in its middle when something is begun in its folder, and a file of this name is there already."""
RESULTS = ("report.json", "manifest.json", "decontamination.jsonl")


def kill(raw: Path, out: Path, like: Path, more: Sequence[str]) -> bool:
    """Prepare, killed in each stage; whether the result is that of `like`."""
    shutil.rmtree(out, ignore_errors=True)
    arguments = ("--root", str(raw), "--decontaminate.root", str(raw / "data"), "--out", str(out), *more)
    command = [sys.executable, "-m", "dreamer_jax.prepare", "--config", __file__, *arguments]
    for stage, before in MIDDLES:
        print(f"{stage}: {killed_in(command, out / 'work' / stage, before)}", flush=True)
    started = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    print(f"then to the end in {time.monotonic() - started:.0f} s")
    same = [digest(out / name) == digest(like / name) for name in RESULTS]
    print(f"the same as uninterrupted: {dict(zip(RESULTS, same, strict=True))}")
    return all(same)


def killed_in(command: Sequence[str], folder: Path, before: str) -> str:
    """Start, and kill all processes in the middle of the stage in a folder."""
    left = set(folder.glob("**/.draft-*"))
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        begun = set(folder.glob("**/.draft-*")) - left
        done = len(list(folder.glob(before))) if before else 0
        if begun and bool(done) == bool(before):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"killed with {done} finished and {len(begun)} begun"
        time.sleep(0.001)
    return f"NOT killed: ended with {process.returncode}"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("raw", type=Path)
    parser.add_argument("--make", type=int, metavar="ROWS")
    parser.add_argument("--data", type=Path, help="folder of the benchmarks and of the real sets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--score", type=Path, metavar="OUT")
    parser.add_argument("--kill", type=Path, metavar="OUT")
    parser.add_argument("--like", type=Path, help="result of an uninterrupted run")
    known, more = parser.parse_known_args()
    if known.make:
        make(known.raw, known.make, known.data, known.seed)
    if known.score:
        print(score(known.raw, known.score))
    return 0 if not known.kill or kill(known.raw, known.kill, known.like, more) else 1


if __name__ == "__main__":
    sys.exit(main())
