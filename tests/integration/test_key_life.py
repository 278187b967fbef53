"""Keys that are revoked and renewed while clinics are connected: real server, real sockets."""

import datetime
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from fedpeft.config import KeySettings
from fedpeft.errors import EnrolmentError, FedpeftError, SignerNotAllowed, WrongSignature
from fedpeft.sealing import Identity
from fedpeft.sealing.context import SERVER, clinic_role
from fedpeft.sealing.keyfile import Protection
from fedpeft.sealing.succession import Succession, newest
from fedpeft_client.box import Box, open_box
from fedpeft_client.connection import ConnectionSettings, Event, serve
from fedpeft_client.enrolment import join
from fedpeft_client.fleet import read_ca
from fedpeft_client.key_life import expiry_warnings, keep_expiry, keys_expire, renewal_in_progress
from fedpeft_client.live_clinic import LiveClinic
from fedpeft_client.reachability import probe
from fedpeft_client.renewal import follow_server, renew_key
from fedpeft_client.settings import (
    BoxModelSettings,
    ClientSettings,
    DataSettings,
    PolicySettings,
    ServerSettings,
    settings_toml,
)
from fedpeft_server import certificate_watch, expiry
from fedpeft_server.pki import renew_server_certificate
from fedpeft_server.site import Site, create_site, open_site
from fedpeft_server.superlink import SuperLink, SuperLinkSettings

BASE = "f" * 64


def echo_app() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message, _context):
        return Message(message.content, reply_to=message)

    return app


def blob() -> RecordDict:
    array = Array(dtype="bytes", shape=(3,), stype="x", data=b"abc")
    return RecordDict({"blob": ArrayRecord({"x": array})})


class Running:
    """A client in a thread, with what it reported and what it died of."""

    def __init__(self, box: Box) -> None:
        self.events: list[Event] = []
        self.error: Exception | None = None
        self.stop = threading.Event()
        self._settings = ConnectionSettings(
            server=box.settings.server.address,
            key=box.key,
            ca=box.ca,
            poll_s=0.05,
            idle_poll_s=0.05,
        )
        self.live = LiveClinic(box, box.load_identity(_never_asked))
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        try:
            serve(echo_app(), self._settings, stop=self.stop, on_event=self._hear)
        except FedpeftError as error:
            self.error = error

    def _hear(self, event: Event) -> None:
        self.events.append(event)
        self.live.heard(event)

    def wait_for(self, kind: str, count: int = 1) -> None:
        deadline = time.monotonic() + 30
        while sum(event.kind == kind for event in self.events) < count:
            assert time.monotonic() < deadline, (self.events, self.error)
            time.sleep(0.02)

    def end(self) -> Exception | None:
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self.error


def _never_asked() -> str:
    raise AssertionError


class Town:
    """A site, and the boxes that joined it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.site = create_site(
            root / "site",
            address=f"localhost:{self.port}",
            name="heart",
            base="embedded",
            keys=KeySettings(),
        )
        self.running: list[Running] = []

    def link(self) -> SuperLink:
        self.site.state.mkdir(mode=0o700, exist_ok=True)
        settings = SuperLinkSettings(
            directory=self.site.state, host="127.0.0.1", port=self.port, poll_s=0.05
        )
        return SuperLink(
            settings,
            self.site.authority,
            self.site.enrolments(),
            succession=self.site.sealing.succession,
        )

    def reopen(self) -> Site:
        self.site = open_site(self.root / "site")
        return self.site

    def box(self, name: str) -> Box:
        """Join with the running server."""
        invitation = self.site.enrolments().create_invitation(name, 3600.0, fingerprint=BASE)
        invitation.write(self.root / f"{name}.json")
        directory = self.root / name
        join(self.root / f"{name}.json", directory, Protection.none())
        settings = ClientSettings(
            clinic=name,
            server=ServerSettings(address=f"localhost:{self.port}", federation="heart"),
            model=BoxModelSettings(directory=Path("model")),
            data=DataSettings(train=Path("train.jsonl")),
        )
        (directory / "client.toml").write_text(settings_toml(settings))
        return open_box(directory)

    def start(self, box: Box) -> Running:
        running = Running(box)
        self.running.append(running)
        running.wait_for("connected")
        return running


@pytest.fixture
def town(tmp_path: Path) -> Iterator[Town]:
    made = Town(tmp_path)
    yield made
    for running in made.running:
        running.stop.set()
        running.end()


def ask(link: SuperLink) -> list[str]:
    """Ask all clinics that are connected, and return the names of those that answered."""
    messages = [Message(blob(), node, "train") for node in link.connected()]
    replies = link.grid.send_and_receive(messages, timeout=30)
    return [link.names()[link.grid.node_of(it)] for it in replies if not it.has_error()]


# Revoking


def test_a_connected_clinic_is_refused_at_its_next_call_once_it_is_revoked(town: Town):
    with town.link() as link:
        anna, bert = town.start(town.box("anna")), town.start(town.box("bert"))
        assert sorted(ask(link)) == ["anna", "bert"]

        # Another process than the server's, as `fedpeft-server revoke` is.
        open_site(town.root / "site").enrolments().revoke("anna")
        began = time.monotonic()

        error = anna.end()
        assert isinstance(error, EnrolmentError)
        assert time.monotonic() - began < 5
        assert list(link.names().values()) == ["bert"]
        assert ask(link) == ["bert"]
        bert.stop.set()


def test_words_are_the_same_on_both_sides(town: Town):
    with town.link():
        assert town.box("anna").words() == town.site.words()


# A clinic's key


def test_a_renewed_key_is_taken_up_by_the_running_client_which_keeps_its_place(town: Town):
    with town.link() as link:
        box = town.box("anna")
        running = town.start(box)
        nodes, old = dict(link.names()), box.key.read_bytes()
        assert ask(link) == ["anna"]

        renew_key(box, box.load_identity(_never_asked))
        expires = renew_key(box, box.load_identity(_never_asked))

        assert box.key.read_bytes() != old
        assert keys_expire(box.directory) == expires
        assert not renewal_in_progress(box.key).exists()
        running.wait_for("disconnected")
        running.wait_for("connected", 2)
        assert ask(link) == ["anna"]
        assert link.names() == nodes
        assert running.error is None


def test_a_message_that_waits_is_answered_with_the_renewed_key(town: Town):
    with town.link() as link:
        box = town.box("anna")
        running = town.start(box)
        (node,) = link.names()
        running.stop.set()
        running.end()
        sent = list(link.grid.push_messages([Message(blob(), node, "train")]))
        renew_key(box, box.load_identity(_never_asked))
        town.start(box)
        deadline, replies = time.monotonic() + 30, []
        while not replies and time.monotonic() < deadline:
            replies = list(link.grid.pull_messages(sent))
            time.sleep(0.05)
        assert [reply.has_error() for reply in replies] == [False]


def test_a_renewal_that_broke_off_is_finished_with_the_same_key(town: Town):
    with town.link():
        box = town.box("anna")
        identity = box.load_identity(_never_asked)
        renew_key(box, identity)
        # As if the answer had been lost: the server has the new key, the box the old one.
        new = box.key.read_bytes()
        renewal_in_progress(box.key).write_bytes(new)
        renewal_in_progress(box.key).chmod(0o600)
        renew_key(box, identity)
        assert box.key.read_bytes() == new
        town.start(box)


def test_the_key_of_another_clinic_renews_nothing(town: Town):
    with town.link():
        anna, bert = town.box("anna"), town.box("bert")
        before = [each.public_key for each in town.site.enrolments().clinics()]
        stranger = Identity.generate()
        for box, identity in ((anna, bert.load_identity(_never_asked)), (anna, stranger)):
            with pytest.raises(EnrolmentError, match="does not know this box's keys"):
                renew_key(box, identity)
        assert [each.public_key for each in town.site.enrolments().clinics()] == before


def test_a_revoked_clinic_cannot_renew_its_key(town: Town):
    with town.link():
        box = town.box("anna")
        town.site.enrolments().revoke("anna")
        with pytest.raises(EnrolmentError, match="does not know this box's keys"):
            renew_key(box, box.load_identity(_never_asked))


# The server's certificate


def _shown(town: Town, box: Box) -> bytes:
    context = ssl.create_default_context(cadata=read_ca(box.ca))
    with (
        socket.create_connection(("localhost", town.port)) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as tls,
    ):
        return tls.getpeercert(binary_form=True) or b""


def test_a_running_server_shows_its_renewed_certificate_and_nobody_is_cut_off(
    town: Town, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(certificate_watch.CertificateWatch.__init__, "__defaults__", (0.05,))
    with town.link() as link:
        box = town.box("anna")
        running = town.start(box)
        before = _shown(town, box)

        renew_server_certificate(town.root / "site" / "keys", f"localhost:{town.port}")

        deadline = time.monotonic() + 20
        while _shown(town, box) == before:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert probe(box.settings.server.address, box.ca).ok
        assert ask(link) == ["anna"]
        assert running.error is None
        assert [event.kind for event in running.events].count("disconnected") == 0


# The server's identity


def test_clinics_follow_the_server_to_the_identity_that_the_old_one_signed(town: Town):
    with town.link():
        box = town.box("anna")
        running = town.start(box)
    old = box.server_identity
    town.site.renew_identity()
    new = town.reopen().sealing.public
    assert new != old
    with town.link():
        running.wait_for("connected", 2)
        deadline = time.monotonic() + 10
        while running.live.present.membership.server != new:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert box.server_identity == new
        assert box.words() == town.site.words()


def test_a_box_that_slept_through_two_renewals_follows_both(town: Town):
    with town.link():
        box = town.box("anna")
    for _ in range(2):
        town.site.renew_identity()
        town.reopen()
    with town.link():
        assert follow_server(box) == town.site.sealing.public
        assert follow_server(box) is None


def test_a_server_that_shows_a_forged_statement_is_not_followed(town: Town):
    with town.link():
        box = town.box("anna")
    pinned, thief = box.server_identity, Identity.generate()
    forged = Succession.sign(thief, thief, federation="heart", holder=SERVER)
    text = forged.to_json().replace(thief.public.to_text(), pinned.to_text(), 1)
    town.site = replace(town.site, sealing=replace(town.site.sealing, succession=(text,)))
    with town.link(), pytest.raises(WrongSignature):
        follow_server(box)
    assert box.server_identity == pinned


def test_a_clinic_that_lists_its_signers_follows_to_those_only(town: Town):
    with town.link():
        box = town.box("anna")
    pinned = box.server_identity
    town.site.renew_identity()
    new = town.reopen().sealing.public

    def listing(*signers: str) -> Box:
        policy = PolicySettings(signers=signers)
        return Box(box.directory, box.settings.model_copy(update={"policy": policy}))

    with town.link():
        with pytest.raises(SignerNotAllowed, match=new.fingerprint):
            follow_server(listing(pinned.fingerprint))
        assert box.server_identity == pinned
        assert follow_server(listing(pinned.fingerprint, new.fingerprint)) == new


def test_statements_of_other_federations_and_holders_lead_nowhere():
    one, two = Identity.generate(), Identity.generate()
    for federation, holder in (("lake", SERVER), ("heart", clinic_role("anna"))):
        line = Succession.sign(one, two, federation=federation, holder=holder).to_json()
        assert newest([line], one.public, federation="heart", holder=SERVER) == one.public


# Warnings


def test_keys_and_certificates_are_warned_of_a_month_ahead(
    town: Town, monkeypatch: pytest.MonkeyPatch
):
    with town.link():
        box = town.box("anna")
    assert expiry_warnings(box.directory, box.ca) == []
    enrolments = town.site.enrolments()
    assert expiry.expiry_warnings(town.site.authority, enrolments) == []

    now = datetime.datetime.now(datetime.UTC)
    keep_expiry(box.directory, now + datetime.timedelta(days=29))
    (warning,) = expiry_warnings(box.directory, box.ca)
    assert "fedpeft-client rotate" in warning
    (clinic,) = enrolments.clinics()
    assert clinic.identity is not None
    shown = (clinic.public_key.replace("\n", "\r\n"), clinic.identity.to_text())
    enrolments.renew("anna", shown, (now - datetime.timedelta(days=701)).timestamp())
    monkeypatch.setattr("fedpeft_server.pki.SERVER_VALIDITY_DAYS", 29)
    renew_server_certificate(town.root / "site" / "keys", f"localhost:{town.port}")
    certificate, keys = expiry.expiry_warnings(town.site.authority, enrolments)
    assert "fedpeft-server rotate" in certificate
    assert "anna" in keys
