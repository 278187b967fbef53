"""A private identity on disk: who may read it, and what a changed file can do (nothing)."""

import getpass
import hashlib
import json
import os
import pickle
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.config.keys import KeySettings
from fedpeft.console import PASSPHRASE, ask_passphrase
from fedpeft.errors import KeyLocked, SealingError, StorageError
from fedpeft.sealing import (
    Identity,
    Protection,
    keyfile,
    load_identity,
    protection_from,
    save_identity,
)

IDENTITY = Identity(b"canary seed" + bytes(117))
WORDS = "canary horse battery staple"
LOCKED, OPEN = Protection.passphrase(WORDS), Protection.none()
KINDS = pytest.mark.parametrize("protection", [OPEN, LOCKED], ids=["plain", "encrypted"])


@pytest.fixture(autouse=True, scope="module")
def _cheap_tries() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    """Let one try cost microseconds; the vectors of the specification have the true cost."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keyfile, "COST", 16)
        patch.setattr(keyfile, "COSTS", (16, 32))
        yield


def saved(directory: Path, protection: Protection) -> Path:
    path = directory / "identity.json"
    save_identity(IDENTITY, path, protection)
    return path


def rewrite(path: Path, **fields: Any) -> None:
    """Change fields of a file as its program would write them."""
    content = json.loads(path.read_bytes()) | fields
    path.write_bytes(keyfile._json(content))


@KINDS
def test_what_is_loaded_is_what_was_saved(protection: Protection, tmp_path: Path):
    path = saved(tmp_path, protection)
    assert load_identity(path, protection) == IDENTITY
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]
    assert len(path.read_bytes()) < keyfile.FILE_LIMIT / 4


def test_an_encrypted_file_holds_no_seed(tmp_path: Path):
    content = json.loads(saved(tmp_path, LOCKED).read_bytes())
    assert "seeds" not in content
    assert keyfile._text(IDENTITY.seeds[:30]) not in json.dumps(content)


def test_every_file_has_its_own_salt_and_nonce(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, two = (json.loads(saved(tmp_path / it, LOCKED).read_bytes()) for it in "ab")
    assert all(one[name] != two[name] for name in ("salt", "nonce", "sealed"))


@KINDS
def test_an_existing_file_is_kept(protection: Protection, tmp_path: Path):
    path = saved(tmp_path, protection)
    before = path.read_bytes()
    with pytest.raises(StorageError, match=r"exists and is kept.*move it"):
        save_identity(Identity.generate(), path, protection)
    assert path.read_bytes() == before


def test_a_missing_directory_and_a_missing_file_are_named(tmp_path: Path):
    path = tmp_path / "no" / "identity.json"
    with pytest.raises(StorageError, match=r"cannot write .*no/identity.json: no such"):
        save_identity(IDENTITY, path, OPEN)
    with pytest.raises(StorageError, match=r"cannot read .*no/identity.json: no such"):
        load_identity(path, OPEN)


def test_a_directory_in_its_place_is_refused(tmp_path: Path):
    with pytest.raises(StorageError):
        load_identity(tmp_path, OPEN)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601, 0o644])
@KINDS
def test_a_file_that_others_can_reach_is_refused(protection: Protection, mode: int, tmp_path: Path):
    path = saved(tmp_path, protection)
    path.chmod(mode)
    with pytest.raises(StorageError, match=f"chmod 600 {path}"):
        load_identity(path, protection)


# secrets


@pytest.mark.parametrize("wrong", [WORDS + " ", WORDS.upper(), "another passphrase"])
def test_a_wrong_passphrase_is_refused(wrong: str, tmp_path: Path):
    with pytest.raises(KeyLocked, match="does not open with the passphrase"):
        load_identity(saved(tmp_path, LOCKED), Protection.passphrase(wrong))


def test_an_encrypted_file_without_a_secret_is_refused(tmp_path: Path):
    with pytest.raises(KeyLocked, match=r"is encrypted.*\[keys\]"):
        load_identity(saved(tmp_path, LOCKED), OPEN)


def test_a_plain_file_is_refused_where_it_should_be_encrypted(tmp_path: Path):
    with pytest.raises(KeyLocked, match="is not encrypted although"):
        load_identity(saved(tmp_path, OPEN), LOCKED)


def test_a_passphrase_is_the_same_on_every_keyboard(tmp_path: Path):
    path = saved(tmp_path, Protection.passphrase("u\u0308ber alle Berge"))
    assert load_identity(path, Protection.passphrase("\u00fcber alle Berge")) == IDENTITY


@pytest.mark.parametrize("text", ["", "1234567", "u\u0308" * 7])
def test_a_short_passphrase_is_refused(text: str):
    with pytest.raises(KeyLocked, match="shorter than 8 characters"):
        Protection.passphrase(text)


def test_a_passphrase_that_is_no_text_is_refused():
    with pytest.raises(KeyLocked, match="UTF-8") as caught:
        Protection.passphrase("canary\udc80\udc81\udc82")
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("size", [16, 32, 64 * 1024])
def test_a_key_file_of_a_fit_size_opens(size: int, tmp_path: Path):
    key = tmp_path / "key"
    key.write_bytes(os.urandom(size))
    (tmp_path / "box").mkdir()
    path = saved(tmp_path / "box", Protection.key_file(key))
    assert load_identity(path, Protection.key_file(key)) == IDENTITY


def test_every_byte_of_a_key_file_counts(tmp_path: Path):
    key = tmp_path / "key"
    key.write_bytes(bytes(32))
    path = saved(tmp_path, Protection.key_file(key))
    key.write_bytes(bytes(32) + b"\n")
    with pytest.raises(KeyLocked, match=f"does not open with the key file {key}"):
        load_identity(path, Protection.key_file(key))


@pytest.mark.parametrize("size", [0, 15, 64 * 1024 + 1])
def test_a_key_file_of_an_unfit_size_is_refused(size: int, tmp_path: Path):
    key = tmp_path / "key"
    key.write_bytes(bytes(size))
    with pytest.raises(KeyLocked, match=f"{key} must have 16 to 65536 bytes"):
        Protection.key_file(key)


@pytest.mark.parametrize("name", ["missing", "."])
def test_a_key_file_that_is_not_there_is_named(name: str, tmp_path: Path):
    with pytest.raises(KeyLocked, match="cannot read the key file"):
        Protection.key_file(tmp_path / name)


@pytest.mark.parametrize("name", ["missing", "short"])
def test_what_gave_the_path_of_a_key_file_is_what_is_to_be_corrected(name: str, tmp_path: Path):
    (tmp_path / "short").write_bytes(b"1")
    with pytest.raises(KeyLocked, match=r"path (right )?that --key-file gives") as caught:
        Protection.key_file(tmp_path / name)
    assert "configuration" not in str(caught.value)
    settings = KeySettings(key_file=Path(name))
    with pytest.raises(KeyLocked, match=r"key_file in the \[keys\] table"):
        protection_from(settings, tmp_path, never)
    with pytest.raises(KeyLocked, match=r"that the letter gives"):
        protection_from(settings, tmp_path, never, named="the letter")


def never() -> str:
    raise AssertionError("asked for a passphrase that is not needed")


def test_the_settings_say_which_protection(tmp_path: Path):
    (tmp_path / "stick.key").write_bytes(bytes(32))
    relative = KeySettings(key_file=Path("stick.key"))
    absolute = KeySettings(key_file=tmp_path / "stick.key")
    expected = Protection.key_file(tmp_path / "stick.key")

    assert protection_from(KeySettings(), tmp_path, never) == OPEN
    assert protection_from(KeySettings(passphrase=True), tmp_path, lambda: WORDS) == LOCKED
    assert protection_from(relative, tmp_path, never) == expected
    assert protection_from(absolute, Path("/elsewhere"), never) == expected


# files that somebody changed


@pytest.mark.parametrize("mask", [0x01, 0x02, 0x20])
@KINDS
def test_no_byte_can_be_changed(protection: Protection, mask: int, tmp_path: Path):
    path = saved(tmp_path, protection)
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :])
        with pytest.raises(SealingError):
            load_identity(path, protection)


@KINDS
def test_no_length_but_the_whole_is_read(protection: Protection, tmp_path: Path):
    path = saved(tmp_path, protection)
    data = path.read_bytes()
    for other in [data[:length] for length in range(len(data))] + [data + b"\n", data * 2]:
        path.write_bytes(other)
        with pytest.raises(SealingError):
            load_identity(path, protection)


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2**40},
        {"n": 0},
        {"n": 17},
        {"n": True},
        {"n": 16.0},
        {"n": None},
        {"r": 2**20},
        {"p": 2**20},
        {"p": True},
        {"salt": "AA=="},
        {"nonce": ""},
        {"sealed": "AAAA"},
        {"salt": "\udc80"},
        {"kind": "another"},
        {"schema": True},
        {"schema": "1"},
        {"encryption": "rot13"},
        {"encryption": []},
        {"encryption": "none"},
        {"more": 1},
    ],
    ids=str,
)
def test_a_field_that_does_not_fit_is_refused_before_any_work(
    fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = saved(tmp_path, LOCKED)
    rewrite(path, **fields)
    monkeypatch.setattr(keyfile, "_derive", None)
    with pytest.raises(SealingError, match=r"identity\.json is no identity file"):
        load_identity(path, LOCKED)


@pytest.mark.parametrize("fields", [{"n": 32}, {"public": "0" * 64}], ids=str)
def test_every_field_is_authenticated(fields: dict[str, Any], tmp_path: Path):
    path = saved(tmp_path, LOCKED)
    rewrite(path, **fields)
    with pytest.raises(KeyLocked, match="does not open"):
        load_identity(path, LOCKED)


@pytest.mark.parametrize("at", [0, 32, 64, 127])
def test_seeds_that_are_damaged_are_noticed(at: int, tmp_path: Path):
    path = saved(tmp_path, OPEN)
    seeds = bytearray(IDENTITY.seeds)
    seeds[at] ^= 1
    rewrite(path, seeds=keyfile._text(bytes(seeds)))
    with pytest.raises(SealingError, match="backup"):
        load_identity(path, OPEN)


def test_seeds_of_somebody_else_are_noticed(tmp_path: Path):
    path = saved(tmp_path, OPEN)
    other = Identity(bytes(128))
    rewrite(path, seeds=keyfile._text(other.seeds), check=hashlib.sha256(other.seeds).hexdigest())
    with pytest.raises(SealingError, match="backup"):
        load_identity(path, OPEN)


def test_another_format_is_named(tmp_path: Path):
    path = saved(tmp_path, OPEN)
    rewrite(path, schema=2)
    with pytest.raises(SealingError, match="identity format 2, this release reads 1"):
        load_identity(path, OPEN)


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"[" * 4000, b"9" * 4096, bytes(10**6)])
def test_another_file_is_refused(data: bytes, tmp_path: Path):
    path = saved(tmp_path, OPEN)
    path.write_bytes(data)
    with pytest.raises(SealingError, match="no identity file"):
        load_identity(path, OPEN)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)


@given(
    st.binary(max_size=300)
    | JSON.map(lambda content: json.dumps(content).encode())
    | st.fixed_dictionaries(
        {"kind": st.just("fedpeft-identity"), "schema": st.just(1)},
        optional={"encryption": st.sampled_from(["none", "scrypt-aes-256-gcm"]), "seeds": JSON},
    ).map(keyfile._json)
)
def test_garbage_is_no_identity_file(tmp_path_factory: pytest.TempPathFactory, data: bytes):
    path = tmp_path_factory.getbasetemp() / "garbage.json"
    path.write_bytes(data)
    path.chmod(0o600)
    with pytest.raises(SealingError):
        load_identity(path, OPEN)


# what is shown


def test_a_protection_does_not_show_its_secret():
    assert "canary" not in f"{LOCKED!r} {LOCKED}"


def test_no_error_holds_a_secret(tmp_path: Path):
    locked, plain = tmp_path / "locked", tmp_path / "plain"
    save_identity(IDENTITY, locked, LOCKED)
    save_identity(IDENTITY, plain, OPEN)
    calls: list[Callable[[], object]] = [
        lambda: load_identity(locked, Protection.passphrase("canary canary")),
        lambda: load_identity(locked, OPEN),
        lambda: load_identity(plain, LOCKED),
        lambda: save_identity(IDENTITY, plain, LOCKED),
        lambda: Protection.passphrase("canary"),
    ]
    for call in calls:
        with pytest.raises((KeyLocked, StorageError)) as caught:
            call()
        told = [f"{caught.value!r} {vars(caught.value)}".encode(), pickle.dumps(caught.value)]
        for secret in (b"canary", IDENTITY.seeds.hex().encode(), WORDS.encode()):
            assert all(secret not in text for text in told)
        assert caught.value.__cause__ is None


# asking


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Pretend that a person types the given lines; returns the prompts."""

    def types(*lines: str) -> list[str]:
        prompts: list[str] = []
        typed = iter(lines)

        def read(prompt: str) -> str:
            prompts.append(prompt)
            try:
                return next(typed)
            except StopIteration:
                raise EOFError from None

        monkeypatch.delenv(PASSPHRASE, raising=False)
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
        monkeypatch.setattr(getpass, "getpass", read)
        return prompts

    return types


def test_the_environment_answers_first(
    monkeypatch: pytest.MonkeyPatch, terminal: Callable[..., list[str]]
):
    prompts = terminal(WORDS)
    monkeypatch.setenv(PASSPHRASE, "from the environment")
    assert ask_passphrase(confirm=True) == "from the environment"
    assert prompts == []


@pytest.mark.parametrize("confirm", [False, True])
def test_a_new_passphrase_is_asked_for_twice(terminal: Callable[..., list[str]], confirm: bool):
    prompts = terminal(WORDS, WORDS)
    assert ask_passphrase(confirm) == WORDS
    assert len(prompts) == 1 + confirm


def test_two_passphrases_that_differ_are_refused(terminal: Callable[..., list[str]]):
    terminal(WORDS, "canary horse battery stapel")
    with pytest.raises(KeyLocked, match="differ") as caught:
        ask_passphrase(confirm=True)
    assert "canary" not in str(caught.value)


def test_an_end_of_input_is_no_passphrase(terminal: Callable[..., list[str]]):
    terminal()
    with pytest.raises(KeyLocked, match="no passphrase"):
        ask_passphrase(confirm=False)


@pytest.mark.parametrize("empty", [False, True])
def test_without_a_terminal_the_ways_out_are_named(monkeypatch: pytest.MonkeyPatch, empty: bool):
    monkeypatch.delenv(PASSPHRASE, raising=False)
    if empty:
        monkeypatch.setenv(PASSPHRASE, "")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False)
    with pytest.raises(KeyLocked, match=rf"{PASSPHRASE}.*key_file"):
        ask_passphrase(confirm=False)
