"""Files appear whole or not at all, and links are not followed."""

import os

import pytest

from dreamer_jax.files import open_without_links, write_whole


def test_a_file_is_written_and_replaced(tmp_path):
    path = tmp_path / "a.json"
    write_whole(path, "one")
    write_whole(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_file_that_is_right_already_is_left_alone(tmp_path):
    path = tmp_path / "a.json"
    write_whole(path, "same")
    inode = path.stat().st_ino
    write_whole(path, "same")
    assert path.stat().st_ino == inode


def test_new_files_have_the_usual_rights(tmp_path):
    mask = os.umask(0o027)
    try:
        write_whole(tmp_path / "a", "x")
    finally:
        os.umask(mask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("content", ["other", "mine"])
def test_a_link_in_its_place_is_replaced_and_its_target_untouched(tmp_path, content):
    target = tmp_path / "target"
    target.write_text(content)
    link = tmp_path / "config.json"
    link.symlink_to(target)
    write_whole(link, "mine")
    assert (link.read_text(), link.is_symlink(), target.read_text()) == ("mine", False, content)


def test_a_failure_leaves_the_old_file_and_no_draft(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_whole(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_link_is_not_opened(tmp_path):
    (tmp_path / "target").write_text("keep")
    (tmp_path / "lock").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match=r"symbolic links|ELOOP"):
        open_without_links(tmp_path / "lock", os.O_RDWR)
    os.close(open_without_links(tmp_path / "new", os.O_RDWR))
    assert (tmp_path / "new").is_file()
