"""`python -m dreamer_jax.evaluate` on a small random model, and benchmarks along a training."""

import dataclasses
import json

import pytest

from dreamer_jax import convert, evaluate
from dreamer_jax import train as train_door
from dreamer_jax.config import CheckpointConfig, Config, ConfigError, DataConfig, TrainConfig
from dreamer_jax.data.tokenizer import train_sentencepiece
from dreamer_jax.evaluation.requests import EvaluationError
from dreamer_jax.training.checkpoint import save_model
from tests import oracle
from tests.models import changed, sizes_of, small
from tests.training.shared import train
from tests.training.toy import REFERENCE, toy_config, with_model

pytestmark = pytest.mark.xdist_group("evaluate")
VOCAB = 300


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three questions of GSM8K's layout and two texts."""
    root = tmp_path_factory.mktemp("data")
    questions = [{"question": f"What is {i} plus 30?", "answer": f"It is {30 + i}.\n#### {30 + i}"} for i in range(3)]
    write_rows(root / "gsm8k" / "test.jsonl", questions)
    write_rows(root / "ppl" / "some.jsonl", [{"text": "It is 42 €. " * n} for n in (1, 9)])
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = folder / "tokenizer.model"
    tokenizer.write_bytes(train_sentencepiece(["Question: What is 12 plus 30?\nAnswer: It is 42 €."] * 4, VOCAB))
    model = changed(small("DR+DA"), vocab=VOCAB)
    config = Config(
        name="run",
        out=str(folder),
        model=model,
        data=DataConfig(context=64, prompt_template="Asked: {text}\nSaid:"),
        train=TrainConfig(dtype="float32"),
    )
    save_model(folder / "run", config, convert.build(model, oracle.random_weights(sizes_of(model), 3, 0.3)), tokenizer)
    return folder / "run"


def call(*arguments):
    return evaluate.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def evaluated(run, data):
    """Evaluated at its depth, and on texts at another."""
    assert call("--checkpoint", run, "--data", data, "--tasks", "gsm8k,ppl") == 0
    assert call("--checkpoint", run, "--data", data, "--tasks", "ppl", "--depth", 3, "--depth", 2) == 0
    return run / "evaluation"


def scores(folder):
    return json.loads((folder / "scores.json").read_text())


def test_scores_and_items_stand_beside_the_checkpoint(evaluated):
    found = scores(evaluated / "0")
    assert (found["run"], found["step"], found["depth"], found["trained_depth"]) == ("run", 0, 3, 3)
    assert list(found["tasks"]) == ["gsm8k", "ppl"]
    assert found["tasks"]["gsm8k"]["metrics"]["robust"]["n"] == 3
    assert 30 < found["tasks"]["ppl"]["metrics"]["perplexity"]["value"] < 3000
    items = (evaluated / "0" / "items.jsonl").read_text().splitlines()
    prompts = {json.loads(line)["request"].get("prompt") for line in items}
    assert len(items) == 5
    assert prompts == {None, *(f"Asked: What is {i} plus 30?\nSaid:" for i in range(3))}


def test_another_depth_has_a_folder_and_scores_of_its_own(evaluated):
    other = scores(evaluated / "0-depth2")
    assert other["depth"] == 2
    assert other["tasks"]["ppl"]["prompts"] == scores(evaluated / "0")["tasks"]["ppl"]["prompts"]
    values = [found["tasks"]["ppl"]["metrics"]["perplexity"]["value"] for found in (other, scores(evaluated / "0"))]
    assert values[0] != values[1]


def test_depth_positions_can_be_scaled_for_an_evaluation(evaluated, run, data):
    """At another depth than the trained one; the results stand apart from those of the model as it was trained."""
    asked = ["--checkpoint", run, "--data", data, "--tasks", "ppl", "--depth", 2, "--depth-rope-scaling"]
    assert call(*asked, "True") == 0
    scaled, plain = scores(run / "evaluation-scaled" / "0-depth2"), scores(evaluated / "0-depth2")
    assert (scaled["depth_rope_scaling"], plain["depth_rope_scaling"]) == (True, None)
    assert scaled["weights"] == plain["weights"]
    values = [found["tasks"]["ppl"]["metrics"]["perplexity"]["value"] for found in (scaled, plain)]
    assert values[0] != values[1]
    assert call(*asked, "False") == 0, "as it was trained"
    assert not (run / "evaluation-unscaled").exists()


def test_a_finished_evaluation_is_reported_and_not_repeated(evaluated, run, data, capsys, monkeypatch):
    from dreamer_jax.evaluation import respondent

    monkeypatch.setattr(respondent.Respondent, "respond", lambda self, requests: iter(()))
    assert call("--checkpoint", run, "--data", data, "--tasks", "gsm8k,ppl") == 0
    printed = capsys.readouterr().out
    assert "perplexity" in printed
    assert f"wrote {evaluated / '0'}" in printed
    assert "next: python -m dreamer_jax.evaluate --compare" in printed


def test_the_benchmarks_own_solutions_can_be_scored(data, capsys):
    assert call("--gold", "--data", data, "--tasks", "gsm8k,ppl") == 0
    assert "robust           gold 1.0000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "gsm8"], "unknown task 'gsm8'; did you mean 'gsm8k'"),
        (["--tasks", " ,"], "no task is named; there are ppl, gsm8k"),
        (["--tasks", "gsm8k,math"], "math/test.jsonl"),
        (["--tasks", "gsm8k", "--limit", "0"], "--limit 0: must be at least 1"),
        (["--tasks", "gsm8k", "--depth", "0"], "at least one depth must run"),
        (["--tasks", "gsm8k", "--all", "--out", "x"], "leave --out away"),
        (["--tasks", "ppl", "--text", "nowhere.jsonl"], "nowhere.jsonl"),
        (
            ["--tasks", "ppl", "--out", "OUT", "--context", "32", "--stride", "32"],
            "is at least 1 and below the context",
        ),
    ],
)
def test_requests_that_cannot_be_met_end_with_one_line(run, data, arguments, message, capsys, tmp_path):
    arguments = [str(tmp_path) if argument == "OUT" else argument for argument in arguments]
    assert call("--checkpoint", run, "--data", data, *arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error


@pytest.mark.parametrize(
    ("arguments", "message"), [([], "give --data"), (["--data", "."], "give --checkpoint and --data, or --compare")]
)
def test_a_command_without_its_object_says_what_is_missing(arguments, message, capsys):
    assert call(*arguments) == 1
    assert message in capsys.readouterr().err


def test_a_checkpoint_without_a_tokenizer_is_refused(run, data, tmp_path, capsys):
    model = changed(small("DR"), vocab=VOCAB)
    weights = oracle.random_weights(sizes_of(model), 3, 0.3)
    save_model(
        tmp_path / "bare", Config(name="bare", out=str(tmp_path), model=model), convert.build(model, weights), None
    )
    assert call("--checkpoint", tmp_path / "bare", "--data", data, "--tasks", "gsm8k") == 1
    assert "has no tokenizer" in capsys.readouterr().err


def fail(snapshot):
    raise EvaluationError("no time")


def test_benchmarks_along_a_training_are_in_its_records_and_leave_it_as_it_is(data, tmp_path, capsys):
    config = with_model(toy_config(tmp_path, steps=4), depth=1, depth_recurrent=False, mixture=("sa", "ea"))
    checkpoint = CheckpointConfig(every=1, keep=1, keep_every=2)
    config = dataclasses.replace(config, checkpoint=checkpoint, kernels=REFERENCE)
    asked = {"evaluate_every": 2, "evaluate_data": str(data), "evaluate_tasks": "ppl", "evaluate_limit": 2}
    with_benchmarks = changed(dataclasses.replace(config, name="asked"), train=asked)
    summary = train(with_benchmarks, look=train_door.benchmarks(with_benchmarks))
    failing = train(dataclasses.replace(with_benchmarks, name="failing"), look=fail)
    assert "step 2: not evaluated: no time" in capsys.readouterr().err
    assert summary.train_loss == failing.train_loss
    lines = [json.loads(line) for line in (with_benchmarks.run_dir / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line for line in lines if "evaluate/ppl/perplexity" in line}
    assert sorted(found) == [2, 4]
    low, high = (found[4][f"evaluate/ppl/perplexity_{end}"] for end in ("low", "high"))
    assert low < found[4]["evaluate/ppl/perplexity"] < high
    assert found[2]["evaluate/ppl/nats_per_token"] != found[4]["evaluate/ppl/nats_per_token"]
    kept = sorted(int(path.name) for path in (with_benchmarks.run_dir / "checkpoints").iterdir())
    assert kept == [2, 4]


def test_benchmarks_along_a_training_are_asked_in_the_layout_of_the_run(data, tmp_path):
    asked = {"evaluate_every": 2, "evaluate_data": str(data), "evaluate_tasks": "gsm8k", "evaluate_limit": 1}
    config = changed(toy_config(tmp_path), train=asked, data={"prompt_template": "Asked: {text}\nSaid:"})
    [(_, [item])] = train_door.benchmarks(config).asked
    assert item.request.prompt == "Asked: What is 0 plus 30?\nSaid:"


def test_benchmarks_whose_files_are_missing_cost_no_training(tmp_path):
    asked = {"evaluate_every": 2, "evaluate_data": str(tmp_path), "evaluate_tasks": "gsm8k"}
    with pytest.raises(EvaluationError, match=r"gsm8k/test\.jsonl"):
        train_door.benchmarks(changed(toy_config(tmp_path), train=asked))
    with pytest.raises(ConfigError, match=r"train\.evaluate_every = 2 needs train\.evaluate_data"):
        changed(toy_config(tmp_path), train={"evaluate_every": 2})
    with pytest.raises(ConfigError, match=r"checkpoint\.keep_every = 3 is not a multiple of checkpoint\.every = 2"):
        CheckpointConfig(every=2, keep_every=3)
