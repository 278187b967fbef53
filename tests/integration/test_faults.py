"""One clinic's fault is that clinic's: it is named with the reason and the round goes on."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message

from fedpeft.adapters import AdapterState
from fedpeft.config import FederationSettings
from fedpeft.errors import FederationError, StorageError
from fedpeft.models import adapter_schema, resolve_base
from fedpeft.protocol import ARRAYS, array_record, state_from
from fedpeft.simulation.clinics import simulated_clinics
from fedpeft.simulation.local import LocalLink
from fedpeft.simulation.plan import embedded_settings, plan_simulation
from fedpeft.simulation.run import simulate
from fedpeft_client.app import ClinicWork, build_client_app
from fedpeft_server.app import build_server_app
from fedpeft_server.rounds import Federation
from fedpeft_server.run_directory import RunDirectory
from fedpeft_strategies import build_strategy

QUICK = ["training.local_steps=2", "rounds.count=2", "rounds.retries=1", "rounds.wait_s=1"]
Trouble = Callable[[Message, Message], Message | None]


class Listener:
    """A watcher that remembers what it was told."""

    def __init__(self) -> None:
        self.repeated: list[str] = []
        self.rounds: list[int] = []

    def waiting(self, connected: int, enrolled: int, minimum: int) -> None: ...
    def asked(self, number: int, kind: str, clinics: list[str]) -> None: ...

    def round_repeated(self, number: int, why: str) -> None:
        self.repeated.append(why)

    def round_finished(self, record: object) -> None:
        self.rounds.append(record.round)  # pyright: ignore[reportAttributeAccessIssue]


class TroubledWork(ClinicWork):
    """The real handlers, with one clinic's answers spoiled on their way out."""

    def spoil(self, name: str, trouble: Trouble) -> None:
        self._spoiled, self._trouble = name, trouble

    def train(self, message: Message, context: Context) -> Message:
        reply = super().train(message, context)
        if self._find_clinic(context).name != self._spoiled:
            return reply
        return self._trouble(message, reply) or reply


def federation_of(
    out: Path, overrides: list[str]
) -> tuple[FederationSettings, Federation, Listener]:
    settings = embedded_settings([*QUICK, *overrides])
    model = resolve_base(settings.model.base, relative_to=Path())
    schema = adapter_schema(model, settings.adapter)
    directory, watcher = RunDirectory(out, settings, engine="local"), Listener()
    strategy = build_strategy("fedavg", schema)
    return settings, Federation(settings, schema, strategy, directory, watcher), watcher


def run_with(out: Path, trouble: Trouble, *overrides: str) -> tuple[dict[str, object], Listener]:
    settings, federation, watcher = federation_of(out, list(overrides))
    plan_simulation(None, QUICK, engine="local", out=out)
    model = resolve_base(settings.model.base, relative_to=Path())
    clinics = simulated_clinics(settings, model, relative_to=out / "data")
    work = TroubledWork(lambda context: clinics[context.node_id - 1000])
    work.spoil("harbour", trouble)
    link = LocalLink(build_client_app(work), clinics)
    link.run(build_server_app(federation, link))
    return json.loads((out / "summary.json").read_text()), watcher


def crash(_message: Message, _reply: Message) -> Message:
    raise RuntimeError("patient Canary-4711 has a secret")


def spoilt(change: Callable[[torch.Tensor], torch.Tensor]) -> Trouble:
    def trouble(_message: Message, reply: Message) -> Message:
        settings = embedded_settings(QUICK)
        model = resolve_base(settings.model.base, relative_to=Path())
        schema = adapter_schema(model, settings.adapter)
        update = state_from(reply.content, schema, "update", source="test")
        changed = AdapterState(schema, change(update.values))
        reply.content[ARRAYS] = array_record(changed, "update")
        return reply

    return trouble


def other_schema(_message: Message, reply: Message) -> Message:
    settings = embedded_settings(["adapter.rank=2"])
    model = resolve_base(settings.model.base, relative_to=Path())
    schema = adapter_schema(model, settings.adapter)
    reply.content[ARRAYS] = array_record(AdapterState(schema, torch.ones(schema.numel)), "update")
    return reply


def no_examples(_message: Message, reply: Message) -> Message:
    reply.content["metrics"]["num-examples"] = 0  # pyright: ignore[reportArgumentType, reportIndexIssue]
    return reply


def endless_loss(_message: Message, reply: Message) -> Message:
    reply.content["metrics"]["train-nll"] = math.inf  # pyright: ignore[reportArgumentType, reportIndexIssue]
    return reply


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        pytest.param(crash, "internal-error", id="crash"),
        pytest.param(spoilt(lambda values: values * math.nan), "not-finite", id="nan"),
        pytest.param(spoilt(lambda values: values / 0.0), "not-finite", id="inf"),
        pytest.param(other_schema, "wrong-adapter-schema", id="schema"),
        pytest.param(no_examples, "bad-adapter", id="no-examples"),
        pytest.param(endless_loss, "bad-adapter", id="infinite-loss"),
    ],
)
def test_a_spoilt_answer_is_named_and_the_round_goes_on(
    tmp_path: Path, trouble: Trouble, reason: str
) -> None:
    summary, watcher = run_with(tmp_path, trouble, "rounds.count=1")
    (only,) = summary["rounds"]  # pyright: ignore[reportGeneralTypeIssues]
    assert only["failed"] == [{"clinic": "harbour", "reason": reason}]
    assert only["participants"] == ["lindenpark", "northfield", "riverside"]
    assert watcher.rounds == [0, 1]
    assert "Canary" not in (tmp_path / "summary.json").read_text()


def test_below_the_minimum_the_round_is_repeated_then_the_run_ends_and_goes_on_later(
    tmp_path: Path,
) -> None:
    with pytest.raises(FederationError, match=r"round 1 failed 2 times: 3 usable answers.*harbour"):
        run_with(tmp_path, crash, "rounds.minimum_clinics=4")
    assert not (tmp_path / "rounds" / "1").exists()
    assert (tmp_path / "rounds" / "0" / "adapter" / "adapter_model.safetensors").is_file()
    summary, watcher = run_with(tmp_path, lambda _m, _r: None, "rounds.minimum_clinics=4")
    assert watcher.rounds == [1, 2]
    assert len(summary["rounds"]) == 2  # pyright: ignore[reportArgumentType]


def test_a_passing_fault_costs_one_repetition(tmp_path: Path) -> None:
    left = ["once"]

    def once(message: Message, reply: Message) -> Message | None:
        return crash(message, reply) if left and left.pop() else None

    _, watcher = run_with(tmp_path, once, "rounds.minimum_clinics=4", "rounds.count=1")
    assert len(watcher.repeated) == 1
    assert "harbour: internal-error" in watcher.repeated[0]


def test_a_clinic_with_another_base_model_is_named(tmp_path: Path, tiny_model: Path) -> None:
    settings, federation, _ = federation_of(tmp_path, ["rounds.count=1"])
    plan_simulation(None, QUICK, engine="local", out=tmp_path)
    model = resolve_base(settings.model.base, relative_to=Path())
    clinics = list(simulated_clinics(settings, model, relative_to=tmp_path / "data"))
    stranger = next(each for each in clinics if each.name == "riverside")
    clinics[clinics.index(stranger)] = type(stranger)(
        name=stranger.name, federation="demo", model=tiny_model, data=stranger.data
    )
    link = LocalLink(
        build_client_app(ClinicWork(lambda context: clinics[context.node_id - 1000])), clinics
    )
    link.run(build_server_app(federation, link))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["rounds"][0]["failed"] == [{"clinic": "riverside", "reason": "other-base-model"}]


def test_a_run_that_was_stopped_goes_on_to_the_same_adapter(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    simulate(plan_simulation(None, QUICK, engine="local", out=whole), Listener())

    class StopAfterFirst(Listener):
        def round_finished(self, record: object) -> None:
            super().round_finished(record)
            if record.round == 1:  # pyright: ignore[reportAttributeAccessIssue]
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(plan_simulation(None, QUICK, engine="local", out=parts), StopAfterFirst())
    again = Listener()
    simulate(plan_simulation(None, QUICK, engine="local", out=parts), again)
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
