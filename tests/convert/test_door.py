"""`python -m dreamer_jax.convert`, there and back through a checkpoint."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from flax import nnx

from dreamer_jax import convert
from dreamer_jax.config import Config, DataConfig, to_json
from dreamer_jax.convert import parity
from dreamer_jax.convert.__main__ import main
from dreamer_jax.data.tokenizer import train_sentencepiece
from dreamer_jax.model.dreamer import Dreamer
from dreamer_jax.training.checkpoint import load_model, save_model
from tests import oracle
from tests.convert.hf.exports import float32
from tests.models import changed, sizes_of, small


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with one checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = folder / "tokenizer.model"
    tokenizer.write_bytes(train_sentencepiece(["What is 12 plus 30? It is 42."] * 4, 300))
    model = changed(small("DR+DA"), vocab=300)
    weights = convert.build(model, float32(oracle.random_weights(sizes_of(model), seed=2)))
    config = Config(name="run", out=str(folder), model=model, data=DataConfig(context=99, prompt_template="Q: {text}"))
    save_model(folder / "run", config, weights, tokenizer)
    return folder / "run"


def test_an_export_holds_the_checkpoints_weights_and_becomes_the_same_checkpoint(run, tmp_path, capsys):
    out, back = tmp_path / "export", tmp_path / "back"
    assert main(["--checkpoint", str(run), "--to", "safetensors", "--out", str(out), "--no-parity"]) == 0
    said = capsys.readouterr().out
    assert f"wrote {out}" in said
    assert "next: python -m dreamer_jax.convert --from safetensors" in said
    config, arrays, merged = convert.load_safetensors(out)
    original = load_model(run)
    assert config == original.config.model
    assert not merged
    for name, array in convert.named_arrays(original.model).items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)

    assert main(["--from", "safetensors", "--source", str(out), "--out", str(back), "--no-parity"]) == 0
    assert f"next: python -m dreamer_jax.generate --checkpoint {back}" in capsys.readouterr().out
    restored = load_model(back)
    assert restored.config == dataclasses.replace(original.config, name="back", out=str(tmp_path))
    assert restored.tokenizer_path.read_bytes() == original.tokenizer_path.read_bytes()
    for name, array in convert.named_arrays(restored.model).items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)


def test_a_merged_export_has_no_shared_experts_and_can_come_back(run, tmp_path, capsys):
    out, back = tmp_path / "export", tmp_path / "back"
    assert main(["--checkpoint", str(run), "--to", "safetensors", "--merged", "--out", str(out), "--no-parity"]) == 0
    _, arrays, merged = convert.load_safetensors(out)
    assert merged
    assert not any(name.endswith("_shared") for name in arrays)
    (out / "run.json").unlink()
    assert main(["--from", "safetensors", "--source", str(out), "--out", str(back), "--no-parity"]) == 0
    assert "shared experts of zero" in capsys.readouterr().err
    restored = convert.named_arrays(load_model(back).model)
    np.testing.assert_array_equal(restored["layer.sa.w_qkv"], arrays["layer.sa.w_qkv"])
    assert not np.asarray(restored["layer.sa.w_qkv_shared"]).any()


def test_an_export_for_transformers_has_all_that_it_loads_and_no_second_one_takes_its_place(run, tmp_path, capsys):
    given = ["--checkpoint", str(run), "--to", "hf", "--merged", "--out", str(tmp_path / "hf"), "--no-parity"]
    assert main(given) == 0
    said = capsys.readouterr().out
    assert "numbers of step 0 (merged), for transformers 5.19 and newer" in said
    assert f"not compared: python -m dreamer_jax.convert.hf.parity --checkpoint {run}" in said
    names = {"config.json", "generation_config.json", "model.safetensors", "modeling_dreamer.py", "tokenizer.json"}
    assert names <= {path.name for path in (tmp_path / "hf").iterdir()}
    assert json.loads((tmp_path / "hf/config.json").read_text())["merged"] is True
    assert main(given) == 1
    assert "is not empty; choose another --out" in capsys.readouterr().err


@pytest.mark.parametrize("merged", [False, True])
def test_what_went_out_for_transformers_becomes_the_same_checkpoint(merged, run, tmp_path, capsys):
    out, back = tmp_path / "hf", tmp_path / "back"
    assert main(["--checkpoint", str(run), "--to", "hf", *["--merged"] * merged, "--out", str(out), "--no-parity"]) == 0
    assert main(["--from", "hf", "--source", str(out), "--out", str(back), "--no-parity"]) == 0
    printed = capsys.readouterr()
    assert "the optimizer's state is new" in printed.out
    assert ("shared experts of zero" in printed.err) == merged
    original, restored = load_model(run), load_model(back)
    data = dataclasses.replace(original.config.data, tokenizer=str(back / "tokenizer/tokenizer.json"))
    assert restored.config == dataclasses.replace(original.config, name="back", out=str(tmp_path), data=data)
    assert restored.tokenizer_path.read_bytes() == (out / "tokenizer.json").read_bytes()
    expected = convert.named_arrays(original.model.merged() if merged else original.model)
    actual = convert.named_arrays(restored.model)
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array, err_msg=name)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A run at its beginning. Its logits are small, as a trained model's errors are beside its logits."""
    folder = tmp_path_factory.mktemp("fresh")
    config = Config(name="run", out=str(folder), model=small("DR+DA"))
    save_model(config.run_dir, config, Dreamer(config.model, nnx.Rngs(0)), None)
    return config.run_dir


@pytest.mark.parametrize("form", ["hf", "safetensors"])
def test_every_conversion_compares_what_the_model_computes_before_and_after(form, fresh, tmp_path, capsys):
    out, back = tmp_path / "out", tmp_path / "back"
    assert main(["--checkpoint", str(fresh), "--to", form, "--merged", "--out", str(out)]) == 0
    assert main(["--from", form, "--source", str(out), "--out", str(back)]) == 0
    said = capsys.readouterr().out
    assert said.count("  float32   logits ") == said.count("  bfloat16  logits ") == 2
    for folder in (out, back):
        figures = json.loads((folder / "parity.json").read_text())
        assert figures["float32"]["difference"] < 1e-5 < figures["bfloat16"]["difference"]


@pytest.mark.parametrize("form", ["hf", "safetensors"])
def test_an_export_that_computes_something_else_does_not_look_whole(form, fresh, tmp_path, capsys, monkeypatch):
    impossible = parity.Limits(difference=-1, kl=-1, top1=1, experts=1)
    monkeypatch.setitem(parity.LIMITS, "float32", impossible)
    assert main(["--checkpoint", str(fresh), "--to", form, "--out", str(tmp_path / "out")]) == 1
    assert "the conversion changes what the model computes: float32: logits" in capsys.readouterr().err
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_run_that_computes_something_else_does_not_stay(fresh, tmp_path, capsys, monkeypatch):
    out, back = tmp_path / "out", tmp_path / "back"
    given = ["--from", "safetensors", "--source", str(out), "--out", str(back)]
    assert main(["--checkpoint", str(fresh), "--to", "safetensors", "--out", str(out), "--no-parity"]) == 0
    with monkeypatch.context() as patched:
        patched.setitem(parity.LIMITS, "float32", parity.Limits(difference=-1, kl=-1, top1=1, experts=1))
        assert main(given) == 1
    assert not (back / "checkpoints").exists()
    assert main([*given, "--no-parity"]) == 0


def test_the_card_has_the_scores_of_the_checkpoint_and_not_of_others(fresh, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(fresh, run)
    for step, depth, value in ((0, 4, 0.25), (0, 8, 0.5), (2, 4, 0.75)):
        folder = run / "evaluation" / f"{step}-{depth}"
        folder.mkdir(parents=True)
        metric = {"value": value, "low": 0.2, "high": 0.9, "n": 1319, "chance": None}
        task = {"metrics": {"robust": metric}, "prompts": "0", "notes": {}, "limit": None, "complete": True}
        about = {"format": 1, "run": "run", "step": step, "tokens": 1, "depth": depth, "trained_depth": 4}
        scores = about | {"variant": "DR+DA", "parameters": 1, "tasks": {"gsm8k": task}}
        (folder / "scores.json").write_text(json.dumps(scores))
    assert main(["--checkpoint", str(run), "--to", "hf", "--out", str(tmp_path / "hf"), "--no-parity"]) == 0
    rows = [line for line in (tmp_path / "hf/README.md").read_text().splitlines() if "gsm8k" in line]
    assert rows == ["| gsm8k | robust | 0.25 | 0.2 to 0.9 | 1,319 |"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "OUT"], "do not go together"),
        (["--checkpoint", "RUN", "--to", "safetensors", "--dtype", "bfloat16", "--out", "OUT"], "go with --to hf"),
        (["--checkpoint", "RUN", "--to", "safetensors", "--stock", "--out", "OUT"], "go with --to hf"),
        (["--checkpoint", "RUN", "--to", "hf", "--stock", "--merged", "--out", "OUT"], "has nothing to merge"),
        (["--checkpoint", "RUN", "--to", "hf", "--stock", "--out", "OUT"], "--stock exports LA alone"),
        (["--source", "NOWHERE", "--from", "hf", "--out", "OUT"], "has no config.json: give a folder that --to hf"),
        (["--source", "OUT", "--from", "hf", "--out", "OUT"], "is --source, too; choose another --out"),
        (["--checkpoint", "RUN", "--from", "safetensors", "--out", "OUT"], "--from safetensors --source DIR"),
        (["--source", "OUT", "--from", "safetensors", "--merged", "--out", "OUT"], "do not go together"),
        (["--checkpoint", "NOWHERE", "--to", "safetensors", "--out", "OUT"], "is not a run folder"),
        (["--source", "NOWHERE", "--from", "safetensors", "--out", "OUT"], "has no config.json"),
    ],
)
def test_wrong_arguments_are_explained(arguments, message, run, tmp_path, capsys):
    paths = {"OUT": str(tmp_path / "out"), "RUN": str(run), "NOWHERE": str(tmp_path / "nowhere")}
    assert main([paths.get(word, word) for word in arguments]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.out == ""


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("file", "is a file; give a folder"),
        ("RUN", "is a run folder, or lies inside of one"),
        ("RUN/checkpoints/2", "is a run folder, or lies inside of one"),
        ("RUN/new/export", "is a run folder, or lies inside of one"),
        ("model", "holds a model that is no export of a run"),
        ("export", "has the export of the run 'another'"),
    ],
)
def test_an_export_overwrites_nothing_but_an_earlier_one_of_its_run(place, message, run, tmp_path, capsys):
    (tmp_path / "file").write_text("keep")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "export").mkdir()
    other = dataclasses.replace(load_model(run).config, name="another")
    (tmp_path / "export" / "run.json").write_text(to_json(other))
    before = sorted(str(path) for path in (*tmp_path.rglob("*"), *run.rglob("*")))
    out = place.replace("RUN", str(run)) if "RUN" in place else str(tmp_path / place)
    assert main(["--checkpoint", str(run), "--to", "safetensors", "--out", out]) == 1
    assert message in capsys.readouterr().err
    assert sorted(str(path) for path in (*tmp_path.rglob("*"), *run.rglob("*"))) == before


def test_a_folder_with_checkpoints_is_not_overwritten_and_a_missing_tokenizer_is_noted(run, tmp_path, capsys):
    assert main(["--checkpoint", str(run), "--to", "safetensors", "--out", str(tmp_path), "--no-parity"]) == 0
    assert main(["--from", "safetensors", "--source", str(tmp_path), "--out", str(run)]) == 1
    assert "has checkpoints already" in capsys.readouterr().err
    (tmp_path / "tokenizer.model").unlink()
    assert main(["--from", "safetensors", "--source", str(tmp_path), "--out", str(tmp_path / "x"), "--no-parity"]) == 0
    assert "the export has no tokenizer" in capsys.readouterr().err
    assert load_model(tmp_path / "x").tokenizer_path is None
