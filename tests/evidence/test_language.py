"""The comparison on mathematics in words: what is compared, on what, and what the report says of it."""

import argparse
import dataclasses
import json
import types

import pytest

from benchmarks.evidence.findings import FINAL, Finding
from benchmarks.evidence.language import report, setup, worker
from benchmarks.evidence.language.__main__ import main
from benchmarks.evidence.language.held_out import written_texts
from benchmarks.evidence.language.setup import (
    ABLATIONS,
    MAIN,
    VARIANTS,
    Plan,
    config_of,
    pilots_of,
    run_of,
    runs_of,
    sized,
)
from dreamer_jax import analyze, evaluate
from dreamer_jax.accounting.match import TOLERANCE
from dreamer_jax.accounting.params import parameters
from dreamer_jax.config import ConfigError, DepthAttentionConfig, ExpertAttentionConfig, SequenceAttentionConfig
from dreamer_jax.evaluation.requests import EvaluationError
from dreamer_jax.training import loop

PLAN = Plan(steps=4, ablation_steps=2, every=2)


@pytest.fixture
def data(tmp_path):
    """A folder of questions; three held-out questions of each file are in a training, too, one in the other file's."""
    for name, prompt, response in (("gsm8k", "question", "answer"), ("math", "problem", "solution")):
        (tmp_path / name).mkdir()
        held_out = "test" if name == "gsm8k" else "math500"
        for split, numbers in (("train", range(40)), (held_out, range(38, 48))):
            asked = [f"What is {n} + {n}?" if n < 47 else f"Of {name}?" for n in numbers]
            asked += [f"Of {other}?" for other in ("gsm8k", "math") if other != name and split == "train"]
            rows = [{prompt: text, response: f"<<{len(text)}>>It is {len(text)}."} for text in asked]
            (tmp_path / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


# What is compared.


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_costs_what_la_does(name):
    cost, la = sized(Plan(), name), sized(Plan(), "LA").model
    assert max(abs(cost.flops), abs(cost.parameters)) <= TOLERANCE
    assert parameters(cost.model).total == pytest.approx(parameters(la).total, rel=TOLERANCE)


def test_runs_of_a_seed_differ_in_their_models_depths_and_ends_alone(tmp_path):
    first, *others = (config_of(PLAN, run_of(name, 0), tmp_path, tmp_path) for name in VARIANTS)
    for variant, config in zip((*MAIN, *ABLATIONS)[1:], others, strict=True):
        train = dataclasses.replace(first.train, depths=variant.depths, steps=config.train.steps)
        assert dataclasses.replace(first, name=config.name, model=config.model, train=train) == config
    assert [config.train.steps for config in others] == [4, 4, 2, 2, 2, 2, 2, 2]


def test_main_variants_of_all_seeds_come_before_the_ablations_of_the_lowest():
    names = [run.name for run in runs_of([3, 4], ["LA", "DR", "LA+DA"])]
    assert names == ["LA-w128-s3", "DR-w128-s3", "LA-w128-s4", "DR-w128-s4", "LA+DA-w128-s3"]
    with pytest.raises(ConfigError, match=r"--variants 'DR\+\+DA': there are LA, DR, "):
        runs_of([0], ["DR++DA"])


def test_pilots_are_of_the_main_variants():
    names = [run.name for run in pilots_of(["DR", "LA+DA"])]
    assert names == [f"DR-w128-s0-rate{rate}" for rate in ("0.0003", "0.001", "0.003")]
    with pytest.raises(ConfigError, match=r"--pilot is for the main variants: LA, DR, DR\+DA"):
        pilots_of(["LA+DA"])


def test_a_folder_without_the_files_is_told_of_in_a_line(tmp_path, capsys):
    assert main(["--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert f"--data '{tmp_path}' has no gsm8k/train.jsonl" in capsys.readouterr().err


def test_held_out_texts_ask_nothing_of_the_training(data, tmp_path):
    config = config_of(PLAN, run_of("LA", 0), data, tmp_path)
    sources = config.data.sources[:2]
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))
    for path in written_texts(config, tmp_path / "texts"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert [row["instruction"] for row in rows] == [f"What is {n} + {n}?" for n in range(40, 47)]
        assert rows[0]["output"] == "It is 16." if path.stem == "gsm8k" else "<<16>>It is 16."
    others = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources[:1]))
    assert written_texts(others, tmp_path / "texts")[0].parent != path.parent


# What the report says.


def finished(name, out, losses, nats, *, seed=0, step=4):
    """A run with these held-out losses along the training and nats of documents of ten tokens at the end.

    Of step 2 each document has one nat more, if the run goes on after it.
    """
    run = run_of(name, seed)
    for at in {2, step}:
        folder = out / run.name / "evaluation" / str(at)
        folder.mkdir(parents=True)
        scores = [{"nats": n + (at < step), "tokens": 10.0, "bytes": 30.0} for n in nats]
        items = [{"task": "ppl", "id": f"gsm8k.jsonl/{i}", "scores": score} for i, score in enumerate(scores)]
        (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    records = [{"step": 2 * i, report.LOSS: loss, "router/ea/gini": 0.25} for i, loss in enumerate(losses, 1)]
    return Finding(run, records, {"steps": step}, None)


def test_losses_are_compared_document_by_document(tmp_path):
    found = [
        finished("LA", tmp_path, (3.0, 2.0), (20.0, 30.0, 10.0)),
        finished("DR", tmp_path, (2.0, 1.5), (19.0, 29.0, 9.0)),
    ]
    table = report._losses(["LA", "DR"], "LA", found, tmp_path, 4)
    assert "| LA | 0 | 2.0000 | 2.0000 |" in table
    assert "| DR | 0 | 1.9000, -0.1000 (-0.1000 to -0.1000) |" in table


def test_a_run_that_was_asked_of_other_documents_is_refused(tmp_path):
    found = [finished("LA", tmp_path, (3.0,), (20.0, 30.0)), finished("DR", tmp_path, (2.0,), (19.0,))]
    with pytest.raises(EvaluationError, match="other held-out texts"):
        report._losses(["LA", "DR"], "LA", found, tmp_path, 4)


def test_data_efficiency_is_told_of_finished_baselines(tmp_path):
    baseline = finished("LA", tmp_path, (4.0, 3.0), (20.0,))
    ours = finished("DR", tmp_path, (3.0, 2.0), (20.0,))
    assert report._efficiency([baseline, ours], ours) == "≥ 2.0"
    assert report._efficiency([baseline._replace(final=None), ours], ours) == "-"


def test_data_efficiency_is_told_of_the_main_variants_alone(tmp_path):
    found = [
        finished("LA", tmp_path, (4.0, 3.0), (20.0, 30.0)),
        finished("DR", tmp_path, (3.0, 2.0), (20.0, 30.0)),
        finished("LA+DA", tmp_path, (3.5, 3.0), (20.0, 30.0), step=2),
    ]
    rows = report._efficiency_and_routers(found).splitlines()
    assert [row.split("|")[3].strip() for row in rows[-3:]] == ["1.0", "≥ 2.0", "-"]
    assert rows[-1].split("|")[4].strip() == "0.25"


def test_runs_that_are_not_finished_are_named(tmp_path):
    text = "\n".join(report._opening(PLAN, [Finding(run_of("LA", 0), [{"step": 3}], None, None)]))
    assert "* LA-w128-s0: at step 3 of 4" in text


# The whole of it.


@pytest.fixture
def small_plan(monkeypatch):
    """A few steps of small models."""
    small = dataclasses.replace(
        setup.MODEL,
        depth=2,
        width=32,
        vocab=400,
        sa=SequenceAttentionConfig(query_heads=2, kv_heads=1, head_size=8),
        da=DepthAttentionConfig(head_size=8),
        ea=ExpertAttentionConfig(experts=8, active_experts=2, expert_width=112),
    )
    plan = setup.SMALL._replace(steps=4, batch=8, context=64, documents_per_task=10, held_out_documents=4)
    monkeypatch.setattr(setup, "MODEL", small)
    monkeypatch.setattr(setup, "SMALL", plan)
    return plan


def carried_out(name, data, out):
    return worker.carried_out(argparse.Namespace(variant=name, seed=0, rate=None, small=True, data=data, out=out))


def test_a_run_is_trained_evaluated_and_analyzed_before_it_is_done(small_plan, data, tmp_path, monkeypatch):
    def train(config):
        config.run_dir.mkdir(parents=True, exist_ok=True)
        return types.SimpleNamespace(config=config, step=config.train.steps, stopped_by=None)

    asked = []
    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(evaluate, "main", lambda words: asked.append(words) or 0)
    monkeypatch.setattr(analyze, "main", lambda words: asked.append(words) or 1)
    assert carried_out("LA", data, tmp_path / "out") == 1
    run = tmp_path / "out" / run_of("LA", 0).name
    assert [words[:2] for words in asked] == [["--checkpoint", str(run)]] * 2
    assert asked[0].count("--text") == 3
    assert "--all" in asked[0]
    assert not (run / FINAL).exists()

    monkeypatch.setattr(analyze, "main", lambda words: 0)
    assert carried_out("LA", data, tmp_path / "out") == 0
    final = json.loads((run / FINAL).read_text())
    assert (final["steps"], final["tokens"]) == (4, 4 * small_plan.tokens_per_step)


@pytest.mark.exhaustive
def test_a_comparison_of_a_few_steps_has_a_report_with_its_figures(small_plan, data, tmp_path):
    out, variants = tmp_path / "out", [variant.name for variant in MAIN]
    assert [carried_out(name, data, out) for name in variants] == [0, 0, 0]
    path = report.write_report(small_plan, runs_of([0], variants), out, tmp_path / "results")
    text = path.read_text()
    assert "Missing runs" not in text
    assert all(f"| {name} | 0 | " in text for name in variants)
    assert len(list(path.parent.glob("*.png"))) == text.count(".png)") == 8
