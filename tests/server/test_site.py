"""A site on disk: its identity, and what the command line says of it."""

import contextlib
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
from fedpeft.errors import (
    ConfigError,
    EnrolmentError,
    KeyLocked,
    PortInUse,
    SealingError,
    StorageError,
)
from fedpeft.sealing.context import SERVER
from fedpeft.sealing.identity import Identity, PublicIdentity
from fedpeft.sealing.possession import prove_possession
from fedpeft.sealing.succession import newest
from fedpeft_server.cli import program
from fedpeft_server.service import serve_federation
from fedpeft_server.site import identity as site_identity
from fedpeft_server.site.directory import Site, create_site, open_site
from fedpeft_server.site.pki import create_authority


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
    with pytest.raises(KeyLocked, match=r"cannot read the key file.* server\.toml gives"):
        _ = open_site(tmp_path / "site").identity


def test_missing_key_file_and_two_locks_make_nothing(tmp_path, stick, capsys):
    options = ("init", tmp_path / "site", "--address", "localhost:1", "--key-file")

    code, _, told = run(capsys, *options, tmp_path / "absent")
    assert code == KeyLocked.exit_code
    assert "path right that --key-file gives" in told
    assert ".toml" not in told
    assert run(capsys, *options, stick, "--passphrase")[0] == ConfigError.exit_code
    assert not (tmp_path / "site").exists()


@pytest.mark.parametrize("where", ["taken", "taken/site", "missing/site", "nowhere"])
def test_a_site_is_made_in_a_folder_that_is_there_and_in_no_other_s_place(where, tmp_path, capsys):
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "nowhere").symlink_to(tmp_path / "elsewhere")
    before = sorted(tmp_path.iterdir())

    code, _, told = run(capsys, "init", tmp_path / where, "--address", "localhost:1")

    assert code == StorageError.exit_code
    assert "defect" not in told
    assert sorted(tmp_path.iterdir()) == before


def test_an_invitation_goes_into_a_folder_that_is_there(site, tmp_path, capsys):
    code, _, told = run(
        capsys, "invite", "anna", "--dir", site.directory, "--out", tmp_path / "stick" / "a.json"
    )

    assert code == StorageError.exit_code
    assert f"there is no folder {tmp_path / 'stick'} to write into" in told
    assert site.enrolments().invitations() == []


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
    assert [(line[0], line[1], line[5]) for line in lines] == [
        ("anna", "enrolled", identity.public.fingerprint),
        ("bert", "must enrol again", "-"),
    ]


def test_words_of_the_federation_are_printed_and_go_with_an_invitation(site, capsys, tmp_path):
    code, out, _ = run(capsys, "fingerprint", "--dir", site.directory)
    assert code == 0
    assert out.strip() == site.words()
    assert len(out.split()) == 10

    file = tmp_path / "anna.json"
    _, _, told = run(capsys, "invite", "anna", "--dir", site.directory, "--out", file)
    assert site.words() in told


def test_an_invitation_that_was_revoked_is_gone(site, capsys, tmp_path):
    file = tmp_path / "anna.json"
    run(capsys, "invite", "anna", "--dir", site.directory, "--out", file, "--expires", "30m")
    _, out, _ = run(capsys, "clinics", "--dir", site.directory)
    assert out.split("\t")[:2] == ["anna", "invited"]

    assert run(capsys, "revoke", "anna", "--dir", site.directory)[0] == 0

    assert run(capsys, "clinics", "--dir", site.directory)[1] == ""
    code, _, told = run(capsys, "revoke", "anna", "--dir", site.directory)
    assert code == EnrolmentError.exit_code
    assert "no clinic and no invitation is named 'anna'" in told


def test_rotating_renews_the_certificate_and_the_identity_only_when_asked(site, capsys):
    certificate, public = site.authority.server_certificate.read_bytes(), site.sealing.public

    assert run(capsys, "rotate", "--dir", site.directory)[0] == 0
    once = open_site(site.directory)
    assert once.authority.server_certificate.read_bytes() != certificate
    assert once.sealing.public == public

    code, _, told = run(capsys, "rotate", "--dir", site.directory, "--identity")
    renewed = open_site(site.directory)
    assert code == 0
    assert renewed.sealing.public.fingerprint in told
    assert renewed.identity.public == renewed.sealing.public != public
    assert newest(renewed.sealing.succession, public, federation="heart", holder=SERVER) == (
        renewed.sealing.public
    )
    assert stat.S_IMODE((site.directory / "keys" / "identity.key").stat().st_mode) == 0o600


def test_a_renewed_identity_stays_locked_as_the_old_one_was(tmp_path, stick):
    site = make_site(tmp_path / "site", KeySettings(key_file=stick))

    site.renew_identity()

    stick.write_bytes(bytes(32))
    with pytest.raises(KeyLocked):
        _ = open_site(site.directory).identity


class _Kill(BaseException):
    """A power cut."""


@pytest.mark.parametrize("at", range(5))
def test_a_crash_while_the_identity_is_renewed_leaves_the_old_one_or_the_new(at, site, monkeypatch):
    old, steps = site.sealing.public, []

    def counting(real):
        def step(*arguments, **named):
            if len(steps) == at:
                raise _Kill
            steps.append(real)
            return real(*arguments, **named)

        return step

    with monkeypatch.context() as patch:
        for name in ("save_identity", "write_atomically", "sync_directory"):
            patch.setattr(site_identity, name, counting(getattr(site_identity, name)))
        patch.setattr(Path, "replace", counting(Path.replace))
        with contextlib.suppress(_Kill):
            site.renew_identity()

    found = open_site(site.directory)
    assert found.identity.public == found.sealing.public
    reached = newest(found.sealing.succession, old, federation="heart", holder=SERVER)
    assert reached == found.sealing.public
    assert len(steps) == at
    again = open_site(site.directory)
    again.renew_identity()
    assert open_site(site.directory).sealing.public not in (old, found.sealing.public)


# A certificate of the hospital's authority


def with_hospital_files(site: Site, address: str, tmp_path: Path) -> Site:
    """Name certificate files of another authority than the site's own."""
    hospital = create_authority(tmp_path / "hospital", address)
    toml = site.directory / "server.toml"
    lines = [
        "[tls]",
        f'certificate = "{hospital.server_certificate}"',
        f'key = "{hospital.server_key}"',
        f'ca = "{hospital.ca_certificate}"',
    ]
    toml.write_text(toml.read_text() + "\n".join(lines) + "\n")
    return open_site(site.directory)


def test_a_certificate_of_the_hospital_is_used_and_goes_into_invitations(site, tmp_path, capsys):
    own = site.authority.ca_pem()

    hospital = with_hospital_files(site, "localhost:1", tmp_path)

    assert hospital.authority.ca_pem() != own
    invitation = hospital.enrolments().create_invitation("anna", 60.0, fingerprint="f" * 64)
    assert invitation.ca_pem == hospital.authority.ca_pem()
    assert hospital.words() != site.words()
    code, _, told = run(capsys, "rotate", "--dir", site.directory)
    assert code == ConfigError.exit_code
    assert "ask that for a new one" in told


def test_a_certificate_for_another_address_or_authority_is_refused(site, tmp_path):
    with pytest.raises(ConfigError, match=r"proves to no clinic that it is fl\.example"):
        (site.directory / "server.toml").write_text(
            (site.directory / "server.toml").read_text().replace("localhost:1", "fl.example:1")
        )
        with_hospital_files(site, "other.example:1", tmp_path)


@pytest.mark.parametrize("name", ["server.key", "ca.pem", "server.pem"])
def test_files_that_do_not_belong_together_are_refused(name, site, tmp_path):
    with_hospital_files(site, "localhost:1", tmp_path)
    other = create_authority(tmp_path / "other", "localhost:1")

    (other.directory / name).replace(tmp_path / "hospital" / name)

    with pytest.raises(ConfigError, match="proves to no clinic"):
        open_site(site.directory)


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
