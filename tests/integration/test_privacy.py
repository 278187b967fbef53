"""Differential privacy over whole runs: what is charged, written down and refused."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from fedpeft.cli import program as fedpeft
from fedpeft.config import FederationSettings
from fedpeft.console import Program
from fedpeft.errors import FederationError
from fedpeft.models import adapter_schema
from fedpeft.privacy.accounting import epsilon_of
from fedpeft.privacy.charge import Charge
from fedpeft.privacy.ledger import Ledger
from fedpeft.sealing import Identity
from fedpeft.simulation.clinics import simulated_clinics
from fedpeft.simulation.local import LocalLink
from fedpeft.simulation.run import Simulation, simulate
from fedpeft_client.rounds.app import ClinicDesk, build_client_app
from fedpeft_client.rounds.work import ClinicWork
from fedpeft_client.settings import BudgetSettings
from fedpeft_server.cli import program as server
from fedpeft_server.link.app import build_server_app
from fedpeft_server.rounds.loop import Federation
from fedpeft_server.rounds.narration import Narration
from fedpeft_server.runs.directory import RunDirectory
from fedpeft_strategies import build_strategy

NAMES = ("c0", "c1", "c2", "c3")
FIGURES = {"epsilon", "delta", "epsilon_rdp", "steps", "noise_multiplier", "clip"}
LOCAL = {"unit": "record", "epsilon": 6.0}
PATIENT = {"unit": "patient", "noise_multiplier": 1.0, "records_per_patient": 2}
SHARED = {**PATIENT, "mechanism": "distributed", "honest_clinics": 3}
CENTRAL = {"unit": "clinic", "mechanism": "central", "noise_multiplier": 2.0, "clip": 0.3}
ONE_STEP = {"local_steps": 1, "optimizer": "sgd", "learning_rate": 0.1}
SEALED = {"confidentiality": "sealed"}


def federation(
    folder: Path, model: Path, privacy: dict[str, Any] | None, **changes: Any
) -> Simulation:
    """Return a simulation of four small clinics on the tiny model, with patients of two rows."""
    folder.mkdir(exist_ok=True)
    for at, name in enumerate(NAMES):
        rows = [
            {"question": f"{row} at {name}?", "answer": f"{row}.", "patient_id": f"p{row // 2}"}
            for row in range(12 + 4 * at)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content: dict[str, Any] = {
        "name": "sea",
        "model": {"base": str(model), "dtype": "float32"},
        "adapter": {"rank": 2, "alpha": 4.0},
        "training": {"local_steps": 2, "batch_size": 4, "max_length": 64, "learning_rate": 5e-3},
        "rounds": {"count": 2, "wait_s": 1, "retries": 0},
        "clinic": [{"name": n, "train": f"{n}.jsonl", "valid": f"{n}.jsonl"} for n in NAMES],
        "privacy": privacy,
        **changes,
    }
    settings = FederationSettings.model_validate(content)
    return Simulation(settings, folder, folder / "out", "local")


def run(simulation: Simulation, *, stop_after: int = 99) -> list[str]:
    """Run or go on with the simulation and return what people are told."""
    told: list[str] = []

    class Stopped(Narration):
        def round_finished(self, record: Any) -> None:
            super().round_finished(record)
            if record.round == stop_after:
                raise KeyboardInterrupt

    simulate(simulation, Stopped(told.append, simulation.settings.rounds.count), tell=told.append)
    return told


def summary_of(simulation: Simulation) -> dict[str, Any]:
    return json.loads((simulation.out / "summary.json").read_text("utf-8"))


def ledger_of(simulation: Simulation, name: str) -> dict[Charge, int]:
    with Ledger(simulation.out / "ledgers" / f"{name}.sqlite") as ledger:
        assert ledger.verify() == []
        (only,) = ledger.datasets()
        return ledger.charges(only.id)


# What is refused before anything runs


def exit_of(program: Program, arguments: Sequence[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        program.run(list(arguments))
    errors = [line for line in capsys.readouterr().err.splitlines() if " error: " in line]
    assert len(errors) == 1
    return stopped.value.code, errors[0]


CHANGES = {
    "a clinic with local noise": (["unit=clinic", "epsilon=3"], 'unit = "clinic" cannot be'),
    "noise of no size": (["unit=record"], "set epsilon"),
    "shared noise in the open": (
        ["unit=record", "mechanism=distributed", "noise_multiplier=1.0"],
        'needs aggregation.confidentiality = "secagg" and training.local_steps = 1 and '
        'training.optimizer = "sgd": only the sum',
    ),
    "shared noise of no size": (
        ["unit=record", "mechanism=distributed", "epsilon=3"],
        "a number as privacy.noise_multiplier: only the sum",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_privacy_that_cannot_be_given_is_refused_in_a_sentence(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    settings, says = CHANGES[name]
    chosen = [part for each in settings for part in ("--set", f"privacy.{each}")]
    sealed = ["--set", "aggregation.confidentiality=sealed"]
    command = ["simulate", "--out", str(tmp_path / "out"), *sealed, *chosen]
    code, sentence = exit_of(fedpeft, command, capsys)
    assert code == 3
    assert says in sentence
    assert not (tmp_path / "out").exists()


def test_a_real_server_takes_no_seed_for_tests(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    site = tmp_path / "site"
    with pytest.raises(SystemExit):
        server.run(["init", str(site), "--address", "localhost:1"])
    capsys.readouterr()
    chosen = ["privacy.unit=record", "privacy.noise_multiplier=1.0", "privacy.test_seed=3"]
    command = ["start", str(site), *(part for each in chosen for part in ("--set", each))]
    code, sentence = exit_of(server, command, capsys)
    assert code == 3
    assert "privacy.test_seed makes noise that anyone can take away again" in sentence
    assert not (site / "run").exists()


def test_a_clinic_whose_bound_is_reached_leaves_and_the_others_go_on(
    tmp_path: Path, tiny_model: Path
):
    plan = federation(tmp_path / "f", tiny_model, {**PATIENT, "unit": "record"})
    ledgers = plan.out / "ledgers"
    bound = epsilon_of(
        {Charge(noise="gaussian", sampling_rate=0.25, noise_multiplier=1.0): 2}, 1e-5
    )
    model, owner = tiny_model, Identity.generate()
    clinics = list(
        simulated_clinics(
            plan.settings,
            model,
            owner.public,
            relative_to=plan.relative_to,
            ledgers=ledgers,
            personal=plan.out / "personal",
        )
    )
    # c1 has 16 rows, of which a step sees a quarter: two steps fit, the second round does not.
    limit = BudgetSettings(max_epsilon=1.001 * bound.epsilon)
    clinics[1] = replace(clinics[1], privacy=limit)
    told: list[str] = []
    schema = adapter_schema(model, plan.settings.adapter)
    watched = Federation(
        plan.settings,
        schema,
        build_strategy(plan.settings, schema),
        RunDirectory(plan.out, plan.settings, engine="local"),
        Narration(told.append, 2),
        owner,
    )
    desk = ClinicDesk(lambda context: clinics[context.node_id - 1000], ClinicWork())
    link = LocalLink(build_client_app(desk), clinics)
    link.run(build_server_app(watched, link))
    rounds = summary_of(plan)["rounds"]
    assert rounds[0]["failed"] == []
    assert rounds[1]["failed"] == [{"clinic": "c1", "reason": "budget"}]
    assert rounds[1]["participants"] == ["c0", "c2", "c3"]
    assert f"{limit.max_epsilon}" not in "".join(told)
    assert sum(ledger_of(plan, "c1").values()) == 2


def test_a_round_is_not_repeated_at_the_others_cost_when_a_refusal_will_stay(
    tmp_path: Path, tiny_model: Path
):
    plan = federation(
        tmp_path / "f",
        tiny_model,
        {**PATIENT, "exact_losses": False, "epsilon": 0.001},
        rounds={"minimum_clinics": 4, "retries": 2},
    )
    with pytest.raises(FederationError, match=r"is not repeated, as .* privacy-refused"):
        run(plan)
    for name in NAMES:
        assert not any((plan.out / "ledgers").glob(f"{name}.sqlite")) or ledger_of(plan, name) == {}


def test_noise_that_too_few_would_share_is_not_even_tried(tmp_path: Path, tiny_model: Path):
    plan = federation(
        tmp_path / "f", tiny_model, {**SHARED, "honest_clinics": 5}, training=ONE_STEP
    )
    with pytest.raises(
        FederationError,
        match=r"0 clinics answered where a secure sum needs at least 3.*c0: bad-config",
    ):
        run(plan)
    assert not (plan.out / "rounds" / "1").exists()
    assert not any((plan.out / "rounds").glob("*/round.json"))


# Whole runs


def assert_figures(plan: Simulation, *more: str) -> dict[str, Any]:
    """The summary has exactly the agreed entry; return its figures of each clinic."""
    asked = plan.settings.privacy
    assert asked is not None
    found = summary_of(plan)["privacy"]
    assert set(found) == {
        "unit",
        "mechanism",
        "epsilon_goal",
        "private",
        "clinics",
        "assumptions",
    }
    assert (found["unit"], found["mechanism"]) == (asked.unit, asked.mechanism)
    assert found["private"] is (asked.test_seed is None)
    assert all(isinstance(sentence, str) for sentence in found["assumptions"])
    assert list(found["clinics"]) == list(NAMES)
    assert all(set(figures) == FIGURES | set(more) for figures in found["clinics"].values())
    return found["clinics"]


def losses_told(plan: Simulation) -> set[Any]:
    summary = summary_of(plan)
    rounds = summary["rounds"]
    return {
        *(done[name] for done in rounds for name in ("train_loss", "valid_loss")),
        summary["valid_loss"]["base"],
        summary["valid_loss"]["final"],
        *summary["valid_loss"]["per_clinic"].values(),
    }


def test_local_noise_for_records_keeps_its_promise_over_the_run(tmp_path: Path, tiny_model: Path):
    plan = federation(tmp_path / "f", tiny_model, LOCAL, aggregation=SEALED)
    told = run(plan)
    figures = assert_figures(plan)
    for at, name in enumerate(NAMES):
        step = Charge(
            noise="gaussian",
            sampling_rate=4 / (12 + 4 * at),
            noise_multiplier=figures[name]["noise_multiplier"],
        )
        assert ledger_of(plan, name) == {step: 4}
        assert figures[name]["epsilon"] == epsilon_of({step: 4}, 1e-5).epsilon <= 6.0
        assert figures[name]["epsilon"] <= figures[name]["epsilon_rdp"]
    assert losses_told(plan) == {None}
    lines = [line for line in told if line.startswith("privacy of ")]
    assert len(lines) == 4
    assert all(re.search(r"epsilon [56]\.\d\d at delta 1e-05 \(RDP \d", line) for line in lines)
    assert any("epsilon up to" in line for line in told if line.startswith("round 2/2"))


def test_a_run_that_goes_on_counts_the_steps_of_before(tmp_path: Path, tiny_model: Path):
    """The peers' fault: a new accountant for each round, so that epsilon begins again."""
    plan = federation(tmp_path / "f", tiny_model, PATIENT)
    with pytest.raises(KeyboardInterrupt):
        run(plan, stop_after=1)
    before = assert_figures(plan)
    run(plan)
    after = assert_figures(plan)
    for at, name in enumerate(NAMES):
        # Patients of two rows each: 6, 8, 10 and 12 of them.
        step = Charge(noise="gaussian", sampling_rate=4 / (6 + 2 * at), noise_multiplier=1.0)
        assert (before[name]["steps"], after[name]["steps"]) == (2, 4)
        assert before[name]["epsilon"] == epsilon_of({step: 2}, 1e-5).epsilon
        assert after[name]["epsilon"] == epsilon_of({step: 4}, 1e-5).epsilon
    # The last round lost on the server is run again, and costs again.
    last = plan.out / "rounds" / "2"
    last.rename(plan.out.parent / "lost")
    run(plan)
    assert {found["steps"] for found in assert_figures(plan).values()} == {6}


def test_distributed_noise_for_patients_under_secure_sums(tmp_path: Path, tiny_model: Path):
    plan = federation(
        tmp_path / "f", tiny_model, SHARED, training={**ONE_STEP, "batch_size": 4, "max_length": 64}
    )
    told = run(plan)
    figures = assert_figures(plan, "epsilon_outside", "epsilon_alone")
    for at, name in enumerate(NAMES):
        found = figures[name]
        assert 0 < found["epsilon_outside"] < found["epsilon"] < found["epsilon_alone"]
        assert (found["steps"], found["epsilon"]) == (2, found["epsilon_rdp"])
        ((step, steps),) = ledger_of(plan, name).items()
        assert (step.noise, step.sampling_rate, steps) == ("skellam", 4 / (6 + 2 * at), 2)
        # Of three shares that make up the noise one may be known to the server.
        assert step.noise_multiplier == pytest.approx(math.sqrt(2 / 3))
    done = summary_of(plan)["rounds"][-1]
    assert (done["confidentiality"]["bits"], done["confidentiality"]["clipped"]) == (24, 0)
    assert losses_told(plan) == {None}
    assert sum("own share alone" in line for line in told) == 4
    first, last = (
        load_file(plan.out / "rounds" / at / "adapter" / "adapter_model.safetensors")
        for at in ("0", "2")
    )
    assert any((first[name] != last[name]).any() for name in first)


@pytest.mark.parametrize("mode", ["sealed", "secagg"])
def test_central_noise_over_clinics_warns_at_the_start_and_goes_on(
    mode: str, tmp_path: Path, tiny_model: Path
):
    plan = federation(tmp_path / "f", tiny_model, CENTRAL, aggregation={"confidentiality": mode})
    with pytest.raises(KeyboardInterrupt):
        run(plan, stop_after=1)
    told = run(plan)
    assert told[0].startswith("warning: clinic-level privacy over 4 clinics adds noise")
    assert "it needs about" in told[0]
    gaussian = Charge(noise="gaussian", noise_multiplier=2.0)
    for name, found in assert_figures(plan).items():
        assert found["steps"] == 2
        assert found["epsilon"] == epsilon_of({gaussian: 2}, 1e-5).epsilon
        assert ledger_of(plan, name) == {gaussian: 2}
    first, second = (done["privacy"] for done in summary_of(plan)["rounds"])
    assert first["clip"] == 0.3
    assert second["clip"] == first["next_clip"] != 0.3
    assert losses_told(plan) == {None}


def test_a_mean_with_central_noise_that_was_lost_has_cost_all_the_same(
    tmp_path: Path, tiny_model: Path
):
    plan = federation(tmp_path / "f", tiny_model, CENTRAL, rounds={"count": 1, "retries": 0})

    class StoppedBeforeTheRoundIsKept(Narration):
        def asked(self, number: int, kind: str, clinics: list[str]) -> None:
            if (number, kind) == (1, "evaluate"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(plan, StoppedBeforeTheRoundIsKept(lambda _: None, 1))
    run(plan)
    assert {found["steps"] for found in assert_figures(plan).values()} == {2}


def test_exact_losses_are_told_where_they_were_asked_for(tmp_path: Path, tiny_model: Path):
    asked = {**PATIENT, "exact_losses": True}
    plan = federation(tmp_path / "f", tiny_model, asked, rounds={"count": 1, "retries": 0})
    run(plan)
    (done,) = summary_of(plan)["rounds"]
    assert done["train_loss"] > 0 < done["valid_loss"]
    assert any("exact" in each for each in summary_of(plan)["privacy"]["assumptions"])


@pytest.mark.parametrize("asked", [PATIENT, CENTRAL], ids=["local", "central"])
def test_a_known_seed_repeats_to_the_byte_and_is_marked(
    asked: dict[str, Any], tmp_path: Path, tiny_model: Path
):
    adapters: list[bytes] = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        plan = federation(
            tmp_path / name,
            tiny_model,
            {**asked, "test_seed": seed},
            aggregation=SEALED,
            rounds={"count": 1, "retries": 0},
        )
        run(plan)
        adapters.append((plan.out / "adapter" / "adapter_model.safetensors").read_bytes())
        assert {found["epsilon"] for found in assert_figures(plan).values()} == {None}
        assert summary_of(plan)["privacy"]["private"] is False
    assert adapters[0] == adapters[1] != adapters[2]
