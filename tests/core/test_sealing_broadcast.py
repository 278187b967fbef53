"""Broadcasts: a clinic takes the bytes that the server signed for it, and no others."""

import hashlib

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import SealingError, TooLarge
from fedpeft.sealing import ContentKey, envelope, open_broadcast, seal_broadcast
from fedpeft.sealing.broadcast import MAGIC

PAYLOAD = b"canary: the adapter for everybody"
DATA, KEY = seal_broadcast(PAYLOAD)


def resigned(data: bytes) -> ContentKey:
    """Return the key with the digest of other bytes, as only a cheating server could sign it."""
    return ContentKey(KEY.key, hashlib.sha256(data).digest())


@given(st.binary(max_size=5000))
def test_everybody_with_the_key_gets_the_payload(payload: bytes):
    data, key = seal_broadcast(payload)
    assert open_broadcast(data, ContentKey.from_bytes(key.to_bytes())) == payload


def test_each_broadcast_has_its_own_key_and_nonce():
    made = [seal_broadcast(PAYLOAD) for _ in range(10)]
    assert len({key.key for _, key in made}) == 10
    assert len({data[8:20] for data, _ in made}) == 10


def test_no_byte_can_be_changed():
    for at in range(len(DATA)):
        data = DATA[:at] + bytes([DATA[at] ^ 1]) + DATA[at + 1 :]
        with pytest.raises(SealingError, match="not the one that the server signed"):
            open_broadcast(data, KEY)


def test_no_byte_can_be_changed_even_under_a_digest_that_fits():
    for at in range(len(DATA)):
        data = DATA[:at] + bytes([DATA[at] ^ 1]) + DATA[at + 1 :]
        with pytest.raises(SealingError):
            open_broadcast(data, resigned(data))


def test_no_length_but_the_whole_opens():
    for length in range(len(DATA)):
        for key in (KEY, resigned(DATA[:length])):
            with pytest.raises(SealingError):
                open_broadcast(DATA[:length], key)


def test_nothing_can_be_appended():
    for key in (KEY, resigned(DATA + b"\0")):
        with pytest.raises(SealingError):
            open_broadcast(DATA + b"\0", key)


def test_a_clinic_cannot_write_in_the_servers_place_with_the_key_all_share():
    nonce = bytes(12)
    forged = MAGIC + nonce + AESGCM(KEY.key).encrypt(nonce, b"another adapter", MAGIC)
    with pytest.raises(SealingError, match="not the one that the server signed"):
        open_broadcast(forged, KEY)


def test_another_version_is_not_read_by_the_rules_of_this_one():
    later = MAGIC[:-1] + b"\2" + DATA[8:]
    with pytest.raises(SealingError, match="same fedpeft release"):
        open_broadcast(later, resigned(later))


@given(st.binary(max_size=200))
def test_garbage_is_no_broadcast(data: bytes):
    for key in (KEY, resigned(data)):
        with pytest.raises(SealingError):
            open_broadcast(data, key)


@given(st.binary(max_size=200).filter(lambda data: len(data) != 64))
def test_a_key_of_another_length_is_refused(data: bytes):
    with pytest.raises(SealingError, match="key of a broadcast"):
        ContentKey.from_bytes(data)


def test_more_than_the_cipher_takes_is_refused_in_words(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(envelope, "PAYLOAD_LIMIT", len(PAYLOAD) - 1)
    with pytest.raises(TooLarge):
        seal_broadcast(PAYLOAD)


def test_the_key_is_not_shown():
    shown = f"{KEY!r} {KEY}"
    assert repr(KEY.key) not in shown
    assert KEY.key.hex() not in shown


def test_no_error_holds_the_key_or_the_payload():
    with pytest.raises(SealingError) as caught:
        open_broadcast(DATA[:-1], resigned(DATA[:-1]))
    told = f"{caught.value!r} {vars(caught.value)}"
    assert "canary" not in told
    assert KEY.key.hex() not in told
    assert repr(KEY.key) not in told
    assert caught.value.__cause__ is None
