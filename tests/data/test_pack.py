"""Packing: rows that fit, epochs that hold every document once, permutations that are ones."""

from pathlib import Path

import numpy as np
import pytest

from dreamer_jax.data.pack import (
    Packing,
    assign_rows,
    find_row,
    load_packing,
    pack_documents,
    permute,
    row_documents,
    save_packing,
)

SIZE = 100
SHARDS = (200, 1, 180, 119)
"""Documents of each shard, where there are several."""
STREAM = {
    None: [[16, 28], [27, 20, 9], [8], [16, 28], [27, 20, 9], [27, 20, 9]],
    7: [[29, 40], [36], [1, 39], [24, 37], [13, 27], [29]],
    5 << 32 | 123456: [[13, 55], [54, 7], [6, 10], [36], [57], [16, 38]],
}
"""By seed: the documents of rows 0, 1, 2, 37, 38 and 10^9 of `few_lengths`, as they were before there were shards."""


@pytest.fixture(scope="module")
def lengths() -> np.ndarray:
    return np.random.default_rng(3).integers(1, SIZE + 1, 500)


def few_lengths() -> np.ndarray:
    return np.array([5 + (i * i * 7 + i * 3) % 28 for i in range(60)])


def row(packing: Packing, index: int, seed: int | None) -> list[int]:
    """Documents of a row of the endless stream over one shard."""
    return row_documents(packing, find_row([packing.rows], index, seed), seed)


def epoch_of_shards(packings: list[Packing], epoch: int, seed: int | None) -> list[list[tuple[int, int]]]:
    """The rows of an epoch over several shards, each document as (shard, index in it)."""
    ends = np.cumsum([packing.rows for packing in packings]).tolist()
    places = [find_row(ends, epoch * ends[-1] + index, seed) for index in range(ends[-1])]
    return [[(p.shard, document) for document in row_documents(packings[p.shard], p, seed)] for p in places]


def best_fit_by_search(lengths: list[int], size: int) -> list[int]:
    """The packer's definition: of the rows with room take the fullest; ties go to the latest brought to that level."""
    space: list[int] = []
    touched: list[int] = []
    assigned = []
    for time, length in enumerate(lengths):
        roomy = [row for row in range(len(space)) if space[row] >= length]
        if roomy:
            row = min(roomy, key=lambda row: (space[row], -touched[row]))
        else:
            row = len(space)
            space.append(size)
            touched.append(0)
        space[row] -= length
        touched[row] = time
        assigned.append(row)
    return assigned


def test_packing_is_best_fit(lengths: np.ndarray):
    assert assign_rows(lengths.tolist(), SIZE) == best_fit_by_search(lengths.tolist(), SIZE)


@pytest.mark.parametrize("seed", [None, 7])
def test_every_epoch_holds_each_document_once_in_rows_that_fit(lengths: np.ndarray, seed: int | None):
    packing = pack_documents(lengths, SIZE)
    for epoch in range(3):
        rows = [row(packing, epoch * packing.rows + index, seed) for index in range(packing.rows)]
        assert all(0 < lengths[documents].sum() <= SIZE for documents in rows)
        assert sorted(document for documents in rows for document in documents) == list(range(len(lengths)))


@pytest.mark.parametrize("seed", STREAM)
def test_the_stream_of_one_shard_is_what_it_was_before_there_were_shards(seed: int | None):
    packing = pack_documents(few_lengths(), 32)
    assert packing.rows == 37
    assert [row(packing, index, seed) for index in (0, 1, 2, 37, 38, 10**9)] == STREAM[seed]


@pytest.fixture(scope="module")
def shards(lengths: np.ndarray) -> list[Packing]:
    return [pack_documents(part, SIZE) for part in np.split(lengths, np.cumsum(SHARDS)[:-1])]


@pytest.mark.parametrize("seed", [None, 7])
def test_every_epoch_over_shards_holds_each_document_once_in_rows_that_fit(
    lengths: np.ndarray, shards: list[Packing], seed: int | None
):
    firsts = np.cumsum((0, *SHARDS))
    for epoch in range(3):
        rows = [[firsts[shard] + i for shard, i in found] for found in epoch_of_shards(shards, epoch, seed)]
        assert all(0 < lengths[documents].sum() <= SIZE for documents in rows)
        assert sorted(document for documents in rows for document in documents) == list(range(len(lengths)))


def test_the_rows_of_all_shards_are_mixed_and_without_a_seed_they_are_in_order(shards: list[Packing]):
    in_order = [found[0][0] for found in epoch_of_shards(shards, 0, None)]
    assert in_order == sorted(in_order)
    mixed = [found[0][0] for found in epoch_of_shards(shards, 0, 7)]
    assert np.count_nonzero(np.diff(mixed)) > len(mixed) // 2


def test_shards_alike_are_dealt_differently():
    packings = [pack_documents(np.full(200, 25), SIZE)] * 2
    rows = epoch_of_shards(packings, 0, 7)
    first, second = ({frozenset(i for _, i in found) for found in rows if found[0][0] == shard} for shard in (0, 1))
    assert len(first) == len(second) == 50
    assert len(first & second) < 5


def test_a_document_longer_than_a_row_is_in_none(lengths: np.ndarray):
    packing = pack_documents(lengths, 60)
    documents = [document for index in range(packing.rows) for document in row(packing, index, 3)]
    assert sorted(documents) == np.flatnonzero(lengths <= 60).tolist()
    assert packing.tokens == lengths[lengths <= 60].sum()


def test_a_shard_without_a_row_is_never_chosen(lengths: np.ndarray):
    packings = [pack_documents(np.array([SIZE + 1]), SIZE), pack_documents(lengths, SIZE)]
    assert packings[0].rows == 0
    assert {shard for found in epoch_of_shards(packings, 0, 7) for shard, _ in found} == {1}


def test_epochs_and_seeds_differ_in_order_and_in_company():
    packing = pack_documents(np.random.default_rng(3).integers(10, 20, 500), SIZE)

    def epoch(number: int, seed: int) -> list[tuple[int, ...]]:
        return [tuple(row(packing, number * packing.rows + index, seed)) for index in range(packing.rows)]

    first, second, other = epoch(0, 1), epoch(1, 1), epoch(0, 2)
    assert first == epoch(0, 1)
    for changed in (second, other):
        assert changed != first
        assert len(set(map(frozenset, first)) & set(map(frozenset, changed))) < packing.rows // 10


def test_the_order_of_the_rows_changes_with_the_epoch(lengths: np.ndarray):
    packing = pack_documents(lengths, SIZE)
    shapes = [[tuple(lengths[row(packing, e * packing.rows + r, 1)]) for r in range(packing.rows)] for e in range(2)]
    assert sorted(shapes[0]) == sorted(shapes[1])
    assert shapes[0] != shapes[1]


def test_rows_are_nearly_full():
    packing = pack_documents(np.random.default_rng(0).integers(5, 60, 5000), SIZE)
    assert packing.fill > 0.97
    assert packing.fill == pytest.approx(np.diff(packing.lengths) @ np.arange(SIZE + 1) / (packing.rows * SIZE))


def test_a_document_of_exactly_the_context_has_a_row_to_itself():
    packing = pack_documents(np.array([SIZE, SIZE, 1]), SIZE)
    assert sorted(len(row(packing, index, 0)) for index in range(packing.rows)) == [1, 1, 1]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 100, 1000])
def test_permute_is_a_permutation(count: int):
    assert sorted(permute(index, count, 4, 2) for index in range(count)) == list(range(count))


def test_permute_sends_an_index_everywhere_alike():
    count, draws = 5, 2000
    found = np.array([[permute(index, count, 9, key) for index in range(count)] for key in range(draws)])
    for index in range(count):
        assert np.abs(np.bincount(found[:, index], minlength=count) / draws - 1 / count).max() < 0.05


@pytest.mark.parametrize("size", [SIZE, 60, 1])
def test_a_plan_survives_the_disk_and_stays_there(lengths: np.ndarray, tmp_path: Path, size: int):
    packing = pack_documents(lengths, size)
    save_packing(packing, tmp_path / "packing.npy")
    again = load_packing(tmp_path / "packing.npy")
    assert all(np.array_equal(a, b) for a, b in zip(packing, again, strict=True))
    assert {array.dtype for array in again} == {np.dtype(np.int32)}
    assert not again.slots.flags.owndata
    assert not again.slots.flags.writeable


@pytest.mark.parametrize("content", [np.arange(9, dtype=np.int32), np.zeros(4), np.int32([1, 3, 1, 1, 0, 0, 0, 1])])
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, content: np.ndarray):
    np.save(tmp_path / "packing.npy", content)
    with pytest.raises(ValueError, match=r"packing\.npy' is no packing"):
        load_packing(tmp_path / "packing.npy")
