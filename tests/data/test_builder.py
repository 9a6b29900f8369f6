"""Preparation: TFDS datasets on disk, atomic, keyed by all that matters, with honest counts."""

import dataclasses
import errno
import fcntl
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tokenizers

from dreamer_jax import config as config_module
from dreamer_jax.config import Config, DataConfig, ModelConfig, Source
from dreamer_jax.data import builder
from dreamer_jax.data import prepared as prepared_data
from dreamer_jax.data.builder import preparation_key, prepare
from dreamer_jax.data.dataset import ids_and_answers
from dreamer_jax.data.document import Document, prompt_digest
from dreamer_jax.data.exercises import family_task
from dreamer_jax.data.prepared import Prepared
from dreamer_jax.data.sources import DataError
from dreamer_jax.data.tokenizer import load_tokenizer
from dreamer_jax.data.unfinished import OWNER, unfinished
from tests.data.conftest import sums
from tests.data.tokenizers_of_others import byte_level, saved, unigram


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
        assert tokenizer.decode(tokens[:start]) == f"Question: {row['question']}\nAnswer:"
        assert tokenizer.decode(tokens[start:]) == " #### " + str(row["answer"]).split("#### ")[1]


def test_documents_are_laid_out_as_the_config_says(one_source: Callable[..., Config]):
    rows = sums(40, seed=1)
    prepared = prepare(one_source(rows, prompt_template="Exercise: {text}\nSolution:", response_template="\n{text}."))
    tokenizer = load_tokenizer(prepared.tokenizer)
    assert len(tokenizer.encode("Question")) > 3  # the tokenizer has seen no such word
    for stored in tokens_on_disk(prepared, "sums", "train"):
        start, tokens = int(stored["response_start"]), stored["tokens"].tolist()
        assert tokenizer.decode(tokens[:start]) in {f"Exercise: {row['question']}\nSolution:" for row in rows}
        assert tokenizer.decode(tokens[start:]).startswith("\n#### ")
        assert tokenizer.decode(tokens[start:]).endswith(".")
    assert prepared.report["prompt_template"] == "Exercise: {text}\nSolution:"
    assert prepared.report["response_template"] == "\n{text}."


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
    assert prepared.unigram_entropy == pytest.approx(-(p * np.log(p)).sum())
    assert prepare(change(config, "data", response_only=True)).unigram_entropy < prepared.unigram_entropy


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
    kept = (dataclasses.replace(config.data.sources[0], remove=""),)
    for other in (
        change(config, "data", context=64),
        change(config, "data", special_tokens=("<s>",)),
        change(config, "data", prompt_template="Q: {text}"),
        change(config, "data", response_template="\n{text}"),
        change(config, "data", sources=kept),
        change(config, "model", vocab=300),
    ):
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
    report = prepare(one_source(rows)).report["sources"]["sums"]
    assert report["skipped"] == {"longer than the context": 1}
    assert (report["train"]["documents"], report["train"]["too_long"]) == (60, 1)
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
        "builder.assemble = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
        "builder.prepare(config.from_json(open(sys.argv[1]).read()))"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "config.json")], timeout=120, check=False)
    assert killed.returncode == -9
    folder = Path(config.data.prepared)
    assert [path.name.split(".")[1][:7] for path in folder.iterdir()] == ["partial"]
    assert prepare(config).splits["sums"]["train"] == 60
    assert [path.name for path in folder.iterdir()] == [preparation_key(config)]


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


def test_a_config_that_names_no_documents_or_tokens_of_no_tokenizer_is_refused(one_source: Callable[..., Config]):
    config = one_source(sums(5, seed=1))
    with pytest.raises(DataError, match=r"data\.sources is empty: name .*, or give prepared data as --data\.prepared"):
        prepare(change(config, "data", sources=()))
    with pytest.raises(DataError, match=r"'x': give either train files or tasks, or prepared data"):
        prepare(change(config, "data", sources=(Source("x"),)))
    with pytest.raises(DataError, match=r"data\.special_tokens names tokens of a tokenizer that is given"):
        prepare(change(config, "data", special_tokens=("<s>",)))


# Nothing left.


@pytest.mark.parametrize(
    ("rows", "data", "cause"),
    [
        (
            sums(30, seed=1),
            {"context": 8},
            r"no train document is left \(skipped: 30 \(longer than the context\)\); those that are longer than "
            r"data\.context = 8 have \d+ to \d+ tokens: raise data\.context",
        ),
        (
            sums(20, seed=9),
            {},
            r"no validation document is left \(skipped: 20 \(held out, but its prompt is also in the training "
            r"data\)\); give other documents as the source's validation files$",
        ),
    ],
)
def test_a_split_without_documents_is_an_error_with_counts_and_a_fix(
    one_source: Callable[..., Config], rows: list[dict[str, object]], data: dict[str, object], cause: str
):
    with pytest.raises(DataError, match=f"data source 'sums': {cause}"):
        prepare(one_source(rows, **data))


def test_a_single_document_cannot_be_split(one_source: Callable[..., Config]):
    config = one_source(sums(1, seed=1))
    alone = (dataclasses.replace(config.data.sources[0], validation=()),)
    with pytest.raises(DataError, match=r"no validation document is left .* validation files, or more: by chance, 2 %"):
        prepare(change(config, "data", sources=alone))
    tasks = (dataclasses.replace(alone[0], train=(), tasks=("rush_hour",), documents_per_task=1),)
    with pytest.raises(DataError, match=r"no train document is left .*; give more documents"):
        prepare(change(config, "data", sources=tasks))


def test_a_vocabulary_beyond_the_documents_names_the_largest(one_source: Callable[..., Config]):
    with pytest.raises(
        DataError, match=r"model\.vocab = 9000 entries .* no more than \d+; give --model\.vocab \d+ or less"
    ):
        prepare(change(one_source(sums(30, seed=1)), "model", vocab=9000))


# Tokenizers that are given.


def test_unknown_characters_are_counted_and_the_number_is_said(
    one_source: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = [{"question": f"What is {n}?", "answer": f"{n}" + " é" * (n == 10)} for n in range(10, 40)]
    tokenizer = saved(unigram(), tmp_path)
    with_them = prepare(one_source(rows, tokenizer=str(tokenizer))).report["sources"]["sums"]["unknown"]
    assert f"sums: {with_them} tokens are the unknown one" in capsys.readouterr().out
    rows[0]["answer"] = "10"
    assert prepare(one_source(rows, tokenizer=str(tokenizer))).report["sources"]["sums"]["unknown"] == with_them - 1


def test_a_character_without_any_token_makes_a_bad_row(one_source: Callable[..., Config], tmp_path: Path):
    letters = dict.fromkeys("Question: What is 0123456789?\nAnswer: #+")
    pieces = [["</s>", 0.0], ["▁", -3.0], *([letter, -3.0] for letter in letters)]
    tokenizer = saved(unigram(added=False), tmp_path, vocab=pieces, unk_id=None)
    rows = [{"question": f"What is {n}?", "answer": f"{n}"} for n in range(30)]
    config = one_source([*rows, {"question": "What is é?", "answer": "é"}], tokenizer=str(tokenizer))
    with pytest.raises(
        DataError, match=r"train\.jsonl, line 31: .*no token for 'é'.*unknown token.*--data\.bad_rows skip"
    ):
        prepare(config)
    report = prepare(change(config, "data", bad_rows="skip")).report["sources"]["sums"]
    assert report["train"]["documents"] == 30
    assert report["skipped"] == {"a character that the tokenizer does not know": 1}


def test_the_tokens_that_end_documents_may_be_named(one_source: Callable[..., Config], tmp_path: Path):
    tokenizer = saved(byte_level("<doc>", "<end>"), tmp_path)
    config = one_source(sums(30, seed=1), tokenizer=str(tokenizer), special_tokens=("<doc>", "<end>"))
    prepared = prepare(config)
    assert prepared.tokenizer.read_bytes() == tokenizer.read_bytes()
    for document in tokens_on_disk(prepared, "sums", "train"):
        assert (document["tokens"][0], document["tokens"][-1]) == (256, 257)
    with pytest.raises(DataError, match=r"--data\.special_tokens BEGIN END"):
        prepare(change(config, "data", special_tokens=()))


def test_a_tokenizer_that_is_no_file_is_named_before_anything_is_read(
    one_source: Callable[..., Config], tmp_path: Path
):
    for name, cause in (
        (tmp_path, "is a folder; give a file"),
        ("$NO_SUCH_1/x", "not set"),
        ("~nobody-1/x", "no such"),
    ):
        with pytest.raises(DataError, match=rf"data\.tokenizer.*{cause}"):
            prepare(one_source(sums(5, seed=1), tokenizer=str(name)))


# A folder that cannot be written.


def test_the_folder_of_prepared_data_may_have_a_home_and_variables_in_it(
    one_source: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SOME_NAME", "there")
    prepared = prepare(one_source(sums(30, seed=1), prepared="~/$SOME_NAME"))
    assert prepared.directory.parent == tmp_path / "there"


@pytest.mark.parametrize(
    ("place", "cause"),
    [
        ("file", "File exists|Not a directory"),
        ("file/x", "Not a directory"),
        ("x" * 300, "File name too long"),
        ("$NO_SUCH_VARIABLE_1/x", "the environment variable is not set"),
    ],
)
def test_a_folder_that_cannot_be_made_is_named_with_its_key(
    one_source: Callable[..., Config], tmp_path: Path, place: str, cause: str
):
    (tmp_path / "file").touch()
    where = place if "$" in place else str(tmp_path / place)
    with pytest.raises(DataError, match=rf"data\.prepared = .*({cause}).*--data\.prepared"):
        prepare(one_source(sums(30, seed=1), prepared=where))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize(
    ("module", "part"),
    [
        (builder, "unfinished"),
        (prepared_data, "save_packing"),
        (builder, "write_whole"),
        (prepared_data, "write_whole"),
    ],
)
def test_a_disk_that_refuses_is_an_error_that_names_the_key_and_leaves_nothing(
    one_source: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, module: ModuleType, part: str, number: int
):
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    config = one_source(sums(30, seed=1))
    monkeypatch.setattr(module, part, refuse)
    with pytest.raises(DataError, match=rf"data\.prepared = .*{os.strerror(number)}.*--data\.prepared"):
        prepare(config)
    assert part == "unfinished" or list(Path(config.data.prepared).iterdir()) == []


# Folders that nobody fills any more.


def test_only_unfinished_folders_of_dead_processes_of_this_machine_are_removed(tmp_path: Path):
    def left(name: str, owner: str | None) -> Path:
        folder = tmp_path / f"{name}.partial-1"
        folder.mkdir()
        if owner is not None:
            (folder / OWNER).write_text(owner)
        return folder

    here = f"pid 1 on {os.uname().nodename}"
    dead, elsewhere, nameless = left("dead", here), left("elsewhere", "pid 1 on elsewhere"), left("nameless", None)
    alive = left("alive", here)
    other = tmp_path / "finished"
    other.mkdir()
    (other / OWNER).write_text(here)
    with (alive / OWNER).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with unfinished(tmp_path / "one") as first, unfinished(tmp_path / "two") as second:
            assert list(first.iterdir()) == list(second.iterdir()) == []
            assert len(list(tmp_path.glob("*.partial-*"))) == 5
        assert set(tmp_path.iterdir()) == {elsewhere, nameless, alive, other}
        assert not dead.exists()


def test_a_file_system_without_locks_is_good_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with unfinished(tmp_path / "one"), unfinished(tmp_path / "two"):
        assert len(list(tmp_path.iterdir())) == 2
    assert list(tmp_path.iterdir()) == []


# Damage.


def flip(path: Path) -> None:
    """Change a byte in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name",
    [
        "report.json",
        "tokenizer.model",
        "sums/unigrams.npy",
        "sums/1.0.0/features.json",
        "sums/1.0.0/dataset_info.json",
    ],
)
def test_a_small_file_that_has_changed_names_the_folder_to_delete(one_source: Callable[..., Config], name: str):
    config = one_source(sums(30, seed=1))
    prepared = prepare(config)
    flip(prepared.directory / name)
    with pytest.raises(DataError, match=rf"damaged.*delete the folder '{prepared.directory}' and start again"):
        prepare(config)
    (prepared.directory / name).unlink()
    with pytest.raises(DataError, match=rf"damaged.*delete the folder '{prepared.directory}' and start again"):
        prepare(config)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b"null", b"7", b'"text"', b"{}", b'{"sha256": 1}', b"[" * 100_000, b"1" * 5000],
    ids=lambda content: content[:10],
)
def test_a_report_that_is_none_names_the_folder_to_delete(one_source: Callable[..., Config], content: bytes):
    config = one_source(sums(30, seed=1))
    directory = Path(config.data.prepared) / preparation_key(config)
    directory.mkdir(parents=True)
    (directory / "report.json").write_bytes(content)
    with pytest.raises(DataError, match=rf"damaged.*delete the folder '{directory}' and start again"):
        prepare(config)


def test_a_report_that_may_not_be_read_is_not_called_damaged(
    one_source: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
):
    def refuse(directory: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(directory / "report.json"))

    config = one_source(sums(30, seed=1))
    prepare(config)
    monkeypatch.setattr(prepared_data, "_verified", refuse)
    with pytest.raises(DataError, match=r"data\.prepared.*report\.json' cannot be read; change its rights"):
        prepare(config)


def test_what_others_leave_beside_the_files_does_not_count(one_source: Callable[..., Config]):
    config = one_source(sums(30, seed=1))
    first = prepare(config)
    for name in (".DS_Store", "._tokenizer.model", "tokenizer.json", "sums/.nfs0001", "sums/1.0.0/._features.json"):
        (first.directory / name).write_bytes(b"x")
    assert prepare(config) == first


# Families, further turns, and a tokenizer of words.


@pytest.fixture(scope="module")
def hops(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A source with further turns, beside one of another family, tokenized by words."""
    sources = (
        Source("hops", tasks=("p_hop(hops=(1, 3), length=(6, 14), test_hops=(4,))",), documents_per_task=60),
        Source("graph", tasks=("two_hop(entities=20, relations=6, out_degree=4, compositions=2.0)",)),
    )
    data = DataConfig(
        sources=sources,
        prepared=str(tmp_path_factory.mktemp("prepared")),
        tokenizer="words",
        prompt_template="Q {text} A",
        response_template="{text}",
        context=40,
    )
    return Config(name="hops", model=ModelConfig(vocab=64), data=data)


@pytest.fixture(scope="module")
def prepared_hops(hops: Config) -> Prepared:
    return prepare(hops)


def test_words_of_documents_templates_and_tests_are_the_vocabulary(hops: Config, prepared_hops: Prepared):
    words = {f"e{i}" for i in range(20)} | {f"r{i}" for i in range(6)} | {"Q", "A", "B", "C", "D", "-"}
    words |= {f"p={p}" for p in (1, 2, 3, 4)} | {"a", "b", "c", "d", "<s>", "</s>", "<unk>"}
    assert prepared_hops.tokenizer.name == "tokenizer.json"
    assert json.loads(prepared_hops.tokenizer.read_bytes())["model"]["vocab"].keys() == words
    assert prepared_hops.report["vocab"] == len(words) == 43
    assert {part["unknown"] for part in prepared_hops.report["sources"].values()} == {0}
    assert prepare(change(hops, "model", vocab=43)) == prepared_hops
    with pytest.raises(DataError, match=r"has 43 entries and model\.vocab = 42; give --model\.vocab 128"):
        prepare(change(hops, "model", vocab=42))


def test_a_vocabulary_too_small_for_the_words_is_refused_with_the_number_needed(hops: Config, tmp_path: Path):
    config = change(change(hops, "model", vocab=42), "data", prepared=str(tmp_path))
    with pytest.raises(
        DataError, match=r"tokenizer 'words' has 43 entries and model\.vocab = 42; give --model\.vocab 1"
    ):
        prepare(config)


def test_further_turns_stand_in_the_response_with_what_is_given_marked(hops: Config, prepared_hops: Prepared):
    tokenizer = load_tokenizer(prepared_hops.tokenizer)
    task = family_task(hops.data.sources[0].tasks[0])
    assert task is not None
    expected = list(task.family.train(task.settings, 60, task.seed))
    for stored, document in zip(tokens_on_disk(prepared_hops, "hops", "train"), expected, strict=True):
        tokens, start = stored["tokens"], int(stored["response_start"])
        assert tokenizer.decode(tokens[:start]) == f"Q {document.prompt} A"
        ids, answered = ids_and_answers(tokens, start)
        texts = [document.response, *(text for turn in document.further for text in turn)]
        assert tokenizer.decode(ids[start:]) == " ".join(texts)
        assert tokenizer.decode(ids[answered]) == " ".join(texts[::2])
        assert answered[-1]
        assert ids[-1] == tokenizer.eos


def test_the_loss_on_responses_looks_at_the_answers_of_all_turns(hops: Config, prepared_hops: Prepared):
    prompts, responses = np.load(prepared_hops.directory / "hops" / "unigrams.npy")
    tokenizer = load_tokenizer(prepared_hops.tokenizer)
    letters, answers = tokenizer.encode("a b c d"), tokenizer.encode("A B C D -")
    assert responses[letters].sum() == 0 < prompts[letters].min()
    assert responses[answers].sum() == prompts[letters].sum()
    assert responses[tokenizer.eos] == 60


def test_a_held_out_document_is_trained_on_if_all_that_it_gives_is():
    document, skipped = Document("p=1 a", "-", (("b", "-"), ("a", "B"))), Counter[str]()
    assert list(builder._unseen([(document, "x")], {prompt_digest("p=1 a")}, skipped)) == [(document, "x")]
    assert not list(builder._unseen([(document, "x")], {prompt_digest("p=1 a b a")}, skipped))
    assert skipped.total() == 1


def test_the_report_quotes_further_turns_where_there_are_some(prepared_hops: Prepared):
    sources = json.loads((prepared_hops.directory / "report.json").read_text())["sources"]
    assert all(len(turn) == 2 for example in sources["hops"]["examples"] for turn in example["further"])
    assert all(example.keys() == {"prompt", "response"} for example in sources["graph"]["examples"])


def test_the_key_follows_the_version_of_the_families_where_one_is_used(hops: Config, monkeypatch: pytest.MonkeyPatch):
    others = change(hops, "data", sources=(Source("sums", tasks=("lcm",), documents_per_task=3),))
    keys = preparation_key(hops), preparation_key(others)
    monkeypatch.setattr(builder, "FAMILIES_VERSION", 99)
    assert preparation_key(hops) != keys[0]
    assert preparation_key(others) == keys[1]
    with pytest.raises(DataError, match="no setting 'x'"):
        preparation_key(change(hops, "data", sources=(Source("x", tasks=("two_hop(x=1)",)),)))


def test_words_have_no_special_tokens_of_other_names(hops: Config):
    with pytest.raises(DataError, match=r"data\.special_tokens names tokens of a tokenizer that is given"):
        prepare(change(hops, "data", special_tokens=("<s>",)))


def test_ready_made_data_are_opened_whatever_tokenizer_would_be_made(hops: Config, prepared_hops: Prepared):
    for tokenizer in ("words", "train"):
        ready = change(hops, "data", sources=(), prepared=str(prepared_hops.directory), tokenizer=tokenizer)
        assert prepare(ready).key == prepared_hops.key
