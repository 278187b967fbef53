"""Backups of a site: whole or not at all, read back before they count, opened by their key only."""

import errno
import os
import re
import shlex
import shutil
import sqlite3
import stat
import tarfile
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import BinaryIO, cast

import pytest

from fedpeft.audit_log import AuditLog, verify
from fedpeft.errors import EvidenceError, KeyLocked, StorageError
from fedpeft.sealing.keyfile import Protection
from fedpeft_server.backup import container, snapshot
from fedpeft_server.backup.archive import Manifest, read_backup, write_backup
from fedpeft_server.backup.container import CHUNK_BYTES, ChunkReader, ChunkWriter
from fedpeft_server.backup.restoring import Restored, restore
from fedpeft_server.backup.snapshot import files_of
from fedpeft_server.cli import program
from fedpeft_server.enrolments.refusal import InvitationRefused
from fedpeft_server.site.directory import Site, open_site
from tests.server.sites import CLINICS, content_of, enrol, finish_rounds, make_site, redeem_in_sea

PLAIN = Protection.none()
HOUR_S = 3600.0


@pytest.fixture(autouse=True)
def quick_scrypt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "COST", 2**14)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sites") / "site"
    make_site(directory)
    return directory


@pytest.fixture
def site(made: Path, tmp_path: Path) -> Site:
    shutil.copytree(made, tmp_path / "site")
    return open_site(tmp_path / "site")


def nobody(_sentence: str) -> None:
    """Listen to nothing."""


def back_up(site: Site, out: Path, protection: Protection = PLAIN) -> Manifest:
    run = site.directory / "run"
    about = ("sea", site.sealing.public.fingerprint)
    return write_backup(out, files_of(site.directory, run, nobody), protection, about)


def restored(out: Path, directory: Path, protection: Protection = PLAIN) -> Restored:
    return restore(out, directory, protection, nobody)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        program.run(arguments)
    return int(ended.value.code or 0)


# What a backup refuses


@pytest.mark.parametrize(
    "options", [[], ["--plain", "--passphrase"], ["--plain", "--key-file", "k"]]
)
def test_how_it_is_protected_must_be_said_once(
    options: list[str], site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "b.backup"
    assert run("backup", str(site.directory), "--out", str(out), *options) == 3
    assert "holds the keys of the site, so say how" in capsys.readouterr().err
    assert not out.exists()


def test_a_backup_in_the_site_itself_is_refused(site: Site, capsys: pytest.CaptureFixture[str]):
    out = str(site.directory / "backups" / "b.backup")
    assert run("backup", str(site.directory), "--out", out, "--plain") == 3
    assert "lies in the site itself" in capsys.readouterr().err


def test_a_file_that_exists_is_never_replaced(site: Site, tmp_path: Path):
    (tmp_path / "b.backup").write_bytes(b"older")
    with pytest.raises(StorageError, match="exists; name another file"):
        back_up(site, tmp_path / "b.backup")
    assert (tmp_path / "b.backup").read_bytes() == b"older"


def test_a_link_to_nowhere_is_no_place_for_a_backup_and_nothing_is_read_for_it(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    link = tmp_path / "b.backup"
    link.symlink_to(tmp_path / "elsewhere")
    assert run("backup", str(site.directory), "--out", str(link), "--plain") == 11
    said = capsys.readouterr().err
    assert "exists; name another file" in said
    assert "taking" not in said
    assert link.is_symlink()
    assert not (tmp_path / "elsewhere").exists()


def test_no_folder_is_made_on_the_way_to_a_backup(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    stick = tmp_path / "stick"
    out = str(stick / "b.backup")
    assert run("backup", str(site.directory), "--out", out, "--plain") == 11
    assert f"there is no folder {stick} to write into" in capsys.readouterr().err
    assert not stick.exists()


def test_what_is_no_site_is_told_from_a_clinic_s_box(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options = ["--out", str(tmp_path / "b.backup"), "--plain"]
    box = tmp_path / "box"
    box.mkdir()
    for nothing, why in ((tmp_path / "nowhere", "no such folder"), (box, "no server.toml")):
        assert run("backup", str(nothing), *options) == 3
        said = capsys.readouterr().err
        assert why in said
        assert "fedpeft-server init made" in said
    (box / "client.toml").touch()
    assert run("backup", str(box), *options) == 3
    said = capsys.readouterr().err
    assert "is a clinic's box" in said
    assert "init" not in said
    assert not (tmp_path / "b.backup").exists()


@pytest.mark.parametrize("command", [["verify", "--dir"], ["clinics", "--dir"], ["start"]])
def test_a_clinic_s_box_is_no_damaged_site(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "client.toml").touch()
    assert run(*command, str(tmp_path)) == 3
    assert re.search(r"is a clinic's box.*fedpeft-client", capsys.readouterr().err)


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_what_is_no_plain_file_is_refused_and_nothing_is_left(
    kind: str, site: Site, tmp_path: Path
):
    strange = site.directory / "run" / "strange"
    if kind == "link":
        strange.symlink_to("/etc/passwd")
    else:
        os.mkfifo(strange)
    (tmp_path / "out").mkdir()
    with pytest.raises(StorageError, match=r"run/strange is a link or no plain file"):
        back_up(site, tmp_path / "out" / "b.backup")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_leaves_no_file(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patch, pytest.raises(StorageError, match="no space left"):
        patch.setattr(ChunkWriter, "_put", full)
        back_up(site, tmp_path / "out" / "b.backup")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_does_not_read_back_is_not_kept(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write = ChunkWriter._put

    def failing_disk(self: ChunkWriter, data: bytes, *, last: bool) -> None:
        middle = len(data) // 2
        write(self, data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :], last=last)

    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patch, pytest.raises(StorageError):
        patch.setattr(ChunkWriter, "_put", failing_disk)
        back_up(site, tmp_path / "out" / "b.backup")
    assert list((tmp_path / "out").iterdir()) == []


# What a backup is


def test_a_backup_is_private_and_has_every_file_but_those_that_are_made_anew(
    site: Site, tmp_path: Path
):
    (site.state / "flower.db").write_bytes(b"messages")
    (site.state / "server.lock").touch()
    (site.directory / "run" / "rounds" / ".3.tmp").mkdir()
    (site.directory / "run" / "rounds" / ".3.tmp" / "half").touch()
    manifest = back_up(site, tmp_path / "b.backup")

    there = set(content_of(site.directory))
    missing = there - manifest.files.keys()
    assert {name for name in missing if not name.startswith("run/adapter/")} == {
        "audit/lock",
        "run/rounds/.3.tmp/half",
        "run/summary.json",
        "state/flower.db",
        "state/server.lock",
    }
    assert manifest.files.keys() <= there
    assert stat.S_IMODE((tmp_path / "b.backup").stat().st_mode) == 0o600


def test_backups_of_the_same_site_hold_the_same(site: Site, tmp_path: Path):
    one, other = (back_up(site, tmp_path / name) for name in ("one", "other"))
    assert one.files == other.files


def test_what_follows_a_gap_in_the_rounds_is_left_out(site: Site, tmp_path: Path):
    shutil.rmtree(site.directory / "run" / "rounds" / "1")
    manifest = back_up(site, tmp_path / "b.backup")
    assert manifest.rounds == 1
    assert not any(name.startswith("run/rounds/2") for name in manifest.files)


@pytest.mark.parametrize("key", ["passphrase", "key file"])
def test_an_encrypted_backup_shows_nothing_and_opens_with_its_secret_only(
    key: str, site: Site, tmp_path: Path
):
    (tmp_path / "secret").write_bytes(bytes(range(32)))
    (tmp_path / "wrong").write_bytes(bytes(32))
    right, wrong = {
        "passphrase": (Protection.passphrase("four words"), Protection.passphrase("four words?")),
        "key file": (
            Protection.key_file(tmp_path / "secret"),
            Protection.key_file(tmp_path / "wrong"),
        ),
    }[key]
    out = tmp_path / "b.backup"
    manifest = back_up(site, out, right)

    data = out.read_bytes()
    for shown in (b"anna", b"sea", b"PRIVATE KEY", b"ustar", b"federation"):
        assert shown not in data
    assert read_backup(out, right) == manifest
    with pytest.raises(KeyLocked, match="does not open with"):
        read_backup(out, wrong)
    with pytest.raises(KeyLocked, match="is encrypted: name its secret"):
        read_backup(out, PLAIN)


def test_a_plain_backup_in_the_place_of_an_encrypted_one_is_refused(site: Site, tmp_path: Path):
    back_up(site, tmp_path / "b.backup")
    with pytest.raises(KeyLocked, match="is not encrypted although the passphrase was named"):
        read_backup(tmp_path / "b.backup", Protection.passphrase("four words"))


# Chunks


class Secret:
    plain = PLAIN
    encrypted = Protection.passphrase("four words")


def chunked(path: Path, content: bytes, protection: Protection) -> Path:
    with path.open("wb") as file:
        writer = ChunkWriter(file, protection)
        for at in range(0, len(content), 300_001):
            writer.write(content[at : at + 300_001])
        writer.finish()
    return path


def unchunked(path: Path, protection: Protection) -> bytes:
    with path.open("rb") as file:
        return ChunkReader(file, protection, path.name).readall()


@pytest.mark.parametrize("protection", [Secret.plain, Secret.encrypted], ids=["plain", "encrypted"])
@pytest.mark.parametrize(
    "size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES]
)
def test_content_of_any_size_comes_back(size: int, protection: Protection, tmp_path: Path):
    content = os.urandom(size)
    assert unchunked(chunked(tmp_path / "c", content, protection), protection) == content


def _swapped(data: bytes, sealed: int) -> bytes:
    head = len(data) - 3 * sealed
    chunks = [data[head + at * sealed : head + (at + 1) * sealed] for at in range(3)]
    return data[:head] + chunks[1] + chunks[0] + chunks[2]


_CHANGES: dict[str, Callable[[bytes, int], bytes]] = {
    "a bit of the head": lambda data, _: data[:13] + bytes([data[13] ^ 1]) + data[14:],
    "a bit of the first chunk": lambda data, _: data[:400] + bytes([data[400] ^ 1]) + data[401:],
    "a bit of the last byte": lambda data, _: data[:-1] + bytes([data[-1] ^ 1]),
    "cut off at a chunk": lambda data, sealed: data[:-sealed],
    "cut off within a chunk": lambda data, _: data[:-100],
    "chunks that changed places": _swapped,
    "more at the end": lambda data, _: data + b"x",
    "the first chunk left out": lambda data, sealed: (
        data[: len(data) - 3 * sealed] + data[len(data) - 2 * sealed :]
    ),
}


@pytest.mark.parametrize("protection", [Secret.plain, Secret.encrypted], ids=["plain", "encrypted"])
@pytest.mark.parametrize("change", _CHANGES)
def test_no_change_of_the_bytes_is_read(change: str, protection: Protection, tmp_path: Path):
    path = chunked(tmp_path / "c", os.urandom(3 * CHUNK_BYTES), protection)
    sealed = CHUNK_BYTES + (32 if protection.secret is None else 16)
    path.write_bytes(_CHANGES[change](path.read_bytes(), sealed))
    with pytest.raises((StorageError, KeyLocked), match=r"damaged|no backup"):
        unchunked(path, protection)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", "is no backup of a site"),
        (b"FPBACKUP", "is no backup of a site"),
        (b"x" * 4096, "is no backup of a site"),
        (b"FPBACKUP\x02\x00\x02\x00{}", r"has the backup format 2, this release reads 1"),
        (b"FPBACKUP\x01\x00\x02\x00{}", "the head of .* is damaged"),
        (b"FPBACKUP\x01\x00\xff\xff" + b"[" * 65535, "the head of .* is damaged"),
    ],
)
def test_what_is_no_backup_is_told(content: bytes, error: str, tmp_path: Path):
    (tmp_path / "b").write_bytes(content)
    with pytest.raises(StorageError, match=error):
        read_backup(tmp_path / "b", PLAIN)


def test_a_head_that_asks_for_much_memory_is_refused(tmp_path: Path):
    path = chunked(tmp_path / "c", b"content", Secret.encrypted)
    path.write_bytes(path.read_bytes().replace(b'"n":16384', b'"n":1073741824'))
    with pytest.raises(StorageError, match="the head of"):
        unchunked(path, Secret.encrypted)


# A plain backup that somebody made


def archived(path: Path, members: list[tarfile.TarInfo]) -> Path:
    with path.open("wb") as file:
        writer = ChunkWriter(file, PLAIN)
        with tarfile.open(fileobj=cast("BinaryIO", writer), mode="w|") as tar:
            for each in members:
                tar.addfile(each)
        writer.finish()
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    head = tarfile.TarInfo(name)
    head.type, head.linkname = kind, "/etc/passwd"
    return head


@pytest.mark.parametrize(
    "members",
    [
        [member("../outside")],
        [member("/tmp/outside")],
        [member("a/../../outside")],
        [member("link", tarfile.SYMTYPE)],
        [member("folder", tarfile.DIRTYPE)],
        [member("twice"), member("twice")],
        [member("without-a-list")],
    ],
    ids=lambda members: members[-1].name,
)
def test_a_planted_archive_writes_nothing_outside_and_is_refused(
    members: list[tarfile.TarInfo], tmp_path: Path
):
    path = archived(tmp_path / "b", members)
    (tmp_path / "inside").mkdir()
    with pytest.raises(StorageError, match="does not hold what a backup of this release holds"):
        read_backup(path, PLAIN, tmp_path / "inside")
    assert {each.name for each in tmp_path.iterdir()} == {"b", "inside"}


# Restoring


def test_a_restored_site_has_the_same_bytes_and_says_in_its_log_that_it_was_restored(
    site: Site, tmp_path: Path
):
    back_up(site, tmp_path / "b.backup", Protection.passphrase("four words"))
    made = restored(tmp_path / "b.backup", tmp_path / "new", Protection.passphrase("four words"))

    assert (made.last_round, made.clinics, made.taken_back) == (2, CLINICS, ())
    before, after = content_of(site.directory), content_of(tmp_path / "new")
    changed = {name for name in before if after.get(name) != before[name]}
    # The summary is written at the next start; the log has grown by an entry.
    assert changed == {"audit/000001.jsonl", "audit/end", "run/summary.json", "state/enrolment.db"}
    assert after["audit/000001.jsonl"].startswith(before["audit/000001.jsonl"])
    assert b'"event":"restored"' in after["audit/000001.jsonl"]
    again = open_site(tmp_path / "new")
    assert [each.name for each in again.enrolments().members()] == list(CLINICS)
    assert verify(again.audit, identity=again.sealing.public).problems == ()
    assert again.identity.public == site.sealing.public
    finish_rounds(again, range(3, 4))
    assert run("verify", "--dir", str(tmp_path / "new")) == 0


@pytest.mark.parametrize("there", ["file", "folder with a file"])
def test_only_an_empty_folder_is_restored_into(there: str, site: Site, tmp_path: Path):
    back_up(site, tmp_path / "b.backup")
    target = tmp_path / "new"
    if there == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "mine").touch()
    with pytest.raises(StorageError, match=r"new is (a file|not empty); name a new folder"):
        restored(tmp_path / "b.backup", target)
    assert target.is_file() or [each.name for each in target.iterdir()] == ["mine"]


@pytest.mark.parametrize("kind", ["link to a folder", "link to nowhere", "here", "mount", "no"])
def test_where_a_site_cannot_appear_by_a_rename_nothing_is_read(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    target = tmp_path / "new"
    if kind == "link to a folder":
        (tmp_path / "empty").mkdir()
        target.symlink_to(tmp_path / "empty")
    elif kind == "link to nowhere":
        target.symlink_to(tmp_path / "nowhere")
    elif kind == "here":
        target.mkdir()
        monkeypatch.chdir(target)
    elif kind == "mount":
        target.mkdir()

        def is_target(self: Path) -> bool:
            return self == target

        monkeypatch.setattr(Path, "is_mount", is_target)
    else:
        target = tmp_path / "no" / "new"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StorageError, match=r"symbolic link|are in, or a mount|no folder .*/no "):
        # There is no such backup, and that is not what is said.
        restored(tmp_path / "none.backup", target)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_is_told_of_the_folder_that_was_asked_for(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    back_up(site, tmp_path / "b.backup")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(StorageError) as caught:
        patch.setattr(os, "fsync", full)
        restored(tmp_path / "b.backup", tmp_path / "new")
    said = str(caught.value)
    assert said.startswith(f"cannot write {tmp_path / 'new'}/")
    assert "no space left on device; check the disk's free space" in said
    assert "/.new." not in said
    assert sorted(each.name for each in tmp_path.iterdir()) == ["b.backup", "site"]


def test_an_empty_folder_may_be_restored_into(site: Site, tmp_path: Path):
    back_up(site, tmp_path / "b.backup")
    (tmp_path / "new").mkdir()
    assert restored(tmp_path / "b.backup", tmp_path / "new").last_round == 2


def test_a_damaged_backup_restores_nothing(site: Site, tmp_path: Path):
    out = tmp_path / "b.backup"
    back_up(site, out)
    data = bytearray(out.read_bytes())
    data[len(data) // 2] ^= 1
    out.write_bytes(data)
    (tmp_path / "place").mkdir()
    with pytest.raises(StorageError, match="is damaged or cut short"):
        restored(out, tmp_path / "place" / "new")
    assert list((tmp_path / "place").iterdir()) == []


def test_what_was_damaged_before_the_backup_is_not_restored(site: Site, tmp_path: Path):
    weights = site.directory / "run" / "rounds" / "1" / "adapter" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    back_up(site, tmp_path / "b.backup")
    (tmp_path / "place").mkdir()
    with pytest.raises(
        EvidenceError, match=r"nothing was restored; .*round 1: its weights are not"
    ):
        restored(tmp_path / "b.backup", tmp_path / "place" / "new")
    assert list((tmp_path / "place").iterdir()) == []


def test_open_invitations_do_not_come_back(site: Site, tmp_path: Path):
    open_ = site.enrolments().create_invitation("dora", HOUR_S, fingerprint="f" * 64)
    back_up(site, tmp_path / "b.backup")
    redeem_in_sea(site.enrolments(), open_.token)

    made = restored(tmp_path / "b.backup", tmp_path / "new")
    assert made.taken_back == ("dora",)
    with pytest.raises(InvitationRefused):
        redeem_in_sea(open_site(tmp_path / "new").enrolments(), open_.token)


def test_whom_to_revoke_again_is_said(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out, new = str(tmp_path / "b.backup"), str(tmp_path / "new")
    assert run("backup", str(site.directory), "--out", out, "--plain") == 0
    site.enrolments().revoke("bert")
    assert run("restore", out, new) == 0
    said = capsys.readouterr().err
    assert "enrolled again are: anna, bert, carl; whom you have revoked or removed since" in said
    assert "make sure that the old server is off for good" in said


def test_noise_of_the_server_that_a_rollback_forgets_is_said(site: Site, tmp_path: Path):
    text = (site.directory / "federation.toml").read_text()
    terms = '[privacy]\nmechanism = "central"\nunit = "clinic"\nepsilon = 8.0\ndelta = 1e-5\n'
    (site.directory / "federation.toml").write_text(text + terms)
    back_up(site, tmp_path / "b.backup")
    assert restored(tmp_path / "b.backup", tmp_path / "new").forgets_noise


# Beside a running server


def test_a_backup_of_a_site_at_work_is_consistent(site: Site, tmp_path: Path):
    stop = threading.Event()

    def work() -> None:
        enrolments, number = site.enrolments(), 3
        while not stop.is_set():
            enrol(enrolments, f"clinic-{number}")
            finish_rounds(site, range(number, number + 1))
            enrolments.revoke(f"clinic-{number}")
            number += 1

    working = threading.Thread(target=work)
    working.start()
    try:
        for attempt in range(6):
            out = tmp_path / f"{attempt}.backup"
            manifest = back_up(site, out)
            made = restored(out, tmp_path / f"restored-{attempt}")
            assert made.last_round == manifest.rounds - 1
    finally:
        stop.set()
        working.join()


def test_the_log_ends_with_its_last_whole_line(site: Site, tmp_path: Path):
    with (site.audit / "000001.jsonl").open("ab") as file:
        file.write(b'{"about":{"event":"to')
    back_up(site, tmp_path / "b.backup")
    (tmp_path / "out").mkdir()
    read_backup(tmp_path / "b.backup", PLAIN, tmp_path / "out")
    assert (tmp_path / "out" / "audit" / "000001.jsonl").read_bytes().endswith(b"}\n")
    assert AuditLog(tmp_path / "out" / "audit").repaired_bytes == 0


def test_a_database_that_is_written_to_is_taken_as_of_one_moment(site: Site, tmp_path: Path):
    with closing(sqlite3.connect(site.state / "enrolment.db", isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        database.execute("DELETE FROM clinics")
        made = restored_of(site, tmp_path)
        database.execute("ROLLBACK")
    assert made.clinics == CLINICS


def restored_of(site: Site, tmp_path: Path) -> Restored:
    back_up(site, tmp_path / "b.backup")
    return restored(tmp_path / "b.backup", tmp_path / "new")


def test_keys_that_never_settle_are_not_backed_up(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    read, count = snapshot._file, [0]

    def changing(path: Path, name: str, size: int | None = None) -> snapshot.Taken:
        if name == "keys/server.pem":
            count[0] += 1
            path.write_text(f"renewed {count[0]} times")
        return read(path, name, size)

    monkeypatch.setattr(snapshot, "_file", changing)
    with pytest.raises(StorageError, match="change all the time"):
        back_up(site, tmp_path / "b.backup")


# verify


def damaged(site: Site, what: str) -> str:
    """Damage the site, and return what is to be said of it."""
    run_, keys = site.directory / "run", site.directory / "keys"
    match what:
        case "weights":
            path = run_ / "rounds" / "1" / "adapter" / "adapter_model.safetensors"
            path.write_bytes(path.read_bytes()[:-1] + b"\x01")
            return r"round 1\tdamaged\tits weights are not those that were signed"
        case "lineage":
            path = run_ / "rounds" / "2" / "adapter" / "lineage.json"
            path.write_bytes(path.read_bytes().replace(b"carl", b"cora"))
            return r"round 2\tdamaged\tthe lineage was changed after the server had signed"
        case "lineage gone":
            (run_ / "rounds" / "2" / "adapter" / "lineage.json").unlink()
            return r"round 2\tdamaged\tits lineage is missing, and round 1 has one"
        case "record":
            (run_ / "rounds" / "0" / "round.json").write_text("{}")
            return r"round 0\tdamaged\t.*round.json or a file beside it cannot be read"
        case "another round":
            shutil.rmtree(run_ / "rounds" / "2")
            shutil.copytree(run_ / "rounds" / "1", run_ / "rounds" / "2")
            return r"round 2\tdamaged\t.*holds round 1"
        case "gap":
            shutil.rmtree(run_ / "rounds" / "1")
            return r"run\tdamaged\t.*rounds/2 follows a gap"
        case "published":
            path = run_ / "adapter" / "adapter_model.safetensors"
            path.write_bytes(path.read_bytes()[:-1] + b"\x01")
            return r"run\tdamaged\t.*is of no finished round"
        case "log":
            path = site.audit / "000001.jsonl"
            path.write_bytes(path.read_bytes().replace(b"bert", b"mert", 1))
            return r"audit log\tdamaged\t000001.jsonl, line \d+ \(entry \d+\) was changed"
        case "older log":
            shutil.rmtree(site.audit)
            AuditLog(site.audit, signer=site.identity).append("key", {"event": "invited"})
            return r"round 1\tdamaged\tits lineage names entry \d+ of the audit log"
        case "database":
            path = site.state / "enrolment.db"
            with closing(sqlite3.connect(path)) as database:
                database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            path.write_bytes(path.read_bytes()[:4096] + bytes(8192))
            return r"enrolments\tdamaged\t.*(damaged|cannot be read)"
        case "older database":
            before = tmp = site.state / "enrolment.db.before"
            with (
                closing(sqlite3.connect(site.state / "enrolment.db")) as live,
                closing(sqlite3.connect(tmp)) as copy,
            ):
                live.backup(copy)
            site.enrolments().revoke("bert")
            for name in ("enrolment.db-wal", "enrolment.db-shm"):
                (site.state / name).unlink(missing_ok=True)
            before.replace(site.state / "enrolment.db")
            (site.state / "enrolment.db").chmod(0o600)
            return r"enrolments\tdamaged\tbert is enrolled, and the audit log says .* revoked"
        case "database gone":
            for path in site.state.glob("enrolment.db*"):
                path.unlink()
            return r"enrolments\tdamaged\t.*is missing: restore it"
        case "messages":
            (site.state / "flower.db").write_bytes(b"no database at all " * 50)
            (site.state / "flower.db").chmod(0o600)
            return r"messages\tdamaged\t.*move it away"
        case "open key":
            (keys / "identity.key").chmod(0o644)
            return r"permissions\tdamaged\t.*identity.key is open to other users.*chmod 600"
        case "other authority":
            (keys / "ca.key").write_bytes((keys / "server.key").read_bytes())
            return r"keys\tdamaged\t.*ca.key is not the key of .*ca.pem"
        case "other certificate":
            (keys / "server.key").write_bytes((keys / "ca.key").read_bytes())
            return r"keys\tdamaged\t.*proves to no clinic"
        case "other identity":
            path = keys / "identity.key"
            path.write_bytes(re.sub(rb'"public":"\w{4}', b'"public":"0000', path.read_bytes()))
            return r"keys\tdamaged\t.*is not the private half of identity.pub"
        case "settings":
            (site.directory / "federation.toml").write_text("name = 3")
            return r"configuration\tdamaged\t"
        case _:
            raise AssertionError(what)


@pytest.mark.parametrize(
    "what",
    [
        "weights", "lineage", "lineage gone", "record", "another round", "gap", "published", "log",
        "older log", "database", "older database", "database gone", "messages", "open key",
        "other authority", "other certificate", "other identity", "settings",
    ],
)  # fmt: skip
def test_damage_is_found_and_named(what: str, site: Site, capsys: pytest.CaptureFixture[str]):
    said = damaged(site, what)
    before = content_of(site.directory)
    assert run("verify", "--dir", str(site.directory)) == 18
    found = capsys.readouterr()
    assert re.search(said, found.out), found.out
    assert "findings of damage" in found.err
    # What SQLite writes beside a database to read it is not ours.
    beside = (".db-wal", ".db-shm")
    after = content_of(site.directory)
    assert {n: c for n, c in after.items() if not n.endswith(beside)} == {
        n: c for n, c in before.items() if not n.endswith(beside)
    }


def test_a_whole_site_and_its_backup_are_told_to_be_whole(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run("verify", "--dir", str(site.directory)) == 0
    assert "damaged" not in capsys.readouterr().out
    back_up(site, tmp_path / "b.backup")
    assert run("verify", str(tmp_path / "b.backup")) == 0
    found = capsys.readouterr().out
    assert found.startswith("backup\tok\tof federation sea, ")
    assert "damaged" not in found


@pytest.mark.parametrize("is_encrypted", [True, False])
def test_the_command_that_a_backup_tells_to_try_works(
    is_encrypted: bool, site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "my key").write_bytes(bytes(32))
    secret = ["--key-file", str(tmp_path / "my key")] if is_encrypted else ["--plain"]
    out = str(tmp_path / "b.backup")
    assert run("backup", str(site.directory), "--out", out, *secret) == 0
    told = capsys.readouterr().err.split("try it: fedpeft-server ")[1]
    assert run(*shlex.split(told)) == 0


def test_a_half_written_round_is_no_damage(site: Site, capsys: pytest.CaptureFixture[str]):
    (site.directory / "run" / "rounds" / ".3.tmp").mkdir()
    assert run("verify", "--dir", str(site.directory)) == 0
    assert "a round that was being written" in capsys.readouterr().out


def test_a_rotated_identity_still_vouches_for_the_rounds_before(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run("rotate", "--identity", "--dir", str(site.directory)) == 0
    finish_rounds(open_site(site.directory), range(3, 4))
    assert run("verify", "--dir", str(site.directory)) == 0, capsys.readouterr()
    assert restored_of(open_site(site.directory), tmp_path).last_round == 3


def test_there_is_no_site_to_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run("verify", "--dir", str(tmp_path / "nowhere")) == 11
    assert "is no folder: name the site with --dir" in capsys.readouterr().err
