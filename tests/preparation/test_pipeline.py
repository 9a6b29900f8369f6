"""The whole preparation: killed in the middle of any stage, by more workers, after a change, and for a training."""

import dataclasses
import fcntl
import itertools
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dreamer_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from dreamer_jax.data import builder
from dreamer_jax.data.files import DataError
from dreamer_jax.data.loader import batches
from dreamer_jax.preparation import documents, stage
from dreamer_jax.preparation.manifest import loaded
from dreamer_jax.preparation.pipeline import groups_of_sources, prepare
from dreamer_jax.preparation.recipe import Keep, included
from dreamer_jax.preparation.stage import Record, Task, perform
from dreamer_jax.preparation.work import VERSIONS
from tests.preparation.conftest import CONTEXT, Run, changed, rows_of, tokenize_and_die

pytestmark = pytest.mark.xdist_group("preparation")


def results(out: Path) -> dict[str, bytes]:
    """The files that tell what was done and what came of it."""
    paths = [*out.glob("*.json*"), *out.glob("held_out/*/*"), *out.glob("*/1.0.0/*"), *out.glob("*/*.npy")]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


def records_in(work: Path) -> list[Path]:
    """The records of finished tasks."""
    return [path for path in work.rglob("*.json") if "samples" not in path.name]


class Killed(BaseException):
    """Stands for the end of the process."""


Killer = Callable[[pytest.MonkeyPatch, str], None]


def kill_while_writing(patch: pytest.MonkeyPatch, name: str) -> None:
    """Die in the first task of a stage, with its files made but not yet in their places."""

    def run(draft: Path, whole: Task) -> None:
        whole.run(draft, *whole.arguments)
        raise Killed

    def dying(work: Path, task: Task) -> tuple[str, Record]:
        return perform(work, task._replace(run=run, arguments=(task,)) if task.stage == name else task)

    patch.setattr(stage, "perform", dying)


def kill_before_the_record(patch: pytest.MonkeyPatch, name: str) -> None:
    """Die in the first task of a stage, with its files in their places but no record of them."""

    def dying(path: Path, content: str) -> None:
        if f"/{name}/" in str(path):
            raise Killed
        write_whole(path, content)

    write_whole = stage.write_whole
    patch.setattr(stage, "write_whole", dying)


def test_killed_in_the_middle_of_each_stage_it_goes_on_and_comes_to_the_same(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = dataclasses.replace(run.recipe, out=str(tmp_path))
    finished: dict[Path, int] = {}
    kills: tuple[Killer, ...] = (kill_while_writing, kill_before_the_record)
    for name, kill in itertools.product(VERSIONS, kills):
        with monkeypatch.context() as during:
            kill(during, name)
            # A process that is killed deletes nothing.
            during.setattr(tempfile.TemporaryDirectory, "cleanup", lambda self: self._finalizer.detach())
            with pytest.raises(Killed):
                prepare(recipe)
        assert not (tmp_path / "manifest.json").exists()
        records = {path: path.stat().st_mtime_ns for path in records_in(tmp_path / "work")}
        assert records.items() >= finished.items()
        assert not [path for path in records if path.parts[-3] == name or path.parts[-2] == name]
        finished = records
    assert list((tmp_path / "work").rglob(".draft-*"))
    prepare(recipe)
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())
    assert not list((tmp_path / "work").rglob(".draft-*"))
    assert results(tmp_path) == results(run.out)


def test_a_killed_worker_of_two_is_an_error_and_without_it_the_result_is_the_same(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = changed(run.recipe, out=str(tmp_path))
    with monkeypatch.context() as during:
        during.setattr(documents, "tokenize_shard", tokenize_and_die)
        with pytest.raises(DataError, match=r"a worker process died.*--work\.workers.*what is finished stays"):
            prepare(changed(recipe, work={"workers": 2}))
    assert list((tmp_path / "work").rglob(".draft-*"))
    assert not list((tmp_path / "work/documents/chats").glob("train-00000.0001.*"))
    prepare(recipe)
    assert results(tmp_path) == results(run.out)


# After a change


@pytest.fixture
def copy(run: Run, tmp_path: Path) -> Run:
    """The preparation in another folder, with the tokenizer that it has trained as a given one."""
    shutil.copytree(run.out, tmp_path / "out")
    recipe = changed(run.recipe, tokens={"tokenizer": str(run.out / "tokenizer.model")}, out=str(tmp_path / "out"))
    return Run(recipe, run.planted, tmp_path / "out")


@pytest.fixture
def performed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Stage and name of the tasks that are carried out from now on."""
    tasks: list[tuple[str, str]] = []

    def watched(work: Path, task: Task) -> tuple[str, Record]:
        tasks.append((task.stage, task.name))
        return perform(work, task)

    monkeypatch.setattr(stage, "perform", watched)
    return tasks


def test_nothing_is_done_twice(copy: Run, run: Run, performed: list[tuple[str, str]]):
    prepare(dataclasses.replace(run.recipe, out=str(copy.out)))
    assert performed == []
    assert results(copy.out) == results(run.out)


def test_another_cap_of_one_source_does_only_what_follows_from_it(copy: Run, performed: list[tuple[str, str]]):
    *others, plain = copy.recipe.sources
    prepare(changed(copy.recipe, sources=(*others, dataclasses.replace(plain, cap=10))))
    stages = Counter(name for name, _ in performed)
    assert set(stages) == {"choose", "unique", "decontaminate", "tokenizer", "documents", "packing"}
    assert stages["unique"] == 7  # which compare with what was chosen, and give the same for the others
    assert {name.partition("/")[0] for stage, name in performed if stage in ("decontaminate", "documents")} == {"plain"}
    assert len(rows_of(copy.work, "unique", "plain")) <= 10


def test_another_context_only_packs_anew(copy: Run, performed: list[tuple[str, str]]):
    before = results(copy.out)
    prepare(changed(copy.recipe, tokens={"tokenizer": "train", "context": CONTEXT // 4}))
    assert {stage for stage, _ in performed} == {"packing"}
    after = results(copy.out)
    same = [name for name in before.keys() & after.keys() if ".array_record" in name]
    assert same
    assert [after[name] for name in same] == [before[name] for name in same]
    assert after["manifest.json"] != before["manifest.json"]


def test_a_source_that_is_left_out_leaves_the_rows_of_others_as_they_were(copy: Run, performed: list[tuple[str, str]]):
    manifest = prepare(changed(copy.recipe, exclude=("non-commercial",))) / "manifest.json"
    assert {"read", "strip", "clean", "keys"}.isdisjoint(stage for stage, _ in performed)
    assert '"chats": {' not in manifest.read_text()
    assert {row.prompt for row in rows_of(copy.work, "unique", "stories")} > set(copy.planted.copied)


def test_a_source_of_which_nothing_is_left_is_in_the_manifest_and_not_in_the_mixture(copy: Run):
    stories, *others = copy.recipe.sources
    nothing = dataclasses.replace(stories, traces="deepmath")  # of which each answer has a trace
    manifest = loaded(prepare(changed(copy.recipe, sources=(nothing, *others))))
    assert manifest["sources"]["stories"]["training_documents"] == 0
    assert "out" not in manifest["sources"]["stories"]["stages"]["strip"]  # counts of none are left out
    assert not (copy.out / "stories").exists()
    assert not (copy.out / "held_out/stories").exists()
    assert list(builder.prepare(training(copy)).weights) == ["chats", "plain"]


def test_a_source_without_one_usable_row_is_an_error_that_counts_the_causes(copy: Run):
    stories, *others = copy.recipe.sources
    nothing = dataclasses.replace(stories, keep=(Keep("verified", ("maybe",)),))
    with pytest.raises(DataError, match=r"'stories': no row of its files is usable \(143 not kept: verified"):
        prepare(changed(copy.recipe, sources=(nothing, *others)))


def test_a_source_that_is_all_held_out_is_there_for_validation(copy: Run):
    stories, *others = copy.recipe.sources
    held_out = dataclasses.replace(stories, held_out=0.9999)
    manifest = loaded(prepare(changed(copy.recipe, sources=(held_out, *others))))
    part = manifest["sources"]["stories"]
    assert part["training_documents"] == 0 < part["validation_documents"]
    config = training(copy)
    prepared = builder.prepare(config)
    assert "stories" in prepared.mixed("validation")
    assert "stories" not in prepared.mixed("train")
    assert next(batches(prepared, config, split="validation")).tokens.shape


def test_a_damaged_shard_is_an_error_that_names_the_fix(copy: Run):
    [shard, *_] = sorted((copy.work / "clean" / "stories").glob("*.parquet"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:4] + bytes(len(whole) - 8) + whole[-4:])
    with pytest.raises(DataError, match=r"cannot be read .* delete the file that is named"):
        prepare(changed(copy.recipe, duplicates={"threshold": 0.7}))


def test_the_folder_of_the_raw_sets_and_that_of_other_data_are_no_place_for_the_result(copy: Run, tmp_path: Path):
    with pytest.raises(DataError, match="is the folder of the raw sets"):
        prepare(changed(copy.recipe, out=copy.recipe.root))
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(DataError, match="prepared data that no recipe has made"):
        prepare(changed(copy.recipe, out=str(tmp_path)))


def test_a_context_that_nothing_fits_is_an_error_that_names_it(copy: Run):
    with pytest.raises(DataError, match="no training document is left that fits a row of 2 tokens"):
        prepare(changed(copy.recipe, tokens={"context": 2}))


# Before anything is done


def test_all_sources_that_are_missing_are_named_with_what_to_do(run: Run, tmp_path: Path):
    recipe = changed(run.recipe, root=str(tmp_path))
    with pytest.raises(DataError, match=r"has no files of 3 sources:\n") as caught:
        groups_of_sources(recipe, included(recipe))
    said = str(caught.value)
    assert "\n  stories: looked for in 'stories/*.jsonl'\n" in said
    assert (
        f"\n  plain: looked for in '{tmp_path}/someone/plain', from https://huggingface.co/datasets/someone/plain"
        in said
    )
    assert "(access has to be asked for)\n" in said
    assert said.endswith("--work.fetch True, or leave them out with --exclude stories chats plain")


def test_only_sources_that_are_used_have_to_be_there(run: Run, tmp_path: Path):
    shutil.copytree(Path(run.recipe.root) / "stories", tmp_path / "stories")
    recipe = changed(run.recipe, root=str(tmp_path), exclude=("chats", "gated"))
    assert list(groups_of_sources(recipe, included(recipe))) == ["stories"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"decontaminate": {"root": ""}}, r"decontaminate\.root is empty"),
        ({"tokens": {"tokenizer": "/absent/tokenizer.json"}}, r"/absent/tokenizer\.json' does not exist"),
    ],
)
def test_what_is_read_last_is_looked_for_first(run: Run, tmp_path: Path, changes: dict[str, Any], said: str):
    with pytest.raises(DataError, match=said):
        prepare(changed(run.recipe, out=str(tmp_path / "out"), **changes))
    assert not (tmp_path / "out").exists()


def test_two_preparations_do_not_work_in_one_folder(run: Run, tmp_path: Path):
    (tmp_path / "work").mkdir()
    with (tmp_path / "work/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another preparation works there; wait for it, or give another --out"):
            prepare(changed(run.recipe, out=str(tmp_path)))


# Before a training


def training(run: Run, **data: Any) -> Config:
    given = {"prepared": str(run.out), "context": CONTEXT, "prefetch": 1} | data
    return Config("x", model=ModelConfig(vocab=512), data=DataConfig(**given), train=TrainConfig(batch=4))


def test_a_training_reads_the_result(run: Run):
    config = training(run)
    prepared = builder.prepare(config)
    assert list(prepared.weights) == ["stories", "chats", "plain"]
    assert prepared.weights["stories"] == 2 * prepared.report["sources"]["stories"]["train"]["rows"]
    assert 3 < prepared.unigram_entropy < np.log(512)
    for split in ("train", "validation"):
        stream = batches(prepared, config, split=split)
        [batch] = itertools.islice(stream, 1)
        stream.close()
        assert batch.tokens.shape == (4, CONTEXT)
        assert batch.segment_ids.max() > 1
        assert 0 < batch.tokens.max() < 500


def test_only_answers_and_plain_text_are_learnt(run: Run):
    whole, responses = (builder.prepare(training(run, response_only=only)).unigram_entropy for only in (False, True))
    assert whole != responses


def test_another_context_than_that_of_the_result_is_an_error(run: Run):
    with pytest.raises(DataError, match=rf"data\.context = 64, and '.*' is packed for {CONTEXT}; give --data\.context"):
        builder.prepare(training(run, context=64))


def test_held_out_rows_are_there_as_text_too(run: Run):
    for name, least in (("stories", 3), ("chats", 20), ("plain", 1)):
        lines = (run.out / f"held_out/{name}/validation.jsonl").read_text().splitlines()
        assert len(lines) == len(run.questions("unique", name, "validation.parquet")) >= least
