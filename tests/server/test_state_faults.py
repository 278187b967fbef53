"""Faults of disk, clock and files at the central site: told in one sentence, no round lost."""

import datetime
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedpeft.audit_log import AuditLog, verify
from fedpeft.errors import StorageError
from fedpeft.sealing.identity import Identity
from fedpeft.sealing.possession import prove_possession
from fedpeft_server.cli import program
from fedpeft_server.enrolments.clinic import KEY_DAYS
from fedpeft_server.enrolments.refusal import InvitationRefused
from fedpeft_server.rounds import lineage
from fedpeft_server.runs.directory import RunDirectory
from fedpeft_server.service import serve_federation
from fedpeft_server.site.check import check_site
from fedpeft_server.site.directory import Site, open_site
from tests.server.sites import CLINICS, content_of, finish_rounds, make_site, redeem_in_sea
from tests.server.test_enrolment import new_key

NOBODY = 65534
HOUR_S, YEAR_S = 3600.0, 365 * 86400.0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sites") / "site"
    make_site(directory, rounds=2)
    return directory


@pytest.fixture
def site(made: Path, tmp_path: Path) -> Site:
    shutil.copytree(made, tmp_path / "site")
    return open_site(tmp_path / "site")


def rounds_of(site: Site) -> dict[str, bytes]:
    """Return what the finished rounds hold."""
    found = content_of(site.directory / "run" / "rounds")
    return {name: content for name, content in found.items() if not name.startswith(".")}


def damage_in(site: Site) -> list[str]:
    found = check_site(site.directory, site.directory / "run")
    return [each.line() for each in found if each.is_damage]


def assert_goes_on(site: Site, before: dict[str, bytes]) -> None:
    """The rounds are as they were, and the next one can be finished."""
    assert rounds_of(site) == before
    number = len({name.split("/")[0] for name in before})
    finish_rounds(site, range(number, number + 1))
    found = rounds_of(site)
    assert {name: found[name] for name in before} == before
    assert damage_in(site) == []


# Disk


@contextmanager
def largest_file(size: int) -> Generator[None]:
    """Let no file of this process grow beyond ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_takes_no_more_costs_the_open_round_only(site: Site):
    before = rounds_of(site)
    log_bytes = (site.audit / "000001.jsonl").stat().st_size
    weights = site.directory / "run" / "rounds" / "1" / "adapter" / "adapter_model.safetensors"
    # The log and the small files still fit, the adapter does not.
    limit = max(log_bytes, 8192) + 8192
    assert weights.stat().st_size > limit
    with (
        largest_file(limit),
        pytest.raises(StorageError, match=r"cannot write .*check the disk's free space"),
    ):
        finish_rounds(site, range(2, 3))
    assert_goes_on(site, before)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up_keeps_its_rounds_and_goes_on_when_there_is_space(
    made: Path, small_disk: Path
):
    shutil.copytree(made, small_disk / "site")
    site, before = open_site(small_disk / "site"), content_of(made / "run" / "rounds")
    free = os.statvfs(small_disk)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(free.f_bavail * free.f_frsize - 40_000))
    with pytest.raises(StorageError, match="no space left on device"):
        finish_rounds(site, range(2, 3))
    ballast.unlink()
    assert_goes_on(site, before)


@contextmanager
def as_nobody() -> Generator[None]:
    """Be a user for whom rights count, as they do not for root."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_results_that_became_read_only_are_told_and_kept(made: Path):
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(made, Path(folder) / "site")
        site = open_site(Path(folder) / "site")
        before, rounds = rounds_of(site), site.directory / "run" / "rounds"
        for path in (Path(folder), *Path(folder).rglob("*")):
            if not os.geteuid():
                os.chown(path, NOBODY, NOBODY)
        rounds.chmod(0o500)
        with as_nobody(), pytest.raises(StorageError, match=r"cannot write .*permission denied"):
            finish_rounds(site, range(2, 3))
        rounds.chmod(0o700)
        assert_goes_on(site, before)


# Kill

_KILLED = """
import os, signal, sys
from pathlib import Path

from tests.server.sites import finish_rounds, schema_of
from fedpeft_server.site.directory import open_site

import shutil

made, folder, points = Path(sys.argv[1]), Path(sys.argv[2]), 0
schema_of(open_site(made))
while True:
    points += 1
    place = folder / str(points)
    shutil.copytree(made, place)
    if (child := os.fork()) == 0:
        left = [points]

        def counted(step):
            def do(*arguments, **named):
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                return step(*arguments, **named)

            return do

        # Whatever makes a change durable or visible, on its way to the system.
        for name in ("fsync", "rename", "replace", "link", "unlink", "mkdir"):
            setattr(os, name, counted(getattr(os, name)))
        finish_rounds(open_site(place), range(2, 3))
        os._exit(0)
    if not os.waitpid(child, 0)[1]:
        break
print(points)
"""


def test_a_kill_between_any_two_durable_steps_of_a_round_costs_the_open_round_at_most(
    made: Path, tmp_path: Path
):
    root = Path(__file__).parents[2]
    ran = subprocess.run(
        [sys.executable, "-c", _KILLED, str(made), str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    points = int(ran.stdout)
    assert points > 30
    before = content_of(made / "run" / "rounds")
    for point in range(1, points):
        site = open_site(tmp_path / str(point))
        found = rounds_of(site)
        assert {name: found.get(name) for name in before} == before, point
        last = RunDirectory(site.directory / "run", site.federation, engine="flower").records()[-1]
        assert last.round == 2 or found == before
        if last.round == 1 and not point % 5:
            assert_goes_on(site, before)
        assert damage_in(site) == [], point


# Clock


def moved(years: float) -> type[datetime.datetime]:
    class Moved(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return super().now(tz) + datetime.timedelta(days=365 * years)

    return Moved


def test_a_clock_that_jumps_between_rounds_breaks_no_chain(
    site: Site, monkeypatch: pytest.MonkeyPatch
):
    before = rounds_of(site)
    for number, years in ((2, -20.0), (3, 30.0), (4, 0.0)):
        clock = moved(years)
        monkeypatch.setattr(lineage, "datetime", clock)
        monkeypatch.setattr("fedpeft.audit_log.log.datetime", clock)
        finish_rounds(site, range(number, number + 1))
    found = rounds_of(site)
    assert {name: found[name] for name in before} == before
    assert verify(site.audit, identity=site.sealing.public).problems == ()
    assert damage_in(site) == []


def test_a_clock_that_jumps_gives_no_invitation_a_second_life(site: Site):
    enrolments = site.enrolments()
    token = enrolments.create_invitation("dora", HOUR_S, fingerprint="f" * 64).token
    identity, key = Identity.generate(), new_key()
    proof = prove_possession(identity, federation="sea", token=token, public_key_pem=key)
    shown = (token, key, identity.public.to_text(), proof)
    for jump in (2 * HOUR_S, YEAR_S):
        with pytest.raises(InvitationRefused, match="expired"):
            enrolments.redeem(*shown, now=time.time() + jump)
    assert enrolments.redeem(*shown, now=time.time() - YEAR_S) == "dora"
    with pytest.raises(InvitationRefused, match="already used"):
        redeem_in_sea(enrolments, token)


def test_a_clock_that_is_years_ahead_ends_memberships_and_setting_it_right_restores_them(
    site: Site,
):
    now = datetime.datetime.now(datetime.UTC)
    clinics = site.enrolments().clinics()
    late = now + datetime.timedelta(days=KEY_DAYS + 1)
    assert [each.is_member(late) for each in clinics] == [False] * 3
    assert [each.is_member(now - datetime.timedelta(days=5000)) for each in clinics] == [True] * 3
    assert [each.name for each in site.enrolments().members()] == list(CLINICS)


# Files


def test_a_base_model_that_changed_is_told_at_the_start_and_no_round_is_touched(
    tmp_path: Path, tiny_copy: Path
):
    make_site(tmp_path / "site", rounds=0)
    settings = (tmp_path / "site" / "federation.toml").read_text()
    (tmp_path / "site" / "federation.toml").write_text(
        settings.replace('"embedded"', f'"{tiny_copy}"')
    )
    site = open_site(tmp_path / "site")
    finish_rounds(site, range(2))
    before = content_of(site.directory / "run")
    weights = tiny_copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)

    with pytest.raises(StorageError, match="holds a run with other settings, data files or base"):
        serve_federation(open_site(site.directory), site.directory / "run", lambda _: None)
    assert content_of(site.directory / "run") == before


@pytest.mark.parametrize("damage", ["a page", "the head", "cut short"])
def test_a_damaged_enrolment_file_is_told_and_never_begun_anew(
    damage: str, site: Site, capsys: pytest.CaptureFixture[str]
):
    path = site.state / "enrolment.db"
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    whole = path.read_bytes()
    path.write_bytes(
        {
            "a page": whole[:4096] + bytes([0xA5]) * (len(whole) - 4096),
            "the head": bytes([0xA5]) * 4096 + whole[4096:],
            "cut short": whole[: len(whole) // 2],
        }[damage]
    )
    damaged = path.read_bytes()
    with pytest.raises(SystemExit) as ended:
        program.run(["start", str(site.directory)])
    assert ended.value.code == 11
    said = capsys.readouterr().err
    assert "enrolment.db" in said
    assert "backup" in said
    assert path.read_bytes()[:4096] == damaged[:4096]
    assert len(path.read_bytes()) == len(damaged)


def test_an_audit_log_on_a_full_disk_lets_no_round_be_signed(site: Site):
    before = rounds_of(site)
    size = (site.audit / "000001.jsonl").stat().st_size
    log = AuditLog(site.audit)
    with largest_file(size + 10), pytest.raises(StorageError, match="what is not logged is not"):
        log.append("key", {"event": "invited", "name": "dora"})
    assert_goes_on(site, before)
