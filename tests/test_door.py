"""What a command says of errors, and that broken output costs nothing."""

import errno
import io
import os
import sys

import pytest

from dreamer_jax import door
from dreamer_jax.errors import DreamerError
from dreamer_jax.training.checkpoint import CheckpointError

OURS = {
    "our own": (CheckpointError("two\nlines"), "two\nlines"),
    "no permission": (
        PermissionError(errno.EACCES, "Permission denied", "/data/x"),
        "'/data/x': Permission denied; no",
    ),
    "a full disk": (OSError(errno.ENOSPC, "No space left on device"), "out: No space left on device; the"),
    "an absent file": (FileNotFoundError(errno.ENOENT, "No such file or directory", "a"), "'a': No such file"),
    "a folder": (IsADirectoryError(errno.EISDIR, "Is a directory", "a"), "'a': Is a directory; it is a folder"),
    "a link": (OSError(errno.ELOOP, "Too many levels of symbolic links", "lock"), "'lock': Too many levels"),
    "two names": (OSError(errno.EXDEV, "Invalid cross-device link", "a", None, "b"), "'a' -> 'b': Invalid"),
    "an extra": (ModuleNotFoundError("No module named 'wandb'", name="wandb"), "pip install 'dreamer-jax[wandb]'"),
    "a module": (
        ModuleNotFoundError("No module named 'grain.x'", name="grain.x"),
        "the module 'grain' is not installed",
    ),
    "memory": (MemoryError(), "no memory left (in Python)"),
    "the device's memory": (
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"),
        "no memory left (RES",
    ),
}
BUGS = [TypeError("x"), ValueError("x"), KeyError("x"), RuntimeError("x"), OSError("no number"), AssertionError()]


@pytest.mark.parametrize("case", OURS)
def test_what_a_user_can_fix_is_a_line(case, capsys):
    error, wanted = OURS[case]

    def run():
        raise error

    assert door.guarded(run, doing="out") == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert wanted in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("error", BUGS, ids=repr)
def test_a_bug_keeps_its_traceback(error):
    def run():
        raise error

    with pytest.raises(type(error)):
        door.guarded(run, doing="out")


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable to initialize backend 'cuda': x")], ids=repr)
def test_a_platform_that_jax_does_not_find_is_a_line(error, monkeypatch, capsys):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    code = compile("def fail(error):\n    raise error", "/somewhere/jax/_src/xla_bridge.py", "exec")
    exec(code, names := {})
    assert door.guarded(lambda: names["fail"](error), doing="out") == 1
    assert "error: JAX_PLATFORMS = 'cuda': JAX finds no such devices" in capsys.readouterr().err


def test_every_error_for_users_has_one_base():
    from dreamer_jax.accounting.match import MatchError
    from dreamer_jax.config import ConfigError
    from dreamer_jax.convert.names import WeightError
    from dreamer_jax.data.sources import DataError
    from dreamer_jax.distributed import DistributedError
    from dreamer_jax.inference.sample import GenerationError
    from dreamer_jax.model.dreamer import TokenError
    from dreamer_jax.training.loop import TrainingDiverged
    from dreamer_jax.training.run_folder import RunFolderError

    kinds = [MatchError, ConfigError, WeightError, DataError, DistributedError, GenerationError, TokenError]
    assert all(issubclass(kind, DreamerError) for kind in [*kinds, TrainingDiverged, RunFolderError, CheckpointError])


def test_ctrl_c_ends_with_its_code():
    def run():
        raise KeyboardInterrupt

    assert door.guarded(run, doing="out") == 130


class Gone(io.StringIO):
    """A stream whose reader has left."""

    def write(self, text):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    def fileno(self):
        raise OSError("no descriptor")


def test_a_reader_that_left_ends_a_command_quietly(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Gone())
    assert door.guarded(lambda: print("x") or 0, doing="out") == 141
    assert "error" not in capsys.readouterr().err


def test_a_run_goes_on_without_its_output(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Gone())
    monkeypatch.setattr(sys, "stderr", Gone())
    with door.unbreakable_output():
        print("one")
        print("two", file=sys.stderr, flush=True)
        assert sys.stdout.broken
        assert sys.stderr.broken
    assert not isinstance(sys.stdout, door.Unbreakable)


def test_output_that_works_passes_through(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    with door.unbreakable_output():
        print("one")
    assert stream.getvalue() == "one\n"


def test_closed_output_and_x64_are_taken_care_of(monkeypatch, capsys):
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    monkeypatch.setattr(sys, "stdout", None)
    assert door.guarded(lambda: print("into nowhere") or 0, doing="out") == 0
    assert os.environ["JAX_ENABLE_X64"] == "0"
    assert "JAX_ENABLE_X64 is set, and left out here" in capsys.readouterr().err
    sys.stdout.close()


def test_a_narrow_terminal_gets_escapes(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert door.guarded(lambda: print("é") or 0, doing="out") == 0
    assert raw.getvalue() == b"\\xe9\n"
