"""What the site notes of messages, and that none is handed to the engine which is not noted."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedpeft.audit_log import Choice, Entry, all_lines, entries_in, verify
from fedpeft.errors import EnrolmentError, FederationError, StorageError
from fedpeft.protocol import carry
from fedpeft.sealing import SERVER, Context, Identity, PublicIdentity, clinic_role, seal
from fedpeft_server.link.wire_meter import WireMeter
from fedpeft_server.site.directory import create_site
from fedpeft_server.trail import RecordedLink, Trail

SITE, CLINIC = Identity.generate(), Identity.generate()
NODE, STRANGER = 11, 12
pytestmark = pytest.mark.usefixtures("flower_identity")


def message_to(node: int = NODE) -> Message:
    place = Context(
        federation="heart",
        run=7,
        round=3,
        attempt=1,
        sender=SERVER,
        receiver=clinic_role("northfield"),
        purpose="train.masked",
        schema="0" * 64,
    )
    sealed = seal(b"job", place, sender=SITE, receiver=CLINIC.public)
    return Message(carry(sealed), node, "train.masked")


class Wire(Grid):
    """An engine that answers each message with a reason word, and keeps what it was handed."""

    def __init__(self) -> None:
        self.handed: list[Message] = []
        self.reason = "bad-data"

    def set_run(self, run: Run) -> None: ...

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl=None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return [NODE]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self.handed += messages
        return [str(at) for at in range(len(self.handed))]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [Message(Error(2, self.reason), reply_to=self.handed[int(at)]) for at in message_ids]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        yield from self.pull_messages(self.push_messages(messages))


class Line:
    """A link over the wire; ``node_of`` says whom a reply is from."""

    def __init__(self) -> None:
        self.grid, self.meter, self.run_id, self.replying = Wire(), WireMeter(), 7, NODE

    def names(self) -> dict[int, str]:
        return {NODE: "northfield"}

    def identities(self) -> dict[int, PublicIdentity]:
        return {NODE: CLINIC.public}

    def successions(self) -> dict[str, tuple[bytes, ...]]:
        return {}

    def node_of(self, reply: Message) -> int:
        return self.replying


class Site:
    """A recorded link, and its log."""

    def __init__(self, folder: Path) -> None:
        self.directory, self.line = folder / "audit", Line()
        self.trail = Trail.open(self.directory, SITE)
        self.link = RecordedLink(self.line, self.trail)

    def entries(self) -> list[Entry]:
        return list(entries_in(all_lines(self.directory), Choice()))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_messages_and_answers_are_noted_by_the_clinic_and_the_place(site: Site):
    (reply,) = site.link.grid.send_and_receive([message_to()], timeout=1)
    assert reply.has_error()
    out, back = site.entries()
    assert (out.kind, out.about["with"], out.about["mode"]) == (
        "message-out", "clinic:northfield", "secagg",
    )  # fmt: skip
    assert (back.kind, back.about["with"], back.about["mode"]) == (
        "message-in", "clinic:northfield", "plain",
    )  # fmt: skip
    assert (back.about["reason"], back.about["round"]) == ("bad-data", 3)


def test_a_message_that_cannot_be_noted_is_not_handed_to_the_engine(site: Site):
    shutil.rmtree(site.directory)  # as a disk that fails
    with pytest.raises(StorageError):
        list(site.link.grid.send_and_receive([message_to()], timeout=1))
    with pytest.raises(StorageError):
        site.link.grid.push_messages([message_to()])
    assert site.line.grid.handed == []


def test_an_answer_that_cannot_be_noted_is_not_looked_at(site: Site):
    ids = list(site.link.grid.push_messages([message_to()]))
    shutil.rmtree(site.directory)
    with pytest.raises(StorageError):
        list(site.link.grid.pull_messages(ids))


def test_what_a_clinic_says_cannot_forge_a_line(site: Site):
    site.line.grid.reason = 'the patient\n{"kind":"stop"}' + "x" * 500
    list(site.link.grid.send_and_receive([message_to()], timeout=1))
    reason = str(site.entries()[-1].about["reason"])
    assert len(reason) == 64
    assert " " not in reason
    assert verify(site.directory).problems == ()


def test_an_answer_of_nobody_enrolled_is_passed_on_and_not_noted(site: Site):
    site.line.replying = STRANGER
    assert len(list(site.link.grid.send_and_receive([message_to()], timeout=1))) == 1
    assert [entry.kind for entry in site.entries()] == ["message-out"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (None, "finished"),
        (FederationError("too few"), "federation-failed"),
        (ValueError("x"), "internal-error"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_start_and_stop_are_noted_and_signed(site: Site, error: BaseException | None, reason: str):
    if error is None:
        with site.trail.session("heart", SITE.public):
            pass
    else:
        with pytest.raises(type(error)), site.trail.session("heart", SITE.public):
            raise error
    stop = next(entry for entry in site.entries() if entry.kind == "stop")
    assert stop.about["reason"] == reason
    assert verify(site.directory, identity=SITE.public).signed == 3


def test_invitations_and_what_becomes_of_them_are_noted(tmp_path: Path):
    from fedpeft.config import KeySettings

    made = create_site(
        tmp_path / "site", address="127.0.0.1:8443", name="sea", base="embedded", keys=KeySettings()
    )
    enrolments = made.enrolments()
    invitation = enrolments.create_invitation("northfield", 3600, fingerprint="f" * 64)
    enrolments.revoke("northfield")
    with pytest.raises(EnrolmentError):
        enrolments.redeem(invitation.token, "no key", "no identity", "no proof")
    noted = list(entries_in(all_lines(made.audit), Choice()))
    assert [(entry.about["event"], entry.about["name"]) for entry in noted] == [
        ("invited", "northfield"),
        ("revoked", "northfield"),
    ]
    secret = invitation.token.partition(".")[2].encode()
    assert secret not in b"".join(line.data for line in all_lines(made.audit))


def test_an_identity_that_was_renewed_keeps_the_log_whole(tmp_path: Path):
    from fedpeft.config import KeySettings
    from fedpeft_server.site.directory import open_site

    directory = tmp_path / "site"
    made = create_site(
        directory, address="127.0.0.1:8443", name="sea", base="embedded", keys=KeySettings()
    )
    with Trail.open(made.audit, made.identity).session("sea", made.sealing.public):
        pass
    renewed = made.renew_identity()
    again = open_site(directory)
    assert again.sealing.public == renewed != made.sealing.public
    assert verify(again.audit, identity=renewed).problems == ()
    assert verify(again.audit, identity=made.sealing.public).problems
