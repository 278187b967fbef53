"""docs/spec/succession.md and its test vectors against the code."""

import hashlib
import json
import re
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedpeft.errors import SealingError, WrongSignature
from fedpeft.protocol import Payload
from fedpeft.protocol.successions import SUCCESSIONS, successions_field, successions_of
from fedpeft.sealing import Identity
from fedpeft.sealing.succession import (
    LINK_BYTES,
    LONGEST_CHAIN,
    MOST_LINKS,
    SCHEMA,
    Link,
    Succession,
    newest,
)

PAGE = (Path(__file__).parents[2] / "docs/spec/succession.md").read_text("utf-8")
OLD, NEW = Identity(bytes(range(128))), Identity(bytes(range(128, 256)))
ROLE = "clinic:northfield"


def vector(name: str) -> bytes:
    (block,) = re.findall(rf"^```{name}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    return bytes.fromhex(block)


def statement(**changed: str) -> Succession:
    about = {"federation": "heart", "holder": ROLE, "key": "a key"} | changed
    return Succession.sign(OLD, NEW, **about)


def test_the_vectors_are_what_the_code_writes():
    assert statement().link.to_bytes() == vector("clinic")
    assert statement(holder="server", key="").link.to_bytes() == vector("server")
    signed = statement().link.message("heart", ROLE)
    assert hashlib.sha256(signed).hexdigest() in PAGE


def test_the_documented_layout_and_bounds_are_those_of_the_code():
    rows = re.findall(r"^\| (\d+) \| (\d+) \|", PAGE, flags=re.MULTILINE)
    offsets, sizes = ([int(row[at]) for row in rows] for at in (0, 1))
    assert offsets == [sum(sizes[:at]) for at in range(len(sizes))]
    assert sum(sizes) == LINK_BYTES
    assert f"{LINK_BYTES} bytes: the statement" in PAGE
    assert f"at most {LONGEST_CHAIN}; `GET" in PAGE
    assert f"the newest {MOST_LINKS}." in PAGE
    assert f"| `schema` | {SCHEMA} |" in PAGE
    assert PAGE.splitlines()[2].startswith(f"Version {SCHEMA}.")


def test_a_reader_made_from_the_document_alone_finds_both_signatures_right():
    for role, data in ((ROLE, vector("clinic")), ("server", vector("server"))):
        texts = (b"heart", role.encode())
        framed = b"".join(len(text).to_bytes(4, "little") + text for text in texts)
        message = b"fedpeft succession, version 2\x00" + framed + data[:160]
        for key, signature in ((data[:32], data[160:224]), (data[64:96], data[224:])):
            Ed25519PublicKey.from_public_bytes(key).verify(signature, message)


def test_every_documented_key_of_the_text_is_there_and_no_other():
    named = re.findall(r"`(\w+)`", PAGE.split("## Statement as text")[1].split("A statement")[0])
    assert set(json.loads(statement().to_json())) == set(named)


def test_a_statement_survives_its_text_and_no_change_of_it():
    text = statement().to_json()
    assert Succession.from_json(text) == statement()
    fields = json.loads(text)
    for name, value in fields.items():
        other = value + 1 if isinstance(value, int) else f"{value[:-2]}{value[-2:][::-1]}x"
        for changed in ({**fields, name: other}, {k: v for k, v in fields.items() if k != name}):
            with pytest.raises(SealingError):
                Succession.from_json(json.dumps(changed))
    for broken in ("", "[]", "null", "{}", "[" * 5000):
        with pytest.raises(SealingError):
            Succession.from_json(broken)


def test_a_statement_that_one_of_the_two_did_not_sign_is_refused():
    right, thief = statement(), Identity.generate()
    forged = thief.sign(right.link.message("heart", ROLE))
    for name in ("by_old", "by_new"):
        fields = json.loads(right.to_json()) | {name: forged.hex()}
        with pytest.raises(WrongSignature):
            Succession.from_json(json.dumps(fields))


def test_an_older_format_is_refused():
    fields = json.loads(statement().to_json()) | {"schema": 1}
    with pytest.raises(SealingError, match="none of this release"):
        newest([json.dumps(fields)], OLD.public, federation="heart", holder=ROLE)


# The field of a message


def test_links_arrive_as_they_were_told():
    third = Identity.generate()
    links = (
        statement().link.to_bytes(),
        Succession.sign(NEW, third, federation="heart", holder=ROLE).link.to_bytes(),
    )
    keys = {"northfield": third.public.signing_bytes, "quay": OLD.public.signing_bytes}
    field = successions_field({"northfield": links, "gone": links}, keys)
    assert successions_of(Payload(field), source="it") == {"northfield": links}

    # Asked before the second renewal: others know it under the key in between.
    between = successions_field({"northfield": links}, {"northfield": NEW.public.signing_bytes})
    assert successions_of(Payload(between), source="it") == {"northfield": links[:1]}


def test_nothing_is_said_where_no_clinic_has_renewed_its_identity():
    assert successions_field({}, {"northfield": OLD.public.signing_bytes}) == {}
    assert successions_field({"northfield": (vector("clinic"),)}, {"northfield": bytes(32)}) == {}
    assert successions_of(Payload(), source="it") == {}


LINK = Payload(successions_field({"a": (vector("clinic"),)}, {"a": NEW.public.signing_bytes})).text(
    SUCCESSIONS, source=""
)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "7",
        "[" * 5000,
        '{"a": 7}',
        '{"a": null}',
        '{"a": [7]}',
        '{"a": ["AAAA"]}',
        LINK.replace("A", "!", 1),
        LINK.replace('["', '["AAAA'),
        json.dumps({"a": json.loads(LINK)["a"] * (MOST_LINKS + 1)}),
        json.dumps({str(at): [] for at in range(1001)}),
    ],
    ids=lambda text: text[:20],
)
def test_a_field_in_another_form_is_refused(text: str):
    with pytest.raises(SealingError, match="renewed their keys"):
        successions_of(Payload({SUCCESSIONS: text}), source="the server")


def test_a_field_that_is_no_text_is_refused():
    with pytest.raises(SealingError):
        successions_of(Payload({SUCCESSIONS: 7}), source="the server")


def test_a_link_tells_nothing_of_the_private_keys():
    link = Link.from_bytes(vector("clinic"))
    assert OLD.seeds[:32] not in link.to_bytes()
    assert NEW.seeds[:32] not in link.to_bytes()
