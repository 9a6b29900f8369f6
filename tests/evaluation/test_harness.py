"""lm-evaluation-harness scores a checkpoint as this project does, on local files and without a network."""

import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from lm_eval import utils
from lm_eval.api.instance import Instance

from dreamer_jax import convert
from dreamer_jax.config import Config, DataConfig, TrainConfig
from dreamer_jax.data.template import DEFAULT_TEMPLATE, Template
from dreamer_jax.data.tokenizer import train_sentencepiece
from dreamer_jax.evaluation import checkpoints
from dreamer_jax.evaluation.benchmarks.mmlu import SUBJECTS
from dreamer_jax.evaluation.benchmarks.tasks import named
from dreamer_jax.evaluation.harness import __main__ as harness
from dreamer_jax.evaluation.harness.local_tasks import Written, write_tasks
from dreamer_jax.evaluation.harness.model import DreamerLM, fitted_pair, generation, sampling_of, shared_contexts, whole
from dreamer_jax.evaluation.requests import Choose, EvaluationError, Generate, Generated, Item, Likelihoods, Verdict
from dreamer_jax.inference.sample import Sampling
from dreamer_jax.language_model import load
from dreamer_jax.training.checkpoint import save_model
from tests import oracle
from tests.models import changed, sizes_of, small

VOCAB, CONTEXT = 400, 96
SHORT = 16
"""Tokens of an answer."""
QUESTIONS = [f"Ada has {n} apples and {2 * n + 1} pears of ${n}.50. How many?" for n in range(2, 8)]
OPTIONS = ["7", "1,5 of π", "27.675", "none of these"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = folder / "tokenizer.model"
    layouts = [
        "The following are multiple choice questions (with answers) about {}.\n\n{}\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:",
        "Question: {}\nAnswer: She has 42 €.\n#### {}",
    ]
    subjects = [subject.replace("_", " ") for subject in SUBJECTS]
    texts = [layout.format(subject, question) for layout in layouts for subject in subjects for question in QUESTIONS]
    tokenizer.write_bytes(train_sentencepiece(texts, VOCAB))
    model = changed(small("DR"), vocab=VOCAB)
    weights = oracle.random_weights(sizes_of(model), seed=3, scale=0.3)
    data = DataConfig(context=CONTEXT, prompt_template="Asked: {text}\nSaid:")
    config = Config(name="run", out=str(folder), model=model, data=data, train=TrainConfig(dtype="float32"))
    save_model(folder / "run", config, convert.build(model, weights), tokenizer)
    return folder / "run"


@pytest.fixture(scope="module")
def lm(run: Path) -> Iterator[DreamerLM]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints.jax, "device_count", lambda: 1)  # the engine's tests are about several
        yield DreamerLM(checkpoint=run, batch_size=1)  # one at a time, few shapes have to be compiled


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six questions for each of GSM8K and MathQA, two for each subject of MMLU, one of MATH."""
    root = tmp_path_factory.mktemp("data")
    for folder in ("gsm8k", "mathqa", "mmlu_math", "math"):
        (root / folder).mkdir()
    lines = [json.dumps({"question": q, "answer": f"<<1+1=2>>2\n#### {n},000"}) for n, q in enumerate(QUESTIONS)]
    (root / "gsm8k" / "test.jsonl").write_text("\n".join(lines))
    options = "a ) 38 , b ) 27.675 , c ) 3π , d ) data inadequate , e ) none of these"
    rows = [{"Problem": q.lower(), "options": options, "correct": "abcde"[n % 5]} for n, q in enumerate(QUESTIONS)]
    (root / "mathqa" / "dev.json").write_text(json.dumps(rows))
    for subject in SUBJECTS:
        table = "".join(f'"{q}\n",$2 ,"1,5",π,None,{letter}\n' for q, letter in zip(QUESTIONS[:2], "BD", strict=True))
        (root / "mmlu_math" / f"{subject}_val.csv").write_text(table)
    problems = [("What is $1+1$? ", r"It is $1+1=\boxed{2}$."), ("Unsolved?", "No one knows.")]
    lines = [json.dumps({"problem": problem, "solution": solution}) for problem, solution in problems]
    (root / "math" / "math500.jsonl").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def tasks(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Written]:
    out = tmp_path_factory.mktemp("tasks")
    return out, write_tasks(data, out)


def asked(kind: Any, *arguments: Any) -> Instance:
    return Instance(kind, {}, arguments, 0)


def outcomes(lm: DreamerLM, *requests: Any) -> list[Any]:
    """What this project's own evaluation gets."""
    found = dict(lm._respondent.respond(requests))
    return [found[number] for number in range(len(requests))]


# Likelihoods


def test_log_likelihoods_are_those_of_this_projects_own_evaluation(lm: DreamerLM) -> None:
    contexts = ["Question: Ada has 3?\nAnswer:", "Question: How many? \nAnswer: ", "Ada"]
    choices = [Choose(context, tuple(f" {option}" for option in OPTIONS)) for context in contexts]
    requests = [asked("loglikelihood", choice.context, option) for choice in choices for option in choice.options]
    found = lm.loglikelihood(requests, disable_tqdm=True)
    own = outcomes(lm, *choices)
    assert [nats for nats, _ in found] == [nats for outcome in own for nats in outcome.nats]
    assert [greedy for _, greedy in found] == [greedy for outcome in own for greedy in outcome.greedy]


def test_a_log_likelihood_is_that_of_the_full_forward_pass(lm: DreamerLM, run: Path) -> None:
    [(nats, greedy)] = lm.loglikelihood([asked("loglikelihood", "Ada has", " 42 pears")], disable_tqdm=True)
    context, continuation = lm._encode_pair("Ada has", " 42 pears")
    assert context[0] == lm.prefix_token_id
    assert nats == pytest.approx(slow(run, context, continuation), rel=1e-5)
    assert not greedy


def test_a_text_without_context_follows_the_token_that_begins_a_document(lm: DreamerLM, run: Path) -> None:
    [(nats, _)] = lm.loglikelihood([asked("loglikelihood", "", "Ada has")], disable_tqdm=True)
    assert nats == pytest.approx(slow(run, lm.tok_encode(""), lm.tok_encode("Ada has", False)), rel=1e-5)


def test_a_context_is_read_once_for_the_continuations_that_follow_one_another() -> None:
    pairs = [(("", ""), [1, 2], [3]), (("", ""), [1, 2], [4, 5]), (("", ""), [1], [3]), (("", ""), [1, 2], [6])]
    assert list(shared_contexts(pairs, 10)) == [(0, [1, 2], [[3], [4, 5]]), (2, [1], [[3]]), (3, [1, 2], [[6]])]
    many = [(("", ""), [1], [token]) for token in range(40)]
    assert [(first, len(options)) for first, _, options in shared_contexts(many, 10)] == [(0, 16), (16, 16), (32, 8)]


def test_a_long_context_loses_its_beginning_as_in_the_harness() -> None:
    assert fitted_pair((("", ""), [1, 2, 3, 4], [5, 6]), 4) == ([2, 3, 4], [5, 6])  # 2 to 5 are read: four tokens
    assert fitted_pair((("", ""), [1, 2], [5, 6]), 4) == ([1, 2], [5, 6])
    with pytest.raises(EvaluationError, match=r"'abc' has 5 tokens, the context 4; give --model_args context=N"):
        fitted_pair((("", "abc"), [1], [2] * 5), 4)
    with pytest.raises(EvaluationError, match="'' adds no token"):
        fitted_pair((("", ""), [1], []), 4)


def test_texts_are_read_in_the_harnesss_windows(lm: DreamerLM, run: Path) -> None:
    texts = ["", "Ada", " ".join(QUESTIONS * 3)]
    found = lm.loglikelihood_rolling([asked("loglikelihood_rolling", text) for text in texts], disable_tqdm=True)
    sizes = []
    for text, nats in zip(texts, found, strict=True):
        tokens = lm.tok_encode(text, add_special_tokens=False)
        cut = utils.get_rolling_token_windows(tokens, lm.prefix_token_id, max_seq_len=CONTEXT, context_len=1)
        windows = [utils.make_disjoint_window(window) for window in cut]
        assert nats == pytest.approx(sum(slow(run, *window) for window in windows), rel=1e-5)
        sizes.append(len(windows))
    assert sizes[:2] == [0, 1]
    assert sizes[2] > 2


def slow(run: Path, context: list[int], continuation: list[int]) -> float:
    """Log-likelihood by one forward pass, without caches, over tokens that are padded to one size."""
    tokens = np.zeros((1, CONTEXT + 1), np.int32)
    read = [*context, *continuation]
    tokens[0, : len(read)] = read
    logits = np.asarray(load_once(run).logits(tokens)[0], np.float64)
    nats = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return float(sum(nats[len(context) - 1 + i, token] for i, token in enumerate(continuation)))


LOADED: dict[Path, Any] = {}


def load_once(run: Path) -> Any:
    return LOADED.setdefault(run, load(run))


# Generation


def test_a_text_ends_before_a_stop_string_and_at_the_largest_number_of_tokens(lm: DreamerLM) -> None:
    prompt = "Question: Ada has 3 apples?\nAnswer:"
    [whole_text] = lm.generate_until([asked("generate_until", prompt, {"max_gen_toks": 12})], disable_tqdm=True)
    [own] = outcomes(lm, Generate(prompt, (), 12))
    assert whole_text == own.text
    stop = whole_text[3:5]
    kwargs = {"until": [stop, "never in it"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
    assert lm.generate_until([asked("generate_until", prompt, kwargs)], disable_tqdm=True) == [
        whole_text.split(stop)[0]
    ]
    [cut] = lm.generate_until([asked("generate_until", prompt, {"max_gen_toks": 9})], disable_tqdm=True)
    assert len(cut) < len(whole_text)
    assert whole_text.startswith(cut)


def test_without_a_limit_of_its_own_a_text_has_1024_tokens_or_as_many_as_the_context(lm: DreamerLM) -> None:
    request, sampling = generation("Ada", {}, lm.max_gen_toks)
    assert (request, sampling) == (Generate("Ada", (), 1024), Sampling())
    tokens = lm.tok_encode("Ada")
    assert lm._respondent._prompt(tokens, request.max_tokens, sampling).max_tokens == CONTEXT - len(tokens)


def test_requests_of_several_kinds_get_their_own_texts(lm: DreamerLM) -> None:
    greedy, drawn = {"max_gen_toks": 12}, {"max_gen_toks": 12, "do_sample": True, "temperature": 5.0}
    prompt = "Question: Ada has 3 apples?\nAnswer:"
    requests = [asked("generate_until", prompt, kwargs) for kwargs in (drawn, greedy, drawn, greedy)]
    texts = lm.generate_until(requests, disable_tqdm=True)
    assert texts[1] == texts[3]
    assert len(set(texts)) == 3


@pytest.mark.parametrize(
    ("kwargs", "sampling"),
    [
        ({}, Sampling()),
        ({"temperature": 0.7}, Sampling(0.7)),
        ({"do_sample": False, "temperature": 0.7}, Sampling()),
        ({"do_sample": True}, Sampling(1.0)),
        ({"do_sample": True, "temperature": 0.5, "top_p": 0.9}, Sampling(0.5, 0.9)),
        ({"do_sample": True, "temperature": 0.0}, Sampling()),
    ],
)
def test_texts_are_greedy_unless_a_task_samples(kwargs: dict[str, Any], sampling: Sampling) -> None:
    assert sampling_of(kwargs) == sampling


def test_the_harnesss_other_names_of_the_limit_are_understood() -> None:
    assert generation("", {"max_new_tokens": 7, "until": "x", "num_beams": 1}, 1024)[0] == Generate("", ("x",), 7)
    assert generation("", {"max_tokens": 9, "max_gen_toks": "8"}, 1024)[0].max_tokens == 8


def test_generation_arguments_that_have_no_effect_here_are_refused_by_name() -> None:
    with pytest.raises(EvaluationError, match=r"generation_kwargs top_k, num_beams: unknown to these models; there"):
        generation("", {"until": [], "top_k": 5, "num_beams": 4}, 1024)
    with pytest.raises(EvaluationError, match=r"max_gen_toks = 0: must be a whole number, 1 or more"):
        generation("", {"max_gen_toks": 0}, 1024)


# The model's arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", r"give checkpoint=DIR"),
        ("checkpoint=x,dtype=float32,parallelize=True", r"--model_args dtype, parallelize: unknown; there are check"),
        ("checkpoint=x,batch_size=auto", r"batch_size = 'auto': must be a whole number, 1 or more"),
        ("checkpoint=x,context=1", r"context = 1: must be a whole number, 2 or more"),
        ("checkpoint=x,depth=1.5", r"depth = 1.5: must be a whole number"),
    ],
)
def test_wrong_arguments_of_the_model_are_explained(arguments: str, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        DreamerLM.create_from_arg_string(arguments, {"batch_size": 1, "device": "cuda:0"})


def test_numbers_may_come_as_text_and_truth_is_no_number() -> None:
    assert whole("batch_size", "32", 1) == 32
    with pytest.raises(EvaluationError, match="depth = True"):
        whole("depth", True, 1)


def test_the_models_arguments_win_over_the_harnesss_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(DreamerLM, "__init__", lambda self, **arguments: given.update(arguments))
    DreamerLM.create_from_arg_obj({"checkpoint": "x", "batch_size": 4}, {"batch_size": "1", "max_batch_size": None})
    assert given == {"checkpoint": "x", "batch_size": 4}


def test_a_chat_template_is_refused(lm: DreamerLM) -> None:
    assert lm.chat_template() == ""
    for use in (partial(lm.chat_template, True), partial(lm.apply_chat_template, [])):
        with pytest.raises(EvaluationError, match="--apply_chat_template: models of this project are no chat models"):
            use()


# The tasks


def test_a_task_is_written_for_every_file_and_what_is_missing_is_named(tasks: tuple[Path, Written], data: Path) -> None:
    out, written = tasks
    subjects = [f"mmlu_{subject}_val_local" for subject in SUBJECTS]
    math = ["minerva_math500_local", "hendrycks_math500_local", "math500_local"]
    names = ["gsm8k_local", "mathqa_dev_local", *subjects, *math, "mmlu_math_val_local"]
    assert list(written.tasks) == names
    assert sorted(path.stem for path in out.glob("*.yaml")) == sorted(names)
    assert f"mathqa_local ('{data}' has no mathqa/test.json or mathqa/test.jsonl)" in written.missing
    assert "mmlu_math_local (not all of its 5 subjects are there)" in written.missing
    assert written.tasks["math500_local"].startswith("1 rows of")
    assert "1 left out: no boxed answer" in written.tasks["math500_local"]


def test_the_data_are_copied_into_the_form_that_the_harness_reads(tasks: tuple[Path, Written]) -> None:
    out, _ = tasks
    [first, _] = (out / "data" / "mmlu_math_abstract_algebra_val.jsonl").read_text().splitlines()
    assert json.loads(first) == {
        "id": "0",
        "question": f"{QUESTIONS[0]}\n",
        "choices": ["$2 ", "1,5", "π", "None"],
        "answer": 1,
    }
    assert len((out / "data" / "mathqa_dev.jsonl").read_text().splitlines()) == len(QUESTIONS)
    assert yaml.safe_load((out / "gsm8k_local.yaml").read_text())["dataset_path"] == "json"


def test_a_group_has_the_mean_over_its_questions(tasks: tuple[Path, Written]) -> None:
    group = yaml.safe_load((tasks[0] / "mmlu_math_val_local.yaml").read_text())
    assert group["aggregate_metric_list"] == [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]


def test_with_a_file_of_examples_few_shot_prompts_can_be_asked_for(tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    for split in ("test", "train"):
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}))
    write_tasks(tmp_path, tmp_path / "out")
    config = yaml.safe_load((tmp_path / "out" / "gsm8k_local.yaml").read_text())
    assert config["num_fewshot"] is None  # 0 could not be changed by --num_fewshot
    assert config["fewshot_split"] == "train"
    assert set(config["dataset_kwargs"]["data_files"]) == {"test", "train"}


def test_a_folder_without_benchmarks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"has no file of a benchmark, such as gsm8k/test.jsonl"):
        write_tasks(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Both paths


@pytest.fixture(scope="module")
def samples(lm: DreamerLM, tasks: tuple[Path, Written]) -> dict[str, list[dict[str, Any]]]:
    """What the harness asked and got."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks[0]), include_defaults=False)
    names = ["gsm8k_local", "mathqa_dev_local", "mmlu_math_val_local"]
    found = simple_evaluate(
        model=lm, tasks=names, task_manager=manager, bootstrap_iters=0, gen_kwargs=f"max_gen_toks={SHORT}"
    )
    assert found is not None
    assert found["config"]["dreamer"]["weights"]
    return dict(found["samples"])


def own(lm: DreamerLM, data: Path, name: str, form: str = "") -> dict[str, tuple[Item, Any, Verdict]]:
    """(item, outcome, verdict) of this project's own evaluation, by item."""
    [task] = named([name])
    items = [item for item in task.questions(data).items if item.id.startswith(form)]
    short = [Generate(r.prompt, r.stop, SHORT) if isinstance(r, Generate) else r for r in (i.request for i in items)]
    found = outcomes(lm, *short)
    return {i.id: (i, o, v) for i, o, v in zip(items, found, task.verdicts(items, found), strict=True)}


def test_gsm8k_is_asked_and_scored_as_by_the_harness(
    lm: DreamerLM, data: Path, samples: dict[str, list[dict[str, Any]]]
) -> None:
    mine = own(lm, data, "gsm8k")
    assert len(samples["gsm8k_local"]) == 2 * len(mine) == 12
    for sample in samples["gsm8k_local"]:
        item, outcome, verdict = mine[sample["doc"]["id"]]
        [(prompt, kwargs)] = sample["arguments"]
        assert isinstance(item.request, Generate)
        assert (prompt, tuple(kwargs["until"])) == (item.request.prompt, item.request.stop)
        assert isinstance(outcome, Generated)
        assert sample["resps"] == [[outcome.text]]
        metric = {"strict-match": "strict", "flexible-extract": "flexible"}[sample["filter"]]
        assert sample["exact_match"] == verdict.scores[metric]


@pytest.mark.parametrize(
    ("name", "local", "form", "metrics"),
    [
        ("mathqa_dev", "mathqa_dev_local", "cloze", {"acc": "cloze", "acc_bytes": "cloze_per_byte"}),
        *(("mmlu_math_val", f"mmlu_{s}_val_local", f"letters/{s}", {"acc": "letters"}) for s in SUBJECTS),
    ],
)
def test_choices_are_asked_and_scored_as_by_the_harness(
    name: str, local: str, form: str, metrics: dict[str, str], lm: DreamerLM, data: Path, samples: dict[str, Any]
) -> None:
    mine = own(lm, data, name, form)
    assert len(samples[local]) == len(mine)
    for sample in samples[local]:
        item, outcome, verdict = mine[f"{form}/{sample['doc']['id']}"]
        assert isinstance(item.request, Choose)
        assert isinstance(outcome, Likelihoods)
        asked = [(item.request.context, option) for option in item.request.options]
        assert [tuple(arguments) for arguments in sample["arguments"]] == asked
        assert [float(nats) for [[nats, _]] in sample["resps"]] == pytest.approx(outcome.nats, rel=1e-6)
        assert {theirs: verdict.scores[ours] for theirs, ours in metrics.items()} == {m: sample[m] for m in metrics}


@pytest.mark.parametrize("template", [DEFAULT_TEMPLATE, Template("{{problem}} {% if %} Q: {text}\n")])
def test_math_is_asked_as_in_this_projects_own_evaluation(template: Template, data: Path, tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    write_tasks(data, tmp_path, template)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    task = manager.load(["math500_local"])["tasks"]["math500_local"]
    task.set_config(key="num_fewshot", value=0)  # as the harness does where a task says nothing
    task.build_all_requests(rank=0, world_size=1)
    [item] = named(["math500"])[0].questions(data, template).items
    [(prompt, kwargs)] = [instance.args for instance in task.instances]
    assert Generate(prompt, tuple(kwargs["until"]), kwargs["max_gen_toks"]) == item.request


# The command line


def test_the_command_evaluates_and_prints_the_harnesss_table(
    run: Path, tasks: tuple[Path, Written], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(checkpoints.jax, "device_count", lambda: 1)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))  # some thousands
    command = ["run", "--tasks", "gsm8k_local", "--limit", "2", "--include_path", str(tasks[0]), "--batch_size", "1"]
    command += ["--gen_kwargs", f"max_gen_toks={SHORT}", "--model_args", f"pretrained={run}"]
    assert harness.main([*command, "--apply_chat_template"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --apply_chat_template: models of this project")
    assert harness.main(command) == 0
    assert "|gsm8k_local|" in capsys.readouterr().out


def test_the_command_evaluates_models_of_this_project_and_not_one_request_at_a_time() -> None:
    parsed = Namespace(config=None, model=None, device=None)
    harness.fill_in(parsed)
    assert (parsed.model, parsed.batch_size, parsed.device) == ("dreamer", "32", "jax")
    other = Namespace(config=None, model="hf", device=None)
    harness.fill_in(other)
    assert other == Namespace(config=None, model="hf", device=None)


def test_the_command_writes_tasks_and_names_what_comes_next(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    assert harness.main(["write-tasks", "--data", str(data), "--out", str(tmp_path / "tasks")]) == 0
    said = capsys.readouterr().out
    assert f"gsm8k_local: 6 rows of {data}" in said
    assert said.splitlines()[-1].endswith(f"--include_path {tmp_path / 'tasks'} --tasks gsm8k_local")
    of_run = ["--out", str(tmp_path / "of_run"), "--checkpoint", str(run)]
    assert harness.main(["write-tasks", "--data", str(data), *of_run]) == 0
    assert "Asked: " in (tmp_path / "of_run" / "math500_local.yaml").read_text()
    assert harness.main(["write-tasks", "--data", str(tmp_path / "no"), "--out", str(tmp_path)]) == 1
    assert "has no file of a benchmark" in capsys.readouterr().err


def test_help_does_not_wait_for_jax() -> None:
    program = (
        "import sys\nfrom dreamer_jax.evaluation.harness import __main__ as harness\n"
        "try:\n    harness.main(['--help'])\nexcept SystemExit:\n    pass\nsys.exit('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "write-tasks" in done.stdout
