"""Captures are written and read back, and every array says what its axes are."""

import csv
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest

from dreamer_jax.analysis.captures import AXES, AnalysisError, Captures, axes_of, load, table
from tests.analysis.planted_captures import planted, without


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


def changed(captures, **arrays):
    packed = io.BytesIO()
    np.savez(packed, **captures.arrays | arrays)
    return packed.getvalue()


@pytest.mark.parametrize(
    "damage", ["absent", "empty", "cut", "bits", "another array", "nothing about it", "other keys"]
)
def test_captures_that_cannot_be_read_are_named(captures, tmp_path, damage):
    captures.save(tmp_path)
    path = tmp_path / "captures.npz"
    whole = path.read_bytes()
    path.unlink()
    other = json.dumps({"run": None})
    content = {
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "bits": whole[:300] + bytes(200) + whole[500:],
        "another array": changed(captures, loads=np.zeros(3)),
        "nothing about it": changed(captures),
        "other keys": changed(captures, **{"captures.json": np.array(other)}),
    }
    if damage in content:
        path.write_bytes(content[damage])
    with pytest.raises(AnalysisError, match=re.escape(str(tmp_path)) + ".*analyze"):
        load(tmp_path)


def test_an_array_that_is_missing_is_named(captures):
    with pytest.raises(AnalysisError, match="the captures of 'dr_da' lack 'experts/ea/loads'"):
        Captures(captures.arrays, replace(captures.about, run="dr_da"))["experts/ea/loads"]


def test_tables_of_an_earlier_analysis_go_and_files_of_others_stay(captures, tmp_path):
    captures.save(tmp_path)
    (tmp_path / "csv" / "mine.csv").write_text("1")
    without(captures, "removal").save(tmp_path)
    names = {path.name for path in (tmp_path / "csv").iterdir()}
    assert "mine.csv" in names
    assert not any(name.startswith("removal") for name in names)
