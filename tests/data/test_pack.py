"""Packing: rows that fit, epochs that hold every document once, permutations that are ones."""

from pathlib import Path

import numpy as np
import pytest

from dreamer_jax.data.pack import assign_rows, load_packing, pack_documents, permute, row_documents, save_packing

SIZE = 100


@pytest.fixture(scope="module")
def lengths() -> np.ndarray:
    return np.random.default_rng(3).integers(1, SIZE + 1, 500)


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
        rows = [row_documents(packing, epoch * packing.rows + row, seed) for row in range(packing.rows)]
        assert all(0 < lengths[row].sum() <= SIZE for row in rows)
        assert sorted(document for row in rows for document in row) == list(range(len(lengths)))


def test_epochs_and_seeds_differ_in_order_and_in_company():
    packing = pack_documents(np.random.default_rng(3).integers(10, 20, 500), SIZE)

    def epoch(number: int, seed: int) -> list[tuple[int, ...]]:
        return [tuple(row_documents(packing, number * packing.rows + row, seed)) for row in range(packing.rows)]

    first, second, other = epoch(0, 1), epoch(1, 1), epoch(0, 2)
    assert first == epoch(0, 1)
    for changed in (second, other):
        assert changed != first
        assert len({frozenset(row) for row in first} & {frozenset(row) for row in changed}) < packing.rows // 10


def test_the_order_of_the_rows_changes_with_the_epoch(lengths: np.ndarray):
    packing = pack_documents(lengths, SIZE)
    shapes = [
        [tuple(lengths[row_documents(packing, e * packing.rows + r, 1)]) for r in range(packing.rows)] for e in range(2)
    ]
    assert sorted(shapes[0]) == sorted(shapes[1])
    assert shapes[0] != shapes[1]


def test_rows_are_nearly_full():
    packing = pack_documents(np.random.default_rng(0).integers(5, 60, 5000), SIZE)
    assert packing.fill > 0.97
    assert packing.fill == pytest.approx(np.diff(packing.lengths) @ np.arange(SIZE + 1) / (packing.rows * SIZE))


def test_a_document_of_exactly_the_context_has_a_row_to_itself():
    packing = pack_documents(np.array([SIZE, SIZE, 1]), SIZE)
    assert sorted(len(row_documents(packing, row, 0)) for row in range(packing.rows)) == [1, 1, 1]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 100, 1000])
def test_permute_is_a_permutation(count: int):
    assert sorted(permute(index, count, 4, 2) for index in range(count)) == list(range(count))


def test_permute_sends_an_index_everywhere_alike():
    count, draws = 5, 2000
    found = np.array([[permute(index, count, 9, key) for index in range(count)] for key in range(draws)])
    for index in range(count):
        assert np.abs(np.bincount(found[:, index], minlength=count) / draws - 1 / count).max() < 0.05


def test_a_plan_survives_the_disk(lengths: np.ndarray, tmp_path: Path):
    packing = pack_documents(lengths, SIZE)
    save_packing(packing, tmp_path / "packing.npz")
    again = load_packing(tmp_path / "packing.npz")
    assert all(np.array_equal(a, b) for a, b in zip(packing, again, strict=True))
