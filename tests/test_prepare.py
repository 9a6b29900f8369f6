"""The command `prepare`: what it prints, where it ends, and that a user's mistakes are lines."""

import json
from pathlib import Path

import pytest

from dreamer_jax import prepare
from tests.preparation.conftest import write_jsonl

RECIPE = """
from dreamer_jax.preparation.recipe import *

def get_config():
    return Recipe(
        sources=(
            RawSource("sums", files=("sums.jsonl",), licence="MIT", prompt=("q",), response=("a",), held_out=0.1),
            RawSource("web", files=("absent",), licence="unclear", commercial=False, text="text"),
        ),
        root={root!r},
        out={out!r},
        decontaminate=DecontaminateConfig(benchmarks=()),
        tokens=TokensConfig(vocab=330, context=64),
        work=WorkConfig(workers=1),
    )
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe of two sets, of which one is not there."""
    monkeypatch.setenv("DAFT_PROGRESS_BAR", "0")
    rows = [{"q": f"What is {n} and {n * n % 97}?", "a": f"It is {n + n * n % 97}."} for n in range(100)]
    write_jsonl(tmp_path / "sums.jsonl", [*rows, rows[3], {"q": "And?", "a": "n/a"}])
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE.format(root=str(tmp_path), out=str(tmp_path / "out")))
    return str(path)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which the command ends."""
    assert prepare.main([*arguments]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    return printed


def test_a_sample_is_prepared_shown_and_not_prepared_twice(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    given = ["--config", config, "--exclude", "non-commercial"]
    nothing = refused(capsys, *given, "--inspect", "2")
    assert "has nothing to look at; run the same command without --inspect first" in nothing
    assert not (tmp_path / "out").exists()

    assert prepare.main(given) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["sums", "MIT"]
    assert printed[1].split(maxsplit=2) == ["web", "unclear", "no commercial use  left out"]
    [line] = [line for line in printed if line.startswith("sums ") and "102" in line]
    assert line.split()[2:8] == ["102", "102", "0", "-1", "-1", "0"]
    assert printed[-1].startswith("next: python -m dreamer_jax.train --config FILE --data.prepared ")
    assert printed[-1].endswith(f"{tmp_path / 'out'} --data.context 64")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["totals"]["rows_in"] == 102

    assert prepare.main([*given, "--inspect", "2"]) == 0
    shown = capsys.readouterr().out
    assert "\nclean, sums: dropped: a placeholder for an answer\n  1.\n    question: And?\n    answer: n/a\n" in shown
    assert "\nunique, sums: dropped: duplicate\n" in shown

    assert prepare.main(given) == 0
    assert "documents: 1 of 1 done already" in capsys.readouterr().out


def test_what_is_missing_is_named_with_what_to_do(config: str, capsys: pytest.CaptureFixture[str]):
    assert prepare.main(["--config", config]) == 1
    said = capsys.readouterr().err
    assert "has no files of 1 sources:\n  web: looked for in 'absent'\n" in said
    assert "--exclude web" in said


def test_a_root_that_is_not_there_is_a_line(config: str, capsys: pytest.CaptureFixture[str]):
    assert "is not a folder; give the folder of the raw sets as --root" in refused(
        capsys, "--config", config, "--root", "/absent"
    )


def test_a_source_to_leave_out_that_is_none_is_a_line(config: str, capsys: pytest.CaptureFixture[str]):
    said = refused(capsys, "--config", config, "--exclude", "sum")
    assert "exclude: there is no ['sum']; there are gated, non-commercial, sums, web" in said


def test_a_config_of_a_training_is_a_line(config: str, capsys: pytest.CaptureFixture[str]):
    Path(config).write_text("from dreamer_jax.config import *\ndef get_config():\n    return Config('x')\n")
    assert "returned Config, not Recipe" in refused(capsys, "--config", config)


def test_an_absent_config_is_a_line(capsys: pytest.CaptureFixture[str]):
    assert "config file 'absent.py' does not exist" in refused(capsys, "--config", "absent.py")


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["--help"], 0), (["-h"], 0), (["--inspect", "3"], 2)])
def test_without_a_config_there_is_the_usage(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]):
    assert prepare.main(arguments) == code
    assert capsys.readouterr().out.startswith("usage: python -m dreamer_jax.prepare --config FILE [--inspect N]")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "--sources.0.held-out"),
        (["--tokens.vocabb", "3"], 2, "--tokens.vocab"),
        (["--inspect", "many"], 2, "must be a whole number from 1 on"),
    ],
)
def test_keys_are_listed_and_unknown_ones_end_it(
    config: str, arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as ended:
        prepare.main(["--config", config, *arguments])
    assert ended.value.code == code
    printed = capsys.readouterr()
    assert said in printed.out + printed.err
