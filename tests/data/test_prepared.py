"""Prepared data: shards that are the same every time, folders made of them, and what does not fit a run."""

import dataclasses
import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from dreamer_jax.config import Config, DataConfig, ModelConfig, Source
from dreamer_jax.data import dataset
from dreamer_jax.data import prepared as prepared_data
from dreamer_jax.data.builder import prepare
from dreamer_jax.data.loader import batches, rows
from dreamer_jax.data.prepared import (
    Shard,
    ShardReport,
    assemble,
    is_prepared,
    open_prepared,
    repack,
    write_shard,
)
from dreamer_jax.data.sources import DataError
from dreamer_jax.data.template import Template

VOCAB, UNKNOWN, CONTEXT = 50, 3, 32


class Letters:
    """A tokenizer of which nothing but its file and its size matters."""

    bos, eos, unknown, vocab_size = 1, 2, UNKNOWN, VOCAB

    def encode(self, text):
        raise AssertionError("nothing is tokenized here")

    def decode(self, ids):
        raise AssertionError("nothing is shown here")

    def save(self, directory):
        path = Path(directory) / "tokenizer.model"
        path.write_bytes(b"letters")
        return path


def documents(count: int, first: int = 0) -> list[tuple[list[int], int]]:
    """Documents of 3 to 18 tokens that tell where they come from by their second one."""
    return [
        ([1, 4 + n % 40, *[5 + n % 7] * (n * 5 % 20), 2], 2 if n * 5 % 20 else 1) for n in range(first, first + count)
    ]


def shard(folder: Path, stem: str, count: int, first: int = 0, context: int = CONTEXT) -> Shard:
    return Shard(folder, write_shard(folder, stem, documents(count, first), context))


def whole(tmp_path: Path, **changes: object) -> Path:
    """Prepared data of two sources: "a" in shards of 30, 0 and 20 training documents, "b" without held-out ones."""
    directory = tmp_path / "whole"
    directory.mkdir(exist_ok=True)
    a = [shard(tmp_path, "a0", 30), shard(tmp_path, "a1", 0), shard(tmp_path, "a2", 20, 30)]
    sources = {
        "a": {"train": a, "validation": [shard(tmp_path, "av", 9, 100)]},
        "b": {"train": [shard(tmp_path, "b0", 7)], "validation": []},
    }
    given = {"key": "abc", "weights": {"a": 3.0, "b": 1.0}, "details": {"a": {"skipped": {"too bad": 2}}}} | changes
    assemble(directory, sources, Letters(), **given)
    return directory


def a_run(directory: Path, vocab: int = VOCAB, **data: object) -> Config:
    given = {"prepared": str(directory), "context": CONTEXT} | data
    return Config(name="run", model=ModelConfig(vocab=vocab), data=DataConfig(**given))


# Shards.


def test_the_same_documents_give_the_same_files(tmp_path: Path):
    reports = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        reports.append(write_shard(folder, "x", iter(documents(50)), CONTEXT))
    assert reports[0] == reports[1]
    for suffix in (".array_record", ".lengths.npy", ".unigrams.npy", ".packing.npy"):
        content = (tmp_path / "one" / f"x{suffix}").read_bytes()
        assert content == (tmp_path / "two" / f"x{suffix}").read_bytes()
        assert reports[0].files[suffix]["bytes"] == len(content)
    assert ShardReport(**json.loads(json.dumps(reports[0]._asdict()))) == reports[0]


def test_a_shard_holds_its_documents_and_counts_them(tmp_path: Path):
    report = write_shard(tmp_path, "x", documents(50), context=16)
    stored = dataset.Documents(tmp_path / "x.array_record")
    assert len(stored) == report.documents == 50
    for number, (tokens, response_start) in enumerate(documents(50)):
        assert stored[number]["tokens"].tolist() == tokens
        assert stored[number]["response_start"] == response_start
        assert dataset.is_whole(stored[number])
    lengths = [len(tokens) for tokens, _ in documents(50)]
    assert np.load(tmp_path / "x.lengths.npy").tolist() == lengths
    assert report.tokens == sum(lengths)
    assert report.packed_documents == sum(length <= 16 for length in lengths) < 50
    assert report.packed_tokens == sum(length for length in lengths if length <= 16)


@pytest.mark.parametrize("few", [1, 30, 1 << 20])
def test_targets_are_counted_apart_in_prompts_and_responses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: int):
    monkeypatch.setattr(prepared_data, "FEW", few)
    write_shard(tmp_path, "x", [([1, 7, 8, 7, 2], 3), ([9, 8, 2], 0), ([1, 40, 2], 2)], CONTEXT)
    ids, prompts, responses = np.load(tmp_path / "x.unigrams.npy")
    assert ids.tolist() == [2, 7, 8, 40]
    assert prompts.tolist() == [0, 1, 1, 1]
    assert responses.tolist() == [3, 1, 1, 0]  # never the first token, which follows nothing


def test_what_is_given_within_a_response_counts_as_prompt(tmp_path: Path):
    tokens = [1, 7, 8, ~7, 9, ~7, ~8, 9, 2]
    report = write_shard(tmp_path, "x", [(tokens, 2)], CONTEXT)
    ids, prompts, responses = np.load(tmp_path / "x.unigrams.npy")
    assert ids.tolist() == [2, 7, 8, 9]
    assert prompts.tolist() == [0, 3, 1, 0]
    assert responses.tolist() == [1, 0, 1, 2]
    assert (report.tokens, report.packed_tokens) == (9, 9)
    stored = dataset.Documents(tmp_path / "x.array_record")[0]
    assert stored["tokens"].tolist() == tokens
    assert dataset.is_whole(stored)


def test_a_shard_is_packed_anew_for_another_context_from_its_lengths_alone(tmp_path: Path):
    report = write_shard(tmp_path, "x", documents(50), CONTEXT)
    (tmp_path / "x.array_record").unlink()
    again = repack(tmp_path, report, 16)
    (tmp_path / "other").mkdir()
    assert again == write_shard(tmp_path / "other", "x", documents(50), 16)
    assert again.rows != report.rows
    (tmp_path / "x.lengths.npy").write_bytes(b"other")
    with pytest.raises(DataError, match=r"x\.lengths\.npy' has changed since it was written"):
        repack(tmp_path, report, 16)


def test_packing_anew_leaves_a_folder_made_before_as_it_is(tmp_path: Path):
    directory = whole(tmp_path)
    packing = directory / "b" / "train-00000.packing.npy"
    before = packing.read_bytes()
    report = write_shard(tmp_path, "b0", documents(7), CONTEXT)
    repack(tmp_path, report, 16)
    assert packing.read_bytes() == before
    assert open_prepared(directory, a_run(directory)).key == "abc"


def test_an_error_of_the_writer_of_records_that_is_none_of_the_disk_stays_what_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    said = ["Failed to write: write() failed: No space left on device; writing /x; Failed to close", "a bug"]
    for text, kind in zip(said, (OSError, RuntimeError), strict=True):

        class Refusing:
            def __init__(self, *_: object, text: str = text):
                raise RuntimeError(text)

        monkeypatch.setattr(dataset, "ArrayRecordWriter", Refusing)
        with pytest.raises(kind, match=r"^No space left on device$|^a bug$"):
            write_shard(tmp_path, "x", documents(1), CONTEXT)


def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path):
    draw = np.random.default_rng(0)
    with pytest.raises(OSError, match="No space left on device"):
        dataset.write_documents(Path("/dev/full"), ((draw.integers(0, 2**30, 1000), 0) for _ in range(300)))


# Folders.


def test_a_folder_is_a_dataset_of_all_its_shards_in_their_order(tmp_path: Path):
    directory = whole(tmp_path)
    names = sorted(path.name for path in (directory / "a/1.0.0").iterdir())
    assert names == [
        "a-train.array_record-00000-of-00002",
        "a-train.array_record-00001-of-00002",
        "a-validation.array_record-00000-of-00001",
        "dataset_info.json",
        "features.json",
    ]
    builder = tfds.builder_from_directory(directory / "a/1.0.0")
    assert builder.info.splits["train"].shard_lengths == [30, 20]
    found = [stored["tokens"].tolist() for stored in builder.as_data_source(split="train")]
    assert found == [tokens for tokens, _ in documents(50)]
    assert list(tfds.builder_from_directory(directory / "b/1.0.0").info.splits) == ["train"]


def test_the_report_says_what_is_there(tmp_path: Path):
    directory = whole(tmp_path, special_tokens=("<s>",))
    report = json.loads((directory / "report.json").read_text())
    part = report["sources"]["a"]["train"]
    lengths = [len(tokens) for tokens, _ in documents(50)]
    assert (part["documents"], part["tokens"], part["too_long"]) == (50, sum(lengths), 0)
    assert part["fill"] == sum(lengths) / (part["rows"] * CONTEXT)
    assert part["shards"]["documents"] == [30, 20]
    assert sum(part["shards"]["rows"]) == part["rows"]
    assert (report["key"], report["context"], report["vocab"]) == ("abc", CONTEXT, VOCAB)
    assert (report["special_tokens"], report["weights"]) == (["<s>"], {"a": 3.0, "b": 1.0})
    assert report["sources"]["a"]["skipped"] == {"too bad": 2}
    assert report["sources"]["b"]["validation"]["rows"] == 0
    on_disk = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    assert set(report["files"]) == on_disk - {"report.json"}


def test_unknown_tokens_are_counted_in_both_splits(tmp_path: Path):
    sources = {
        "a": {
            split: [Shard(tmp_path, write_shard(tmp_path, split, [([1, UNKNOWN, 9, UNKNOWN, 2], 2)] * n, CONTEXT))]
            for split, n in (("train", 3), ("validation", 1))
        }
    }
    report = assemble(tmp_path, sources, Letters(), key="k", weights={"a": 1.0})
    assert report["sources"]["a"]["unknown"] == 8


def test_a_folder_has_no_report_until_all_else_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    directory = whole(tmp_path)
    assert is_prepared(directory)
    assert not is_prepared(tmp_path)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr(dataset, "write_description", killed)
        with pytest.raises(KeyboardInterrupt):
            whole(tmp_path)
    assert not is_prepared(directory)
    whole(tmp_path)
    assert is_prepared(directory)


def test_the_same_shards_give_the_same_report(tmp_path: Path):
    first = (whole(tmp_path) / "report.json").read_bytes()
    shutil.rmtree(tmp_path / "whole")
    assert (whole(tmp_path) / "report.json").read_bytes() == first


def test_shards_are_copied_where_they_cannot_be_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError("another file system")

    monkeypatch.setattr(os, "link", refuse)
    directory = whole(tmp_path)
    assert open_prepared(directory, a_run(directory)).splits["a"] == {"train": 50, "validation": 9}


def test_a_folder_without_a_training_row_is_refused(tmp_path: Path):
    sources = {"a": {"train": [shard(tmp_path, "x", 5, context=2)], "validation": []}}
    with pytest.raises(DataError, match="no training document is left that fits a row of 2 tokens"):
        assemble(tmp_path, sources, Letters(), key="k", weights={"a": 1.0})
    assert not is_prepared(tmp_path)


def test_shards_of_two_contexts_do_not_go_together(tmp_path: Path):
    sources = {"a": {"train": [shard(tmp_path, "x", 5), shard(tmp_path, "y", 5, context=16)], "validation": []}}
    with pytest.raises(ValueError, match="shards of several contexts"):
        assemble(tmp_path, sources, Letters(), key="k", weights={"a": 1.0})


# Opening.


def test_the_mixture_is_that_of_the_report_unless_the_config_has_one(tmp_path: Path):
    directory = whole(tmp_path)
    prepared = prepare(a_run(directory))
    assert (prepared.directory, prepared.key) == (directory, "abc")
    assert prepared.weights == {"a": 3.0, "b": 1.0}
    assert prepared.mixed("validation") == {"a": 3.0}
    chosen = prepare(a_run(directory, sources=(Source("b", weight=2.0), Source("a", weight=5.0))))
    assert list(chosen.weights.items()) == [("b", 2.0), ("a", 5.0)]
    alone = prepare(a_run(directory, sources=(Source("b"),)))
    assert alone.mixed("train") == {"b": 1.0}
    assert alone.mixed("validation") == {}
    assert alone.unigram_entropy != chosen.unigram_entropy != prepared.unigram_entropy


def test_rows_come_from_the_sources_in_the_proportions_of_the_mixture(tmp_path: Path):
    directory = whole(tmp_path)
    config = a_run(directory)
    found = list(itertools.islice(batches(prepare(config), config, split="train"), 1))
    assert found[0].tokens.shape == (config.train.batch, CONTEXT)
    weights = {"a": 1.0, "b": 3.0}
    mixed = rows(dataclasses.replace(prepare(config), weights=weights), config, "train")
    only_b = rows(dataclasses.replace(prepare(config), weights={"b": 1.0}), config, "train")
    of_b = {only_b[index]["tokens"].tobytes() for index in range(20)}
    assert sum(mixed[index]["tokens"].tobytes() in of_b for index in range(16)) >= 12
    assert (
        len(rows(prepare(config), config, "validation")) == prepare(config).report["sources"]["a"]["validation"]["rows"]
    )


def test_a_run_without_held_out_rows_has_no_validation_batches(tmp_path: Path):
    config = a_run(whole(tmp_path), sources=(Source("b"),))
    assert list(batches(prepare(config), config, split="validation")) == []


def test_a_folder_of_preparations_and_one_of_them_give_the_same_batches(config: Config):
    own = prepare(config)
    given = dataclasses.replace(
        config,
        data=dataclasses.replace(
            config.data,
            prepared=str(own.directory),
            sources=tuple(Source(source.name, weight=source.weight) for source in config.data.sources),
        ),
    )
    assert prepare(given) == own
    streams = [batches(prepare(c), c, split="train") for c in (config, given)]
    for one, other in itertools.islice(zip(*streams, strict=True), 3):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"context": 64},
            r"data\.context = 64, and '.*' is packed for 32; give --data\.context 32, or prepare again with python -m "
            r"dreamer_jax\.prepare \.\.\. --tokens\.context 64",
        ),
        (
            {"special_tokens": ("<s>", "</s>")},
            r"data\.special_tokens = \['<s>', '</s>'\], and '.*' was prepared with \[\]; leave them out",
        ),
        ({"vocab": 49}, r"tokenizer of '.*' has 50 entries and model\.vocab = 49; give --model\.vocab 128"),
        ({"sources": (Source("aa"),)}, r"names 'aa', which '.*' does not hold; did you mean 'a'\? it has a, b"),
        (
            {"sources": (Source("a", train=("x.jsonl",)),)},
            r"data source 'a' names documents, and data\.prepared = '.*' holds prepared ones: give another folder as "
            r"--data\.prepared, or of each source only its name and weight",
        ),
    ],
)
def test_what_does_not_fit_the_folder_is_named_with_both_values_and_the_fix(
    tmp_path: Path, data: dict[str, object], message: str
):
    with pytest.raises(DataError, match=message):
        prepare(a_run(whole(tmp_path), **data))


def test_special_tokens_of_the_folder_are_to_be_given(tmp_path: Path):
    directory = whole(tmp_path, special_tokens=("<s>", "</s>"))
    with pytest.raises(DataError, match=r"data\.special_tokens = \[\], .* give --data\.special_tokens '<s>' '</s>'"):
        prepare(a_run(directory))
    prepare(a_run(directory, special_tokens=("<s>", "</s>")))


@pytest.mark.parametrize("key", ["prompt_template", "response_template"])
def test_the_layout_of_the_folder_is_to_be_given(tmp_path: Path, key: str):
    directory = whole(tmp_path, template=Template("Q: {text}\nA:", "\n{text}"))
    given = {"prompt_template": "Q: {text}\nA:", "response_template": "\n{text}"}
    prepare(a_run(directory, **given))
    del given[key]
    with pytest.raises(DataError) as caught:
        prepare(a_run(directory, **given))
    said = str(caught.value)
    assert "data.prompt_template = " in said
    assert "data.response_template = " in said
    assert r"write prompt_template='Q: {text}\nA:', response_template='\n{text}' in the config's data section" in said


def test_another_tokenizer_than_the_folders_is_refused(tmp_path: Path):
    directory = whole(tmp_path)
    (tmp_path / "same.model").write_bytes(b"letters")
    (tmp_path / "other.model").write_bytes(b"others")
    assert prepare(a_run(directory, tokenizer=str(tmp_path / "same.model"))).key == "abc"
    with pytest.raises(DataError, match=r"data\.tokenizer = '.*other\.model', .* its own 'tokenizer\.model'; leave"):
        prepare(a_run(directory, tokenizer=str(tmp_path / "other.model")))


def test_a_mixture_without_training_rows_is_refused(tmp_path: Path):
    directory = whole(tmp_path)
    report = json.loads((directory / "report.json").read_text())
    report["sources"]["b"]["train"]["rows"] = 0
    report["sha256"] = prepared_data._digest(report)
    (directory / "report.json").write_text(json.dumps(report))
    with pytest.raises(DataError, match=r"data\.sources = b: '.*' has no training rows of them"):
        prepare(a_run(directory, sources=(Source("b"),)))


def test_the_files_that_a_shard_needs_are_looked_at_when_the_data_are_opened(tmp_path: Path):
    directory = whole(tmp_path)
    (directory / "a" / "train-00001.packing.npy").unlink()
    with pytest.raises(DataError, match=rf"damaged .*train-00001\.packing\.npy.* delete the folder '{directory}'"):
        prepare(a_run(directory))


def test_the_description_for_others_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """TFDS imports the modules that a description names, so one of a stranger could run any code."""
    config = a_run(whole(tmp_path))
    prepared = prepare(config)
    (tmp_path / "stranger.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for path in prepared.directory.rglob("features.json"):
        path.write_text(json.dumps({"pythonClassName": "stranger.Feature"}))
    assert rows(prepared, config, "train")[0]["tokens"].any()
