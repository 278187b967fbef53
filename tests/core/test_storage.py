"""Files on disk: after any failure the old content is there, whole."""

import errno
import os
import stat
from pathlib import Path

import pytest

from fedpeft import storage
from fedpeft.errors import StorageError
from fedpeft.storage import (
    explained,
    require_folder,
    require_new,
    write_atomically,
    write_once,
)


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


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOENT, "check the path"),
        (errno.ENOTDIR, "a part of it that should be a folder is a file"),
        (errno.EISDIR, "name a file"),
        (errno.EEXIST, "name another place"),
        (errno.EACCES, "check the owner and mode"),
        (errno.EPERM, "check the owner and mode"),
        (errno.ENOSPC, "check the disk's free space"),
        (errno.EDQUOT, "check the disk's free space"),
        (errno.EFBIG, "the limit on the size of a file"),
        (errno.EROFS, "mounted read-only"),
        (errno.EIO, "may be failing"),
        (errno.ENOTCONN, "check the disk"),
    ],
)
def test_the_advice_fits_what_failed(code: int, advice: str, tmp_path: Path):
    with pytest.raises(StorageError) as caught, explained("read", tmp_path / "file"):
        raise OSError(code, os.strerror(code))
    said, _, told = str(caught.value).partition("; ")
    assert said == f"cannot read {tmp_path / 'file'}: {os.strerror(code).lower()}"
    assert advice in told
    assert ("free space" in told) == (code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


def test_an_error_without_a_number_is_explained_too(tmp_path: Path):
    with (
        pytest.raises(StorageError, match=r"cannot read .*: oserror; check the disk"),
        explained("read", tmp_path),
    ):
        raise OSError


def test_a_folder_that_is_missing_is_named_and_not_made(tmp_path: Path):
    with pytest.raises(StorageError, match=rf"there is no folder {tmp_path}/stick to write into"):
        require_folder(tmp_path / "stick")
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file is no folder"):
        require_folder(tmp_path / "file")
    require_folder(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("kind", ["file", "folder", "link to nowhere"])
def test_what_stands_there_is_nothing_new(kind: str, tmp_path: Path):
    path = tmp_path / "there"
    if kind == "file":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    with pytest.raises(StorageError, match="there exists; name another file"):
        require_new(path)
    with pytest.raises(StorageError, match="there is no folder"):
        require_new(tmp_path / "missing" / "file")
    require_new(tmp_path / "file")


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
