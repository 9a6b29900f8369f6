"""Preparation: TFDS datasets on disk, atomic, keyed by all that matters, with honest counts."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tokenizers

from dreamer_jax import config as config_module
from dreamer_jax.config import Config
from dreamer_jax.data import builder
from dreamer_jax.data.builder import Prepared, preparation_key, prepare, unigram_entropy
from dreamer_jax.data.sources import DataError, render_prompt, render_response
from dreamer_jax.data.tokenizer import load_tokenizer
from tests.data.conftest import sums


def change(config: Config, section: str, **values: object) -> Config:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def tokens_on_disk(prepared: Prepared, source: str, split: str) -> list[dict[str, np.ndarray]]:
    return list(tfds.builder_from_directory(prepared.directory / source / "1.0.0").as_data_source(split=split))


def test_the_dataset_is_array_record_with_the_documents_in_their_order(config: Config, prepared: Prepared):
    info = json.loads((prepared.directory / "sums/1.0.0/dataset_info.json").read_text())
    assert info["fileFormat"] == "array_record"
    tokenizer = load_tokenizer(prepared.tokenizer)
    for row, stored in zip(sums(300, seed=1), tokens_on_disk(prepared, "sums", "train"), strict=True):
        start, tokens = int(stored["response_start"]), stored["tokens"].tolist()
        assert tokens[0] == tokenizer.bos
        assert tokens[-1] == tokenizer.eos
        assert tokenizer.decode(tokens[:start]) == render_prompt(str(row["question"]))
        assert tokenizer.decode(tokens[start:]) == render_response("#### " + str(row["answer"]).split("#### ")[1])


def test_the_report_counts_what_is_on_disk(prepared: Prepared):
    for name, splits in prepared.splits.items():
        for split, count in splits.items():
            stored = tokens_on_disk(prepared, name, split)
            part = prepared.report["sources"][name][split]
            assert len(stored) == count == part["documents"]
            assert sum(len(document["tokens"]) for document in stored) == part["tokens"]
    assert sum(prepared.splits["stories"].values()) == 250
    assert json.loads((prepared.directory / "report.json").read_text()) == prepared.report


def test_the_unigram_entropy_is_that_of_the_weighted_mixture(config: Config, prepared: Prepared):
    mixture = np.zeros(420)
    for source in config.data.sources:
        stored = tokens_on_disk(prepared, source.name, "train")
        counts = np.bincount(np.concatenate([document["tokens"][1:] for document in stored]), minlength=420)
        mixture += source.weight * prepared.report["sources"][source.name]["train"]["fill"] * counts / counts.sum()
    p = mixture[mixture > 0] / mixture.sum()
    assert unigram_entropy(prepared) == pytest.approx(-(p * np.log(p)).sum())
    assert unigram_entropy(prepare(change(config, "data", response_only=True))) < unigram_entropy(prepared)


def test_a_second_preparation_is_found_not_built(config: Config, prepared: Prepared, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(builder, "_build", lambda *_: pytest.fail("built again"))
    assert prepare(config) == prepared
    assert prepare(config, process_index=1) == prepared


def test_the_key_follows_what_shapes_the_data_and_nothing_else(one_source: Callable[..., Config]):
    config = one_source(sums(30, seed=1))
    key = preparation_key(config)
    heavier = (dataclasses.replace(config.data.sources[0], weight=2.0),)
    for same in (
        change(config, "train", seed=9),
        change(config, "data", sources=heavier),
        change(config, "model", depth=3),
    ):
        assert preparation_key(same) == key
    for other in (change(config, "data", context=64), change(config, "model", vocab=300)):
        assert preparation_key(other) != key
    assert preparation_key(one_source(sums(31, seed=1))) != key


def test_held_out_documents_whose_prompt_is_trained_on_are_dropped_and_counted(one_source: Callable[..., Config]):
    rows = sums(60, seed=1)
    leaked = [{"question": str(row["question"]).upper(), "answer": "?"} for row in sums(20, seed=9)[:3]]
    prepared = prepare(one_source(rows + leaked))
    assert prepared.splits["sums"] == {"train": 63, "validation": 17}
    assert prepared.report["sources"]["sums"]["skipped"] == {"held out, but its prompt is also in the training data": 3}


def test_long_documents_are_counted_or_refused(one_source: Callable[..., Config], capsys: pytest.CaptureFixture[str]):
    rows = [*sums(60, seed=1), {"question": "long " * 200, "answer": "yes"}]
    assert prepare(one_source(rows)).report["sources"]["sums"]["skipped"] == {"longer than the context": 1}
    assert "skipped: 1 (longer than the context)" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"exceeds data\.context = 128; raise it.*'long long"):
        prepare(one_source(rows, long_documents="error"))


def test_special_token_strings_in_documents_stay_text(one_source: Callable[..., Config], tmp_path: Path):
    byte_level = tokenizers.ByteLevelBPETokenizer()
    byte_level.train_from_iterator(["12 + 34"], vocab_size=300, special_tokens=["<|begin_of_text|>", "<|end_of_text|>"])
    byte_level.save(str(tmp_path / "tokenizer.json"))
    rows = [{"question": f"{n} <|begin_of_text|>?", "answer": f"<|end_of_text|> {n}"} for n in range(30)]
    prepared = prepare(one_source(rows, tokenizer=str(tmp_path / "tokenizer.json")))
    tokenizer = load_tokenizer(prepared.tokenizer)
    for document in tokens_on_disk(prepared, "sums", "train"):
        assert (document["tokens"] == tokenizer.bos).nonzero()[0].tolist() == [0]
        assert (document["tokens"] == tokenizer.eos).nonzero()[0].tolist() == [len(document["tokens"]) - 1]
    small = change(one_source(rows, tokenizer=str(tmp_path / "tokenizer.json")), "model", vocab=100)
    with pytest.raises(DataError, match=r"model\.vocab = 100; give --model\.vocab"):
        prepare(small)


def test_a_truncated_or_missing_file_of_the_prepared_data_names_the_folder_to_delete(one_source: Callable[..., Config]):
    config = one_source(sums(60, seed=1))
    prepared = prepare(config)
    record = next(prepared.directory.rglob("*train.array_record*"))
    record.write_bytes(record.read_bytes()[:-100])
    with pytest.raises(DataError, match=rf"array_record.*bytes.*delete the folder '{prepared.directory}'"):
        prepare(config)
    record.unlink()
    with pytest.raises(DataError, match=rf"damaged.*delete the folder '{prepared.directory}'"):
        prepare(config)


def test_a_preparation_killed_halfway_leaves_nothing_in_the_way(one_source: Callable[..., Config], tmp_path: Path):
    config = one_source(sums(60, seed=1))
    (tmp_path / "config.json").write_text(config_module.to_json(config))
    script = (
        "import os, signal, sys; from dreamer_jax import config; from dreamer_jax.data import builder\n"
        "builder._write_dataset = lambda dataset: os.kill(os.getpid(), signal.SIGKILL)\n"
        "builder.prepare(config.from_json(open(sys.argv[1]).read()))"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "config.json")], timeout=120, check=False)
    assert killed.returncode == -9
    folder = Path(config.data.prepared)
    assert [path.name.split(".")[1][:7] for path in folder.iterdir()] == ["partial"]
    assert prepare(config).splits["sums"]["train"] == 60


def test_of_two_preparations_at_once_the_later_adopts_the_earlier(
    one_source: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
):
    config = one_source(sums(60, seed=1))
    fill, others = builder._fill, []

    def overtaken(*args: object) -> None:
        monkeypatch.setattr(builder, "_fill", fill)
        others.append(prepare(config))
        fill(*args)

    monkeypatch.setattr(builder, "_fill", overtaken)
    assert [prepare(config)] == others
    assert [path.name for path in Path(config.data.prepared).iterdir()] == [preparation_key(config)]


def test_an_error_leaves_no_folder_behind(one_source: Callable[..., Config]):
    config = one_source([*sums(5, seed=1), {"question": "no answer"}])
    with pytest.raises(DataError, match="line 6: no field 'answer'"):
        prepare(config)
    assert list(Path(config.data.prepared).iterdir()) == []


def test_other_processes_must_see_what_the_first_prepared(
    one_source: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("dreamer_jax.distributed.VISIBLE_SECONDS", 0.1)
    with pytest.raises(DataError, match=r"process 0 has prepared .* data\.prepared must be on a file system that all"):
        prepare(one_source(sums(5, seed=1)), process_index=1)


def test_unusable_names_are_refused(one_source: Callable[..., Config]):
    config = one_source(sums(5, seed=1))
    renamed = (dataclasses.replace(config.data.sources[0], name="My Sums"),)
    with pytest.raises(DataError, match="'My Sums': a name is"):
        prepare(change(config, "data", sources=renamed))
    with pytest.raises(DataError, match=r"data\.sources is empty"):
        prepare(change(config, "data", sources=()))
