"""`python -m dreamer_jax.generate` on a checkpoint of a small random model."""

import pytest

from dreamer_jax import convert, generate
from dreamer_jax import train as train_door
from dreamer_jax.config import Config, DataConfig, TrainConfig
from dreamer_jax.data.prepared import Prepared
from dreamer_jax.data.tokenizer import load_tokenizer, train_sentencepiece
from dreamer_jax.inference import engine
from dreamer_jax.kernels.compute import Compute
from dreamer_jax.training.checkpoint import load_model, save_model
from dreamer_jax.training.loop import Summary
from tests import oracle
from tests.models import changed, sizes_of, small

pytestmark = pytest.mark.xdist_group("generate")
VOCAB = 300


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = folder / "tokenizer.model"
    tokenizer.write_bytes(train_sentencepiece(["Question: What is 12 plus 30?\nAnswer: It is 42 €."] * 4, VOCAB))
    model = changed(small("DR+DA"), vocab=VOCAB)
    weights = oracle.random_weights(sizes_of(model), seed=3, scale=0.3)
    data = DataConfig(context=64, prompt_template="<{text}>")
    config = Config(name="run", out=str(folder), model=model, data=data, train=TrainConfig(dtype="float32"))
    save_model(folder / "run", config, convert.build(model, weights), tokenizer)
    return folder / "run"


@pytest.fixture(scope="module")
def expected(run):
    """(prompts' token ids, their greedy answers as text)."""
    loaded = load_model(run)
    tokenizer = load_tokenizer(loaded.tokenizer_path)
    prompts = [[tokenizer.bos, *tokenizer.encode(f"<{text}>")] for text in ("What is 12?", "30 plus 30?")]
    answers = engine.generate(loaded.model, Compute(), prompts, max_tokens=12, stop_ids=(tokenizer.eos,))
    return [tokenizer.decode(answer).rstrip("\ufffd").lstrip(" ") for answer in answers]


def call(run, *arguments, tokens=12):
    return generate.main(["--checkpoint", str(run), "--max-tokens", str(tokens), *arguments])


def test_one_answer_streams_and_the_speed_goes_to_stderr(run, expected, capsys):
    assert call(run, "--prompt", "What is 12?") == 0
    printed = capsys.readouterr()
    assert printed.out == expected[0] + "\n"
    assert "tokens/s" in printed.err
    assert "next: python -m dreamer_jax.convert" in printed.err


def test_several_prompts_are_answered_in_one_batch(run, expected, capsys):
    assert call(run, "--prompt", "What is 12?", "--prompt", "30 plus 30?") == 0
    printed = capsys.readouterr()
    assert f"== What is 12?\n{expected[0]}\n" in printed.out
    assert f"== 30 plus 30?\n{expected[1]}\n" in printed.out


def test_the_sample_at_the_end_of_a_training_is_asked_in_the_layout_of_the_run(run, monkeypatch):
    monkeypatch.setattr(engine, "generate", lambda model, compute, prompts, **_: prompts)
    loaded = load_model(run)
    prepared = Prepared(run, "key", loaded.tokenizer_path, {}, {}, 1.0, {"sources": {}})
    said = train_door.sample(Summary(loaded.config, 0, None, None, None, 1.0, loaded.model, prepared))
    assert said.count("<What is 12 + 30?>") == 2  # what is printed, and what the model has read


def test_a_stop_string_ends_the_answer_before_it(run, expected, capsys):
    stop = expected[0][3:5]
    assert call(run, "--prompt", "What is 12?", "--stop", "never in it", "--stop", stop) == 0
    assert capsys.readouterr().out == expected[0].split(stop)[0] + "\n"


def test_neither_the_end_token_nor_the_space_before_an_answer_is_shown(run, capsys):
    tokenizer = load_tokenizer(load_model(run).tokenizer_path)
    answers = generate.Answers(tokenizer, ("a", "b"), ())
    for row in (0, 1):
        assert not any(answers.add(row, token) for token in tokenizer.encode(" 7"))
    assert answers.add(0, tokenizer.eos)
    assert capsys.readouterr().out == "== a\n7\n"
    answers.finish()
    assert capsys.readouterr().out == "== b\n7\n"
    assert answers.report().startswith(f"{2 * len(tokenizer.encode(' 7')) + 1} tokens, ")


def test_text_held_back_for_a_stop_string_is_shown_when_the_answer_ends_without_it(run, capsys):
    tokenizer = load_tokenizer(load_model(run).tokenizer_path)
    answers = generate.Answers(tokenizer, ("a",), ("7 €",))
    assert not any(answers.add(0, token) for token in tokenizer.encode("7"))
    assert capsys.readouterr().out == ""
    answers.finish()
    assert capsys.readouterr().out == "7\n"


def test_a_prompt_beyond_the_trained_context_is_warned_of(run, capsys):
    generate._warn_of_length(65, 1, 64)
    generate._warn_of_length(60, 4, 64)
    generate._warn_of_length(60, 5, 64)
    assert capsys.readouterr().err.splitlines() == [
        "warning: a prompt of 65 tokens exceeds the trained context of 64",
        "warning: answers longer than 4 tokens exceed the trained context of 64",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a prompt is empty or absent"),
        (["--prompt", "x", "--prompt", " "], "a prompt is empty or absent"),
        (["--prompt", "x", "--temperature", "-1"], "temperature = -1.0: must be 0"),
        (["--prompt", "x", "--top-p", "0"], "top-p = 0.0: must lie in (0, 1]"),
        (["--prompt", "x", "--stop", ""], "stop string is empty"),
        (["--prompt", "x", "--max-tokens", "0"], "max-tokens = 0: must be at least 1"),
        (["--prompt", "x", "--max-tokens", "1000000000"], "at most 1,048,576"),
        (["--prompt", "x", "--seed", str(2**70)], "seed = 1180591620717411303424: must be at least 0 and below"),
        (["--prompt", "x", "--seed", "-1"], "seed = -1: must be at least 0"),
        (["--prompt", "x", "--top-p", "nan"], "top-p = nan: must lie in (0, 1]"),
        (["--prompt", "x", "--temperature", "inf"], "temperature = inf: must be 0"),
        (["--prompt", "x\udcff"], "'x\\udcff' is not UTF-8 text"),
        (["--prompt", "x", "--stop", "\udcff"], "'\\udcff' is not UTF-8 text"),
        (["--prompt", "x", "--depth", "0"], "depth = 0"),
        (["--prompt", "x", "--depth", "1000000000"], "depth = 1000000000: at most 4096"),
        (["--prompt", "x", "--checkpoint", "/nowhere"], "'/nowhere' is not a run folder"),
    ],
)
def test_wrong_arguments_are_explained(run, arguments, message, capsys):
    assert call(run, *arguments) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.out == ""


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit):
        generate.main(["--help"])
    said = capsys.readouterr().out
    for flag in ("--checkpoint", "--prompt", "--temperature", "--top-p", "--max-tokens", "--seed", "--stop"):
        assert flag in said
