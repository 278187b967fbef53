"""The link after an accident: a client's process is killed, a server dies under an upload."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from flwr.app import Message
from flwr.clientapp import ClientApp

from fedpeft_client.link.connection import ConnectionSettings
from fedpeft_client.link.standing import STANDING_FILE, KeptStanding
from fedpeft_server.link.superlink import SuperLink
from tests.client.test_connection import Federation, ask, blob, data_of, echo_app

# A client that never answers.
PROGRAM = """
import sys, threading, time
from pathlib import Path
from flwr.clientapp import ClientApp
from fedpeft_client.link.connection import ConnectionSettings, serve
from fedpeft_client.link.standing import KeptStanding

def work(message, context):
    print("asked", flush=True)
    time.sleep(60)

app = ClientApp()
app.train()(work)
app.train("masked")(work)
server, key, ca = sys.argv[1:]
serve(
    app,
    ConnectionSettings(server=server, key=Path(key), ca=Path(ca)),
    stop=threading.Event(),
    standing=KeptStanding(Path(key).parent),
)
"""


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    made = Federation(tmp_path)
    yield made
    for clinic in made.clinics:
        clinic.finish()


@contextmanager
def busy(link: SuperLink, settings: ConnectionSettings, kind: str) -> Generator[list[Message]]:
    """Have a process killed while it works on a message, and collect what comes in answer."""
    command = [sys.executable, "-c", PROGRAM, settings.server, settings.key, settings.ca]
    replies: list[Message] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        while not link.connected():
            time.sleep(0.05)
        asking = threading.Thread(
            target=lambda: replies.extend(ask(link, blob(b"x"), kind, 40).values())
        )
        asking.start()
        assert process.stdout is not None
        assert process.stdout.readline() == b"asked\n"
        process.kill()
    yield replies
    asking.join()


@pytest.mark.parametrize(
    ("kind", "reason"), [("train", "adapter-not-held"), ("train.masked", "interrupted")]
)
def test_a_process_takes_the_place_of_a_killed_one_at_once_and_excuses_it(
    federation: Federation, kind: str, reason: str
):
    with federation.link() as link:
        settings = federation.join("anna")
        with busy(link, settings, kind) as replies:
            began = time.monotonic()
            standing = KeptStanding(settings.key.parent)
            federation.start(echo_app(), settings, standing=standing).wait_for("connected")
        assert [reply.error.reason for reply in replies] == [reason]
        assert time.monotonic() - began < 10  # the server believes in the other for a minute
        assert data_of(ask(link, blob(b"abcdefgh1"))["anna"])[8:] == b"1"
        assert list(link.connected().values()) == ["anna"]


def test_without_what_was_left_the_server_has_to_give_the_former_process_up(
    federation: Federation,
):
    with federation.link() as link:
        settings = federation.join("anna")
        with busy(link, settings, "train") as replies:
            (settings.key.parent / STANDING_FILE).unlink()
            standing = KeptStanding(settings.key.parent)
            clinic = federation.start(echo_app(), settings, standing=standing)
            clinic.wait_for("waiting")
            time.sleep(3)
            assert "connected" not in clinic.kinds()
            assert replies == []
            link.stop.set()


def test_an_upload_tells_of_the_servers_death_once_and_goes_on_when_it_is_back(
    federation: Federation,
):
    app, uploading = ClientApp(), threading.Event()
    payload = os.urandom(40 << 20)

    @app.train()
    def train(message: Message, _context: object) -> Message:
        uploading.set()
        return Message(blob(payload), reply_to=message)

    with federation.link() as link:
        clinic = federation.start(app, federation.join("anna"))
        clinic.wait_for("connected")
        asking = threading.Thread(target=ask, args=(link, blob(b"x")))
        asking.start()
        before = link.meter.bytes_up
        while link.meter.bytes_up < before + (1 << 20):
            time.sleep(0.01)
        link.stop.set()
        asking.join()
    clinic.wait_for("disconnected", timeout_s=10)
    time.sleep(3)
    assert clinic.kinds().count("disconnected") == 1
    with federation.link() as link:
        clinic.wait_for("connected", 2)
        assert data_of(ask(link, blob(b"y"))["anna"]) == payload
    assert clinic.error is None
