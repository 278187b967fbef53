"""Identities: one encoding, no key that works for anybody else, no secret in sight."""

import copy
import pickle

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import SealingError, WrongSignature
from fedpeft.sealing import Identity, PublicIdentity
from fedpeft.sealing.identity import _WEAK, PUBLIC_BYTES, SEED_BYTES

NORTH, SOUTH = Identity(bytes(range(128))), Identity(bytes(range(1, 129)))


def refused(data: bytes) -> None:
    with pytest.raises(SealingError, match="same fedpeft release"):
        PublicIdentity(data)


def with_key(at: int, key: bytes) -> bytes:
    data = NORTH.public.data
    return data[:at] + key + data[at + len(key) :]


def test_identities_are_made_from_fresh_randomness():
    made = {Identity.generate().seeds for _ in range(20)}
    assert len(made) == 20
    assert {len(seeds) for seeds in made} == {SEED_BYTES}


def test_each_third_of_the_seeds_is_one_key():
    for at, start, end in ((0, 1, 33), (32, 33, 65), (64, 65, PUBLIC_BYTES)):
        seeds = bytearray(NORTH.seeds)
        seeds[at] ^= 0x10
        other, own = Identity(bytes(seeds)).public.data, NORTH.public.data
        assert other[start:end] != own[start:end]
        assert other[:start] + other[end:] == own[:start] + own[end:]


@pytest.mark.parametrize("length", [0, 1, SEED_BYTES - 1, SEED_BYTES + 1])
def test_seeds_of_another_length_are_refused(length: int):
    with pytest.raises(SealingError, match="backup"):
        Identity(bytes(length))


def test_a_signature_holds_for_one_key_and_one_message():
    signature = NORTH.sign(b"yes")
    NORTH.public.verify(signature, b"yes", source="north")
    for public, message in ((NORTH.public, b"no"), (SOUTH.public, b"yes")):
        with pytest.raises(WrongSignature, match="from clinic:x"):
            public.verify(signature, message, source="clinic:x")


@given(st.binary(max_size=80))
def test_no_other_bytes_are_a_signature(signature: bytes):
    with pytest.raises(WrongSignature):
        NORTH.public.verify(signature, b"yes", source="north")


@pytest.mark.parametrize("length", [0, 1, PUBLIC_BYTES - 1, PUBLIC_BYTES + 1])
def test_a_public_identity_of_another_length_is_refused(length: int):
    refused((NORTH.public.data + b"\0")[:length])


@pytest.mark.parametrize("version", [0, 2, 255])
def test_a_public_identity_of_another_version_is_refused(version: int):
    refused(bytes([version]) + NORTH.public.data[1:])


@pytest.mark.parametrize("y", sorted(_WEAK))
@pytest.mark.parametrize("sign", [0, 1])
def test_a_key_under_which_anybody_can_sign_is_refused(y: int, sign: int):
    key = (y + (sign << 255)).to_bytes(32, "little")
    assert forgeries(key) > 0
    refused(with_key(1, key))


def forgeries(key: bytes) -> int:
    """Count the messages that a stranger signs: R of small order, S zero."""
    points = [(y + (sign << 255)).to_bytes(32, "little") for y in _WEAK for sign in (0, 1)]
    found = 0
    for number in range(20):
        for point in points:
            try:
                Ed25519PublicKey.from_public_bytes(key).verify(point + bytes(32), bytes([number]))
            except InvalidSignature:
                continue
            found += 1
    return found


@pytest.mark.parametrize("x", [0, 1, 2**255 - 20, 2**255 - 19, 2**255 - 18])
def test_a_key_that_nobody_can_write_to_is_refused(x: int):
    refused(with_key(33, x.to_bytes(32, "little")))


@pytest.mark.parametrize("at", [65, 65 + 3 * 383])
def test_a_lattice_key_that_is_not_reduced_is_refused(at: int):
    refused(with_key(at, b"\xff\xff\xff"))


def test_a_public_identity_survives_its_text():
    text = NORTH.public.to_text()
    assert PublicIdentity.from_text(text) == NORTH.public
    assert text.isascii()
    assert not set(text) & set("+/ \n")


@pytest.mark.parametrize("name", ["appended", "spaced", "unpadded", "standard", "spare bits"])
def test_an_identity_has_one_text_only(name: str):
    text = NORTH.public.to_text()
    assert text.endswith("==")
    others = {
        "appended": text + "=",
        "spaced": text[:8] + "\n" + text[8:],
        "unpadded": text.rstrip("="),
        "standard": text.replace("-", "+").replace("_", "/"),
        "spare bits": text[:-3] + chr(ord(text[-3]) + 1) + "==",
    }
    assert others[name] != text
    with pytest.raises(SealingError):
        PublicIdentity.from_text(others[name])


@given(st.text() | st.binary(max_size=PUBLIC_BYTES * 2).map(lambda data: data.decode("latin-1")))
def test_garbage_is_no_identity(text: str):
    with pytest.raises(SealingError):
        PublicIdentity.from_text(text)


@given(st.binary(min_size=PUBLIC_BYTES - 1, max_size=PUBLIC_BYTES - 1))
def test_random_keys_are_an_identity_or_refused(keys: bytes):
    try:
        public = PublicIdentity(b"\x01" + keys)
    except SealingError:
        return
    assert PublicIdentity.from_text(public.to_text()) == public


def test_fingerprints_are_for_the_telephone():
    groups = NORTH.public.fingerprint.split("-")
    assert "".join(groups) == NORTH.public.digest.hex()[:32]
    assert {len(group) for group in groups} == {4}
    assert NORTH.public.fingerprint != SOUTH.public.fingerprint


def test_the_private_half_is_not_shown():
    secret = Identity(b"canary" + bytes(122))
    _ = secret.public, secret.sealing_key
    assert "canary" not in f"{secret!r} {secret}"
    assert secret.seeds.hex() not in f"{secret!r} {secret}"


@pytest.mark.parametrize("kind", ["private", "public"])
def test_identities_can_be_copied_and_sent_to_processes(kind: str):
    original = NORTH if kind == "private" else NORTH.public
    _ = original.sealing_key
    assert pickle.loads(pickle.dumps(original)) == original
    assert copy.deepcopy(original) == original
