"""Joining by stick: a request that gives no token away, and a ticket nobody else can write."""

import dataclasses
import json

import pytest

from fedpeft.errors import EnrolmentError, StickRefused
from fedpeft.sealing import Identity
from fedpeft.sealing.carried import FILE_LIMIT
from fedpeft.sealing.join_file import JoinRequest, Ticket, token_key
from fedpeft.sealing.possession import check_possession

NORTH, SITE = Identity.generate(), Identity.generate()
TOKEN = "0123456789abcdef.a-secret-of-many-letters"
REQUEST = JoinRequest.make(
    NORTH, federation="sea", clinic="north", token=TOKEN, public_key="a key in PEM"
)
TICKET = Ticket(
    federation="sea",
    clinic="north",
    identity=NORTH.public.to_text(),
    keys_expire="2028-01-01T00:00:00+00:00",
    identity_expires="2030-01-01T00:00:00+00:00",
)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b"nonsense",
        b"[" * 100_000,
        REQUEST.to_json().encode()[:-5],
        TICKET.to_json(SITE).encode(),
        REQUEST.to_json().replace('"schema": 1', '"schema": 2').encode(),
        REQUEST.to_json().replace('"clinic": "north"', '"clinic": 1').encode(),
        REQUEST.to_json().replace('"clinic"', '"klinik"').encode(),
        REQUEST.to_json().replace('"north"', '"\\ud800"').encode(),
        REQUEST.to_json().encode() + b" " * FILE_LIMIT,
    ],
)
def test_what_is_no_request_is_refused(content: bytes):
    with pytest.raises(StickRefused):
        JoinRequest.from_json(content)


def test_the_token_is_not_in_the_request():
    secret = TOKEN.partition(".")[2]
    assert secret not in REQUEST.to_json()
    assert token_key(secret).hex() not in REQUEST.to_json()


@pytest.mark.parametrize("field", ["federation", "token_id", "public_key", "identity"])
def test_a_request_for_other_keys_does_not_know_the_token(field: str):
    key = token_key(TOKEN.partition(".")[2])
    assert REQUEST.knows(key)
    assert not dataclasses.replace(REQUEST, **{field: "other"}).knows(key)
    assert not REQUEST.knows(token_key("another secret"))


def test_the_holder_of_another_identity_cannot_pass_the_request_on():
    other = dataclasses.replace(REQUEST, identity=Identity.generate().public.to_text())
    with pytest.raises(EnrolmentError):
        check_possession(
            other.possession,
            Identity.generate().public,
            federation="sea",
            token=other.token_id,
            public_key_pem=other.public_key,
        )
    check_possession(
        REQUEST.possession,
        NORTH.public,
        federation="sea",
        token=REQUEST.token_id,
        public_key_pem=REQUEST.public_key,
    )


def test_a_request_is_read_as_it_was_written():
    assert JoinRequest.from_json(REQUEST.to_json().encode()) == REQUEST


def test_a_ticket_of_another_server_is_refused():
    with pytest.raises(StickRefused, match="not signed by the central site"):
        Ticket.from_json(TICKET.to_json(Identity.generate()).encode(), SITE.public)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Ticket)])
def test_a_ticket_that_was_changed_is_refused(field: str):
    document = json.loads(TICKET.to_json(SITE)) | {field: "other"}
    with pytest.raises(StickRefused):
        Ticket.from_json(json.dumps(document).encode(), SITE.public)


@pytest.mark.parametrize("signature", ["", "zz", "ab" * 63])
def test_a_ticket_without_a_signature_is_refused(signature: str):
    document = json.loads(TICKET.to_json(SITE)) | {"signature": signature}
    with pytest.raises(StickRefused):
        Ticket.from_json(json.dumps(document).encode(), SITE.public)


def test_a_ticket_is_read_as_it_was_written():
    assert Ticket.from_json(TICKET.to_json(SITE).encode(), SITE.public) == TICKET
