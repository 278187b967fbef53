import json
import shutil
import socket
import stat
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from fedpeft.errors import (
    CertificateRefused,
    ConfigError,
    ConnectionFailed,
    EnrolmentError,
    KeyLocked,
    StorageError,
)
from fedpeft.sealing.identity import Identity, PublicIdentity
from fedpeft.sealing.keyfile import Protection, load_identity
from fedpeft_client.cli import program
from fedpeft_client.keys import enrolment as enrolment_module
from fedpeft_client.keys.enrolment import Enrolment, read_invitation
from fedpeft_client.keys.key_life import keys_expire
from fedpeft_client.link.fleet import load_key
from fedpeft_server.enrolments.enrolment import Enrolments
from fedpeft_server.enrolments.rate_limit import EnrolmentLimit
from fedpeft_server.link.superlink import SuperLink, SuperLinkSettings
from fedpeft_server.site.pki import create_authority

HOUR_S = 3600.0
BASE = "f" * 64
SERVER = Identity.generate().public


def join(invitation: Path, directory: Path, protection: Protection | None = None) -> Enrolment:
    return enrolment_module.join(invitation, directory, protection or Protection.none())


class Server:
    """One running server for all tests here; each test invites clinics of its own."""

    def __init__(self, directory, port) -> None:
        self.address = f"localhost:{port}"
        self.authority = create_authority(directory / "pki", self.address)
        self.enrolments = Enrolments(
            directory / "enrolment.db",
            federation="heart",
            server=self.address,
            ca_pem=self.authority.ca_pem(),
            identity=SERVER,
        )
        self.link = SuperLink(
            SuperLinkSettings(directory=directory / "server", host="127.0.0.1", port=port),
            self.authority,
            self.enrolments,
        )


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = Server(tmp_path_factory.mktemp("server"), port)
    with made.link:
        yield made


@pytest.fixture(autouse=True)
def no_rate_limit(server):
    server.link._listener._server.config.app._limiter = EnrolmentLimit(10)


@pytest.fixture
def invite(server, tmp_path, request):
    def write(expires_in_s=HOUR_S, **changes):
        name = f"clinic-{abs(hash(request.node.name))}-{time.monotonic_ns()}"
        invitation = server.enrolments.create_invitation(name, expires_in_s, fingerprint=BASE)
        document = json.loads(invitation.to_json()) | changes
        path = tmp_path / f"{time.monotonic_ns()}.json"
        path.write_text(json.dumps({k: v for k, v in document.items() if v is not None}))
        return path

    return write


def test_joining_makes_a_key_and_says_what_to_configure(server, invite, tmp_path):
    file = invite()

    enrolment = join(file, tmp_path / "clinic")

    assert enrolment.server == server.address
    assert enrolment.federation == "heart"
    assert enrolment.clinic == json.loads(file.read_text())["clinic"]
    assert enrolment.ca.read_text() == server.authority.ca_pem()
    assert enrolment.clinic in server.link.names().values()
    assert sorted(path.name for path in (tmp_path / "clinic").iterdir()) == [
        "ca.pem",
        "identity.key",
        "key.pem",
        "membership.json",
        "server.identity",
    ]
    (member,) = (it for it in server.enrolments.clinics() if it.name == enrolment.clinic)
    assert keys_expire(tmp_path / "clinic") == member.keys_expire.replace(microsecond=0)


def test_both_sides_pin_the_others_identity(server, invite, tmp_path):
    enrolment = join(invite(), tmp_path / "clinic")

    known = {clinic.name: clinic.identity for clinic in server.enrolments.clinics()}
    own = load_identity(tmp_path / "clinic" / "identity.key", Protection.none())
    pinned = (tmp_path / "clinic" / "server.identity").read_text().strip()
    assert known[enrolment.clinic] == own.public == enrolment.identity
    assert PublicIdentity.from_text(pinned) == SERVER == enrolment.server_identity
    for name in ("identity.key", "server.identity"):
        assert stat.S_IMODE((tmp_path / "clinic" / name).stat().st_mode) == 0o600


def test_key_is_private_and_the_server_has_its_public_half(server, invite, tmp_path):
    enrolment = join(invite(), tmp_path / "clinic")

    assert stat.S_IMODE(enrolment.key.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "clinic").stat().st_mode) == 0o700
    public = load_key(enrolment.key).public_key()
    pem = public.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    known = {clinic.name: clinic.public_key for clinic in server.enrolments.clinics()}
    assert known[enrolment.clinic] == pem.decode()


def test_enrolled_directory_is_not_joined_again(invite, tmp_path):
    join(invite(), tmp_path / "clinic")
    key = (tmp_path / "clinic" / "key.pem").read_bytes()

    with pytest.raises(EnrolmentError, match="is enrolled in a federation already"):
        join(invite(), tmp_path / "clinic")

    assert (tmp_path / "clinic" / "key.pem").read_bytes() == key


def test_used_invitation_is_refused(invite, tmp_path):
    file = invite()
    join(file, tmp_path / "first")

    with pytest.raises(EnrolmentError, match="already used by another machine"):
        join(file, tmp_path / "second")

    assert not (tmp_path / "second" / "ca.pem").exists()


def test_answer_that_was_lost_on_the_way_is_made_good_by_joining_again(invite, tmp_path):
    file = invite()
    join(file, tmp_path / "clinic")
    # As if the connection had broken after the server accepted.
    (tmp_path / "clinic" / "ca.pem").unlink()
    pinned = (tmp_path / "clinic" / "server.identity").read_bytes()

    assert join(file, tmp_path / "clinic").ca.exists()
    assert (tmp_path / "clinic" / "server.identity").read_bytes() == pinned


def test_lost_answer_is_made_good_before_the_server_was_pinned_too(invite, tmp_path):
    file = invite()
    join(file, tmp_path / "clinic")
    (tmp_path / "clinic" / "ca.pem").unlink()
    (tmp_path / "clinic" / "server.identity").unlink()

    join(file, tmp_path / "clinic")

    pinned = (tmp_path / "clinic" / "server.identity").read_text()
    assert PublicIdentity.from_text(pinned.strip()) == SERVER


def test_another_servers_identity_is_not_pinned_over_the_first_and_nothing_is_sent(
    invite, tmp_path
):
    file = invite()
    join(file, tmp_path / "clinic")
    (tmp_path / "clinic" / "ca.pem").unlink()
    other = invite(identity=Identity.generate().public.to_text())

    with pytest.raises(EnrolmentError, match="identity of another server"):
        join(other, tmp_path / "clinic")

    assert join(file, tmp_path / "clinic").server_identity == SERVER


def test_identity_that_was_exchanged_since_the_first_attempt_is_refused(invite, tmp_path):
    file = invite()
    join(file, tmp_path / "clinic")
    (tmp_path / "clinic" / "ca.pem").unlink()
    (tmp_path / "clinic" / "identity.key").unlink()

    with pytest.raises(EnrolmentError, match="already used by another machine"):
        join(file, tmp_path / "clinic")


def test_identity_of_another_enrolled_box_is_refused(invite, tmp_path):
    join(invite(), tmp_path / "first")
    (tmp_path / "second").mkdir()
    shutil.copy(tmp_path / "first" / "identity.key", tmp_path / "second")

    with pytest.raises(EnrolmentError, match="did not accept this machine's keys"):
        join(invite(), tmp_path / "second")

    assert not (tmp_path / "second" / "ca.pem").exists()


def test_identity_is_encrypted_with_the_key_file_and_stays_so_after_a_failure(invite, tmp_path):
    (tmp_path / "stick").write_bytes(bytes(range(32)))
    locked = Protection.key_file(tmp_path / "stick")
    with pytest.raises(ConnectionFailed):
        join(invite(server="localhost:1"), tmp_path / "clinic", locked)
    file = tmp_path / "clinic" / "identity.key"

    with pytest.raises(KeyLocked):
        join(invite(), tmp_path / "clinic")

    assert join(invite(), tmp_path / "clinic", locked).identity == (
        load_identity(file, locked).public
    )


def test_identity_that_others_can_read_is_refused_unsent(server, invite, tmp_path):
    with pytest.raises(ConnectionFailed):
        join(invite(server="localhost:1"), tmp_path / "clinic")
    (tmp_path / "clinic" / "identity.key").chmod(0o640)

    with pytest.raises(StorageError, match="chmod 600"):
        join(invite(), tmp_path / "clinic")


def test_invitation_that_expired_here_is_refused_unsent(invite, tmp_path):
    file = invite(expires="2020-01-01T00:00:00+00:00")

    with pytest.raises(EnrolmentError, match="expired at 2020-01-01"):
        join(file, tmp_path / "clinic")

    assert not (tmp_path / "clinic").exists()


def test_invitation_that_expired_at_the_server_is_refused(invite, tmp_path):
    file = invite(0.001, expires="2999-01-01T00:00:00+00:00")

    with pytest.raises(EnrolmentError, match="the invitation has expired"):
        join(file, tmp_path / "clinic")


def test_unknown_token_is_refused(invite, tmp_path):
    with pytest.raises(EnrolmentError, match="does not know this invitation"):
        join(invite(token="x.y"), tmp_path / "clinic")


def test_failure_leaves_only_keys_that_the_next_attempt_uses(server, invite, tmp_path):
    with pytest.raises(ConnectionFailed, match="cannot be reached"):
        join(invite(server="localhost:1"), tmp_path / "clinic")
    left = {path.name: path.read_bytes() for path in (tmp_path / "clinic").iterdir()}

    join(invite(), tmp_path / "clinic")

    assert sorted(left) == ["identity.key", "key.pem"]
    for name, content in left.items():
        assert (tmp_path / "clinic" / name).read_bytes() == content


def test_server_of_another_ca_is_refused(invite, tmp_path):
    stranger = create_authority(tmp_path / "stranger", "localhost:1")

    with pytest.raises(CertificateRefused, match="not issued by the federation's own CA"):
        join(invite(ca=stranger.ca_pem()), tmp_path / "clinic")


@pytest.mark.parametrize("ca", ["", "no certificate", "ü"])
def test_damaged_ca_certificate_is_refused(invite, tmp_path, ca):
    with pytest.raises(EnrolmentError, match="damaged"):
        join(invite(ca=ca), tmp_path / "clinic")


def test_too_many_attempts_are_told_to_wait(invite, tmp_path):
    for _ in range(10):
        with pytest.raises(EnrolmentError, match="does not know"):
            join(invite(token="x.y"), tmp_path / "clinic")

    with pytest.raises(EnrolmentError, match="wait a minute"):
        join(invite(), tmp_path / "clinic")


def test_missing_invitation_is_named(tmp_path):
    with pytest.raises(EnrolmentError, match=r"none\.json cannot be read \(No such file"):
        join(tmp_path / "none.json", tmp_path / "clinic")


@pytest.mark.parametrize("text", ["", "no json", "[]", "null", "[" * 5000, "x" * 70_000])
def test_what_is_no_json_object_is_refused(tmp_path, text):
    (tmp_path / "file").write_text(text)

    with pytest.raises(EnrolmentError, match="is not an invitation"):
        join(tmp_path / "file", tmp_path / "clinic")


def test_invitation_of_an_older_release_is_refused_unsent(invite, tmp_path):
    with pytest.raises(EnrolmentError, match="made by an older release"):
        join(invite(schema=1, identity=None), tmp_path / "clinic")

    assert not (tmp_path / "clinic").exists()


@pytest.mark.parametrize(
    "identity", ["", "AAAA", "A" * 1668, SERVER.to_text()[:-4], SERVER.to_text() + "A"]
)
def test_damaged_identity_of_the_server_is_refused_unsent(invite, tmp_path, identity):
    with pytest.raises(EnrolmentError, match="is damaged"):
        join(invite(identity=identity), tmp_path / "clinic")

    assert not (tmp_path / "clinic").exists()


def test_changed_federation_in_the_invitation_is_found_by_the_server(invite, tmp_path):
    with pytest.raises(EnrolmentError, match="did not accept this machine's keys"):
        join(invite(federation="lung"), tmp_path / "clinic")


@pytest.mark.parametrize("schema", [3, None, "1"])
def test_other_schema_is_refused(invite, tmp_path, schema):
    with pytest.raises(EnrolmentError, match="install the fedpeft version"):
        join(invite(schema=schema), tmp_path / "clinic")


@pytest.mark.parametrize(
    "field", ["server", "federation", "clinic", "expires", "token", "identity", "ca"]
)
@pytest.mark.parametrize("value", [None, 7])
def test_missing_or_odd_fields_are_named(invite, tmp_path, field, value):
    with pytest.raises(EnrolmentError, match=f"lacks a usable '{field}'"):
        join(invite(**{field: value}), tmp_path / "clinic")


@pytest.mark.parametrize("expires", ["", "soon", "2999-01-01T00:00:00"])
def test_expiry_that_is_no_moment_is_refused(invite, tmp_path, expires):
    with pytest.raises(EnrolmentError, match="is damaged"):
        join(invite(expires=expires), tmp_path / "clinic")


@pytest.mark.parametrize(
    "address",
    ["no host", "localhost", "localhost:port", "a@localhost:1", "a:1/b", "a:1?b", "", ":1"],
)
def test_address_that_is_none_is_refused(invite, tmp_path, address):
    with pytest.raises(ConfigError, match="is not host:port"):
        join(invite(server=address), tmp_path / "clinic")


def test_token_is_in_no_error_and_no_repr(server, invite, tmp_path, caplog):
    file = invite(server="localhost:1")
    token = json.loads(file.read_text())["token"]

    with pytest.raises(ConnectionFailed) as caught:
        join(file, tmp_path / "clinic")

    assert token not in str(caught.value)
    assert token not in caplog.text


def test_place_that_cannot_be_written_is_named(invite, tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(StorageError, match="cannot be written"):
        join(invite(), tmp_path / "file" / "clinic")


@pytest.mark.parametrize("words", ["amber basil", ""])
def test_other_words_than_the_central_site_reads_out_stop_before_anything_is_sent(
    words, server, invite, tmp_path, capsys
):
    file, before = invite(), len(server.enrolments.clinics())

    options = {"--dir": tmp_path / "box", "--model": "embedded", "--train": tmp_path / "t"}
    flat = [str(each) for option in options.items() for each in option]
    with pytest.raises(SystemExit) as stopped:
        program.run(["join", str(file), *flat, "--words", words])

    assert stopped.value.code == EnrolmentError.exit_code
    told = capsys.readouterr().err
    assert "nothing was sent" in told
    assert read_invitation(file).words() in told
    assert not (tmp_path / "box").exists()
    assert len(server.enrolments.clinics()) == before
