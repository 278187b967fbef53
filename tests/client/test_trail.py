"""What a box notes of messages, and that nothing leaves which is not noted."""

import hashlib
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flwr.app import Error, Message
from flwr.clientapp import ClientApp

from fedpeft.audit_log import AuditLog, Choice, Entry, all_lines, entries_in, verify
from fedpeft.errors import BudgetSpent, DataError, KeyLocked, StorageError
from fedpeft.protocol import Payload, carried, carry, raw
from fedpeft.sealing import SERVER, Context, Identity, clinic_role, seal
from fedpeft.sealing.keyfile import Protection
from fedpeft_client.keys.enrolment import join
from fedpeft_client.link.connection import ConnectionSettings, Event, serve
from fedpeft_client.rounds.clinic import Clinic, Membership
from fedpeft_client.settings import DataSettings
from fedpeft_client.trail import BoxTrail, joining, unlocking
from fedpeft_server.enrolments.enrolment import Enrolments
from fedpeft_server.link.superlink import SuperLink, SuperLinkSettings
from fedpeft_server.site.pki import create_authority

OWN, SITE = Identity.generate(), Identity.generate()
CANARY = "mrs-example-takes-tablets"
pytestmark = pytest.mark.usefixtures("flower_identity")


def clinic_in(folder: Path) -> Clinic:
    return Clinic(
        name="northfield",
        federation="heart",
        membership=Membership(OWN, SITE.public),
        model=folder / "model",
        data=DataSettings(train=folder / "rows.jsonl"),
        ledger=folder / "ledger.sqlite",
    )


def place(number: int = 3, purpose: str = "train.masked") -> Context:
    return Context(
        federation="heart",
        run=7,
        round=number,
        attempt=2,
        sender=SERVER,
        receiver=clinic_role("northfield"),
        purpose=purpose,
        schema="0" * 64,
    )


def asked(purpose: str = "train.masked", broadcast: bytes | None = None) -> Message:
    payload = Payload({"secret": CANARY}).to_bytes()
    sealed = seal(payload, place(purpose=purpose), sender=SITE, receiver=OWN.public)
    return Message(carry(sealed, None if broadcast is None else raw(broadcast)), 1, purpose)


def answered(message: Message, purpose: str = "train.masked") -> tuple[Message, bytes]:
    sealed = seal(b"x", place(purpose=purpose).answer(), sender=OWN, receiver=SITE.public)
    return Message(carry(sealed), reply_to=message), sealed


class Noted:
    """A trail in a folder, and what it wrote."""

    def __init__(self, folder: Path) -> None:
        self.directory = folder / "audit"
        self.trail = BoxTrail.open(self.directory, clinic_in(folder), lambda _text: None)

    def entries(self, kind: str | None = None) -> list[Entry]:
        return list(entries_in(all_lines(self.directory), Choice(kind=kind)))

    @property
    def last(self) -> Entry:
        return self.entries()[-1]


@pytest.fixture
def noted(tmp_path: Path) -> Noted:
    return Noted(tmp_path)


def test_a_message_is_noted_by_place_size_and_hash(noted: Noted):
    message = asked(broadcast=b"b" * 1000)
    noted.trail.received(message)
    sealed, _ = carried(message.content, source="it")
    assert noted.last.kind == "message-in"
    assert dict(noted.last.about) == {
        "with": "server",
        "type": "train.masked",
        "run": str(message.metadata.run_id),
        "round": 3,
        "attempt": 2,
        "mode": "secagg",
        "bytes": len(sealed) + 1000,
        "sha256": hashlib.sha256(sealed).hexdigest(),
    }


def test_an_answer_is_noted_by_the_bytes_that_leave(noted: Noted):
    reply, sealed = answered(asked("evaluate"), "evaluate")
    noted.trail.leaving(reply)
    assert noted.last.kind == "message-out"
    about = noted.last.about
    assert (about["mode"], about["bytes"]) == ("sealed", len(sealed))
    assert about["sha256"] == hashlib.sha256(sealed).hexdigest()


def test_a_reason_word_is_noted_with_the_place_of_what_it_answers(noted: Noted):
    message = asked()
    message.metadata.__dict__["_message_id"] = "m-1"
    noted.trail.received(message)
    noted.trail.leaving(Message(Error(2, "bad-data"), reply_to=message))
    about = noted.last.about
    assert (about["mode"], about["reason"], about["round"]) == ("plain", "bad-data", 3)
    assert (about["bytes"], about["sha256"]) == (8, hashlib.sha256(b"bad-data").hexdigest())


def test_of_an_error_only_the_rule_is_noted(noted: Noted):
    message = asked()
    for error in (BudgetSpent(f"the bound of {CANARY}"), DataError(f"line 3 of /data/{CANARY}")):
        noted.trail.refused(message, error)
    assert [entry.about["rule"] for entry in noted.entries("decision")] == ["budget", "bad-data"]
    assert CANARY.encode() not in b"".join(line.data for line in all_lines(noted.directory))


def test_what_the_server_calls_a_message_cannot_forge_a_line(noted: Noted):
    message = asked()
    message.metadata.__dict__["_message_type"] = f'train.x\n{{"kind": "stop"}} {CANARY} é'
    noted.trail.received(message)
    noted.trail.refused(message, DataError("no"))
    assert len(noted.entries()) == 2
    assert "\n" not in str(noted.last.about["type"])
    assert verify(noted.directory).problems == ()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (None, "asked"),
        (DataError("no"), "bad-data"),
        (RuntimeError(CANARY), "internal-error"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_start_and_stop_are_noted_and_signed(
    noted: Noted, error: BaseException | None, reason: str
):
    def body() -> None:
        with noted.trail.session():
            if error is not None:
                raise error

    if error is None:
        body()
    else:
        with pytest.raises(type(error)):
            body()
    kinds = [entry.kind for entry in noted.entries()]
    assert kinds == ["start", "checkpoint", "stop", "checkpoint"]
    assert noted.entries("stop")[0].about["reason"] == reason
    assert noted.entries("start")[0].about["identity"] == OWN.public.fingerprint
    assert verify(noted.directory, identity=OWN.public).signed == 3


def test_an_identity_that_cannot_be_unlocked_is_noted(noted: Noted):
    with pytest.raises(KeyLocked), unlocking(noted.directory):
        raise KeyLocked("the passphrase is wrong")
    assert noted.last.about["event"] == "unlock-failed"


def test_joining_is_noted_before_anything_is_sent(tmp_path: Path):
    box = tmp_path / "box"
    with pytest.raises(DataError), joining(box, "northfield"):
        assert [entry.about["event"] for entry in Noted(box).entries()] == ["joining"]
        raise DataError("the server said no")
    assert len(Noted(box).entries()) == 1
    assert box.stat().st_mode & 0o777 == 0o700
    with joining(box, "northfield"):
        pass
    assert [entry.about["event"] for entry in Noted(box).entries()][1:] == ["joining", "joined"]


# Over a real server


class Network:
    """A server and one client in a thread, with a trail."""

    def __init__(self, folder: Path) -> None:
        (folder / "server").mkdir(mode=0o700)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        address = f"localhost:{self.port}"
        self.authority = create_authority(folder / "pki", address)
        self.enrolments = Enrolments(
            folder / "enrolment.db",
            federation="heart",
            server=address,
            ca_pem=self.authority.ca_pem(),
            identity=SITE.public,
        )
        self.folder, self.error = folder, list[Exception]()
        self.noted = Noted(folder)

    def link(self) -> SuperLink:
        place = SuperLinkSettings(
            directory=self.folder / "server", host="127.0.0.1", port=self.port, poll_s=0.05
        )
        return SuperLink(place, self.authority, self.enrolments)

    def serve(self, app: ClientApp, stop: threading.Event, events: list[Event]) -> None:
        file = self.folder / "invitation.json"
        self.enrolments.create_invitation("northfield", 3600, fingerprint="f" * 64).write(file)
        enrolment = join(file, self.folder / "box", Protection.none())
        settings = ConnectionSettings(
            server=enrolment.server,
            key=enrolment.key,
            ca=enrolment.ca,
            poll_s=0.05,
            idle_poll_s=0.05,
            message_types=frozenset({"train"}),
        )
        try:
            serve(app, settings, stop=stop, on_event=events.append, trail=self.noted.trail)
        except StorageError as error:
            self.error.append(error)

    def ask(self, app: ClientApp, purpose: str = "train") -> tuple[list[Message], list[Event]]:
        """Ask the clinic once, and return what came and what the client said."""
        stop, events = threading.Event(), list[Event]()
        with self.link() as link:
            thread = threading.Thread(target=self.serve, args=(app, stop, events))
            thread.start()
            try:
                while not (nodes := list(link.connected())):
                    time.sleep(0.02)
                message = Message(asked("train").content, nodes[0], purpose)
                replies = list(link.grid.send_and_receive([message], timeout=5))
            finally:
                stop.set()
                thread.join(20)
        return replies, events


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    yield Network(tmp_path)


def app_that(answer: Callable[[Message], Message]) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message, _context):  # pyright: ignore[reportUnusedFunction]
        return answer(message)

    return app


def test_message_and_answer_are_noted_on_their_way(network: Network):
    replies, _ = network.ask(app_that(lambda message: answered(message, "train")[0]))
    (reply,) = replies
    sealed, _ = carried(reply.content, source="it")
    noted = [(e.kind, e.about["sha256"]) for e in network.noted.entries()]
    assert [kind for kind, _ in noted] == ["message-in", "message-out"]
    assert noted[1][1] == hashlib.sha256(sealed).hexdigest()


def test_an_answer_that_cannot_be_noted_does_not_leave(network: Network):
    def answer(message: Message) -> Message:
        shutil.rmtree(network.noted.directory)  # as a disk that fails
        return answered(message, "train")[0]

    replies, events = network.ask(app_that(answer))
    assert [reply.has_content() for reply in replies] in ([], [False])
    assert "answered" not in [event.kind for event in events]
    (error,) = network.error
    assert isinstance(error, StorageError)


def test_a_message_that_cannot_be_noted_is_not_opened(network: Network):
    opened: list[Message] = []

    def answer(message: Message) -> Message:
        opened.append(message)
        return answered(message, "train")[0]

    shutil.rmtree(network.noted.directory)
    network.ask(app_that(answer))
    assert opened == []
    assert len(network.error) == 1


def test_a_message_that_the_connection_refuses_is_noted(network: Network):
    network.ask(app_that(lambda message: message), "query")
    decision, out = network.noted.entries()
    assert (decision.about["verdict"], decision.about["rule"]) == ("refused", "refused-by-clinic")
    assert (out.kind, out.about["reason"]) == ("message-out", "refused-by-clinic")


def test_a_log_that_was_changed_stops_the_box(network: Network):
    log = AuditLog(network.noted.directory)
    log.append("key", {"event": "joined"})
    path = network.noted.directory / "000001.jsonl"
    path.write_bytes(path.read_bytes().replace(b"joined", b"jumped"))
    from fedpeft.errors import AuditLogDamaged

    with pytest.raises(AuditLogDamaged):
        BoxTrail.open(network.noted.directory, clinic_in(network.folder), print)
