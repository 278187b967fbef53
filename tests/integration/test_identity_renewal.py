"""Clinics that renew their identities in the midst of a run: real server, sockets and training."""

import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message

from fedpeft.audit_log import verify
from fedpeft.config import KeySettings
from fedpeft.errors import FedpeftError
from fedpeft.models import resolve_base
from fedpeft.protocol.lineage_check import check_directory
from fedpeft.sealing import PublicIdentity
from fedpeft.sealing.keyfile import Protection
from fedpeft_client.box import Box, open_box
from fedpeft_client.keys.enrolment import join
from fedpeft_client.keys.peers import key_fingerprint
from fedpeft_client.keys.renewal import rotate_keys
from fedpeft_client.link.connection import ConnectionSettings, Event, serve
from fedpeft_client.rounds.app import ClinicDesk, build_client_app
from fedpeft_client.rounds.live_clinic import LiveClinic
from fedpeft_client.rounds.work import ClinicWork
from fedpeft_client.settings import (
    BoxModelSettings,
    ClientSettings,
    DataSettings,
    LimitSettings,
    ServerSettings,
    settings_toml,
)
from fedpeft_client.trail import BoxTrail
from fedpeft_server.link.superlink import SuperLink, SuperLinkSettings
from fedpeft_server.service import serve_federation
from fedpeft_server.site.directory import Site, create_site, open_site

NAMES = ("anna", "bert", "carl")
ROUNDS = 2
# transformers does not load two models in one process at once; real clinics have one each.
_LOADING = threading.Lock()
_RUN = f"""name = "heart"
[model]
base = "embedded"
[adapter]
rank = 2
alpha = 4.0
[training]
local_steps = 1
batch_size = 2
max_length = 48
[rounds]
count = {ROUNDS}
minimum_clinics = 3
wait_s = 120
gather_s = 120
retries = 0
"""


def make_site(root: Path) -> Site:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    create_site(
        root / "site",
        address=f"localhost:{port}",
        name="heart",
        base="embedded",
        keys=KeySettings(),
    )
    (root / "site" / "federation.toml").write_text(_RUN)
    return open_site(root / "site")


def make_boxes(root: Path, site: Site) -> dict[str, Box]:
    """Let three clinics join, and return their boxes."""
    settings = SuperLinkSettings(directory=site.state, host="127.0.0.1", port=site.host_and_port[1])
    enrolments = site.enrolments()
    with SuperLink(settings, site.authority, enrolments):
        for name in NAMES:
            file = root / f"{name}.json"
            enrolments.create_invitation(name, 3600, fingerprint=site.fingerprint()).write(file)
            join(file, root / name, Protection.none())
    for at, name in enumerate(NAMES):
        rows = [{"question": f"{name} {row}?", "answer": f"{row + at}."} for row in range(4)]
        records = root / name / "train.jsonl"
        records.write_text("".join(json.dumps(row) + "\n" for row in rows))
        content = ClientSettings(
            clinic=name,
            server=ServerSettings(address=site.listen.address, federation="heart"),
            model=BoxModelSettings(directory=resolve_base("embedded", relative_to=Path())),
            data=DataSettings(train=Path("train.jsonl"), valid=Path("train.jsonl")),
            limits=LimitSettings(min_free_disk_mb=0),
        )
        (root / name / "client.toml").write_text(settings_toml(content))
    return {name: open_box(root / name) for name in NAMES}


class Client:
    """A box's client in a thread, as ``fedpeft-client start`` puts it together."""

    def __init__(self, box: Box, heard: Callable[[Event], None]) -> None:
        self.told: list[str] = []
        self.error: FedpeftError | None = None
        self.stop = threading.Event()
        self._heard = heard
        self.live = LiveClinic(box, Protection.none())
        self._trail = BoxTrail.open(box.audit, self.live.present, self.told.append)
        self.live.when_renewed(self._trail.kept_by)
        desk = ClinicDesk(
            lambda _context: self.live.present,
            ClinicWork(),
            tell=self.told.append,
            trail=self._trail,
        )
        app = build_client_app(desk)

        def one_at_a_time(message: Message, context: Context) -> Message:
            with _LOADING:
                return app(message, context)

        self._app = one_at_a_time
        self._settings = ConnectionSettings(
            server=box.settings.server.address, key=box.key, ca=box.ca, idle_poll_s=0.1
        )
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        try:
            with self._trail.session():
                serve(
                    self._app,
                    self._settings,
                    stop=self.stop,
                    on_event=self._hear,
                    trail=self._trail,
                )
        except FedpeftError as error:
            self.error = error

    def _hear(self, event: Event) -> None:
        self._heard(event)
        self.live.heard(event)

    def end(self) -> None:
        self.stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive()


class Once:
    """Renews a box's identity the first time that it is called."""

    def __init__(self, box: Box) -> None:
        self._box = box
        self.before = box.load_identity(str).public
        self.after: PublicIdentity | None = None

    def __call__(self) -> None:
        if self.after is None:
            self.after = rotate_keys(self._box, Protection.none(), identity=True).identity


def run(site: Site, boxes: dict[str, Box], said: Callable[[str], None], heard: dict[str, Once]):
    """Run the federation; a box of ``heard`` is renewed when it has received a job to train."""

    def listener(name: str) -> Callable[[Event], None]:
        def hear(event: Event) -> None:
            if event.kind == "received" and event.message_type == "train.keys" and name in heard:
                heard[name]()

        return hear

    clients = {name: Client(box, listener(name)) for name, box in boxes.items()}
    try:
        serve_federation(site, site.directory / "run", said)
    finally:
        for client in clients.values():
            client.end()
    return clients


def test_a_run_goes_on_while_clinics_renew_their_identities_and_all_are_told(tmp_path: Path):
    site = make_site(tmp_path)
    boxes = make_boxes(tmp_path, site)
    anna, bert = Once(boxes["anna"]), Once(boxes["bert"])
    rounds: list[str] = []

    def said(line: str) -> None:
        if line.startswith("round "):
            rounds.append(line)
        # Anna has begun a secure sum of round 1 with the old identity, and goes on with it.
        if line == "clinic anna answered" and rounds:
            anna()

    # Bert has been sent the job, and renews the identity before it begins to train.
    clients = run(site, boxes, said, {"bert": bert})

    assert [client.error for client in clients.values()] == [None] * 3
    summary = json.loads((site.directory / "run" / "summary.json").read_text())["rounds"]
    assert [each["round"] for each in summary] == [1, 2]
    assert all(each["failed"] == [] for each in summary)
    assert all(each["participants"] == list(NAMES) for each in summary)
    assert anna.after is not None and bert.after is not None
    known = boxes["carl"].peers.known()
    assert known == {
        "anna": key_fingerprint(anna.after.signing_bytes),
        "bert": key_fingerprint(bert.after.signing_bytes),
    }
    for name, told in ((each, clients[each].told) for each in NAMES):
        renewed = [line for line in told if "renewed the identity" in line]
        assert len(renewed) == len({"anna", "bert"} - {name})
    for name, box in boxes.items():
        own = box.load_identity(str).public
        assert own == {"anna": anna.after, "bert": bert.after}.get(name, own)
        assert verify(box.audit, identity=own).problems == ()
    assert check_directory(site.directory / "run" / "adapter", site.sealing.public)
