"""The file that carries one message on a stick: what is refused, and what the page says."""

import hashlib
import json
import struct
from pathlib import Path

import pytest

from fedpeft.errors import SealingError, StickRefused
from fedpeft.protocol.stick_file import (
    MAGIC,
    StickFile,
    parse_stick_file,
    question_file,
    read_stick_file,
)
from fedpeft.sealing import SERVER, Context, Identity, clinic_role, seal

# The seeds of the specification's vector: any reader can derive both identities from them.
SITE, NORTH = Identity(bytes(range(128))), Identity(bytes(range(128, 256)))
PAGE = Path(__file__).parents[2] / "docs" / "spec" / "stick.md"
PLACE = Context(
    federation="sea",
    run=7,
    round=3,
    attempt=1,
    sender=SERVER,
    receiver=clinic_role("north"),
    purpose="train",
    schema="ab" * 32,
)


def asked(place: Context = PLACE, broadcast: bytes | None = b"adapter") -> StickFile:
    return question_file(seal(b"work", place, sender=SITE, receiver=NORTH.public), broadcast)


def answered(question: StickFile) -> StickFile:
    place = question.context.answer()
    return question.answered(sealed=seal(b"done", place, sender=NORTH, receiver=SITE.public))


def changed_header(content: bytes, signer: Identity, **changes: object) -> bytes:
    """The file with other values in its header, checksum and signature made anew."""
    (length,) = struct.unpack_from("<I", content, 8)
    header = json.loads(content[12 : 12 + length]) | changes
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    body = MAGIC + struct.pack("<I", len(text)) + text + content[12 + length : -96]
    digest = hashlib.sha256(body).digest()
    return body + digest + signer.sign(b"fedpeft stick file, version 1\x00" + digest)


# What is refused


@pytest.mark.parametrize("content", [b"", b"FP", b"%PDF-1.7", b"FPSTICK", MAGIC, MAGIC + bytes(99)])
def test_what_is_no_file_of_ours_is_refused(content: bytes):
    with pytest.raises(StickRefused):
        parse_stick_file(content)


def test_a_later_format_asks_for_the_same_release():
    with pytest.raises(StickRefused, match="install the same fedpeft release"):
        parse_stick_file(MAGIC[:7] + b"\x02" + asked().to_bytes(SITE)[8:])


def test_a_file_that_is_cut_or_changed_anywhere_is_refused():
    content = asked().to_bytes(SITE)
    for end in range(0, len(content), 41):
        with pytest.raises(StickRefused):
            parse_stick_file(content[:end])
    for at in range(8, len(content) - 64, 37):
        with pytest.raises(StickRefused, match="is damaged"):
            parse_stick_file(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])


def test_a_file_that_somebody_else_signed_is_refused():
    read = parse_stick_file(answered(asked()).to_bytes(Identity.generate()))
    with pytest.raises(StickRefused, match="foreign or forged"):
        read.signed_by(NORTH.public, source="clinic north")


def test_a_file_above_the_limit_is_not_read(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(asked().to_bytes(SITE))
    with pytest.raises(StickRefused, match="larger than the 100 bytes"):
        read_stick_file(path, 100)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "answer"},
        {"kind": "letter"},
        {"round": 4},
        {"clinic": "south"},
        {"federation": "air"},
        {"run": "x"},
        {"run": str(1 << 64)},
        {"question": "0" * 64},
        {"reason": "Mr Smith has a fever"},
        {"reason": "budget"},
        {"sealed": -1},
        {"sealed": 10},
        {"broadcast": None},
        {"schema": "none"},
        {"attempt": None},
    ],
    ids=str,
)
def test_a_header_that_does_not_fit_the_sealed_message_is_refused(changes: dict[str, object]):
    with pytest.raises(StickRefused, match="is damaged"):
        parse_stick_file(changed_header(asked().to_bytes(SITE), SITE, **changes))


def test_an_answer_to_another_place_is_refused():
    other = seal(b"done", PLACE, sender=NORTH, receiver=SITE.public)
    with pytest.raises(StickRefused):
        parse_stick_file(asked().answered(sealed=other).to_bytes(NORTH))


@pytest.mark.parametrize("reason", ["", "two words", "Upper", "a-b-c-d-e-f-g"])
def test_an_answer_without_content_says_one_word(reason: str):
    with pytest.raises(StickRefused):
        parse_stick_file(asked().answered(reason=reason).to_bytes(NORTH))


def test_a_question_that_is_not_sealed_is_none():
    with pytest.raises(SealingError):
        question_file(b"plain", None)


# What is read


@pytest.mark.parametrize("broadcast", [None, b"", b"adapter"])
def test_a_question_is_read_as_it_was_written(broadcast: bytes | None):
    question = asked(broadcast=broadcast)
    read = parse_stick_file(question.to_bytes(SITE))
    assert read.signed_by(SITE.public, source="the site") == question
    assert question.clinic == "north"


def test_an_answer_is_read_as_it_was_written():
    question = asked()
    for answer in (answered(question), question.answered(reason="outside-hours")):
        read = parse_stick_file(answer.to_bytes(NORTH))
        assert read.signed_by(NORTH.public, source="clinic north") == answer


def test_a_file_name_says_clinic_round_and_step():
    question = asked()
    assert question.name.startswith("sea-north-round3-train-")
    assert question.name.endswith(".question.fedpeft")
    assert question.answered(reason="budget").name.endswith(".answer.fedpeft")


# The specification


def vector() -> bytes:
    text = PAGE.read_text("utf-8")
    block = text.split("```hex\n", 1)[1].split("```", 1)[0]
    return bytes.fromhex("".join(block.split()))


def test_the_vector_is_read_by_the_page_alone():
    content = vector()
    assert content[:8] == b"FPSTICK\x01"
    (length,) = struct.unpack("<I", content[8:12])
    header = json.loads(content[12 : 12 + length])
    assert len(content) == 12 + length + header["sealed"] + (header["broadcast"] or 0) + 32 + 64
    assert (header["clinic"], header["round"], header["reason"]) == ("north", 3, "outside-hours")
    digest = content[-96:-64]
    assert hashlib.sha256(content[:-96]).digest() == digest
    NORTH.public.verify(
        content[-64:], b"fedpeft stick file, version 1\x00" + digest, source="the vector"
    )


def test_the_vector_is_what_the_code_writes():
    answer = StickFile(kind="answer", context=PLACE, question="cd" * 32, reason="outside-hours")
    assert answer.to_bytes(NORTH) == vector()


def test_the_page_names_every_field_of_the_header():
    (length,) = struct.unpack_from("<I", vector(), 8)
    fields = json.loads(vector()[12 : 12 + length])
    page = PAGE.read_text("utf-8")
    assert all(f"`{name}`" in page for name in fields)
