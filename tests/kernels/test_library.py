"""The cache of compiled kernels: whole, private, tidy, and never in the way."""

import concurrent.futures
import os
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from dreamer_jax.kernels.native import library
from tests.kernels.backends import needs_compiler

pytestmark = needs_compiler
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
COMPILER = """#!/bin/sh
# Stands in for a compiler: "links" a library that is there, and counts.
case "$*" in
    --version) echo "stand-in 1.0" ;;
    *-shared*)
        echo "$PWD" >> {log}
        case "$PWD" in {full}*) echo "ld: final link failed: No space left on device" >&2; exit 1 ;; esac
        sleep 0.2
        cp {real} kernels.so ;;
esac
"""


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """A compiled library, from the cache of the machine or compiled now."""
    folder = tmp_path_factory.mktemp("real")
    kept = library._cache() / f"{library._fingerprint(library._compiler())}.so"
    if kept.exists():
        return shutil.copy(kept, folder)
    return library._compile(library._compiler(), folder)


class Cache:
    """A cache of its own, and a stand-in for the compiler."""

    def __init__(self, home, real, monkeypatch):
        self.root, self._log, compiler = home / "cache", home / "log", home / "compiler"
        self.folder = self.root / "dreamer_jax" / "native"
        compiler.write_text(COMPILER.format(log=self._log, real=real, full=home / "full"))
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
        monkeypatch.setenv("XDG_CACHE_HOME", str(self.root))
        monkeypatch.setattr(tempfile, "tempdir", str(home))

    def places(self):
        """Where libraries were made."""
        return [Path(line).parent for line in self._log.read_text().splitlines()]

    def get(self):
        """A library with all functions; returns how many were made for it."""
        before = len(self.places()) if self._log.exists() else 0
        loaded = library._loaded()
        assert all(loaded[name] for name in library.FUNCTIONS)
        return len(self.places()) - before

    @property
    def files(self):
        found = sorted(self.folder.iterdir())
        assert [path.suffix for path in found] == [".sha256", ".so"]
        return found


@pytest.fixture
def cache(tmp_path, real, monkeypatch):
    return Cache(tmp_path, real, monkeypatch)


def rights(path):
    return stat.S_IMODE(path.lstat().st_mode)


def halved(digest, path):
    os.truncate(path, path.stat().st_size // 2)


def linked(digest, path):
    elsewhere = path.parents[3] / "elsewhere.so"
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)


def a_pipe(digest, path):
    path.unlink()
    os.mkfifo(path)


DAMAGE = {
    "cut in half": halved,
    "empty": lambda digest, path: os.truncate(path, 0),
    "of a digest that is missing": lambda digest, path: digest.unlink(),
    "of another digest": lambda digest, path: digest.write_text("0" * 64),
    "a link": linked,
    "a pipe": a_pipe,
    "for others to write to": lambda digest, path: path.chmod(0o666),
    "of a digest for others to write to": lambda digest, path: digest.chmod(0o620),
    "another's": pytest.param(lambda digest, path: os.chown(path, 1234, 1234), marks=as_root),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_library_that_cannot_be_trusted_is_made_anew(cache, damage):
    assert cache.get() == 1
    assert cache.get() == 0
    damage(*cache.files)
    assert cache.get() == 1
    assert cache.get() == 0
    assert [rights(path) for path in cache.files] == [0o600, 0o600]


def test_a_library_is_never_taken_for_one_that_was_loaded_before(cache, tmp_path):
    cache.get()
    first = library._loaded()
    halved(*cache.files)  # its pages are gone: to look up a name in it would end the process
    cache.get()
    assert library._loaded()._handle != first._handle


@pytest.mark.parametrize("umask", [0, 0o777])
def test_files_and_folders_are_the_users_alone(cache, umask):
    cache.root.mkdir()
    previous = os.umask(umask)
    try:
        cache.get()
    finally:
        os.umask(previous)
    assert [rights(path) for path in (cache.folder.parent, cache.folder, *cache.files)] == [0o700] * 2 + [0o600] * 2


def test_rights_that_are_too_wide_are_narrowed(cache):
    cache.get()
    cache.folder.chmod(0o777)
    assert cache.get() == 0
    assert rights(cache.folder) == 0o700


def given_away(folder):
    os.chown(folder, 1234, 1234)


def a_link_to_another(folder):
    elsewhere = folder.with_name("elsewhere")
    shutil.move(folder, elsewhere)
    folder.symlink_to(elsewhere)


@pytest.mark.parametrize("change", [pytest.param(given_away, marks=as_root), a_link_to_another])
def test_a_folder_that_cannot_be_trusted_is_left_alone(cache, change, capfd, tmp_path):
    cache.get()
    change(cache.folder)
    held = sorted(cache.folder.iterdir())
    for _ in range(2):
        assert cache.get() == 1
        assert cache.places()[-1] == tmp_path
    assert sorted(cache.folder.iterdir()) == held
    assert "warning: the cache of compiled kernels cannot be used: '" in capfd.readouterr().err
    assert not list(tmp_path.glob("dreamer_jax-build-*"))


def test_without_a_place_for_a_cache_each_process_makes_its_own(cache, monkeypatch, capfd, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert cache.get() == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: Path("/proc/nobody"))
    assert cache.get() == 1

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert cache.get() == 1
    warnings = capfd.readouterr().err
    assert warnings.count("warning: the cache of compiled kernels cannot be used") == 3
    assert "Could not determine home directory" in warnings
    assert cache.places() == [tmp_path] * 3


def test_a_full_disk_is_no_reason_to_go_without(cache, monkeypatch, capfd, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "full"))
    assert cache.get() == 2
    assert cache.places() == [tmp_path / "full" / "dreamer_jax" / "native", tmp_path]
    assert "for this process alone" in capfd.readouterr().err


def test_what_was_left_behind_goes(cache):
    cache.get()
    used = cache.files
    here = f"dreamer_jax-build-{socket.gethostname()}+"
    with subprocess.Popen(["true"]) as ended:
        pass
    day, another = 24 * 3600, "dreamer_jax-build-another"
    folders = [f"{here}{ended.pid}+a", f"{here}{os.getpid()}+b", f"{another}+1+c", "tmpd"]
    for name in (*folders, f"{another}+1+e", "tmpf"):
        (cache.folder / name).mkdir()
        (cache.folder / name / "grouped.o").touch()
    for name, days in (("long.so", 31), ("long.sha256", 31), ("short.so", 29), (used[0].name, 99), (used[1].name, 99)):
        (cache.folder / name).touch()
        os.utime(cache.folder / name, (time.time() - days * day,) * 2)
    for name in (f"{another}+1+e", "tmpf"):
        os.utime(cache.folder / name, (time.time() - 2 * day,) * 2)
    assert cache.get() == 0
    left = {path.name for path in cache.folder.iterdir()}
    assert left == {*folders[1:], "short.so", *(path.name for path in used)}
    assert all(time.time() - path.stat().st_mtime < day for path in used)


def test_several_may_build_at_once(cache):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        loaded = [future.result() for future in [pool.submit(library._loaded) for _ in range(4)]]
    assert all(each[name] for each in loaded for name in library.FUNCTIONS)
    assert cache.get() == 0
    assert cache.files


def test_a_compiler_that_cannot_be_understood_is_a_reason(monkeypatch):
    monkeypatch.setenv("CXX", "g++ '")
    with pytest.raises(OSError, match=r"CXX = .*No closing quotation"):
        library._compiler()
