"""`python -m dreamer_jax.analyze` on small random models, and the notebook."""

import json
from pathlib import Path

import numpy as np
import pytest

from dreamer_jax import analyze, convert
from dreamer_jax.analysis import report
from dreamer_jax.analysis.captures import load
from dreamer_jax.config import Config, DataConfig, TrainConfig
from dreamer_jax.data.tokenizer import train_sentencepiece
from dreamer_jax.training.checkpoint import save_model
from tests import oracle
from tests.models import changed, sizes_of, small

pytestmark = pytest.mark.xdist_group("analyze")
VOCAB = 300
NOTEBOOK = Path(__file__).parents[2] / "docs" / "analysis.ipynb"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "some.jsonl"
    rows = [{"question": f"What is {i} plus 30?", "answer": f"It is {30 + i} €."} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run that was not trained."""
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = folder / "tokenizer.model"
    tokenizer.write_bytes(train_sentencepiece(["Question: What is 12 plus 30?\nAnswer: It is 42 €."] * 4, VOCAB))
    model = changed(small("DR+DA"), vocab=VOCAB)
    weights = oracle.random_weights(sizes_of(model), seed=3, scale=0.3)
    config = Config(
        name="dr_da", out=str(folder), model=model, data=DataConfig(context=64), train=TrainConfig(dtype="float32")
    )
    save_model(folder / "dr_da", config, convert.build(model, weights), tokenizer)
    return folder


def call(*arguments):
    return analyze.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def analyzed(runs, data):
    assert call("--checkpoint", runs / "dr_da", "--data", data, "--removal-sequences", 2, "--batch", 2) == 0
    return runs


@pytest.fixture
def reported(monkeypatch):
    """What reports were asked for, in place of drawing them: (captures, folder)."""
    asked = []

    def write(captures, out):
        asked.append((captures, out))
        return out / "report.html"

    monkeypatch.setattr(report, "write", write)
    return asked


def test_an_analysis_stands_beside_the_checkpoint(analyzed):
    folder = analyzed / "dr_da" / "analysis" / "0"
    found = load(folder)
    assert (found.about.run, found.about.variant, found.about.source) == ("dr_da", "DR+DA", "some.jsonl")
    assert found.about.entries == {"da": "source depth"}
    assert found["experts/ea/counts"].sum() == found["tokens"] * 3 * 2
    assert found["attention/da/weight"].shape == (3, 2, 3)
    np.testing.assert_allclose(found["attention/da/weight"].sum(axis=-1), 1, rtol=1e-5)
    assert {path.name for path in folder.iterdir()} == {
        "captures.json",
        "captures.npz",
        "csv",
        "figures",
        "report.html",
    }
    names = {path.stem for path in (folder / "figures").iterdir()}
    assert {"figure_4_da", "figure_5_ea", "figure_6_ea", "figure_7_ea", "removals", "trajectories"} <= names


def test_runs_are_reported_side_by_side(analyzed, tmp_path, reported, capsys):
    given = analyzed / "dr_da", analyzed / "dr_da" / "analysis" / "0"
    assert call("--compare", *given, "--out", tmp_path) == 0
    [(captures, out)] = reported
    assert [one.about.run for one in captures] == ["dr_da", "dr_da"]
    assert out == tmp_path
    assert f"wrote {tmp_path / 'report.html'}" in capsys.readouterr().out


def test_another_depth_has_a_folder_of_its_own(analyzed, data, reported):
    run = analyzed / "dr_da"
    few = ("--sequences", 1, "--removal-sequences", 0, "--trace", "It is 42")
    assert call("--checkpoint", run, "--data", data, "--depth", 2, *few) == 0
    assert reported[0][1] == run / "analysis" / "0-depth2"
    found = load(run / "analysis" / "0-depth2")
    assert (found.about.depth, found.about.trained_depth, found.about.sequences) == (2, 3, 1)
    assert "removal/loss" not in found
    assert "".join(found["trajectory/token"].tolist()).endswith("42")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --checkpoint, or --compare RUN RUN"),
        (["--checkpoint", "{run}", "--compare", "{run}"], "give --checkpoint, or --compare"),
        (["--checkpoint", "{run}", "--sequences", "0"], "--sequences 0: must be at least 1"),
        (["--checkpoint", "{run}", "--removal-sequences", "-1"], "--removal-sequences -1"),
        (["--compare", "{run}"], "--compare needs two runs"),
        (["--compare", "{run}/checkpoints", "{run}"], "has no captures"),
        (["--checkpoint", "{run}", "--data", "{data}", "--depth", "0"], "at least one depth must run"),
    ],
)
def test_what_cannot_be_done_is_one_line(runs, data, arguments, message, capsys):
    given = [argument.format(run=runs / "dr_da", data=data) for argument in arguments]
    assert call(*given) == 1
    assert message in capsys.readouterr().err


def test_the_notebook_runs(runs, data, monkeypatch, tmp_path):
    monkeypatch.setenv("CHECKPOINT", str(runs / "dr_da"))
    monkeypatch.setenv("DATA", str(data))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert load(tmp_path / "captures").about.run == "dr_da"
