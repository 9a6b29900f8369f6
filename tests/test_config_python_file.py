"""Config files in Python: what is wrong with one is a line that names the file and the line in it."""

from pathlib import Path

import pytest

from dreamer_jax.config import Config, ConfigError, load

IMPORT = b"from dreamer_jax.config import *\n"
GOOD = IMPORT + b"def get_config():\n    return Config('x')\n"


def refused(path: Path | str) -> str:
    """The line that a file is refused with."""
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (b"def get_config(:\n    pass\n", "config file '{path}', line 1: SyntaxError: invalid syntax"),
        (b"x = 1\n  y = 2\n", "config file '{path}', line 2: IndentationError: unexpected indent"),
        (b"x = 1\n\xff = 2\n", "config file '{path}', line 2: SyntaxError: (unicode error) 'utf-8' codec"),
        (b"\xff\xfex\0=\0", "config file '{path}', line 1: there is a NUL byte"),
        (b"x = 1\ny = '\0'\n", "config file '{path}', line 2: there is a NUL byte"),
        (b"x = 1\nimport no_module_of_this_name\n", "config file '{path}', line 2: ModuleNotFoundError: No module"),
        (IMPORT + b"from dreamer_jax.config import X\n", "config file '{path}', line 2: ImportError: cannot import"),
        (b"open('absent.json')", "config file '{path}', line 1: FileNotFoundError: "),
        (b"import sys\nsys.exit(0)\n", "config file '{path}', line 2: it ends the program: get_config() must"),
        (b"", "config file '{path}' defines no get_config()"),
        (b"get_config = 3\n", "get_config() of '{path}' is no function, but 3"),
        (b"def get_config(a, b=1):\n    pass\n", "get_config() of '{path}' is called without arguments: missing a"),
        (b"def get_config():\n    pass\n", "get_config() of '{path}' returned NoneType, not Config"),
        (b"def get_config():\n    return {'name': 'x'}\n", "get_config() of '{path}' returned dict, not Config"),
        (b"def get_config():\n    raise KeyError('a\\nb')\n", "config file '{path}', line 2: KeyError: "),
        (b"def get_config():\n    raise ValueError('a\\nb')\n", "config file '{path}', line 2: ValueError: a b"),
        (b"def get_config():\n    assert False\n", "config file '{path}', line 2: AssertionError"),
        (b"def get_config():\n    exit()\n", "config file '{path}', line 2: it ends the program"),
        (b"def get_config():\n    return get_config()\n", "config file '{path}', line 2: RecursionError: "),
        (b"import math\ndef get_config():\n    return math.sqrt(-1)\n", "config file '{path}', line 3: ValueError: "),
    ],
)
def test_a_file_that_gives_no_config_is_named_with_the_line(code, message, tmp_path):
    path = tmp_path / "bad.py"
    path.write_bytes(code)
    assert refused(path).startswith(message.format(path=path))


def test_an_error_of_a_config_passes_as_it_is(tmp_path):
    path = tmp_path / "bad.py"
    path.write_bytes(IMPORT + b"def get_config():\n    return Config('x', train=TrainConfig(stepz=3))\n")
    assert refused(path) == "unknown key 'train.stepz'; did you mean 'train.steps'?"


def test_a_syntax_error_in_what_a_file_imports_names_both(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a_helper_of_configs.py").write_text("x = 1\ny = = 2\n")
    path = tmp_path / "good.py"
    path.write_text("import a_helper_of_configs\n")
    said = refused(path)
    assert said.startswith(f"config file '{path}', line 1: SyntaxError: ")
    assert "a_helper_of_configs.py, line 2" in said


def test_an_interrupt_in_a_file_is_no_error_of_it(tmp_path):
    path = tmp_path / "config.py"
    path.write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load(path)


def test_a_path_that_is_no_file_is_named(tmp_path):
    assert refused(tmp_path / "absent.py").startswith(f"config file '{tmp_path / 'absent.py'}' does not exist")
    assert refused(tmp_path).startswith(f"config file '{tmp_path}' is a folder")
    assert refused("a\0b").startswith("config file 'a\0b' does not exist")
    assert "File name too long" in refused("x" * 5000)
    assert refused("~nobody-of-this-name/x.py").startswith("config file '~nobody-of-this-name/x.py': there is no such")


def test_a_file_in_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.py").write_bytes(GOOD)
    assert load("~/config.py") == Config("x")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (b"    object.__setattr__(config, 'out', {1})\n", "a checkpoint could not hold its config: Object of type set"),
        (
            b"    object.__setattr__(config, 'out', 5)\n",
            "a checkpoint could not hold its config: out = 5: must be text",
        ),
        (
            b"    object.__setattr__(config.optimizer, 'beta1', float('nan'))\n",
            "a checkpoint could not hold its config: Out of range float values are not JSON compliant",
        ),
        (
            b"    object.__setattr__(config.model, 'mixture', ['sa', 'ea'])\n",
            "model.mixture is of type list, and would be of type tuple after a checkpoint",
        ),
        (
            b"    class Other(ModelConfig):\n        pass\n    config = replace(config, model=Other())\n",
            "model is of type Other, and would be of type ModelConfig after a checkpoint",
        ),
    ],
)
def test_a_config_that_no_checkpoint_could_hold_is_refused(code, message, tmp_path):
    path = tmp_path / "odd.py"
    path.write_bytes(
        IMPORT + b"from dataclasses import replace\ndef get_config():\n    config = Config('x')\n" + code
        + b"    return config\n"
    )  # fmt: skip
    assert refused(path).startswith(f"get_config() of '{path}': {message}")


def test_a_kind_of_config_is_not_the_config(tmp_path):
    path = tmp_path / "odd.py"
    path.write_bytes(IMPORT + b"class Mine(Config):\n    pass\ndef get_config():\n    return Mine('x')\n")
    assert refused(path) == f"get_config() of '{path}' returned Mine, not Config"


def test_a_file_of_version_0_1_still_works(tmp_path):
    path = tmp_path / "old.py"
    path.write_text(
        "from dreamer_jax.config import Config, DataConfig, ModelConfig\n"
        "def get_config():\n"
        "    model = ModelConfig(depth=2, width=16, vocab=320, query_heads=2, kv_heads=1, head_size=8,\n"
        "        da_head_size=8, router_size=8, experts=4, active_experts=2, expert_width=8,\n"
        "        mixture='attention_parallel')\n"
        "    return Config(name='old', model=model, data=DataConfig(cache='~/prepared'))\n"
    )
    config = load(path)
    assert (config.model.sa.query_heads, config.model.da.head_size, config.model.router.size) == (2, 8, 8)
    assert config.model.mixture == ("da+sa", "ea")
    assert config.data.prepared == "~/prepared"
