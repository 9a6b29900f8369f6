"""The public face: what README shows in a notebook, and what a user with weights of their own needs."""

import operator
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

import dreamer_jax as dj
from dreamer_jax import convert
from dreamer_jax.model.dreamer import TokenError
from dreamer_jax.training.checkpoint import CheckpointError
from tests.models import SMALL, changed
from tests.training.shared import train
from tests.training.toy import toy_config

README = Path(__file__).parents[1] / "README.md"
IDS = np.array([[3, 1, 4, 1, 5, 9, 2, 6]], np.int32)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = toy_config(tmp_path_factory.mktemp("face"), steps=2)
    return train(config).config.run_dir


def readme_block(mark: str) -> str:
    found = re.search(rf"<!-- {mark} -->\n```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert found, f"README.md has no python block marked <!-- {mark} -->"
    return found[1]


@pytest.mark.xdist_group("face")
def test_what_readme_shows_runs(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(readme_block("library"), "README.md", "exec"), names)
    lm = names["lm"]
    assert isinstance(lm, dj.LanguageModel)
    assert isinstance(lm.answer("What is 1 + 2?", max_tokens=4), str)


@pytest.mark.xdist_group("face")
def test_a_question_is_put_as_the_documents_of_its_run_were(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dj.LanguageModel, "generate", lambda self, prompt: [prompt])
    lm = dj.load(run)
    other = replace(lm, run=changed(lm.run, data={"prompt_template": "Q: {text}\nA:"}))
    assert (lm.answer("1?"), other.answer("1?")) == ("Question: 1?\nAnswer:", "Q: 1?\nA:")
    assert replace(lm, run=None).answer("1?") == "Question: 1?\nAnswer:"


@pytest.mark.xdist_group("face")
def test_a_run_and_its_export_give_the_same_logits(run: Path, tmp_path: Path) -> None:
    lm = dj.load(run)
    convert.save_safetensors(tmp_path, lm.config, lm.weights)
    chex.assert_trees_all_equal(dj.load(tmp_path).logits(IDS), lm.logits(IDS))


@pytest.mark.xdist_group("face")
def test_text_and_its_ids_give_the_same_answers(run: Path) -> None:
    lm = dj.load(run)
    [text] = lm.generate("What is", max_tokens=5)
    [ids] = lm.generate(lm.tokens("What is"), max_tokens=5)
    assert lm.tokenizer is not None
    assert lm.tokenizer.decode(ids) == text
    assert len(lm.generate(["What is", "And"], max_tokens=2)) == 2


def test_a_model_of_arrays_is_the_model_that_they_came_from() -> None:
    new = dj.build(SMALL, seed=1)
    again = dj.build(SMALL, new.weights)
    chex.assert_trees_all_equal(again.logits(IDS), new.logits(IDS))
    assert not np.array_equal(dj.build(SMALL, seed=2).logits(IDS), new.logits(IDS))


def test_any_depth_can_be_asked_for() -> None:
    lm = dj.build(SMALL)
    chex.assert_trees_all_equal(lm.logits(IDS, depth=SMALL.depth), lm.logits(IDS))
    deeper = lm.inspect(IDS, depth=SMALL.depth + 2)
    assert deeper.capture.hidden.shape[0] == SMALL.depth + 3
    chex.assert_trees_all_close(deeper.logits, lm.logits(IDS, depth=SMALL.depth + 2), rtol=2e-5, atol=2e-5)


def test_inspection_shows_everything_that_a_depth_computes() -> None:
    capture = dj.build(SMALL).inspect(IDS).capture
    L, T, D, E, M = SMALL.depth, IDS.shape[1], SMALL.width, SMALL.ea.experts, SMALL.linear_experts
    shapes = {
        "hidden": (L + 1, 1, T, D),
        "updates": {name: (L, 1, T, D) for name in ("sa", "da", "ea")},
        "router_logits": {"sa": (L, 1, T, M), "da": (L, 1, T, M), "ea": (L, 1, T, E)},
        "counts": {"sa": (L, M), "da": (L, M), "ea": (L, E)},
    }
    for name, expected in shapes.items():
        assert jax.tree.map(lambda a: a.shape, getattr(capture, name)) == expected, name
    for name, counts in capture.counts.items():
        chex.assert_trees_all_equal(counts.sum(axis=1), np.full(L, T * capture.experts[name].shape[-1]))
    x, steps = capture.hidden[0], sum(update[0] for update in capture.updates.values())
    assert x.shape == steps.shape


def test_inspection_needs_tokens_alone() -> None:
    lm = dj.build(SMALL)
    positions, one = np.arange(8, dtype=np.int32)[None], np.ones((1, 8), np.int32)
    chex.assert_trees_all_equal(
        convert.inspect(lm.model, IDS).logits, convert.inspect(lm.model, IDS, positions, one).logits
    )


@pytest.mark.parametrize("wrong", [-1, SMALL.vocab])
def test_an_id_outside_of_the_vocabulary_is_an_error(wrong: int) -> None:
    lm, ids = dj.build(SMALL), [1, wrong]
    with pytest.raises(TokenError, match=f"token id {wrong} is not in the model's vocabulary"):
        lm.logits(ids)
    with pytest.raises(TokenError, match=f"token id {wrong}"):
        convert.inspect(lm.model, np.array([ids], np.int32))
    with pytest.raises(TokenError, match=f"token id {wrong}"):
        lm.generate(ids)


def test_text_without_a_tokenizer_is_an_error() -> None:
    with pytest.raises(ValueError, match="no tokenizer: give token ids"):
        dj.build(SMALL).logits("What is")


@pytest.mark.xdist_group("face")
def test_training_starts_from_arrays_without_a_tokenizer_file(tmp_path: Path) -> None:
    config = toy_config(tmp_path, steps=1)
    given = dj.build(config.model, seed=5)
    folder = given.save(config.run_dir, config)
    assert not list((folder / "tokenizer").iterdir())
    chex.assert_trees_all_equal(dj.load(folder).weights, given.weights)
    summary = train(config)
    assert summary.step == 1
    trained = dj.load(folder)
    assert trained.tokenizer is not None
    change = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), trained.weights, given.weights)
    assert 0 < max(change.values()) < 0.1  # one step away from the given weights, not from others


def test_a_merged_model_is_not_saved_for_training(tmp_path: Path) -> None:
    lm = dj.build(SMALL)
    with pytest.raises(ValueError, match="cannot be trained"):
        dj.LanguageModel(lm.model.merged(), lm.compute).save(tmp_path / "run")
    lm.save(tmp_path / "run")
    with pytest.raises(CheckpointError, match="has checkpoints already"):
        lm.save(tmp_path / "run")


def test_importing_the_package_imports_nothing_else() -> None:
    program = "import sys, dreamer_jax as dj; dj.ModelConfig; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
    with pytest.raises(AttributeError, match="it has Compute, Config, LanguageModel"):
        operator.attrgetter("nothing")(dj)
