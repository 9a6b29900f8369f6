"""Captures are written and read back, and every array says what its axes are."""

import csv
import json

import numpy as np
import pytest

from dreamer_jax.analysis.captures import AXES, AnalysisError, axes_of, load, table
from tests.analysis.planted_captures import planted


@pytest.fixture
def captures():
    return planted("DR+DA")


def test_captures_are_read_back(captures, tmp_path):
    captures.save(tmp_path)
    found = load(tmp_path)
    assert found.about == captures.about
    assert found.arrays.keys() == captures.arrays.keys()
    for name, array in captures.arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def test_every_array_has_as_many_axes_as_it_says(captures):
    for name, array in captures.arrays.items():
        assert array.ndim == len(axes_of(name)), name


def test_tables_have_a_row_for_every_number(captures, tmp_path):
    captures.save(tmp_path)
    for name, array in captures.arrays.items():
        lines = (tmp_path / "csv" / f"{name.replace('/', '.')}.csv").read_text().splitlines()
        assert lines[0] == ",".join([*axes_of(name), "value"])
        assert len(list(csv.reader(lines))) == array.size + 1
    rows = csv.DictReader((tmp_path / "csv" / "experts.ea.counts.csv").read_text().splitlines())
    counts = captures["experts/ea/counts"]
    assert all(int(row["value"]) == counts[int(row["depth"]), int(row["expert"])] for row in rows)


def test_a_number_without_axes_is_one_row():
    assert table(np.array(1.5), ()) == "value\n1.5\n"


def test_names_are_those_that_stand_for_the_star(captures):
    assert sorted(captures.names("experts/*/counts")) == ["da", "ea", "sa"]
    assert "experts/sa/together" not in captures


def test_an_array_without_a_name_in_the_list_is_refused():
    assert "experts/*/counts" in AXES
    with pytest.raises(AnalysisError, match="captures have no array 'experts/ea/loads'"):
        axes_of("experts/ea/loads")


@pytest.mark.parametrize("damage", ["absent", "cut", "other keys"])
def test_captures_that_cannot_be_read_are_named(captures, tmp_path, damage):
    captures.save(tmp_path)
    if damage == "absent":
        (tmp_path / "captures.npz").unlink()
    elif damage == "cut":
        whole = (tmp_path / "captures.npz").read_bytes()
        (tmp_path / "captures.npz").write_bytes(whole[: len(whole) // 2])
    else:
        (tmp_path / "captures.json").write_text(json.dumps({"runs": 1}))
    with pytest.raises(AnalysisError, match="analyze"):
        load(tmp_path)
