"""Sealed messages between a sender, a reader and a network that is against both."""

import copy
import dataclasses
import pickle
import struct
from typing import Any

import pytest
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import SealingError, TooLarge, WrongContext, WrongSignature
from fedpeft.sealing import (
    HEADER_LIMIT,
    SERVER,
    Context,
    Identity,
    PublicIdentity,
    clinic_role,
    envelope,
    open_sealed,
    read_context,
    seal,
)
from fedpeft.sealing.envelope import OVERHEAD_LIMIT

SENDER, READER, OTHER = (Identity(bytes([number]) * 128) for number in (1, 2, 3))
CONTEXT = Context(
    federation="f",
    run=2**63,
    round=2,
    attempt=1,
    sender=SERVER,
    receiver=clinic_role("north"),
    purpose="train",
    schema="ab" * 32,
)
PAYLOAD = b"canary: a small adapter"
SEALED = seal(PAYLOAD, CONTEXT, sender=SENDER, receiver=READER.public)
HEADER = 12 + len(CONTEXT.to_bytes())
ROOM = 1024


def opened(
    data: bytes,
    expected: Context = CONTEXT,
    *,
    sender: PublicIdentity = SENDER.public,
    receiver: Identity = READER,
    max_bytes: int = ROOM,
) -> bytes:
    return open_sealed(data, expected, sender=sender, receiver=receiver, max_bytes=max_bytes)


def changed(data: bytes, at: int, mask: int) -> bytes:
    return data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]


def decrypted(data: bytes, reader: Identity) -> bytes:
    """Return signature and payload, as a reader who turns against the others has them."""
    suite = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
    return suite.decrypt(data[HEADER:], reader.sealing_key, info=data[:HEADER])


def encrypted(header: bytes, plain: bytes, reader: PublicIdentity) -> bytes:
    """Return what a stranger can seal: everything but a signature."""
    suite = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
    return header + suite.encrypt(plain, reader.sealing_key, info=header)


# what is meant to happen


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 100_000])
def test_the_reader_gets_what_the_sender_wrote(size: int):
    payload = bytes(size)
    sealed = seal(payload, CONTEXT, sender=SENDER, receiver=READER.public)
    assert opened(sealed, max_bytes=size) == payload
    assert 0 < len(sealed) - size <= OVERHEAD_LIMIT


def test_the_context_can_be_read_by_its_first_bytes():
    assert read_context(SEALED) == CONTEXT
    assert read_context(SEALED[:HEADER_LIMIT]) == CONTEXT


def test_sealing_twice_gives_other_bytes():
    again = seal(PAYLOAD, CONTEXT, sender=SENDER, receiver=READER.public)
    assert again[:HEADER] == SEALED[:HEADER]
    assert again[HEADER:] != SEALED[HEADER:]


def test_neither_payload_nor_signature_is_in_the_open():
    assert PAYLOAD not in SEALED
    assert decrypted(SEALED, READER)[:64] not in SEALED


def test_the_overhead_is_what_is_added():
    longest = dataclasses.replace(
        CONTEXT, federation="f" * 255, sender="s" * 255, receiver="r" * 255, purpose="p" * 255
    )
    sealed = seal(b"", longest, sender=SENDER, receiver=READER.public)
    assert len(sealed) == OVERHEAD_LIMIT


# a network that changes bytes


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_no_byte_can_be_changed(mask: int):
    for at in range(len(SEALED)):
        with pytest.raises(SealingError):
            opened(changed(SEALED, at, mask))


def test_no_length_but_the_whole_opens():
    for length in range(len(SEALED)):
        with pytest.raises(SealingError):
            opened(SEALED[:length])


@pytest.mark.parametrize("surplus", [1, 16, 500])
def test_nothing_can_be_appended(surplus: int):
    with pytest.raises(SealingError):
        opened(SEALED + bytes(surplus))


@pytest.mark.parametrize("at", range(0, HEADER, 7))
def test_nothing_can_be_inserted_into_the_header(at: int):
    with pytest.raises(SealingError):
        opened(SEALED[:at] + b"\0" + SEALED[at:])


@given(st.binary(max_size=2000))
def test_garbage_is_no_message(data: bytes):
    with pytest.raises(SealingError):
        opened(data)
    with pytest.raises(SealingError):
        read_context(data)


@given(st.binary(max_size=1500))
def test_garbage_behind_a_true_header_is_no_message(data: bytes):
    with pytest.raises(SealingError):
        opened(SEALED[:HEADER] + data)


@given(st.binary(max_size=300), st.integers(0, 2**16 - 1))
def test_garbage_behind_a_true_magic_is_no_message(data: bytes, length: int):
    lead = struct.pack("<8sHH", envelope.MAGIC, envelope.VERSION, length)
    with pytest.raises(SealingError):
        opened(lead + data)
    try:
        claimed = read_context(lead + data)
    except SealingError:
        return
    assert claimed.to_bytes() == data[:length]


def test_another_format_version_is_named():
    with pytest.raises(SealingError, match="format version 2, this release reads 1"):
        opened(SEALED[:8] + b"\2\0" + SEALED[10:])


def test_another_protocol_version_is_named():
    with pytest.raises(SealingError, match="protocol version 3, this release speaks 2"):
        read_context(SEALED[:12] + b"\3\0" + SEALED[14:])


def test_the_ephemeral_key_cannot_be_one_of_small_order():
    at = HEADER + 1088
    with pytest.raises(SealingError):
        opened(SEALED[:at] + bytes(32) + SEALED[at + 32 :])


# peers that turn against the others


def test_another_sender_cannot_write_in_its_name():
    with pytest.raises(WrongSignature, match="from server"):
        opened(seal(PAYLOAD, CONTEXT, sender=OTHER, receiver=READER.public))


def test_another_receiver_cannot_read():
    with pytest.raises(SealingError, match="does not open"):
        opened(SEALED, receiver=OTHER)


def test_a_reader_cannot_forward_what_was_signed_for_it():
    forwarded = encrypted(SEALED[:HEADER], decrypted(SEALED, READER), OTHER.public)
    with pytest.raises(WrongSignature):
        opened(forwarded, receiver=OTHER)


def test_a_reader_cannot_move_signed_content_to_another_place():
    there = dataclasses.replace(CONTEXT, round=3)
    about = there.to_bytes()
    header = SEALED[:10] + struct.pack("<H", len(about)) + about
    moved = encrypted(header, decrypted(SEALED, READER), READER.public)
    with pytest.raises(WrongSignature):
        opened(moved, there)


def test_a_reader_cannot_put_other_content_behind_a_signature():
    signature = decrypted(SEALED, READER)[:64]
    with pytest.raises(WrongSignature):
        opened(encrypted(SEALED[:HEADER], signature + b"other", READER.public))


@pytest.mark.parametrize("size", [0, 1, 63])
def test_a_message_without_a_whole_signature_is_refused(size: int):
    with pytest.raises(SealingError, match="does not open"):
        opened(encrypted(SEALED[:HEADER], bytes(size), READER.public))


def test_an_answer_cannot_be_the_message_itself():
    with pytest.raises(WrongContext, match="sender, receiver"):
        opened(SEALED, dataclasses.replace(CONTEXT, sender=CONTEXT.receiver, receiver=SERVER))


# replays

ELSEWHERE: dict[str, Any] = {
    "federation": "g",
    "run": 0,
    "round": 3,
    "attempt": 2,
    "sender": clinic_role("south"),
    "receiver": clinic_role("south"),
    "purpose": "train/reply",
    "schema": "ac" * 32,
}


def test_every_field_of_the_context_is_tried():
    assert list(ELSEWHERE) == [field.name for field in dataclasses.fields(Context)]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_message_from_elsewhere_is_refused_and_the_field_named(name: str):
    elsewhere = dataclasses.replace(CONTEXT, **{name: ELSEWHERE[name]})
    with pytest.raises(WrongContext, match=rf"\({name} differ") as caught:
        opened(SEALED, elsewhere)
    assert caught.value.reason == "wrong-context"


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_claimed_context_cannot_be_exchanged(name: str):
    elsewhere = dataclasses.replace(CONTEXT, **{name: ELSEWHERE[name]})
    about = elsewhere.to_bytes()
    claimed = SEALED[:10] + struct.pack("<H", len(about)) + about + SEALED[HEADER:]
    with pytest.raises(SealingError, match="does not open"):
        opened(claimed, elsewhere)


# sizes


def test_a_payload_of_the_largest_size_opens_and_one_byte_more_is_refused():
    assert opened(SEALED, max_bytes=len(PAYLOAD)) == PAYLOAD
    with pytest.raises(TooLarge, match=f"{len(PAYLOAD)} bytes where {len(PAYLOAD) - 1} are"):
        opened(SEALED, max_bytes=len(PAYLOAD) - 1)


def test_what_is_too_large_is_not_decrypted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(envelope, "_SUITE", None)
    with pytest.raises(TooLarge):
        opened(SEALED + bytes(ROOM))


def test_more_than_the_cipher_takes_is_refused_in_words(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(envelope, "PAYLOAD_LIMIT", len(PAYLOAD) - 1)
    with pytest.raises(TooLarge, match="smaller rank"):
        seal(PAYLOAD, CONTEXT, sender=SENDER, receiver=READER.public)
    with pytest.raises(TooLarge):
        opened(SEALED)


# contexts

PLAIN = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=255)
CONTEXTS = st.builds(
    Context,
    federation=PLAIN,
    run=st.integers(0, 2**64 - 1),
    round=st.integers(0, 2**32 - 1),
    attempt=st.integers(0, 2**32 - 1),
    sender=PLAIN,
    receiver=PLAIN,
    purpose=PLAIN,
    schema=st.binary(min_size=32, max_size=32).map(bytes.hex),
)


@given(CONTEXTS)
def test_a_context_survives_its_bytes(context: Context):
    data = context.to_bytes()
    assert Context.from_bytes(data) == context
    assert len(data) + 12 <= HEADER_LIMIT


SHORT = st.text("ab", max_size=3)


@given(*[st.tuples(SHORT, SHORT, SHORT, SHORT)] * 2)
def test_two_contexts_never_share_their_bytes(one: tuple[str, ...], two: tuple[str, ...]):
    names = "federation", "sender", "receiver", "purpose"
    first, second = (
        dataclasses.replace(CONTEXT, **dict(zip(names, texts, strict=True))) for texts in (one, two)
    )
    assert (first.to_bytes() == second.to_bytes()) == (first == second)


@given(st.binary(max_size=200) | st.binary(max_size=60).map(lambda end: b"\2\0" + bytes(48) + end))
def test_bytes_are_a_context_or_damaged_and_never_have_two_encodings(data: bytes):
    try:
        context = Context.from_bytes(data)
    except SealingError:
        return
    assert context.to_bytes() == data


def test_a_context_of_another_length_is_damaged():
    data = CONTEXT.to_bytes()
    for other in [data[:length] for length in range(len(data))] + [data + b"\0", data * 2]:
        with pytest.raises(SealingError, match="damaged"):
            Context.from_bytes(other)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("federation", "f" * 256),
        ("sender", "clinic:zürich"),
        ("receiver", "clinic:\x1b[2J"),
        ("purpose", "train\n"),
        ("purpose", "\udc80"),
        ("run", -1),
        ("run", 2**64),
        ("round", 2**32),
        ("attempt", -1),
        ("schema", ""),
        ("schema", "ab" * 31),
        ("schema", "AB" * 32),
        ("schema", "ab" * 32 + "\n"),
        ("schema", "no hex"),
    ],
)
def test_a_field_that_does_not_fit_is_named_and_nothing_is_sealed(name: str, value: Any):
    unfit = dataclasses.replace(CONTEXT, **{name: value})
    with pytest.raises(SealingError, match=f"as {name} of its context"):
        seal(PAYLOAD, unfit, sender=SENDER, receiver=READER.public)


@pytest.mark.parametrize("character", [0x00, 0x0A, 0x1B, 0x7F, 0x80, 0xFF])
def test_what_a_stranger_claims_cannot_steer_a_terminal(character: int):
    at = SEALED.index(b"train")
    with pytest.raises(SealingError, match="damaged"):
        read_context(SEALED[:at] + bytes([character]) + SEALED[at + 1 :])


# what errors tell


def failures() -> list[SealingError]:
    """Return one error of each kind."""
    forged = seal(PAYLOAD, CONTEXT, sender=OTHER, receiver=READER.public)
    calls: list[tuple[bytes, Context, int]] = [
        (changed(SEALED, -1 + len(SEALED), 1), CONTEXT, ROOM),
        (SEALED[:5], CONTEXT, ROOM),
        (SEALED, dataclasses.replace(CONTEXT, round=9), ROOM),
        (SEALED, CONTEXT, 1),
        (forged, CONTEXT, ROOM),
    ]
    found: list[SealingError] = []
    for data, expected, most in calls:
        with pytest.raises(SealingError) as caught:
            opened(data, expected, max_bytes=most)
        found.append(caught.value)
    return found


def test_no_error_holds_a_secret():
    for error in failures():
        told = [str(error).encode(), repr(error).encode(), pickle.dumps(error)]
        told.append(repr(vars(error)).encode())
        for secret in (PAYLOAD, SENDER.seeds[:16], READER.seeds[:16], b"canary"):
            assert all(secret not in text and secret.hex().encode() not in text for text in told)
        assert error.__cause__ is None


def test_errors_can_be_copied():
    for error in failures():
        assert type(copy.copy(error)) is type(error)
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
