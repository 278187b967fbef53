"""Secure aggregation over whole runs: what is summed, who may be lost, and what is refused."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from flwr.app import Context, Message
from safetensors.numpy import load_file

import fedpeft_client.sums.summing
from fedpeft.config import FederationSettings
from fedpeft.demo.clinics import write_federation
from fedpeft.errors import FederationError
from fedpeft.models import adapter_schema, resolve_base
from fedpeft.sealing import Identity
from fedpeft.secagg import ClinicSession, Session
from fedpeft.secagg.messages import Advert
from fedpeft.simulation.clinics import simulated_clinics
from fedpeft.simulation.local import LocalLink
from fedpeft.simulation.plan import embedded_settings
from fedpeft.simulation.run import Simulation, simulate
from fedpeft_client.rounds.app import ClinicDesk, Handler, build_client_app
from fedpeft_client.rounds.clinic import Clinic
from fedpeft_client.rounds.work import ClinicWork
from fedpeft_client.settings import ConfidentialitySettings
from fedpeft_server.link.app import build_server_app
from fedpeft_server.rounds.loop import Federation
from fedpeft_server.runs.directory import RoundRecord, RunDirectory
from fedpeft_strategies import build_strategy

# One step at the full rate, so that updates are far larger than any step of quantisation.
QUICK = (
    "training.local_steps=1",
    "training.schedule=constant",
    "training.warmup_steps=0",
    "rounds.count=1",
    "rounds.retries=1",
    "rounds.wait_s=1",
)
SEALED = "aggregation.confidentiality=sealed"
FLOAT_NOISE = 2e-6
Values = dict[str, "np.ndarray[Any, np.dtype[np.float32]]"]


class Listener:
    """A watcher that remembers what it was told."""

    def __init__(self) -> None:
        self.repeated: list[str] = []
        self.records: list[RoundRecord] = []

    def waiting(self, connected: int, enrolled: int, minimum: int) -> None: ...
    def asked(self, number: int, kind: str, clinics: list[str]) -> None: ...

    def finished(self, records: list[RoundRecord]) -> None: ...

    def warned(self, sentence: str) -> None:
        raise AssertionError(sentence)

    def round_repeated(self, number: int, why: str) -> None:
        self.repeated.append(why)

    def round_finished(self, record: RoundRecord) -> None:
        self.records.append(record)


def small_federation(data: Path, clinics: Sequence[str], *overrides: str) -> FederationSettings:
    """Settings of clinics with some rows each, no two with the same rows or as many."""
    northfield = write_federation(data)[0]
    rows = northfield.train.read_text("utf-8").splitlines(keepends=True)
    valid = northfield.valid.read_text("utf-8").splitlines(keepends=True)
    entries: list[dict[str, str]] = []
    for name in clinics:
        number = int(name.removeprefix("c"))
        first = 60 * number
        (data / f"{name}.jsonl").write_text("".join(rows[first : first + 20 + 4 * number]))
        (data / f"{name}-valid.jsonl").write_text("".join(valid[:8]))
        entry = {"name": name, "train": f"{name}.jsonl", "valid": f"{name}-valid.jsonl"}
        entries.append(entry)
    content = embedded_settings([*QUICK, *overrides]).model_dump(mode="json")
    return FederationSettings.model_validate({**content, "clinic": entries})


def summary_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text("utf-8"))


def adapter(out: Path, number: int) -> Values:
    return load_file(out / "rounds" / str(number) / "adapter" / "adapter_model.safetensors")


def largest(one: Values, other: Values) -> float:
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def rounding(record: RoundRecord, rows: int) -> float:
    """The most by which rounding of each clinic's coordinates can move the mean."""
    found = record.confidentiality
    assert found is not None and found.limit is not None and found.bits is not None
    step = 2 * found.limit / (2**found.bits - 1)
    return found.survivors * step / rows


class Killer(Listener):
    """Kills the process of another clinic before each stage of one training round."""

    def __init__(self, victims: dict[str, str]) -> None:
        super().__init__()
        self._victims = victims
        self.asked_for: dict[str, list[str]] = {}

    def asked(self, number: int, kind: str, clinics: list[str]) -> None:
        if number == 1:
            self.asked_for[kind] = clinics
        if number == 1 and kind in self._victims:
            name = self._victims.pop(kind)
            for process in psutil.Process().children():
                # A killed clinic stays here as a zombie, which has no command line.
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                if process.cmdline()[-1].endswith(f"/{name}"):
                    process.kill()
                    return
            raise AssertionError(f"no process of {name}")


def test_a_clinic_killed_at_each_stage_costs_that_clinic_only(tmp_path: Path) -> None:
    names = [f"c{number}" for number in range(1, 11)]
    data = tmp_path / "data"
    settings = small_federation(
        data,
        names,
        "aggregation.adversary=curious",
        "aggregation.stage_timeout_s=8",
        "rounds.timeout_s=20",
    )
    # Nine have keys, so five must stay: after these four there are just five.
    killer = Killer(
        {
            "train.keys": "c2",
            "train.shares": "c3",
            "train.masked": "c5",
            "train.check": "c7",
            "train.unmask": "c8",
        }
    )
    simulate(Simulation(settings, data, tmp_path / "out", "flower"), killer)
    assert killer.repeated == []
    alive = sorted(set(names) - {"c2", "c3", "c5", "c7", "c8"})
    summed = sorted({*alive, "c7", "c8"})
    assert killer.asked_for["train.check"] == summed
    (done,) = summary_of(tmp_path / "out")["rounds"]
    # The masked vectors of the last two had come, so they are in the sum.
    assert done["participants"] == summed
    reasons = {each["clinic"]: each["reason"] for each in done["failed"]}
    assert {"c2", "c3", "c5"} <= reasons.keys() <= {"c2", "c3", "c5", "c7", "c8"}
    assert set(reasons.values()) <= {"timeout", "offline"}
    found = summary_of(tmp_path / "out")["confidentiality"]
    assert (found["mode"], found["threshold"], found["survivors"]) == ("secagg", 5, 7)
    assert found["bits"] == 16
    assert found["wire_bytes_per_coordinate"] <= 2.6

    exact = small_federation(data, summed, SEALED)
    simulate(Simulation(exact, data, tmp_path / "exact", "local"), Listener())
    after, expected = adapter(tmp_path / "out", 1), adapter(tmp_path / "exact", 1)
    rows = sum(20 + 4 * int(name.removeprefix("c")) for name in summed)
    bound = rounding(killer.records[-1], rows) + FLOAT_NOISE
    assert bound < 1e-4
    assert largest(after, expected) <= bound
    # Had there been no update, or one of other clinics, the difference would be larger.
    assert largest(adapter(tmp_path / "exact", 0), expected) > 20 * bound
    fewer = small_federation(data, alive, SEALED)
    simulate(Simulation(fewer, data, tmp_path / "fewer", "local"), Listener())
    assert largest(after, adapter(tmp_path / "fewer", 1)) > 20 * bound


FOUR = ("c1", "c2", "c3", "c4")
FOUR_ROWS = 24 + 28 + 32 + 36


def run_locally(tmp_path: Path, name: str, *overrides: str) -> Listener:
    listener = Listener()
    settings = small_federation(tmp_path / "data", FOUR, *overrides)
    simulate(Simulation(settings, tmp_path / "data", tmp_path / name, "local"), listener)
    return listener


def test_the_secure_sum_is_the_exact_mean_up_to_rounding(tmp_path: Path) -> None:
    secure = run_locally(tmp_path, "secure")
    run_locally(tmp_path, "sealed", SEALED)
    difference = largest(adapter(tmp_path / "secure", 1), adapter(tmp_path / "sealed", 1))
    bound = rounding(secure.records[-1], FOUR_ROWS) + FLOAT_NOISE
    assert 0 < difference <= bound < 1e-4
    assert largest(adapter(tmp_path / "sealed", 0), adapter(tmp_path / "sealed", 1)) > 20 * bound
    assert largest(adapter(tmp_path / "sealed", 0), adapter(tmp_path / "secure", 0)) == 0
    found = secure.records[-1].confidentiality
    assert found is not None and type(found.clipped) is int
    # What a clinic's validation loss is stays unknown; the mean over all is the same number.
    assert secure.records[-1].per_clinic == {}


def test_coordinates_beyond_the_limit_are_clipped_and_counted(tmp_path: Path) -> None:
    listener = run_locally(tmp_path, "narrow", "aggregation.limit=1e-3")
    found = listener.records[-1].confidentiality
    assert found is not None and found.limit == 1e-3 and found.clipped is not None
    assert found.clipped > 0
    moved = largest(adapter(tmp_path / "narrow", 0), adapter(tmp_path / "narrow", 1))
    assert 0 < moved <= 4 * 1e-3 / FOUR_ROWS + FLOAT_NOISE


class FailingDesk(ClinicDesk):
    """The real handlers; some clinics crash at a stage of the first attempt, or lose its answer."""

    crashing: tuple[str, ...] = ()
    stage = ""
    after_the_answer = False

    def summed(self, kind: str, stage: str) -> Handler:
        handler, left = super().summed(kind, stage), set(self.crashing)

        def handle(message: Message, context: Context) -> Message:
            name = self._find_clinic(context).name
            crash = f"{kind}.{stage}" == self.stage and name in left
            reply = handler(message, context) if self.after_the_answer or not crash else None
            if crash or reply is None:
                left.discard(name)
                raise RuntimeError("patient Canary-4711 has a secret")
            return reply

        return handle


def run_desk(
    tmp_path: Path,
    overrides: Sequence[str],
    desk: type[ClinicDesk],
    change: dict[str, ConfidentialitySettings] | None = None,
) -> Listener:
    """Run four clinics on ``desk``; of those in ``change`` the demands are others."""
    data, listener = tmp_path / "data", Listener()
    settings = small_federation(data, FOUR, *overrides)
    model = resolve_base(settings.model.base, relative_to=data)
    server = Identity.generate()
    clinics: list[Clinic] = [
        dataclasses.replace(clinic, aggregation=(change or {}).get(clinic.name, clinic.aggregation))
        for clinic in simulated_clinics(
            settings,
            model,
            server.public,
            relative_to=data,
            ledgers=tmp_path / "ledgers",
            personal=tmp_path / "personal",
        )
    ]
    schema = adapter_schema(model, settings.adapter)
    directory = RunDirectory(tmp_path / "out", settings, engine="local")
    strategy = build_strategy(settings, schema)
    federation = Federation(settings, schema, strategy, directory, listener, server)
    work = desk(lambda context: clinics[context.node_id - 1000], ClinicWork())
    link = LocalLink(build_client_app(work), clinics)
    link.run(build_server_app(federation, link))
    return listener


def test_a_clinic_that_requires_secure_sums_refuses_to_be_opened(tmp_path: Path) -> None:
    demands = ConfidentialitySettings()
    assert demands.require_secagg
    listener = run_desk(tmp_path, [SEALED], ClinicDesk, {"c2": demands})
    (only,) = summary_of(tmp_path / "out")["rounds"]
    assert only["failed"] == [{"clinic": "c2", "reason": "secagg-required"}]
    assert only["participants"] == ["c1", "c3", "c4"]
    assert listener.records[0].per_clinic.keys() == {"c1", "c3", "c4"}
    assert summary_of(tmp_path / "out")["confidentiality"]["mode"] == "sealed"


@dataclasses.dataclass(frozen=True)
class Answer:
    clinic: str
    session: Session
    stage: str
    data: bytes


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[Answer]:
    """What the clinics' sessions answer, before it is sealed."""
    found: list[Answer] = []

    class Recorded(ClinicSession):
        def __init__(self, session: Session, name: str, *others: Any, **named: Any) -> None:
            super().__init__(session, name, *others, **named)
            self._place = (name, session)

        def receive(self, stage: str, data: bytes) -> bytes:
            answer = super().receive(stage, data)
            found.append(Answer(*self._place, stage, answer))
            return answer

    monkeypatch.setattr(fedpeft_client.sums.summing, "ClinicSession", Recorded)
    return found


@pytest.mark.parametrize("stage", ["keys", "shares", "masked", "check"])
def test_beyond_the_threshold_nothing_is_opened_and_the_retry_has_fresh_keys(
    tmp_path: Path, answers: list[Answer], stage: str
) -> None:
    class Desk(FailingDesk):
        crashing = ("c2", "c3")

    Desk.stage = f"train.{stage}"
    listener = run_desk(tmp_path, [], Desk)
    (why,) = listener.repeated
    assert "c2: internal-error, c3: internal-error" in why
    assert "Canary" not in why
    (only,) = summary_of(tmp_path / "out")["rounds"]
    assert (only["participants"], only["failed"]) == (list(FOUR), [])

    trained = [each for each in answers if each.session.kind == "train"]
    first = {(each.clinic, each.stage): each.data for each in trained if each.session.attempt == 1}
    second = {(each.clinic, each.stage): each.data for each in trained if each.session.attempt == 2}
    assert not any(at == "unmask" for _, at in first)
    assert {each.session.attempt for each in trained} == {1, 2}
    shared = first.keys() & second.keys()
    assert {clinic for clinic, _ in shared} >= {"c1", "c4"}
    for clinic, at in shared:
        one, other = first[clinic, at], second[clinic, at]
        if at == "keys":
            before, after = Advert.from_bytes(one), Advert.from_bytes(other)
            keys = {before.share_key, before.mask_key, after.share_key, after.mask_key}
            assert len(keys) == 4
        elif at == "masked":
            left, right = (np.frombuffer(each, np.uint8)[:100_000] for each in (one, other))
            assert float(np.mean(left == right)) < 0.01
        else:
            assert one != other


def test_a_second_sum_of_a_round_that_was_opened_is_refused(
    tmp_path: Path, answers: list[Answer]
) -> None:
    class Desk(FailingDesk):
        crashing = ("c2", "c3")
        stage = "train.unmask"
        after_the_answer = True

    refusal = r"round 1 .* is not repeated.*" + r".*".join(f"{c}: already-aggregated" for c in FOUR)
    with pytest.raises(FederationError, match=refusal):
        run_desk(tmp_path, [], Desk)
    assert {each.session.attempt for each in answers if each.session.kind == "train"} == {1}
    assert not (tmp_path / "out" / "rounds" / "1").exists()
    # A new run of the server is what the message tells to start, and it goes on.
    listener = run_desk(tmp_path, [], ClinicDesk)
    assert [record.round for record in listener.records] == [1]
    assert listener.records[0].participants == FOUR


def test_ray_and_secure_aggregation_exclude_each_other(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fedpeft", "simulate", "--engine", "ray"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 3
    assert "aggregation.confidentiality=sealed" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "rounds").exists()
