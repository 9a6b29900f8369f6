"""Three small raw sets of different kinds with planted faults, and the preparation of them that many tests look at.

    stories   JSON lines with columns, of which `verified` says what is kept
    chats     a gzipped JSON array of conversations with reasoning traces; some ask the questions of stories
    plain     Parquet of plain text; some of it contains questions of chats

All texts are random words and numbers, so that nothing but what is planted looks alike.
"""

import dataclasses
import gzip
import itertools
import json
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dreamer_jax.preparation.documents import Done, tokenize_shard
from dreamer_jax.preparation.pipeline import prepare
from dreamer_jax.preparation.recipe import (
    Benchmark,
    DecontaminateConfig,
    DuplicatesConfig,
    Keep,
    RawSource,
    Recipe,
    TokensConfig,
    WorkConfig,
)
from dreamer_jax.preparation.stage import ROWS, Row, rows, write

_WORDS = (
    "apple river stone cloud paper green window garden silver market orange letter bridge candle forest harbor island "
    "kitchen lantern meadow needle ocean pepper quiet rabbit saddle tunnel velvet winter yellow"
)
WORDS = _WORDS.split()
CONTEXT, ANSWERS, CAP = 256, 3, 25
"""Tokens of a row, answers of a question, rows of the plain text."""
ASKED = "How many of the {number} shelves does the {word} librarian fill?"


class Planted(NamedTuple):
    """What is hidden in the raw sets, as lists of questions or texts."""

    asked_often: str
    """It has five answers."""
    shared: list[str]
    """Questions of stories that chats answer otherwise."""
    copied: list[str]
    """Of them chats repeat the answers as well, in capitals."""
    almost: list[str]
    """Of them chats repeat the answers but for a word."""
    leaked: dict[str, list[str]]
    """Questions of stories that hold one of a benchmark, by how. There are some of each, as some are held out."""
    harmless: list[str]
    """Those with other numbers than the benchmark's."""


def sentence(rng: random.Random, words: int) -> str:
    """A sentence of words and numbers that no other sentence resembles."""
    return " ".join(str(rng.randrange(1000)) if i % 7 == 3 else rng.choice(WORDS) for i in range(words)) + "."


def write_jsonl(path: Path, lines: Iterable[dict[str, Any]]) -> Path:
    """A file of JSON lines; gzipped if its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_rows(path: Path, pairs: Iterable[tuple[str, str]], first: int = 0) -> Path:
    """A shard of questions and answers, whose ranks go up from `first`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, (Row(rank, *pair) for rank, pair in enumerate(pairs, start=first)), ROWS)
    return path


def shards(work: Path, stage: str, source: str = "", ending: str = "parquet") -> list[Path]:
    """The shards that a stage has made, in order."""
    return sorted((work / stage / source).rglob(f"*.{ending}"))


def rows_of(work: Path, stage: str, source: str = "", ending: str = "parquet") -> list[Row]:
    """The rows of a stage."""
    return [row for path in shards(work, stage, source, ending) for row in rows(path)]


def draft(tmp_path: Path) -> Path:
    """An empty folder for what a task makes."""
    made = tmp_path / f"draft-{len(list(tmp_path.glob('draft-*')))}"
    made.mkdir()
    return made


def _stories(rng: random.Random, benchmark: list[str]) -> tuple[list[dict[str, Any]], Planted]:
    pairs = [(sentence(rng, 22), sentence(rng, 30)) for _ in range(110)]
    asked_often = sentence(rng, 18)
    leaked = {
        "verbatim": benchmark[:4],
        "in capitals": [question.upper() for question in benchmark[4:8]],
        "embedded": [f"{sentence(rng, 6)} {question} {sentence(rng, 6)}" for question in benchmark[8:12]],
    }
    harmless = [question.replace("71", "91") for question in benchmark[12:]]
    pairs += [(asked_often, sentence(rng, 25)) for _ in range(5)]
    pairs += [(question, sentence(rng, 20)) for question in [*itertools.chain(*leaked.values()), *harmless]]
    pairs += [(sentence(rng, 15), sentence(rng, 250)) for _ in range(4)]  # longer than a row of tokens
    lines = [{"question": question, "answer": answer, "verified": True} for question, answer in pairs]
    lines += [{"question": sentence(rng, 15), "answer": sentence(rng, 15), "verified": False} for _ in range(7)]
    lines += [{"question": sentence(rng, 15), "answer": "n/a", "verified": True}]
    questions = [question for question, _ in pairs]
    return lines, Planted(asked_often, questions[:40], questions[40:45], questions[45:50], leaked, harmless)


def _chats(rng: random.Random, stories: dict[str, str], planted: Planted) -> list[dict[str, Any]]:
    pairs = [(question, sentence(rng, 30)) for question in planted.shared]
    pairs += [(sentence(rng, 20), sentence(rng, 25)) for _ in range(35)]
    pairs = [(question, f"<think>{sentence(rng, 9)}</think>\n{answer}") for question, answer in pairs]
    pairs += [(question, stories[question].upper()) for question in planted.copied]
    pairs += [(question, f"{stories[question][:-1]} altogether.") for question in planted.almost]
    pairs += [(sentence(rng, 15), f"<think>{sentence(rng, 9)}") for _ in range(3)]
    pairs += [("Prove that the sum of two odd numbers is even.", "It is even.")]
    return [{"turns": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in pairs]


def make_raw(folder: Path) -> Planted:
    """Write the raw sets and a benchmark."""
    rng = random.Random(5)
    benchmark = [ASKED.format(number=700 + n, word=word) for n, word in enumerate(WORDS[:16])]
    stories, planted = _stories(rng, benchmark)
    write_jsonl(folder / "stories/train.jsonl", stories)
    chats = _chats(rng, {line["question"]: line["answer"] for line in stories}, planted)
    (folder / "chats").mkdir()
    (folder / "chats/data.json.gz").write_bytes(gzip.compress(json.dumps(chats).encode()))
    questions = [line["turns"][0]["value"] for line in chats[:20]]
    texts = [f"{sentence(rng, 8)}\n{question}\n{sentence(rng, 8)}" for question in questions]
    texts += [sentence(rng, 30) for _ in range(40)] + [""]
    (folder / "plain").mkdir()
    pq.write_table(pa.table({"text": texts}), folder / "plain/train-00000.parquet")
    write_jsonl(folder / "bench/shelves.jsonl.gz", [{"question": question} for question in benchmark])
    return planted


def recipe_of(raw: Path, out: Path) -> Recipe:
    """The recipe for these sets."""
    return Recipe(
        sources=(
            RawSource(
                "stories",
                files=("stories/*.jsonl",),
                licence="MIT",
                prompt=("question",),
                response=("answer",),
                keep=(Keep("verified", ("true",)),),
                repeats=2.0,
                held_out=0.1,
            ),
            RawSource(
                "chats",
                files=("chats/*.gz",),
                licence="CC-BY-NC",
                commercial=False,
                turns="turns",
                traces="think",
                held_out=0.4,
                benchmark=True,
            ),
            RawSource("plain", hub="someone/plain", text="text", cap=CAP, gated=True, held_out=0.1),
        ),
        root=str(raw),
        out=str(out),
        duplicates=DuplicatesConfig(answers=ANSWERS),
        decontaminate=DecontaminateConfig(
            root=str(raw / "bench"), benchmarks=(Benchmark("shelves", ("*.jsonl.gz",), "question"),)
        ),
        tokens=TokensConfig(vocab=500, context=CONTEXT, budget=1),
        work=WorkConfig(workers=1, shard_rows=50),
    )


def changed(recipe: Recipe, **sections: Any) -> Recipe:
    """The recipe with other values, given as dicts for its sections."""
    values = {
        name: dataclasses.replace(getattr(recipe, name), **value) if isinstance(value, dict) else value
        for name, value in sections.items()
    }
    return dataclasses.replace(recipe, **values)


class Run(NamedTuple):
    """A preparation that is finished."""

    recipe: Recipe
    planted: Planted
    out: Path

    @property
    def work(self) -> Path:
        """The folder of the shards between the stages."""
        return self.out / "work"

    def questions(self, stage: str, source: str, ending: str = "parquet") -> list[str]:
        """The questions of a stage's rows; of plain text, the texts."""
        return [row.prompt or row.response for row in rows_of(self.work, stage, source, ending)]


def tokenize_and_die(draft: Path, shard: Path, *arguments: Any) -> Done:
    """Tokenize a shard; the process of one of them is then killed, with the files made but not yet in their places."""
    result = tokenize_shard(draft, shard, *arguments)
    if shard.as_posix().endswith("decontaminate/chats/00000.0001.parquet"):
        os._exit(9)
    return result


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The preparation, which no test may change."""
    raw, out = tmp_path_factory.mktemp("raw_sets"), tmp_path_factory.mktemp("prepared_sets")
    planted = make_raw(raw)
    recipe = recipe_of(raw, out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DAFT_PROGRESS_BAR", "0")
        prepare(recipe)
    return Run(recipe, planted, out)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No progress bars of daft."""
    monkeypatch.setenv("DAFT_PROGRESS_BAR", "0")
