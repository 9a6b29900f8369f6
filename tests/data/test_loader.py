"""Batches: a pure function of seed and row, whoever asks and however often it was interrupted."""

import contextlib
import dataclasses
import functools
import gc
import itertools
import os
import threading
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from dreamer_jax.config import Config
from dreamer_jax.data import builder, loader
from dreamer_jax.data.batch import Batch
from dreamer_jax.data.builder import prepare
from dreamer_jax.data.loader import PackedRows, batches, lay_out, rows
from dreamer_jax.data.pack import find_row, row_documents
from dreamer_jax.data.prepared import Prepared
from dreamer_jax.data.sources import DataError
from dreamer_jax.data.tokenizer import load_tokenizer
from dreamer_jax.distributed import becomes_visible
from tests.data.conftest import sums


def take(count: int, prepared: Prepared, config: Config, **kwargs: object) -> list[Batch]:
    stream = batches(prepared, config, **{"split": "train"} | kwargs)
    found = list(itertools.islice(stream, count))
    stream.close()
    return found


def equal(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def documents_of(batch: Batch) -> list[tuple[int, ...]]:
    return [
        tuple(tokens[segments == segment].tolist())
        for tokens, segments in zip(batch.tokens, batch.segment_ids, strict=True)
        for segment in range(1, segments.max() + 1)
    ]


@pytest.fixture(scope="module")
def stream(prepared: Prepared, config: Config) -> list[Batch]:
    return take(12, prepared, config)


@pytest.mark.parametrize("step", [1, 7])
def test_a_resumed_run_sees_the_same_batches(prepared: Prepared, config: Config, stream: list[Batch], step: int):
    assert equal(take(12 - step, prepared, config, start_row=step * config.train.batch), stream[step:])


def test_a_run_that_goes_on_with_smaller_batches_repeats_and_skips_no_row(
    prepared: Prepared, config: Config, stream: list[Batch]
):
    smaller = dataclasses.replace(config, train=dataclasses.replace(config.train, batch=4))
    halves = take(6, prepared, smaller, start_row=8)
    joined = [
        jax.tree.map(lambda a, b: np.concatenate([a, b]), *pair) for pair in zip(halves[::2], halves[1::2], strict=True)
    ]
    assert equal(joined, stream[1:4])
    held = take(2, prepared, smaller, start_row=8, held=(1, 3))
    assert equal(held, jax.tree.map(lambda array: array[[1, 3]], halves[:2]))


@pytest.mark.parametrize("held", [(0, 1, 2, 3), (4, 5), (1, 2, 6), (7,)])
@pytest.mark.parametrize(("split", "start"), [("train", 0), ("train", 5), ("validation", 0)])
def test_a_process_reads_the_rows_of_the_global_batch_that_it_holds(
    prepared: Prepared, config: Config, held: tuple[int, ...], split: str, start: int
):
    first = start * config.train.batch
    whole = take(2, prepared, config, split=split, start_row=first)
    part = take(2, prepared, config, split=split, start_row=first, held=held)
    assert equal(part, jax.tree.map(lambda array: array[list(held)], whole))


@pytest.mark.parametrize("prefetch", [1, 7])
def test_prefetching_changes_nothing(prepared: Prepared, config: Config, stream: list[Batch], prefetch: int):
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, prefetch=prefetch))
    assert equal(take(12, prepared, other), stream)


def test_another_seed_is_another_order(prepared: Prepared, config: Config, stream: list[Batch]):
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=6))
    assert not equal(take(12, prepared, other), stream)


def test_any_row_is_reached_at_once(prepared: Prepared, config: Config):
    assert equal(take(1, prepared, config, start_row=10**10), take(1, prepared, config, start_row=10**10))


def test_shapes_and_types(config: Config, stream: list[Batch]):
    shape = (config.train.batch, config.data.context)
    for batch in stream:
        assert [array.shape for array in batch] == [shape] * 4
        assert [array.dtype for array in batch] == [np.int32, np.int32, np.int32, np.bool_]


def test_positions_restart_and_segments_count_up_in_each_document(prepared: Prepared, stream: list[Batch]):
    tokenizer = load_tokenizer(prepared.tokenizer)
    for batch in stream:
        for tokens, positions, segments in zip(batch.tokens, batch.positions, batch.segment_ids, strict=True):
            used = int((segments > 0).sum())
            assert not np.concatenate([tokens[used:], positions[used:], segments[used:]]).any()
            starts = np.flatnonzero(positions[:used] == 0)
            assert (tokens[starts] == tokenizer.bos).all()
            ends = np.append(starts[1:], used)
            assert (tokens[ends - 1] == tokenizer.eos).all()
            for segment, (start, end) in enumerate(zip(starts, ends, strict=True), start=1):
                assert (segments[start:end] == segment).all()
                assert (positions[start:end] == np.arange(end - start)).all()


def test_the_mask_covers_the_response_and_its_end(prepared: Prepared, stream: list[Batch]):
    tokenizer = load_tokenizer(prepared.tokenizer)
    for tokens, segments, mask in zip(stream[0].tokens, stream[0].segment_ids, stream[0].response_mask, strict=True):
        assert not mask[segments == 0].any()
        for segment in range(1, segments.max() + 1):
            inside = segments == segment
            prompt, response = tokens[inside & ~mask], tokens[inside & mask]
            assert response[-1] == tokenizer.eos
            assert tokenizer.decode(prompt).endswith("\nAnswer:")
            assert tokenizer.decode(response).startswith((" #### ", " They are "))


def test_what_further_turns_give_is_laid_out_as_it_is_and_is_no_response():
    plain = {"tokens": np.array([1, 5, 6, 2], np.int32), "response_start": 2}
    turns = {"tokens": np.array([1, 5, 6, ~5, ~0, 6, ~9, 7, 2], np.int32), "response_start": 2}
    row = lay_out([plain, turns], 15)
    assert row["tokens"].tolist() == [1, 5, 6, 2, 1, 5, 6, 5, 0, 6, 9, 7, 2, 0, 0]
    assert row["tokens"].dtype == np.int32
    assert np.flatnonzero(row["response_mask"]).tolist() == [2, 3, 6, 9, 11, 12]
    assert row["positions"].tolist() == [*range(4), *range(9), 0, 0]


def test_an_epoch_of_batches_holds_every_document_once(one_source: Callable[..., Config]):
    config = one_source(sums(64, seed=1))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch=1))
    prepared = prepare(config)
    count = prepared.report["sources"]["sums"]["train"]["rows"]
    for epoch in range(2):
        found = [d for batch in take(count, prepared, config, start_row=epoch * count) for d in documents_of(batch)]
        assert len(found) == len(set(found)) == 64


def open_files(folder: Path) -> list[str]:
    """The files of a folder that this process holds open."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one of the listing is closed by now
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return [name for name in found if name.startswith(str(folder))]


@pytest.fixture
def sharded(one_source: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> tuple[Config, Prepared]:
    """64 training documents in shards of ten, of which two may be open at a time."""
    monkeypatch.setattr(builder, "SHARD_DOCUMENTS", 10)
    monkeypatch.setattr(loader, "_open_shard", functools.lru_cache(maxsize=2)(loader._open_shard.__wrapped__))
    config = one_source(sums(64, seed=1))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, batch=1)), prepare(config)


def test_an_epoch_over_shards_holds_every_document_once_with_few_open(sharded: tuple[Config, Prepared]):
    config, prepared = sharded
    part = prepared.report["sources"]["sums"]["train"]
    assert part["shards"]["documents"] == [10, 10, 10, 10, 10, 10, 4]
    epochs = [take(part["rows"], prepared, config, start_row=epoch * part["rows"]) for epoch in range(2)]
    for found in epochs:
        documents = [document for batch in found for document in documents_of(batch)]
        assert len(documents) == len(set(documents)) == 64
    assert not equal(*epochs)
    assert loader._open_shard.cache_info().misses > 7
    # Two of each shard. Grain's threads may hold a row for a moment after they were told to end.
    assert becomes_visible(lambda: gc.collect() >= 0 and len(open_files(prepared.directory)) <= 4)


def test_a_shard_is_not_opened_before_it_is_needed(sharded: tuple[Config, Prepared]):
    config, prepared = sharded
    stream = rows(prepared, config, "train")
    assert loader._open_shard.cache_info().currsize == 0
    stream[0]
    assert loader._open_shard.cache_info().currsize == 1
    assert len(open_files(prepared.directory)) == 2


def test_a_packing_that_has_changed_is_found_when_its_shard_is_first_opened(sharded: tuple[Config, Prepared]):
    config, prepared = sharded
    path = prepared.directory / "sums" / "train-00003.packing.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    stream = rows(prepare(config), config, "train")
    with pytest.raises(
        DataError, match=rf"packing of shard 3 of sums/train .*delete the folder '{prepared.directory}'"
    ):
        [stream[index] for index in range(200)]


def test_rows_follow_the_weights(prepared: Prepared, config: Config, stream: list[Batch]):
    tokenizer = load_tokenizer(prepared.tokenizer)
    beginnings = [tokenizer.decode(row[:12]) for batch in stream for row in batch.tokens]
    of_sums = [text.startswith("Question: What is") for text in beginnings]
    assert sum(of_sums) == pytest.approx(0.75 * len(of_sums), abs=1)


def test_validation_is_fixed_finite_and_repeats_no_row(prepared: Prepared, config: Config):
    first = take(99, prepared, config, split="validation")
    assert equal(first, take(99, prepared, config, split="validation"))
    available = len(rows(prepared, config, "validation"))
    assert len(first) == min(config.train.validation_batches, -(-available // config.train.batch))
    found = [document for batch in first for document in documents_of(batch)]
    assert len(found) == len(set(found)) > 0


def test_a_small_held_out_set_is_filled_up_with_empty_rows(one_source: Callable[..., Config]):
    config = one_source(sums(30, seed=1))
    many = dataclasses.replace(config, train=dataclasses.replace(config.train, batch=16, validation_batches=50))
    prepared = prepare(many)
    (only,) = take(99, prepared, many, split="validation")
    assert (only.segment_ids.max(axis=1) > 0).sum() == prepared.report["sources"]["sums"]["validation"]["rows"] < 16
    assert len(set(documents_of(only))) == len(documents_of(only)) == 20


def test_training_and_validation_share_no_prompt(prepared: Prepared, config: Config):
    def prompts(split: str, count: int) -> set[tuple[int, ...]]:
        return {
            tuple(row[(segments == s) & ~mask].tolist())
            for batch in take(count, prepared, config, split=split)
            for row, segments, mask in zip(batch.tokens, batch.segment_ids, batch.response_mask, strict=True)
            for s in range(1, segments.max() + 1)
        }

    assert prompts("train", 12).isdisjoint(prompts("validation", 99))


def test_flipped_bytes_in_the_records_name_the_folder_to_delete(one_source: Callable[..., Config]):
    config = one_source(sums(64, seed=1))
    prepared = prepare(config)
    record: Path = next(prepared.directory.rglob("*train.array_record*"))
    content = bytearray(record.read_bytes())
    content[200:6000] = bytes(5800)
    record.write_bytes(content)
    with pytest.raises(DataError, match=rf"damaged: delete the folder '{prepared.directory}'"):
        take(20, prepared, config)


def test_a_document_that_is_not_the_one_written_is_named(
    one_source: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
):
    config = one_source(sums(64, seed=1))
    prepared = prepare(config)
    source = PackedRows(prepared, "sums", "train", config.data.context, None)
    shard = source._shard(0)
    places = [find_row([len(source)], index, None) for index in range(len(source))]
    row = next(place.row for place in places if 7 in row_documents(shard.packing, place, None))
    stored = [shard.documents[i] for i in range(len(shard.documents))]
    source[row]
    for change in ({"tokens": stored[7]["tokens"][::-1].copy()}, {"response_start": 1}, {"checksum": 0}):
        changed = shard._replace(documents=[*stored[:7], stored[7] | change, *stored[8:]])
        monkeypatch.setattr(loader, "_open_shard", lambda *_, changed=changed: changed)
        with pytest.raises(DataError, match=rf"document 7 of sums/train .*delete the folder '{prepared.directory}'"):
            source[row]


def test_a_closed_iterator_leaves_no_thread(prepared: Prepared, config: Config):
    before = set(threading.enumerate())
    stream = batches(prepared, config, split="train")
    next(stream)
    started = set(threading.enumerate()) - before
    assert started
    stream.close()
    for thread in started:
        thread.join(timeout=10)
        assert not thread.is_alive()
