"""Fine-tuning of exports. Only where PyTorch and transformers are installed, and PEFT for adapters."""

import functools
import json
import runpy
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

from dreamer_jax.config import Config, DataConfig, OptimizerConfig
from dreamer_jax.convert.hf import export_hf, load_hf
from dreamer_jax.data.tokenizer import load_tokenizer, train_sentencepiece
from dreamer_jax.model.dreamer import RouterFigures
from dreamer_jax.model.parameters import RouterBias
from dreamer_jax.training import metrics
from dreamer_jax.training.optimizer import rebalanced
from tests import oracle
from tests.convert.hf.exports import float32
from tests.models import changed, relative_error, sizes_of, small

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", minversion="5.19", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
script = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[3] / "launch" / "finetune.py")))
ROWS = [
    {"question": "What is 12 plus 30?", "answer": "It is 42."},
    {"question": "What is 3 plus 3?", "answer": "6"},
    {"question": "What is 1?", "answer": "It is 1. It is 1."},
    {"question": "What is 2 plus 30 plus 12?", "answer": "It is 44"},
]
RATES = OptimizerConfig(expert_bias_rate=0.25, attention_bias_rate=0.125)
REBALANCE = ["--biases", "rebalance", "--expert-bias-rate", "0.25", "--attention-bias-rate", "0.125"]
KINDS = ("sa", "da", "ea")


@functools.cache
def scratch():
    """A folder for what all tests read; it goes with the process."""
    return tempfile.TemporaryDirectory(prefix="dreamer-jax-finetune-")


@functools.cache
def tokenizer_file():
    """A SentencePiece model of 300 entries."""
    path = Path(scratch().name) / "tokenizer.model"
    path.write_bytes(train_sentencepiece(["What is 12 plus 30? It is 42."] * 4, 300))
    return path


@functools.cache
def exported(variant):
    """A small model with that tokenizer: its config, its weights in float64, its folder."""
    config = Config(name="small", model=changed(small(variant), vocab=300), data=DataConfig(context=80))
    weights = oracle.random_weights(sizes_of(config.model), seed=3)
    folder = Path(scratch().name) / variant.replace("+", "_")
    export_hf(config, float32(weights), tokenizer_file(), folder, merged=False)
    return config, weights, folder


@functools.cache
def tokenizer():
    """As transformers has it."""
    return transformers.AutoTokenizer.from_pretrained(exported("LA")[2], trust_remote_code=True)


@pytest.fixture
def data(tmp_path):
    """A file of ROWS."""
    return written(tmp_path / "data.jsonl", *map(json.dumps, ROWS))


def written(path, *lines):
    """A file of these lines."""
    path.write_text("".join(line + "\n" for line in lines))
    return path


def finetuned(variant, data, *options):
    """The folder of a model after the command, which succeeds."""
    out = data.parent / "tuned"
    command = ["--model", exported(variant)[2], "--data", data, "--out", out, "--batch", "2", *options]
    assert script.main([str(part) for part in command]) == 0
    return out


def load(folder):
    """The language model."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def logits_of(model):
    """Of a few tokens."""
    with torch.no_grad():
        return model(torch.tensor([[1, 5, 9, 200, 17]])).logits.numpy()


def tensors_of(folder):
    """The weights of a model, or of an adapter, by name."""
    with safe_open(next(folder.glob("*model.safetensors")), "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)


def biases_of(folder):
    """Router biases of a model."""
    return {name: array for name, array in tensors_of(folder).items() if name.endswith("router.bias")}


def batch_of(rows):
    """Tokens and mask [B, T] of rows, as the original tokenizer and templates lay them out."""
    original = load_tokenizer(tokenizer_file())
    texts = [(f"Question: {row['question']}\nAnswer:", f" {row['answer']}") for row in rows]
    ids = [[original.bos, *original.encode(a), *original.encode(b), original.eos] for a, b in texts]
    tokens, mask = np.zeros((2, len(ids), max(map(len, ids))), np.int64)
    for row, one in enumerate(ids):
        tokens[row, : len(one)], mask[row, : len(one)] = one, 1
    return tokens, mask


@functools.cache
def oracle_pass(variant):
    """What the oracle computes of ROWS."""
    config, weights, _ = exported(variant)
    tokens, mask = batch_of(ROWS)
    return oracle.forward(weights, sizes_of(config.model), tokens, np.arange(tokens.shape[1])[None] * mask, mask)


def expected_biases(variant):
    """Router biases after a step of pre-training on ROWS whose learning rate is 0, by their names in transformers."""
    config, weights, _ = exported(variant)
    recurrent, mask = config.model.depth_recurrent, batch_of(ROWS)[1]
    figures, biases = {}, {}
    for kind in KINDS:
        ids, names = getattr(oracle_pass(variant), f"{kind}_ids"), sorted(n for n in weights if f"{kind}.router.b" in n)
        if names:
            start = np.stack([weights[name] for name in names]).astype(np.float32)
            counts = np.stack([np.bincount(chosen[mask > 0].ravel(), minlength=start.shape[1]) for chosen in ids])
            figures[kind] = RouterFigures(jnp.asarray(counts, jnp.int32), jnp.zeros(len(counts)))
            biases["layers", kind, "router", "bias"] = RouterBias(jnp.asarray(start[0] if recurrent else start))
    moved = nnx.to_flat_state(rebalanced(nnx.from_flat_state(biases), figures, config.model, RATES))
    rows = {path[1]: np.atleast_2d(np.asarray(bias[...])) for path, bias in moved}
    return {f"model.layers.{i}.{kind}.router.bias": row for kind, bias in rows.items() for i, row in enumerate(bias)}


# Rows.


def test_labels_are_the_answer_and_tokens_those_of_training():
    for row in ROWS:
        one = script.example(tokenizer(), row["question"], row["answer"])
        tokens, _ = batch_of([row])
        assert one["input_ids"] == tokens[0].tolist()
        learnt = [label for label in one["labels"] if label != -100]
        assert one["labels"] == [-100] * (len(one["labels"]) - len(learnt)) + one["input_ids"][-len(learnt) :]
        assert tokenizer().decode(learnt) == f" {row['answer']}</s>"


def test_padding_is_neither_read_nor_learnt():
    batch = script.collated([{"input_ids": [1, 5, 6], "labels": [-100, 5, 6]}, {"input_ids": [7], "labels": [7]}])
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 5, 6], [7, -100, -100]]
    assert batch["input_ids"][1, 0] == 7


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ([], "has no rows; give a file of JSON lines"),
        (["", " "], "has no rows"),
        (["", '{"question": "a"}'], r"line 2 has no field 'answer', but 'question'; see --question-field"),
        (["[1]"], "line 1 has no field 'question', but no fields"),
        (["no JSON"], "line 1 is no JSON"),
        (['{"question": "a", "answer": 4}'], "line 1: 'answer' is 4; a text is needed"),
        (['{"question": " ", "answer": "b"}'], "line 1: 'question' is ' '; a text is needed"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path, lines, error):
    with pytest.raises(script.InputError, match=error):
        list(script.read_rows(written(tmp_path / "data.jsonl", *lines), ("question", "answer")))


def test_fields_have_the_names_that_are_given(tmp_path):
    path = written(tmp_path / "data.jsonl", '{"problem": "a", "solution": "b"}')
    assert list(script.read_rows(path, ("problem", "solution"))) == [("a", "b", f"'{path}', line 1")]


def test_long_rows_are_an_error_or_left_out(capsys):
    rows = [script.Row("q", "a", f"line {n}") for n in (1, 2, 3)]
    examples = [{"input_ids": [0] * size, "labels": [0] * size} for size in (4, 6, 5)]
    with pytest.raises(script.InputError, match=r"1 of 3 rows have more than 5 tokens \(the first is line 2, with 6\)"):
        script.fitting(rows, examples, 5, skip=False)
    assert script.fitting(rows, examples, 5, skip=True) == [examples[0], examples[2]]
    assert "1 of 3 rows have more than 5 tokens and are left out" in capsys.readouterr().out
    with pytest.raises(script.InputError, match="3 of 3 rows have more than 3 tokens"):
        script.fitting(rows, examples, 3, skip=True)


# What is no export.


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (
            lambda model: shutil.rmtree(model),
            "has no config.json; give a folder that dreamer_jax.convert --to hf wrote",
        ),
        (lambda model: (model / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda model: (model / "config.json").write_text("{}"), "is of the type None; this script fine-tunes"),
        (lambda model: (model / "config.json").write_text("["), "is damaged"),
        (lambda model: (model / "adapter_config.json").write_text("{}"), "is an adapter; give the whole model"),
    ],
)
def test_another_folder_than_an_export_is_an_error_of_one_line(tmp_path, capsys, data, change, error):
    model = shutil.copytree(exported("LA")[2], tmp_path / "model")
    change(model)
    assert script.main(["--model", str(model), "--data", str(data), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert error in said


def test_nothing_is_overwritten(tmp_path):
    with pytest.raises(script.InputError, match="is there already"):
        script.check_folders(exported("LA")[2], exported("LA")[2])


def test_one_process_does_not_count_for_several_gpus():
    with pytest.raises(script.InputError, match="torchrun --nproc-per-node 2"):
        script.check_devices(SimpleNamespace(n_gpu=2), "rebalance")
    script.check_devices(SimpleNamespace(n_gpu=2), "keep")
    script.check_devices(SimpleNamespace(n_gpu=1), "rebalance")


# Router biases.


@pytest.mark.parametrize("variant", ["DR+DA", "LA"])
def test_each_selection_counts_once(variant):
    """Gradient checkpointing runs layers twice, and evaluation is counted apart."""
    model = load(exported(variant)[2])
    counted = script.RouterLoad(model)
    tokens, mask = (torch.tensor(array) for array in batch_of(ROWS))
    model.eval()(tokens[:1], attention_mask=mask[:1])
    model.train().gradient_checkpointing_enable()
    model(tokens, attention_mask=mask, labels=tokens).loss.backward()
    counts = {f"{name}.bias": of.tolist() for name, of in counted.taken(training=True).items()}
    names = {name: f"model.{name.replace('layer.', 'layers.0.')}" for name in oracle_pass(variant).counts}
    assert counts == {names[name]: of.tolist() for name, of in oracle_pass(variant).counts.items()}
    of_one = counted.taken(training=False)
    assert of_one.keys() == counted.routers.keys()
    assert all(sum(of_one[name].tolist()) < sum(counts[f"{name}.bias"]) for name in of_one)
    assert counted.taken(training=True) == {}


@pytest.mark.parametrize("variant", ["DR+DA", "LA"])
def test_biases_move_as_in_pre_training(variant, data):
    """Two batches make the step, and held-out rows have no part in it."""
    once = ["--steps", "1", "--accumulate", "2", "--learning-rate", "0"]
    held_out = written(data.parent / "held_out.jsonl", json.dumps(ROWS[1]))
    out = finetuned(variant, data, *once, *REBALANCE, "--validation", held_out, "--gradient-checkpointing")
    expected, actual = expected_biases(variant), biases_of(out)
    assert expected.keys() == actual.keys()
    for name, bias in expected.items():
        np.testing.assert_array_equal(actual[name], bias, err_msg=name)


def test_load_is_measured_as_in_pre_training():
    counts = np.array([3, 0, 7, 2, 2])
    assert float(script.gini(torch.tensor(counts).double())) == pytest.approx(float(metrics.gini(counts)))
    assert float(script.busiest(torch.tensor(counts).double())) == pytest.approx(2.5)


def test_the_held_out_loss_is_the_mean_over_answer_tokens_however_they_are_batched():
    torch.manual_seed(0)
    batch = script.collated([script.example(tokenizer(), row["question"], row["answer"]) for row in ROWS])
    logits, labels = torch.randn(*batch["labels"].shape, 300), batch["labels"]
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    for size in (1, 3, 4):
        pairs = zip(logits.split(size), labels.split(size), strict=True)
        sums = np.concatenate([script.answer_losses(*pair).numpy() for pair in pairs])
        assert sums.shape == (4, 2)
        found = script.answer_loss(SimpleNamespace(predictions=sums))
        assert found == {"answer_loss": pytest.approx(float(expected), rel=1e-5)}


# The whole way.


def test_all_weights_learn_but_biases_and_the_run_comes_back(data, capsys):
    out = finetuned("DR+DA", data, "--steps", "4", "--learning-rate", "1e-2", "--validation", data)
    said = capsys.readouterr().out
    before, after = (float(said.split(f"{when}: loss ")[1].split(";")[0]) for when in ("before", "after"))
    assert after < before - 0.5
    config, _, folder = exported("DR+DA")
    batch = script.collated([script.example(tokenizer(), row["question"], row["answer"]) for row in ROWS])
    assert before == pytest.approx(load(folder)(**batch).loss.item(), abs=1e-3)  # answers differ in length
    original, tuned = tensors_of(folder), tensors_of(out)
    assert {name for name in original if np.array_equal(original[name], tuned[name])} == set(biases_of(folder))
    back = load_hf(out)
    assert back.config.model == config.model
    assert back.config.data.context == 80
    np.testing.assert_array_equal(back.arrays["embed"], tuned["model.embed_tokens.weight"])
    model = load(out)
    assert model.config.use_cache
    tokens = np.array([[1, 5, 9, 200, 17]])
    weights = {name: array.astype(np.float64) for name, array in back.arrays.items()}
    passed = oracle.forward(weights, sizes_of(config.model), tokens, np.arange(5)[None], np.ones_like(tokens))
    assert relative_error(logits_of(model), passed.logits) < 1e-5


@pytest.mark.parametrize("variant", ["DR+DA", "LA"])
def test_adapters_alone_learn_and_merge_to_the_same_logits(variant, data):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    steps = ["--steps", "3", "--learning-rate", "3e-2"]
    out = finetuned(variant, data, *steps, "--lora", "--lora-rank", "2", *REBALANCE)
    folder = exported(variant)[2]
    base = load(folder)
    before = logits_of(base)
    adapted = peft.PeftModel.from_pretrained(base, out / "adapter")
    with safe_open(out / "adapter" / "router_biases.safetensors", "pt") as file:
        base.load_state_dict({name: file.get_tensor(name) for name in file.keys()}, strict=False)  # noqa: SIM118
    assert relative_error(logits_of(adapted.eval()), before) > 1e-2
    assert relative_error(logits_of(load(out)), logits_of(adapted)) < 1e-5
    assert all("lora_" in name for name in tensors_of(out / "adapter"))
    original, tuned = tensors_of(folder), tensors_of(out)
    matrices = {name for name in original if "_proj" in name or name == "lm_head.weight"}
    learnt = {name for name in original if not np.array_equal(original[name], tuned[name])}
    assert matrices <= learnt <= matrices | set(biases_of(folder))
