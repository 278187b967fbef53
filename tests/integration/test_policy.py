"""A hostile server against one box: real wire, its messages signed by the real server identity."""

import dataclasses
import datetime
import json
import pickle
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict

import fedpeft_server.link.superlink
from fedpeft.config import AdapterSettings, KeySettings, PrivacySettings, TrainingSettings
from fedpeft.models import adapter_schema, fingerprint, initial_state
from fedpeft.privacy.ledger import Ledger
from fedpeft.protocol import ADAPTER, CONTENT_KEY, JOB, Job, Payload, SumTerms, carry, raw
from fedpeft.protocol.parcel import Held, whole
from fedpeft.sealing import SERVER, Identity, clinic_role, seal, seal_broadcast
from fedpeft.sealing import Context as Sealing
from fedpeft.sealing.keyfile import Protection
from fedpeft_client.box import Box, open_box
from fedpeft_client.keys.enrolment import join
from fedpeft_client.limits.traffic import TrafficMeter
from fedpeft_client.link.connection import ConnectionSettings, Event, serve
from fedpeft_client.rounds.app import ClinicDesk, build_client_app
from fedpeft_client.rounds.clinic import Clinic
from fedpeft_client.rounds.work import ClinicWork
from fedpeft_client.settings import (
    BoxModelSettings,
    ClientSettings,
    ConfidentialitySettings,
    DataSettings,
    LimitSettings,
    PolicySettings,
    ServerSettings,
    settings_toml,
)
from fedpeft_server.link.superlink import SuperLink, SuperLinkSettings
from fedpeft_server.site.directory import Site, create_site

LORA: Final = AdapterSettings(rank=2, alpha=4.0)
SEALED: Final = SumTerms(confidentiality="sealed", adversary="active", bits=16, limit=1.0)
SUMMED: Final = SEALED.model_copy(update={"confidentiality": "secagg"})
RUNS_CODE: Final = frozenset(
    {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class"}
)


class Watch:
    """What this process opens and starts while somebody looks; a hook cannot be taken away."""

    def __init__(self) -> None:
        self.on = False
        self.opened: list[str] = []
        self.ran: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in ("open", "sqlite3.connect"):
            self.opened.append(str(arguments[0]))
        elif event in RUNS_CODE:
            self.ran.append(event)

    def start(self) -> None:
        self.opened.clear()
        self.ran.clear()
        self.on = True


WATCH = Watch()


class Attack:
    """A box that is connected to a server which may send anything in the real server's name."""

    def __init__(self, root: Path, model: Path) -> None:
        self.records = root / "records.jsonl"
        rows = [{"question": f"What is {n}?", "answer": f"It is {n * n}."} for n in range(8)]
        self.records.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.secret = root / "secret.txt"
        self.secret.write_text("nobody's business")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        keys = KeySettings()
        self.site: Site = create_site(
            root / "site", address=f"localhost:{port}", name="sea", base=str(model), keys=keys
        )
        self._port = port
        self.box = self._join(root, model)
        self.honest = self.box.clinic(self.box.load_identity(_never_asked))
        self.clinic: Clinic = self.honest
        self.meter: TrafficMeter | None = None
        self.events: list[Event] = []
        # An order of a round gone by would be refused for that.
        self.round = 0
        self.stop = threading.Event()

    def _join(self, root: Path, model: Path) -> Box:
        invitation = self.site.enrolments().create_invitation(
            "north", 3600.0, fingerprint=fingerprint(model)
        )
        invitation.write(root / "north.json")
        # The server has to run for this; it is another one than the one that attacks.
        with self.link():
            join(root / "north.json", root / "box", Protection.none())
        settings = ClientSettings(
            clinic="north",
            server=ServerSettings(address=f"localhost:{self._port}", federation="sea"),
            model=BoxModelSettings(directory=model, fingerprint=fingerprint(model)),
            data=DataSettings(train=self.records),
            limits=LimitSettings(max_rank=4, max_steps=5, min_free_disk_mb=0),
        )
        (root / "box" / "client.toml").write_text(settings_toml(settings))
        return open_box(root / "box")

    def link(self) -> SuperLink:
        settings = SuperLinkSettings(
            directory=self.site.state, host="127.0.0.1", port=self._port, poll_s=0.05
        )
        self.site.state.mkdir(mode=0o700, exist_ok=True)
        return SuperLink(settings, self.site.authority, self.site.enrolments())

    def serve(self) -> None:
        desk = ClinicDesk(
            lambda _context: self.clinic,
            ClinicWork(),
            seen=self.box.status.saw,
            refused=lambda error: self.box.refusals.note(error.reason, str(error)),
        )
        settings = ConnectionSettings(
            server=self.box.settings.server.address,
            key=self.box.key,
            ca=self.box.ca,
            max_payload_bytes=8 << 20,
            traffic=self.meter,
            poll_s=0.05,
            idle_poll_s=0.05,
        )
        serve(build_client_app(desk), settings, stop=self.stop, on_event=self.hear)

    def hear(self, event: Event) -> None:
        self.events.append(event)
        if event.rule:
            self.box.refusals.note(event.rule, event.detail)

    @property
    def base(self) -> Path:
        return self.honest.model

    def job(self, **changes: Any) -> dict[str, Any]:
        self.round += 1
        job = Job(
            run="0" * 32,
            federation="sea",
            fingerprint=fingerprint(self.base),
            quantization="none",
            adapter=LORA,
            training=TrainingSettings(local_steps=1, max_length=32, learning_rate=1e-3),
            aggregation=SUMMED,
            round=self.round,
            rounds=1000,
        )
        return {**job.model_dump(mode="json"), **changes}


class Enemy:
    """The server's side of one connection."""

    def __init__(self, attack: Attack, link: SuperLink) -> None:
        self._attack, self._link = attack, link
        self._node = next(iter(link.names()))
        deadline = time.monotonic() + 30
        while not link.connected():
            assert time.monotonic() < deadline, attack.events
            time.sleep(0.02)

    def send(self, content: RecordDict, kind: str) -> Message:
        grid = self._link.grid
        (reply,) = grid.send_and_receive([Message(content, self._node, kind)], timeout=60)
        return reply

    def order(
        self,
        job: dict[str, Any],
        kind: str = "train.keys",
        *,
        parcel: bytes | None = None,
        signer: Identity | None = None,
        adapter: AdapterSettings = LORA,
    ) -> Message:
        """Send a job as the real server does: sealed to the clinic, in its own name."""
        schema = adapter_schema(self._attack.base, adapter)
        # What the box holds already it would not open.
        held = Held(initial_state(schema, 0 if parcel is None else 7))
        broadcast, key = seal_broadcast(parcel or whole(held))
        fields = {JOB: json.dumps(job), ADAPTER: held.digest, CONTENT_KEY: key.to_bytes().hex()}
        about = Sealing(
            federation="sea",
            run=self._link.run_id,
            round=self._attack.round,
            attempt=1,
            sender=SERVER,
            receiver=clinic_role("north"),
            purpose=kind,
            schema=schema.hash,
        )
        sealed = seal(
            Payload({**fields}).to_bytes(),
            about,
            sender=signer or self._attack.site.identity,
            receiver=self._attack.honest.membership.identity.public,
        )
        return self.send(carry(sealed, raw(broadcast)), kind)


def _never_asked() -> str:
    raise AssertionError


def reason_of(reply: Message) -> str:
    assert reply.has_error(), "the box did what it was told"
    assert not reply.has_content()
    return str(reply.error.reason)


@pytest.fixture(scope="module")
def attack(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Attack:
    return Attack(tmp_path_factory.mktemp("attack"), tiny_model)


@pytest.fixture(scope="module")
def running(attack: Attack) -> Iterator[Enemy]:
    with attack.link() as link:
        thread = threading.Thread(target=attack.serve)
        thread.start()
        try:
            yield Enemy(attack, link)
        finally:
            attack.stop.set()
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture
def enemy(running: Enemy, attack: Attack) -> Iterator[Enemy]:
    """The enemy, with everything that the box touches during a test on record."""
    attack.clinic = attack.honest
    kept = (attack.box.directory / "client.toml").read_bytes()
    WATCH.start()
    yield running
    WATCH.on = False
    attack.clinic = attack.honest
    assert (attack.box.directory / "client.toml").read_bytes() == kept
    assert str(attack.secret) not in WATCH.opened
    assert WATCH.ran == []


def nothing_was_touched(attack: Attack) -> bool:
    """Say whether neither the records nor the privacy ledger were opened."""
    mine = {str(attack.records), str(attack.honest.ledger)}
    return not mine & set(WATCH.opened)


def steps_charged(clinic: Clinic) -> int:
    if not clinic.ledger.exists():
        return 0
    with Ledger(clinic.ledger) as ledger:
        return sum(sum(ledger.charges(one.id).values()) for one in ledger.datasets())


# What a rule forbids


def limits(**changes: Any) -> Callable[[Clinic], Clinic]:
    return lambda clinic: dataclasses.replace(
        clinic, limits=clinic.limits.model_copy(update=changes)
    )


def rules(**changes: Any) -> Callable[[Clinic], Clinic]:
    return lambda clinic: dataclasses.replace(
        clinic, policy=clinic.policy.model_copy(update=changes)
    )


def closed_hours(clinic: Clinic) -> Clinic:
    now = datetime.datetime.now().astimezone()
    begin, end = (now + datetime.timedelta(hours=ahead) for ahead in (2, 3))
    hours = (f"{begin:%H:%M}-{end:%H:%M}",)
    return dataclasses.replace(clinic, policy=PolicySettings(hours=hours))


def bounded(clinic: Clinic) -> Clinic:
    privacy = clinic.privacy.model_copy(update={"max_epsilon": 1.0})
    return dataclasses.replace(clinic, privacy=privacy)


def unchanged(clinic: Clinic) -> Clinic:
    return clinic


ADAPTER_5: Final = AdapterSettings(rank=5, alpha=4.0)
TRAINING: Final = TrainingSettings(local_steps=1, max_length=32).model_dump(mode="json")
ORDERS: Final[dict[str, tuple[Callable[[Clinic], Clinic], dict[str, Any], str]]] = {
    "an unlisted signer": (rules(signers=("0000-" * 7 + "0000",)), {}, "signer-not-allowed"),
    "to open the update": (
        unchanged,
        {"aggregation": SEALED.model_dump(mode="json")},
        "secagg-required",
    ),
    "another base model": (unchanged, {"fingerprint": "f" * 64}, "base-not-allowed"),
    "a forbidden method": (
        rules(methods=("lora",)),
        {"trains": "AB", "sends": "A"},
        "method-not-allowed",
    ),
    "at a forbidden hour": (closed_hours, {}, "outside-hours"),
    "more memory": (limits(max_memory_mb=1), {}, "memory-limit"),
    "on a full disk": (limits(min_free_disk_mb=1 << 40), {}, "disk-limit"),
}
DEEPER: Final[dict[str, tuple[Callable[[Clinic], Clinic], dict[str, Any], str]]] = {
    "a higher rank": (unchanged, {"adapter": ADAPTER_5.model_dump(mode="json")}, "rank-limit"),
    "more steps": (unchanged, {"training": {**TRAINING, "local_steps": 6}}, "steps-limit"),
    "more privacy": (bounded, {}, "budget"),
    "exact losses beside noise": (
        unchanged,
        {
            "privacy": PrivacySettings(
                unit="record", noise_multiplier=1.0, exact_losses=True
            ).model_dump(mode="json")
        },
        "losses-not-allowed",
    ),
}


@pytest.mark.parametrize("name", ORDERS)
def test_an_order_against_a_rule_is_refused_before_anything_is_touched(
    name: str, enemy: Enemy, attack: Attack
):
    change, job, rule = ORDERS[name]
    attack.clinic = change(attack.honest)
    assert reason_of(enemy.order(attack.job(**job))) == rule
    assert nothing_was_touched(attack)
    kept = attack.box.refusals.read()
    assert kept is not None
    assert kept.rule == rule
    assert "client.toml" in kept.sentence


@pytest.mark.parametrize("name", DEEPER)
def test_an_order_against_a_limit_on_work_is_refused_and_costs_nothing(
    name: str, enemy: Enemy, attack: Attack
):
    change, job, rule = DEEPER[name]
    attack.clinic = change(attack.honest)
    adapter = AdapterSettings.model_validate(job.get("adapter", LORA.model_dump()))
    assert reason_of(enemy.order(attack.job(**job), adapter=adapter)) == rule
    assert steps_charged(attack.honest) == 0
    kept = attack.box.refusals.read()
    assert kept is not None
    assert kept.rule == rule


# What no order can say


def passwd(attack: Attack) -> str:
    return str(attack.secret)


SMUGGLED: Final[dict[str, Callable[[Attack], dict[str, Any]]]] = {
    "a file to train on": lambda a: {"data": {"train": passwd(a)}},
    "a file to measure with": lambda a: {"data": {"valid": passwd(a)}},
    "a path as records": lambda a: {"train": passwd(a)},
    "a base model's path": lambda a: {"model": {"directory": passwd(a)}},
    "rows by number": lambda _: {"rows": [1, 2, 3]},
    "a query": lambda _: {"where": "patient_id = 7"},
    "higher limits": lambda _: {"limits": {"max_rank": 10_000, "max_steps": 10_000_000}},
    "other rules": lambda _: {"policy": {"hours": ["00:00-24:00"], "methods": ["lora"]}},
    "a weaker demand": lambda _: {"require_secagg": False},
    "a larger budget": lambda _: {"max_epsilon": 1e9},
    "code": lambda _: {"code": "import os; os.system('true')"},
    "a run that is a path": lambda _: {"run": "../../../../tmp/evil"},
    "a federation that is a path": lambda _: {"federation": "../sea"},
    "a fingerprint that is a path": lambda _: {"fingerprint": "../" * 22},
    "a round that is code": lambda _: {"round": "__import__('os')"},
    "an infinite rate": lambda _: {"training": {**TRAINING, "learning_rate": 1e999}},
}
ANSWERS: Final = {"bad-config", "refused-by-clinic"}


@pytest.mark.parametrize("name", SMUGGLED)
@pytest.mark.parametrize("kind", ["train.keys", "evaluate.keys"])
def test_a_job_has_no_place_for_files_code_data_or_limits(
    name: str, kind: str, enemy: Enemy, attack: Attack
):
    before = attack.clinic
    assert reason_of(enemy.order(attack.job(**SMUGGLED[name](attack)), kind)) in ANSWERS
    assert nothing_was_touched(attack)
    assert attack.clinic == before


@pytest.mark.parametrize(
    "modules", [["../../secret.txt"], ["/etc/passwd"], ["__class__"], ["os.system('true')"]]
)
def test_module_names_are_names_and_nothing_else(modules: list[str], enemy: Enemy, attack: Attack):
    adapter = {**LORA.model_dump(mode="json"), "target_modules": modules}
    assert reason_of(enemy.order(attack.job(adapter=adapter))) == "bad-adapter"
    assert nothing_was_touched(attack)


class _Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return eval, ("__import__('pathlib').Path('exploded').touch()",)


def test_a_pickle_is_bytes_and_is_never_opened(enemy: Enemy, attack: Attack):
    data = pickle.dumps(_Bomb())
    array = Array(dtype="float32", shape=(1,), stype="numpy.ndarray", data=data)
    for name in ("sealed", "weights"):
        content = RecordDict({name: ArrayRecord({"message": array})})
        assert reason_of(enemy.send(content, "train")) == "bad-seal"
    assert reason_of(enemy.order(attack.job(), parcel=data)) in ("bad-seal", "bad-adapter")
    assert not Path("exploded").exists()
    assert nothing_was_touched(attack)


@pytest.mark.parametrize("kind", ["query", "query.read", "train.exec", "evaluate.shell", "system"])
def test_there_is_no_message_for_anything_else(kind: str, enemy: Enemy, attack: Attack):
    assert reason_of(enemy.order(attack.job(), kind)) == "refused-by-clinic"
    assert nothing_was_touched(attack)


def test_another_signature_is_no_order(enemy: Enemy, attack: Attack):
    stranger = Identity.generate()
    assert reason_of(enemy.order(attack.job(), signer=stranger)) == "wrong-signature"
    assert nothing_was_touched(attack)


def test_a_larger_message_than_allowed_is_not_taken_in(enemy: Enemy, attack: Attack):
    array = Array(dtype="bytes", shape=(9 << 20,), stype="x", data=bytes(9 << 20))
    content = RecordDict({"sealed": ArrayRecord({"message": array})})
    assert reason_of(enemy.send(content, "train")) == "size-limit"
    kept = attack.box.refusals.read()
    assert kept is not None
    assert kept.rule == "size-limit"


def test_the_watch_can_fail_and_an_order_within_the_rules_is_done(enemy: Enemy, attack: Attack):
    lenient = ConfidentialitySettings(require_secagg=False)
    attack.clinic = dataclasses.replace(attack.honest, aggregation=lenient)
    job = attack.job(aggregation=SEALED.model_dump(mode="json"))
    before = steps_charged(attack.honest)
    attack.records.write_text(attack.records.read_text() + "\n")
    assert not enemy.order(job, "train").has_error()
    assert not nothing_was_touched(attack)
    assert steps_charged(attack.honest) == before + 1
    attack.secret.read_text()
    assert WATCH.opened.pop() == str(attack.secret)


# Rules of the link itself


def served(attack: Attack, meter: TrafficMeter | None = None) -> threading.Thread:
    attack.meter, attack.stop = meter, threading.Event()
    attack.events.clear()
    attack.clinic = attack.honest
    thread = threading.Thread(target=attack.serve)
    thread.start()
    return thread


@pytest.fixture
def fresh(tmp_path: Path, tiny_model: Path) -> Attack:
    return Attack(tmp_path, tiny_model)


def test_a_run_of_other_code_is_refused(fresh: Attack, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fedpeft_server.link.superlink, "FAB_ID", "evil/shell")
    with fresh.link() as link:
        thread = served(fresh)
        try:
            WATCH.start()
            assert reason_of(Enemy(fresh, link).order(fresh.job())) == "refused-by-clinic"
            WATCH.on = False
            assert WATCH.ran == []
            assert nothing_was_touched(fresh)
        finally:
            fresh.stop.set()
            thread.join(30)


def test_bytes_beyond_the_day_are_refused_also_after_a_restart(fresh: Attack, tmp_path: Path):
    path, limit = tmp_path / "traffic.json", 3 << 20
    big = RecordDict(
        {
            "sealed": ArrayRecord(
                {"message": Array(dtype="bytes", shape=(1,), stype="x", data=bytes(2 << 20))}
            )
        }
    )
    answers: list[str] = []
    with fresh.link() as link:
        for _ in range(2):
            meter = TrafficMeter(path, limit)
            thread = served(fresh, meter)
            try:
                answers.append(reason_of(Enemy(fresh, link).send(big, "train")))
            finally:
                fresh.stop.set()
                thread.join(30)
    # The first is 2 MiB of which as many again would be needed for an answer.
    assert answers == ["traffic-limit", "traffic-limit"]
    left = TrafficMeter(path, limit).left()
    assert left is not None
    assert left < 1 << 20
    kept = fresh.box.refusals.read()
    assert kept is not None
    assert "limits.max_mb_per_day = 3" in kept.sentence
