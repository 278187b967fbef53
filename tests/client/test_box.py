"""A box on disk, and what its people are told about its identity."""

import re
from pathlib import Path

import pytest

from fedpeft.config import KeySettings
from fedpeft.errors import EnrolmentError, KeyLocked, SealingError, StorageError, UnknownPeer
from fedpeft.sealing.identity import Identity
from fedpeft.sealing.keyfile import Protection, save_identity
from fedpeft_client.box import Box, open_box
from fedpeft_client.cli import program
from fedpeft_client.keys.peers import key_fingerprint
from fedpeft_client.reports.check import check
from fedpeft_client.settings import (
    BoxModelSettings,
    ClientSettings,
    DataSettings,
    ServerSettings,
    settings_toml,
)

OWN, SERVER = Identity.generate(), Identity.generate()
ANNA = bytes(32)


def never_asked() -> str:
    raise AssertionError


def make_box(directory: Path, protection: Protection, keys: KeySettings) -> Path:
    directory.mkdir(mode=0o700)
    settings = ClientSettings(
        clinic="anna",
        server=ServerSettings(address="localhost:1", federation="heart"),
        model=BoxModelSettings(directory=Path("model")),
        data=DataSettings(train=Path("train.jsonl")),
        keys=keys,
    )
    (directory / "client.toml").write_text(settings_toml(settings))
    (directory / "server.identity").write_text(SERVER.public.to_text() + "\n")
    save_identity(OWN, directory / "identity.key", protection)
    return directory


@pytest.fixture
def directory(tmp_path) -> Path:
    return make_box(tmp_path / "box", Protection.none(), KeySettings())


def finding(box: Box, ask=never_asked):
    return next(each for each in check(box, ask) if each.subject == "identity")


@pytest.mark.parametrize("name", ["identity.key", "server.identity"])
def test_box_of_an_older_release_is_sent_to_join_again(directory, name):
    (directory / name).unlink()

    with pytest.raises(EnrolmentError, match=f"no {name}, as it was made by an older release"):
        open_box(directory)


@pytest.mark.parametrize("content", [b"", b"\xff", b"AAAA", SERVER.public.to_text().encode()[:-4]])
def test_damaged_identity_of_the_server_is_refused(directory, content):
    (directory / "server.identity").write_bytes(content)

    with pytest.raises(SealingError, match=r"server\.identity is damaged"):
        _ = open_box(directory).server_identity
    assert not finding(open_box(directory)).ok


def test_both_identities_are_read(directory):
    box = open_box(directory)

    assert box.load_identity(never_asked) == OWN
    assert box.server_identity == SERVER.public


def test_check_tells_the_fingerprints_to_compare_and_nothing_secret(directory):
    found = finding(open_box(directory))

    assert found.ok
    for part in (OWN.public.fingerprint, SERVER.public.fingerprint):
        assert part in found.text
    assert key_fingerprint(OWN.public.signing_bytes) in found.text
    assert OWN.seeds.hex() not in found.text


def test_identity_that_others_can_read_is_found(directory):
    (directory / "identity.key").chmod(0o640)

    with pytest.raises(StorageError, match="chmod 600"):
        open_box(directory).load_identity(never_asked)
    assert not finding(open_box(directory)).ok


def test_key_file_that_is_not_there_is_found(tmp_path):
    (tmp_path / "stick").write_bytes(bytes(range(32)))
    keys = KeySettings(key_file=Path("../stick"))
    box = open_box(make_box(tmp_path / "box", Protection.key_file(tmp_path / "stick"), keys))
    assert finding(box).ok

    (tmp_path / "stick").unlink()

    found = finding(box)
    assert not found.ok
    assert "stick" in found.text


def test_wrong_passphrase_opens_nothing(tmp_path):
    right = Protection.passphrase("a right passphrase")
    box = open_box(make_box(tmp_path / "box", right, KeySettings(passphrase=True)))

    with pytest.raises(KeyLocked):
        box.load_identity(lambda: "a wrong passphrase")
    assert box.load_identity(lambda: "a right passphrase") == OWN


def run(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        program.run([str(each) for each in arguments])
    told = capsys.readouterr()
    return int(stopped.value.code or 0), told.out, told.err


def test_peers_are_listed_and_forgotten(directory, capsys):
    open_box(directory).peers.admit({"bert": ANNA, "carl": bytes([1]) * 32})

    code, out, _ = run(capsys, "peers", directory)
    assert (code, out.splitlines()[0]) == (0, f"bert\t{key_fingerprint(ANNA)}")
    assert len(out.splitlines()) == 2

    code, out, told = run(capsys, "peers", directory, "--forget", "bert")
    assert (code, len(out.splitlines())) == (0, 1)
    assert "forgot bert" in told

    code, _, told = run(capsys, "peers", directory, "--forget", "bert")
    assert code == EnrolmentError.exit_code
    assert "no clinic named 'bert'" in told


def test_new_peers_are_refused_where_client_toml_says_so(directory):
    file = directory / "client.toml"
    file.write_text(re.sub('new_peers = "accept"', 'new_peers = "refuse"', file.read_text()))

    with pytest.raises(UnknownPeer, match="never seen the clinic bert"):
        open_box(directory).peers.admit({"bert": ANNA})
