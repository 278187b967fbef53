"""Keys that are revoked and renewed while clinics are connected: real server, real sockets."""

import datetime
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedpeft.audit_log import AuditLog, verify
from fedpeft.config import KeySettings
from fedpeft.errors import (
    EnrolmentError,
    FedpeftError,
    KeyLocked,
    SignerNotAllowed,
    StorageError,
    WrongSignature,
)
from fedpeft.protocol import Payload, carried, carry
from fedpeft.sealing import Context, Identity, PublicIdentity, open_sealed, seal
from fedpeft.sealing.context import SERVER, clinic_role
from fedpeft.sealing.keyfile import Protection, load_identity
from fedpeft.sealing.succession import Succession, newest
from fedpeft_client.box import Box, open_box
from fedpeft_client.cli import program as client
from fedpeft_client.keys import renewal
from fedpeft_client.keys.enrolment import join
from fedpeft_client.keys.key_life import (
    Expiry,
    expiry_of,
    expiry_warnings,
    identity_in_progress,
    keep_expiry,
    keys_expire,
    renewal_in_progress,
)
from fedpeft_client.keys.renewal import follow_server, renew_key, rotate_keys
from fedpeft_client.link.connection import ConnectionSettings, Event, serve
from fedpeft_client.link.fleet import read_ca
from fedpeft_client.link.reachability import probe
from fedpeft_client.rounds.live_clinic import LiveClinic
from fedpeft_client.rounds.mailbox import Mailbox
from fedpeft_client.settings import (
    BoxModelSettings,
    ClientSettings,
    DataSettings,
    PolicySettings,
    ServerSettings,
    settings_toml,
)
from fedpeft_client.vault import Vault
from fedpeft_server.link import certificate_watch
from fedpeft_server.link.superlink import SuperLink, SuperLinkSettings
from fedpeft_server.rounds.channel import Channel, Letter
from fedpeft_server.site import expiry
from fedpeft_server.site.directory import Site, create_site, open_site
from fedpeft_server.site.pki import renew_server_certificate

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

    def __init__(self, box: Box, app: ClientApp) -> None:
        self.events: list[Event] = []
        self._app = app
        self.error: Exception | None = None
        self.stop = threading.Event()
        self._settings = ConnectionSettings(
            server=box.settings.server.address,
            key=box.key,
            ca=box.ca,
            poll_s=0.05,
            idle_poll_s=0.05,
        )
        self.live = LiveClinic(box, box.protection(_never_asked))
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        try:
            serve(self._app, self._settings, stop=self.stop, on_event=self._hear)
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

    def box(self, name: str, protection: Protection | None = None) -> Box:
        """Join with the running server."""
        invitation = self.site.enrolments().create_invitation(name, 3600.0, fingerprint=BASE)
        invitation.write(self.root / f"{name}.json")
        directory = self.root / name
        join(self.root / f"{name}.json", directory, protection or Protection.none())
        settings = ClientSettings(
            clinic=name,
            server=ServerSettings(address=f"localhost:{self.port}", federation="heart"),
            model=BoxModelSettings(directory=Path("model")),
            data=DataSettings(train=Path("train.jsonl")),
        )
        (directory / "client.toml").write_text(settings_toml(settings))
        return open_box(directory)

    def start(self, box: Box, app: ClientApp | None = None) -> Running:
        running = Running(box, app or echo_app())
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
        expiry = renew_key(box, box.load_identity(_never_asked))

        assert box.key.read_bytes() != old
        assert expiry_of(box.directory) == expiry
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


# A clinic's identity


def rotate(box: Box) -> PublicIdentity:
    renewed = rotate_keys(box, box.protection(_never_asked), identity=True)
    assert renewed.identity is not None
    return renewed.identity


def enrolled_identities(town: Town) -> list[PublicIdentity | None]:
    return [each.identity for each in town.site.enrolments().clinics()]


def test_a_renewed_identity_is_the_one_on_both_sides_and_the_log_goes_on(town: Town):
    with town.link():
        box = town.box("anna")
        log = AuditLog(box.audit, signer=box.load_identity(_never_asked))
        log.append("connection", {"event": "connected"})
        log.checkpoint()
        old, key = box.load_identity(_never_asked), box.key.read_bytes()

        new = rotate(box)

    assert box.load_identity(_never_asked).public == new != old.public
    assert box.identity_path.stat().st_mode & 0o777 == 0o600
    assert box.key.read_bytes() != key
    assert enrolled_identities(town) == [new]
    assert not identity_in_progress(box.identity_path).exists()
    assert verify(box.audit, identity=new).problems == ()
    # What the old identity signs from now on proves nothing.
    AuditLog(box.audit, signer=old).append("connection", {"event": "connected"})
    AuditLog(box.audit, signer=old).checkpoint()
    assert "not signed by the keeper" in verify(box.audit, identity=new).problems[0]


def test_an_encrypted_identity_is_renewed_under_the_same_passphrase(town: Town):
    secret = Protection.passphrase("four random words")
    with town.link() as link:
        box = town.box("anna", secret)
        live = LiveClinic(box, secret)
        new = rotate_keys(box, secret, identity=True).identity
        assert load_identity(box.identity_path, secret).public == new
        with pytest.raises(KeyLocked):
            load_identity(box.identity_path, Protection.none())
        # The running client still knows the passphrase, and asks nobody.
        assert opened(town, link, live) == ["anna"]
        assert live.present.membership.identity.public == new


def test_the_command_says_what_was_renewed_and_until_when(
    town: Town, capsys: pytest.CaptureFixture[str]
):
    with town.link():
        box = town.box("anna")
        client.app(["rotate", str(box.directory), "--identity"], standalone_mode=False)
    expiry, new = expiry_of(box.directory), box.load_identity(_never_asked).public
    assert expiry is not None and expiry.identity is not None
    assert expiry.key < expiry.identity
    told = capsys.readouterr().err
    assert f"is good until {expiry.key:%Y-%m-%d}\n" in told
    assert f"fingerprint is now {new.fingerprint}, tell" in told


class Killed(BaseException):
    pass


STEPS = (
    "save_identity",
    "pass_on",
    "_post",
    "keep_expiry",
    "note_handover",
    "sync_directory",
)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_renewal_that_is_killed_at_any_step_is_completed_by_the_next(
    town: Town, monkeypatch: pytest.MonkeyPatch, step: str, when: str
):
    with town.link() as link:
        box = town.box("anna")
        runs = LiveClinic(box, Protection.none())
        old = box.load_identity(_never_asked)
        real = getattr(renewal, step)

        def killed(*given: Any, **named: Any) -> None:
            if when == "after":
                real(*given, **named)
            raise Killed

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(renewal, step, killed)
            renewal.renew_identity(box, old, Protection.none())

        # A client that runs and one that starts now take part, whatever the server knows.
        starts = LiveClinic(box, Protection.none())
        assert opened(town, link, runs) == opened(town, link, starts) == ["anna"]

        new = rotate(box)
        assert enrolled_identities(town) == [new] != [old.public]
        assert verify(box.audit, identity=new).problems == ()
        assert opened(town, link, runs) == opened(town, link, starts) == ["anna"]
        assert not list(box.directory.glob("*.next.*"))


def opened(town: Town, link: SuperLink, live: LiveClinic) -> list[str]:
    """Seal a question to each clinic as the server knows it, and return whose answers open."""
    names, identities = link.names(), link.identities()
    clinic = live.present
    asked, mailbox = [], Mailbox()
    for node, name in names.items():
        context = Context(
            federation="heart",
            run=1,
            round=1,
            attempt=1,
            sender=SERVER,
            receiver=clinic_role(name),
            purpose="train",
            schema="0" * 64,
        )
        server = town.site.identity
        sealed = seal(Payload().to_bytes(), context, sender=server, receiver=identities[node])
        message = Message(carry(sealed), node, "train")
        message.metadata.__dict__["_run_id"] = 1
        request = mailbox.open(clinic, message)
        reply, _ = carried(mailbox.answer(request, Payload()).content, source="")
        open_sealed(
            reply, context.answer(), sender=identities[node], receiver=server, max_bytes=1 << 20
        )
        asked.append(name)
    return asked


def test_checkpoints_of_before_are_read_by_the_renewed_identity(town: Town):
    with town.link():
        box = town.box("anna")
        folder = box.directory / "checkpoints"
        for number in range(3):
            Vault(folder, box.load_identity(_never_asked)).write(f"{number}", b"%d" % number)
            rotate(box)
        vault = Vault(folder, box.load_identity(_never_asked))
        assert [vault.read(name) for name in vault.names()] == [b"0", b"1", b"2"]
    thief = Vault(folder, Identity.generate())
    with pytest.raises(StorageError, match="another identity"):
        thief.read("0")


def test_the_identity_of_another_clinic_renews_none(town: Town):
    with town.link():
        anna, bert = town.box("anna"), town.box("bert")
        before = enrolled_identities(town)
        shutil.copy(bert.identity_path, anna.identity_path)
        with pytest.raises(EnrolmentError, match="does not know this box's keys"):
            rotate(anna)
    assert enrolled_identities(town) == before


def test_the_running_client_takes_up_the_renewed_identity_without_a_restart(town: Town):
    with town.link() as link:
        box = town.box("anna")
        live, told = LiveClinic(box, Protection.none()), list[PublicIdentity]()
        live.when_renewed(lambda clinic: told.append(clinic.membership.identity.public))
        old = live.present.membership.identity
        new = rotate(box)
        membership = live.present.membership
        assert (membership.identity.public, membership.others) == (new, (old,))
        assert told == [new]
        assert opened(town, link, live) == ["anna"]


def test_what_was_sealed_for_the_old_identity_is_asked_again_under_the_new(town: Town):
    with town.link() as link:
        box = town.box("anna")
        app, asked, accepted = ClientApp(), list[str](), list[str]()

        @app.train()
        def train(message: Message, _context: object) -> Message:
            asked.append(message.metadata.message_id)
            if len(asked) == 1:
                rotate(box)
            # As a client that was started anew since: it has the new identity alone.
            clinic, mailbox = LiveClinic(box, Protection.none()).present, Mailbox()
            try:
                request = mailbox.open(clinic, message)
            except FedpeftError as error:
                return Message(Error(2, error.reason), reply_to=message)
            return mailbox.answer(request, Payload({"answer": 1}))

        running = town.start(box, app)
        channel = Channel(link, town.site.identity, federation="heart", schema="0" * 64, values=1)
        (node,) = link.names()
        failed = channel.ask(
            "train",
            1,
            1,
            {node: Letter(Payload())},
            timeout_s=60,
            accept=lambda name, _payload: accepted.append(name),
        )
        assert (failed, accepted, len(asked)) == ({}, ["anna"], 2)
        assert channel.key_asked("anna") == channel.signing_keys()["anna"]
        assert running.error is None


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
    soon, late = now + datetime.timedelta(days=29), now + datetime.timedelta(days=31)
    for key, identity, remedy in ((soon, late, "rotate"), (late, soon, "rotate --identity")):
        keep_expiry(box.directory, Expiry(key=key, identity=identity))
        (warning,) = expiry_warnings(box.directory, box.ca)
        assert warning.endswith(f"fedpeft-client {remedy}")
        assert keys_expire(box.directory) == soon.replace(microsecond=0)
    (clinic,) = enrolments.clinics()
    assert clinic.identity is not None
    shown = (clinic.public_key.replace("\n", "\r\n"), clinic.identity.to_text())
    enrolments.renew("anna", shown, (now - datetime.timedelta(days=701)).timestamp())
    monkeypatch.setattr("fedpeft_server.site.pki.SERVER_VALIDITY_DAYS", 29)
    renew_server_certificate(town.root / "site" / "keys", f"localhost:{town.port}")
    certificate, keys = expiry.expiry_warnings(town.site.authority, enrolments)
    assert "fedpeft-server rotate" in certificate
    assert "anna" in keys
