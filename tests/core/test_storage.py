"""Files on disk: after any failure the old content is there, whole."""

import errno
import os
import stat
from pathlib import Path

import pytest

from fedpeft import storage
from fedpeft.errors import StorageError
from fedpeft.storage import write_atomically, write_once


def fail_with(code: int):
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("broken", ["fsync", "fdopen", "fchmod"])
def test_a_full_disk_leaves_the_old_content_and_no_litter(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "state.json"
    write_atomically(path, b"old")
    monkeypatch.setattr(storage.os, broken, fail_with(errno.ENOSPC))
    with pytest.raises(StorageError, match=r"cannot write .*state\.json: no space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_crash_before_the_rename_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "state.json"
    write_atomically(path, b"old")

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


def test_a_file_in_the_way_of_the_folder_is_explained(tmp_path: Path):
    (tmp_path / "taken").write_text("x")
    with pytest.raises(StorageError, match="taken"):
        write_atomically(tmp_path / "taken" / "state.json", b"x")


def test_content_and_folder_are_synced_before_and_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_sync(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        events.append(kind)
        fsync(descriptor)

    def note_replace(self: Path, target: Path) -> Path:
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(storage.os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_replace)
    write_atomically(tmp_path / "state.json", b"x")
    assert events == ["file", "rename", "folder"]


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_the_mode_is_as_asked_whatever_the_umask(mode: int, tmp_path: Path):
    before = os.umask(0o077)
    try:
        write_atomically(tmp_path / "f", b"x", mode=mode)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == mode


def test_folders_are_made_on_the_way(tmp_path: Path):
    write_atomically(tmp_path / "a" / "b" / "f", b"content")
    assert (tmp_path / "a" / "b" / "f").read_bytes() == b"content"


def test_write_once_never_replaces(tmp_path: Path) -> None:
    write_once(tmp_path / "file", b"first", mode=0o600)

    with pytest.raises(FileExistsError):
        write_once(tmp_path / "file", b"second", mode=0o600)

    assert (tmp_path / "file").read_bytes() == b"first"
    assert len(list(tmp_path.iterdir())) == 1
