"""What a clinic did not hear of is offered to it again, and nothing else is."""

import time

import pytest
from flwr.app import Message
from flwr.clientapp import ClientApp

from fedpeft_client.link.session import Session
from tests.client.test_connection import Federation, ask, blob, data_of, echo_app


@pytest.fixture
def federation(tmp_path):
    made = Federation(tmp_path)
    yield made
    for clinic in made.clinics:
        clinic.finish()


def test_an_announcement_that_was_lost_is_made_again(federation, monkeypatch):
    real, lost = Session.poll, []

    def poll(self):
        found = real(self)
        if found is not None and len(lost) < 2:
            lost.append(found)
            return None
        return found

    monkeypatch.setattr(Session, "poll", poll)
    with federation.link() as link:
        federation.start(echo_app(), federation.join("anna")).wait_for("connected")
        began = time.monotonic()
        assert data_of(ask(link, blob(b"abcdefghi"))["anna"])[8:] == b"i"
        assert time.monotonic() - began < 10
        assert len(lost) == 2


def test_what_was_answered_or_refused_is_not_offered_again(federation):
    app, did = ClientApp(), []

    @app.train()
    def train(message, _context):
        did.append(message.metadata.message_id)
        return Message(message.content, reply_to=message)

    with federation.link() as link:
        clinic = federation.start(app, federation.join("anna"))
        clinic.wait_for("connected")
        ask(link, blob(b"x"))
        ask(link, blob(b"y"), "query")
        time.sleep(2)
        assert len(did) == 1
        assert clinic.kinds().count("refused") == 1
        assert "dropped" not in clinic.kinds()
