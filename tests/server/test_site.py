"""A site on disk: its identity, and what the command line says of it."""

import socket
import sqlite3
import stat
import tomllib
from contextlib import closing
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedpeft.config import KeySettings
from fedpeft.console import PASSPHRASE
from fedpeft.errors import ConfigError, KeyLocked, PortInUse, SealingError, StorageError
from fedpeft.sealing.identity import Identity, PublicIdentity
from fedpeft.sealing.possession import prove_possession
from fedpeft_server.cli import program
from fedpeft_server.service import serve_federation
from fedpeft_server.site import Site, create_site, open_site


def make_site(
    directory: Path, keys: KeySettings | None = None, address: str = "localhost:1"
) -> Site:
    keys = keys or KeySettings()
    return create_site(directory, address=address, name="heart", base="embedded", keys=keys)


@pytest.fixture
def site(tmp_path) -> Site:
    return make_site(tmp_path / "site")


@pytest.fixture
def stick(tmp_path) -> Path:
    path = tmp_path / "stick"
    path.write_bytes(bytes(range(32)))
    return path


def run(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        program.run([str(each) for each in arguments])
    told = capsys.readouterr()
    return int(stopped.value.code or 0), told.out, told.err


def test_new_site_has_an_identity_whose_private_half_is_private(site):
    keys = site.directory / "keys"

    assert stat.S_IMODE((keys / "identity.key").stat().st_mode) == 0o600
    text = (keys / "identity.pub").read_text().strip()
    assert PublicIdentity.from_text(text) == site.sealing.public == site.identity.public


@pytest.mark.parametrize("name", ["identity.key", "identity.pub"])
def test_missing_identity_is_named(site, name):
    (site.directory / "keys" / name).unlink()

    with pytest.raises(StorageError, match=f"{name} is missing.*make a new site"):
        open_site(site.directory)


@pytest.mark.parametrize("content", [b"", b"\xff", b"AAAA", b"A" * 1668])
def test_damaged_public_half_is_named(site, content):
    (site.directory / "keys" / "identity.pub").write_bytes(content)

    with pytest.raises(StorageError, match=r"identity\.pub is damaged"):
        open_site(site.directory)


def test_damaged_private_half_is_named(site):
    (site.directory / "keys" / "identity.key").write_text("{}")

    with pytest.raises(SealingError, match=r"identity\.key is no identity file"):
        _ = open_site(site.directory).identity


def test_halves_of_two_identities_are_refused(site, tmp_path):
    other = make_site(tmp_path / "other").directory / "keys" / "identity.pub"
    other.replace(site.directory / "keys" / "identity.pub")

    with pytest.raises(StorageError, match="do not belong together"):
        _ = open_site(site.directory).identity


def test_private_half_that_others_can_read_is_refused(site):
    (site.directory / "keys" / "identity.key").chmod(0o640)

    with pytest.raises(StorageError, match="chmod 600"):
        _ = open_site(site.directory).identity


def test_passphrase_is_needed_to_start_and_not_to_invite(tmp_path, monkeypatch):
    monkeypatch.setenv(PASSPHRASE, "a right passphrase")
    make_site(tmp_path / "site", KeySettings(passphrase=True))
    monkeypatch.setenv(PASSPHRASE, "a wrong passphrase")

    site = open_site(tmp_path / "site")

    assert site.enrolments().create_invitation("anna", 60.0, fingerprint="f" * 64).identity == (
        site.sealing.public
    )
    with pytest.raises(KeyLocked, match="does not open"):
        _ = site.identity


def test_passphrase_that_is_too_short_makes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv(PASSPHRASE, "short")

    with pytest.raises(KeyLocked):
        make_site(tmp_path / "site", KeySettings(passphrase=True))

    assert not (tmp_path / "site").exists()


def test_key_file_of_the_command_line_is_kept_as_an_absolute_path(
    tmp_path, stick, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)

    code, _, told = run(
        capsys, "init", "site", "--address", "localhost:1", "--key-file", stick.name
    )

    settings = tomllib.loads((tmp_path / "site" / "server.toml").read_text())
    assert code == 0
    assert settings["keys"] == {"passphrase": False, "key_file": str(stick)}
    site = open_site(tmp_path / "site")
    assert site.identity.public.fingerprint in told
    stick.unlink()
    with pytest.raises(KeyLocked, match="cannot read the key file"):
        _ = open_site(tmp_path / "site").identity


def test_missing_key_file_and_two_locks_make_nothing(tmp_path, stick, capsys):
    options = ("init", tmp_path / "site", "--address", "localhost:1", "--key-file")

    assert run(capsys, *options, tmp_path / "absent")[0] == KeyLocked.exit_code
    assert run(capsys, *options, stick, "--passphrase")[0] == ConfigError.exit_code
    assert not (tmp_path / "site").exists()


def test_clinics_are_listed_with_their_fingerprints(site, capsys):
    enrolments = site.enrolments()
    identity = Identity.generate()
    for name, own in (("anna", identity), ("bert", Identity.generate())):
        token = enrolments.create_invitation(name, 60.0, fingerprint="f" * 64).token
        key = ec.generate_private_key(ec.SECP384R1()).public_key()
        pem = key.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        ).decode()
        proof = prove_possession(own, federation="heart", token=token, public_key_pem=pem)
        enrolments.redeem(token, pem, own.public.to_text(), proof)
    with closing(sqlite3.connect(site.state / "enrolment.db")) as database:
        database.execute("UPDATE clinics SET identity = NULL WHERE name = 'bert'")
        database.commit()

    code, out, _ = run(capsys, "clinics", "--dir", site.directory)

    lines = [line.split("\t") for line in out.splitlines()]
    assert code == 0
    assert [(line[0], line[2]) for line in lines] == [
        ("anna", identity.public.fingerprint),
        ("bert", "must enrol again"),
    ]


def test_start_says_its_fingerprint_and_who_must_enrol_again(tmp_path):
    said = []
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        site = make_site(tmp_path / "site", address=f"localhost:{taken.getsockname()[1]}")
        site.enrolments()
        with closing(sqlite3.connect(site.state / "enrolment.db")) as database:
            database.execute(
                "INSERT INTO clinics (name, public_key, enrolled_at) VALUES ('bert', 'key', 1.0)"
            )
            database.commit()

        with pytest.raises(PortInUse):
            serve_federation(site, tmp_path / "run", said.append)

    assert site.identity.public.fingerprint in said[0]
    assert "bert enrolled with an older release" in said[1]


def test_start_refuses_halves_of_two_identities(tmp_path, capsys):
    site, other = make_site(tmp_path / "site"), make_site(tmp_path / "other")
    public = other.directory / "keys" / "identity.pub"
    public.replace(site.directory / "keys" / "identity.pub")

    code, _, told = run(capsys, "start", site.directory)

    assert code == StorageError.exit_code
    assert "do not belong together" in told
