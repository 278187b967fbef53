"""One clinic's fault is that clinic's: it is named with the reason and the round goes on."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedpeft.adapters import AdapterState
from fedpeft.config import FederationSettings
from fedpeft.errors import FederationError, StorageError
from fedpeft.models import adapter_schema, resolve_base
from fedpeft.sealing import Identity
from fedpeft.simulation.clinics import simulated_clinics
from fedpeft.simulation.local import LocalLink
from fedpeft.simulation.plan import embedded_settings, plan_simulation
from fedpeft.simulation.run import simulate
from fedpeft_client.rounds.app import ClinicDesk, build_client_app
from fedpeft_client.rounds.clinic import Clinic
from fedpeft_client.rounds.work import Assignment, ClinicWork, Trained
from fedpeft_server.link.app import build_server_app
from fedpeft_server.rounds.loop import Federation
from fedpeft_server.runs.directory import RoundRecord, RunDirectory
from fedpeft_strategies import build_strategy

QUICK = ["training.local_steps=2", "rounds.count=2", "rounds.retries=1", "rounds.wait_s=1"]
Trouble = Callable[[Trained], Trained]


class Listener:
    """A watcher that remembers what it was told."""

    def __init__(self) -> None:
        self.repeated: list[str] = []
        self.rounds: list[int] = []

    def waiting(self, connected: int, enrolled: int, minimum: int) -> None: ...
    def asked(self, number: int, kind: str, clinics: list[str]) -> None: ...

    def finished(self, records: list[RoundRecord]) -> None: ...

    def warned(self, sentence: str) -> None:
        raise AssertionError(sentence)

    def round_repeated(self, number: int, why: str) -> None:
        self.repeated.append(why)

    def round_finished(self, record: object) -> None:
        self.rounds.append(record.round)  # pyright: ignore[reportAttributeAccessIssue]


class TroubledWork(ClinicWork):
    """The real work, with what one clinic's comes to spoiled before it is sealed."""

    def __init__(self, trouble: Trouble) -> None:
        super().__init__()
        self._trouble = trouble

    def train(self, clinic: Clinic, assignment: Assignment) -> Trained:
        trained = super().train(clinic, assignment)
        return self._trouble(trained) if clinic.name == "harbour" else trained


SERVER = Identity.generate()


def federation_of(
    out: Path, overrides: list[str]
) -> tuple[FederationSettings, Federation, Listener]:
    settings = embedded_settings([*QUICK, *overrides])
    model = resolve_base(settings.model.base, relative_to=Path())
    schema = adapter_schema(model, settings.adapter)
    directory, watcher = RunDirectory(out, settings, engine="local"), Listener()
    strategy = build_strategy(settings, schema)
    return settings, Federation(settings, schema, strategy, directory, watcher, SERVER), watcher


def clinics_of(settings: FederationSettings, out: Path) -> list[Clinic]:
    model = resolve_base(settings.model.base, relative_to=Path())
    return list(
        simulated_clinics(
            settings,
            model,
            SERVER.public,
            relative_to=out / "data",
            ledgers=out / "ledgers",
            personal=out / "personal",
        )
    )


def run_with(out: Path, trouble: Trouble, *overrides: str) -> tuple[dict[str, object], Listener]:
    settings, federation, watcher = federation_of(out, list(overrides))
    plan_simulation(None, QUICK, engine="local", out=out)
    clinics = clinics_of(settings, out)
    desk = ClinicDesk(lambda context: clinics[context.node_id - 1000], TroubledWork(trouble))
    link = LocalLink(build_client_app(desk), clinics)
    link.run(build_server_app(federation, link))
    return json.loads((out / "summary.json").read_text()), watcher


def crash(_trained: Trained) -> Trained:
    raise RuntimeError("patient Canary-4711 has a secret")


def unspoilt(trained: Trained) -> Trained:
    return trained


def spoilt(change: Callable[[torch.Tensor], torch.Tensor]) -> Trouble:
    def trouble(trained: Trained) -> Trained:
        values = change(trained.update.values)
        return replace(trained, update=AdapterState(trained.update.schema, values))

    return trouble


def other_schema(trained: Trained) -> Trained:
    settings = embedded_settings(["adapter.rank=2"])
    model = resolve_base(settings.model.base, relative_to=Path())
    schema = adapter_schema(model, settings.adapter)
    return replace(trained, update=AdapterState(schema, torch.ones(schema.numel)))


def no_examples(trained: Trained) -> Trained:
    return replace(trained, rows=0)


def endless_loss(trained: Trained) -> Trained:
    return replace(trained, nll=math.inf)


FAULTS = {
    "crash": (crash, "internal-error", "internal-error"),
    "nan": (spoilt(lambda values: values * math.nan), "not-finite", "not-finite"),
    "inf": (spoilt(lambda values: values / 0.0), "not-finite", "not-finite"),
    "schema": (other_schema, "wrong-adapter-schema", "bad-vector"),
    "no-examples": (no_examples, "bad-adapter", "bad-vector"),
    "infinite-loss": (endless_loss, "internal-error", "not-finite"),
}


@pytest.mark.parametrize("mode", ["sealed", "secagg"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_spoilt_answer_is_named_and_the_round_goes_on(
    tmp_path: Path, fault: str, mode: str
) -> None:
    trouble, sealed, summed = FAULTS[fault]
    confidentiality = f"aggregation.confidentiality={mode}"
    summary, watcher = run_with(tmp_path, trouble, "rounds.count=1", confidentiality)
    (only,) = summary["rounds"]  # pyright: ignore[reportGeneralTypeIssues]
    reason = sealed if mode == "sealed" else summed
    assert only["failed"] == [{"clinic": "harbour", "reason": reason}]
    assert only["participants"] == ["lindenpark", "northfield", "riverside"]
    assert only["confidentiality"]["mode"] == mode
    assert watcher.rounds == [0, 1]
    assert "Canary" not in (tmp_path / "summary.json").read_text()


def test_below_the_minimum_the_round_is_repeated_then_the_run_ends_and_goes_on_later(
    tmp_path: Path,
) -> None:
    with pytest.raises(FederationError, match=r"round 1 failed 2 times: 3 clinics .*harbour: int"):
        run_with(tmp_path, crash, "rounds.minimum_clinics=4")
    assert not (tmp_path / "rounds" / "1").exists()
    assert (tmp_path / "rounds" / "0" / "adapter" / "adapter_model.safetensors").is_file()
    summary, watcher = run_with(tmp_path, unspoilt, "rounds.minimum_clinics=4")
    assert watcher.rounds == [1, 2]
    assert len(summary["rounds"]) == 2  # pyright: ignore[reportArgumentType]


def test_a_passing_fault_costs_one_repetition(tmp_path: Path) -> None:
    left = ["once"]

    def once(trained: Trained) -> Trained:
        return crash(trained) if left and left.pop() else trained

    _, watcher = run_with(tmp_path, once, "rounds.minimum_clinics=4", "rounds.count=1")
    assert len(watcher.repeated) == 1
    assert "harbour: internal-error" in watcher.repeated[0]


def test_a_clinic_with_another_base_model_is_named(tmp_path: Path, tiny_model: Path) -> None:
    settings, federation, _ = federation_of(tmp_path, ["rounds.count=1"])
    plan_simulation(None, QUICK, engine="local", out=tmp_path)
    clinics = clinics_of(settings, tmp_path)
    stranger = next(each for each in clinics if each.name == "riverside")
    clinics[clinics.index(stranger)] = replace(stranger, model=tiny_model)
    desk = ClinicDesk(lambda context: clinics[context.node_id - 1000], ClinicWork())
    link = LocalLink(build_client_app(desk), clinics)
    link.run(build_server_app(federation, link))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["rounds"][0]["failed"] == [{"clinic": "riverside", "reason": "other-base-model"}]


def test_a_run_that_was_stopped_goes_on_to_the_same_adapter(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    # The rounding of a secure sum is random by design, so only sealed runs repeat to the byte.
    sealed = [*QUICK, "aggregation.confidentiality=sealed"]
    simulate(plan_simulation(None, sealed, engine="local", out=whole), Listener())

    class StopAfterFirst(Listener):
        def round_finished(self, record: object) -> None:
            super().round_finished(record)
            if record.round == 1:  # pyright: ignore[reportAttributeAccessIssue]
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(plan_simulation(None, sealed, engine="local", out=parts), StopAfterFirst())
    again = Listener()
    simulate(plan_simulation(None, sealed, engine="local", out=parts), again)
    assert again.rounds == [2]
    one, other = (place / "adapter" / "adapter_model.safetensors" for place in (whole, parts))
    assert one.read_bytes() == other.read_bytes()


def test_a_directory_of_another_run_is_refused(tmp_path: Path) -> None:
    simulate(
        plan_simulation(None, [*QUICK, "rounds.count=1"], engine="local", out=tmp_path), Listener()
    )
    changed = [*QUICK, "rounds.count=1", "training.learning_rate=1e-3"]
    with pytest.raises(StorageError, match="holds a run with other settings"):
        simulate(plan_simulation(None, changed, engine="local", out=tmp_path), Listener())


def test_early_stopping_ends_the_run(tmp_path: Path) -> None:
    watcher = Listener()
    overrides = [*QUICK, "rounds.count=6", "rounds.patience=1", "training.learning_rate=0.5"]
    simulate(plan_simulation(None, overrides, engine="local", out=tmp_path), watcher)
    assert 2 <= len(watcher.rounds) < 7
