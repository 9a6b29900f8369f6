"""The config file of a sized model: a training run reads it, and gets the model that was sized."""

from dataclasses import replace
from pathlib import Path

import pytest

from dreamer_jax.accounting.config_file import config_text, write_new
from dreamer_jax.accounting.match import match
from dreamer_jax.config import Config, ConfigError, Source, load

CONFIGS = Path(__file__).parents[2] / "configs"
SOURCE, BASELINE = CONFIGS / "dr_da_1b.py", load(CONFIGS / "la_1b.py")


def sized(*overrides: str) -> Config:
    config = load(SOURCE, overrides)
    return replace(config, model=match(config.model, BASELINE.model)[-1].config)


def write_config(config: Config, file: Path, source: Path = SOURCE) -> Config:
    named, text = config_text(config, BASELINE, source, file)
    write_new(file, text)
    return named


def test_the_file_gives_the_config_that_was_sized(tmp_path: Path) -> None:
    config = sized("--model.da.query-heads", "4", "--model.da.kv-heads", "2")
    file = tmp_path / "four_heads.py"
    written = write_config(config, file)
    assert load(file) == written == replace(config, name="four_heads")
    assert (config.model.ea.expert_width, config.model.ea.experts) != (480, 537)


def test_overrides_of_any_section_are_in_the_file(tmp_path: Path) -> None:
    overrides = ["--name", "mine", "--out", 'a "b"\\c', "--model.depth", "12", "--model.mixture", "da[::2]+sa+ea"]
    overrides += ["--optimizer.learning-rate", "3e-05", "--log.no-tensorboard", "--train.steps", "7"]
    config = sized(*overrides)
    sources = (Source("sums", tasks=("chain_sum",), documents_per_task=9), *config.data.sources)
    config = replace(config, data=replace(config.data, sources=sources))
    write_config(config, tmp_path / "x.py")
    assert load(tmp_path / "x.py") == config


def test_only_what_differs_is_written(tmp_path: Path) -> None:
    write_config(sized("--model.depth", "12"), tmp_path / "x.py")
    text = (tmp_path / "x.py").read_text()
    body = text[text.index("    return replace(") :]
    keys = [line.split("=")[0].strip() for line in body.splitlines() if "=" in line]
    assert keys == ["name", "model", "depth", "ea", "experts", "expert_width"]


def test_the_docstring_has_the_command_and_the_figures(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    write_config(sized(), file)
    text = file.read_text()
    assert text.startswith('"""DR+DA at depth 16, 1.17B parameters: dr_da_1b.py, sized after la_1b (section 3.8).\n')
    assert f"\n    python -m dreamer_jax.train --config {file}\n" in text
    assert "1,170,846,080 parameters (+0.000% of the baseline's) and 0.9404 GFLOPs for a generated token" in text


def test_the_file_finds_its_source_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source.py").write_text((CONFIGS / "tiny.py").read_text())
    monkeypatch.chdir(tmp_path)
    config = load("source.py")
    (tmp_path / "sub").mkdir()
    write_config(config, Path("sub/x.py"), Path("source.py"))
    monkeypatch.chdir(CONFIGS)
    assert load(tmp_path / "sub" / "x.py") == replace(config, name="x")
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert load(moved / "sub" / "x.py") == replace(config, name="x")


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text("precious")
    with pytest.raises(ConfigError, match="exists and is not overwritten"):
        write_new(file, "other")
    assert file.read_text() == "precious"


def test_a_file_without_a_folder_or_in_place_of_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"there is no folder '{tmp_path / 'absent'}' for 'x.py'"):
        write_new(tmp_path / "absent" / "x.py", "")
    with pytest.raises(ConfigError, match=f"'{tmp_path}' is a folder"):
        write_new(tmp_path, "")


def test_a_text_for_anywhere_finds_its_source_from_another_folder(tmp_path: Path) -> None:
    named, text = config_text(sized("--model.depth", "12"), BASELINE, SOURCE, Path("elsewhere.py"), anywhere=True)
    (tmp_path / "kept.py").write_text(text)
    assert load(tmp_path / "kept.py") == named
    assert named.name == "elsewhere"


def test_quotes_in_the_name_of_the_source_do_not_end_the_docstring(tmp_path: Path) -> None:
    source = tmp_path / 'a""" \\ b.py'
    source.write_text((CONFIGS / "tiny.py").read_text())
    write_config(load(source), tmp_path / "x.py", source)
    assert load(tmp_path / "x.py").name == "x"
