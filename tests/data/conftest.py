"""Small synthetic sources, prepared once: short sums and longer stories, with texts made here."""

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from dreamer_jax.config import Config, DataConfig, ModelConfig, Source, TrainConfig
from dreamer_jax.data.builder import prepare
from dreamer_jax.data.prepared import Prepared

MARKS = r"<<[^<>]*>>"
NAMES = ("Ada", "Emmy", "Sophie", "Srinivasa", "Carl", "Leonhard", "Maryam", "Henri")


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sums(count: int, seed: int) -> list[dict[str, object]]:
    draw = random.Random(seed)
    pairs = [(seed * 100_000 + n, draw.randrange(1000)) for n in range(count)]
    return [{"question": f"What is {a} + {b}?", "answer": f"<<{a}+{b}={a + b}>>#### {a + b}"} for a, b in pairs]


def stories(count: int, seed: int) -> list[dict[str, object]]:
    draw = random.Random(seed)
    rows: list[dict[str, object]] = []
    for n in range(count):
        names = draw.choices(NAMES, k=draw.randrange(2, 9))
        rows.append({"problem": f"Story {seed}-{n}: " + " meets ".join(names), "solution": f"They are {len(names)}."})
    return rows


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Two sources, 3 to 1; `stories` has no validation files."""
    root = tmp_path_factory.mktemp("raw")
    write_jsonl(root / "sums/train.jsonl", sums(300, seed=1))
    write_jsonl(root / "sums/test.jsonl", sums(60, seed=2))
    write_jsonl(root / "stories.jsonl", stories(250, seed=3))
    sources = (
        Source("sums", weight=3.0, train=("sums/train.jsonl",), validation=("sums/test.jsonl",), remove=MARKS),
        Source("stories", train=("stories.jsonl",), prompt_field="problem", response_field="solution"),
    )
    prepared = str(tmp_path_factory.mktemp("prepared"))
    return Config(
        name="test",
        model=ModelConfig(vocab=420),
        data=DataConfig(sources=sources, root=str(root), prepared=prepared, context=128, prefetch=2),
        train=TrainConfig(batch=8, validation_batches=2, seed=5),
    )


@pytest.fixture(scope="session")
def prepared(config: Config) -> Prepared:
    return prepare(config)


@pytest.fixture
def one_source(tmp_path: Path) -> Callable[..., Config]:
    """A config of one source whose training file holds the given bytes or rows."""

    def make(content: bytes | list[dict[str, object]], **data: object) -> Config:
        root = tmp_path / "raw"
        write_jsonl(root / "test.jsonl", sums(20, seed=9))
        if isinstance(content, bytes):
            (root / "train.jsonl").write_bytes(content)
        else:
            write_jsonl(root / "train.jsonl", content)
        source = Source("sums", train=("train.jsonl",), validation=("test.jsonl",), remove=MARKS)
        base = DataConfig(sources=(source,), root=str(root), prepared=str(tmp_path / "prepared"), context=128)
        return Config(
            name="one",
            model=ModelConfig(vocab=320),
            data=dataclasses.replace(base, **data),
            train=TrainConfig(batch=4, validation_batches=2),
        )

    return make
