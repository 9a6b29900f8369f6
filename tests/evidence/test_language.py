"""The comparison on mathematics in words: what is compared, on what, and what the report says of it."""

import argparse
import dataclasses
import json

import pytest

from benchmarks.evidence.findings import FINAL, Finding
from benchmarks.evidence.language import report, setup, worker
from benchmarks.evidence.language.held_out import write_texts
from benchmarks.evidence.language.setup import (
    ABLATIONS,
    MAIN,
    VARIANTS,
    Plan,
    config_of,
    model_of,
    pilots_of,
    run_of,
    runs_of,
)
from dreamer_jax import analyze, evaluate
from dreamer_jax.accounting.flops import generated_flops
from dreamer_jax.accounting.match import TOLERANCE
from dreamer_jax.accounting.params import parameters
from dreamer_jax.config import ConfigError, DepthAttentionConfig, ExpertAttentionConfig, SequenceAttentionConfig

PLAN = Plan(steps=4, ablation_steps=2, every=2)


@pytest.fixture
def data(tmp_path):
    """A folder of questions; the last held-out question of each file is in its training, too."""
    for name, prompt, response in (("gsm8k", "question", "answer"), ("math", "problem", "solution")):
        (tmp_path / name).mkdir()
        held_out = "test" if name == "gsm8k" else "math500"
        for split, numbers in (("train", range(40)), (held_out, range(37, 47))):
            rows = [{prompt: f"What is {n} + {n}?", response: f"<<{n}+{n}>>It is {2 * n}."} for n in numbers]
            (tmp_path / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


# What is compared.


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_costs_what_la_does(name):
    ours, las = model_of(name), model_of("LA")
    assert abs(parameters(ours).total / parameters(las).total - 1) <= TOLERANCE
    assert (
        abs(generated_flops(ours, Plan().context).total / generated_flops(las, Plan().context).total - 1) <= TOLERANCE
    )


def test_runs_of_a_seed_differ_in_their_models_and_depths_alone(tmp_path):
    configs = [config_of(PLAN, run_of(v.name, 0), tmp_path, tmp_path) for v in ABLATIONS]
    first = configs[0]
    for variant, config in zip(ABLATIONS, configs, strict=True):
        train = dataclasses.replace(first.train, depths=variant.depths)
        assert dataclasses.replace(first, name=config.name, model=config.model, train=train) == config


def test_main_variants_of_all_seeds_come_before_the_ablations_of_the_first():
    names = [run.name for run in runs_of([3, 4], ["LA", "DR", "LA+DA"])]
    assert names == ["LA-w128-s3", "DR-w128-s3", "LA-w128-s4", "DR-w128-s4", "LA+DA-w128-s3"]
    with pytest.raises(ConfigError, match=r"--variants 'DR\+\+DA': there are LA, DR, "):
        runs_of([0], ["DR++DA"])


def test_pilots_are_of_the_main_variants():
    assert [run.name for run in pilots_of(["DR", "LA+DA"])] == ["DR-w128-s0-rate0.001", "DR-w128-s0-rate0.003"]


def test_held_out_texts_ask_nothing_of_the_training(data, tmp_path):
    config = config_of(PLAN, run_of("LA", 0), data, tmp_path)
    sources = config.data.sources[:2]
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))
    gsm8k, math = write_texts(config, tmp_path / "texts")
    rows = [json.loads(line) for line in gsm8k.read_text().splitlines()]
    assert [row["instruction"] for row in rows] == [f"What is {n} + {n}?" for n in range(40, 47)]
    assert rows[0]["output"] == "It is 80."
    assert len(math.read_text().splitlines()) == 7


# What the report says.


def finished(name, out, losses, nats, *, seed=0, step=4):
    """A run with these held-out losses along the training and nats of documents of ten tokens at the end."""
    run = run_of(name, seed)
    for at in {2, step}:
        folder = out / run.name / "evaluation" / str(at)
        folder.mkdir(parents=True)
        scores = [{"nats": n, "tokens": 10.0, "bytes": 30.0} for n in nats]
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


def test_data_efficiency_is_told_of_the_main_variants_alone(tmp_path):
    found = [
        finished("LA", tmp_path, (4.0, 3.0), (20.0, 30.0)),
        finished("DR", tmp_path, (3.0, 2.0), (20.0, 30.0)),
        finished("LA+DA", tmp_path, (3.0,), (20.0, 30.0), step=2),
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
        ea=ExpertAttentionConfig(experts=8, active_experts=2, expert_width=64),
    )
    plan = setup.SMALL._replace(steps=4, batch=8, context=64, documents_per_task=10, held_out_documents=4)
    monkeypatch.setattr(setup, "MODEL", small)
    monkeypatch.setattr(setup, "SMALL", plan)
    return plan


def carried_out(name, data, out):
    return worker.carried_out(argparse.Namespace(variant=name, seed=0, rate=None, small=True, data=data, out=out))


def test_a_run_is_trained_evaluated_and_analyzed_before_it_is_done(small_plan, data, tmp_path, monkeypatch):
    asked = []
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
