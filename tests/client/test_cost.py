"""What a round would cost a clinic's data: which noise counts, and which promises are refused."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft.config import AdapterSettings, PrivacySettings, TrainingSettings
from fedpeft.data import EncodedExample
from fedpeft.errors import BudgetSpent, DataError, LossesNotAllowed, PrivacyError, UnitNotAllowed
from fedpeft.privacy.accounting import epsilon_of
from fedpeft.privacy.charge import Charge
from fedpeft.protocol import Job, RankTerms, SumTerms
from fedpeft.sealing import Identity
from fedpeft_client.rounds.clinic import Clinic, Membership
from fedpeft_client.rounds.cost import (
    Cost,
    cost_of,
    require_losses_allowed,
    require_noise_fits,
    steps_of,
)
from fedpeft_client.settings import BudgetSettings, DataSettings

COORDINATES = 4096
MEMBERSHIP = Membership(Identity.generate(), Identity.generate().public)
RECORD: dict[str, Any] = {"unit": "record", "noise_multiplier": 1.0}
SHARED: dict[str, Any] = {
    "unit": "record",
    "mechanism": "distributed",
    "noise_multiplier": 1.0,
    "honest_clinics": 4,
}
CENTRAL: dict[str, Any] = {"unit": "clinic", "mechanism": "central", "noise_multiplier": 1.0}


def clinic_of(test_seed: int | None = None, **privacy: Any) -> Clinic:
    return Clinic(
        name="north",
        federation="sea",
        membership=MEMBERSHIP,
        model=Path("model"),
        data=DataSettings(train=Path("rows.jsonl")),
        ledger=Path("ledger.sqlite"),
        privacy=BudgetSettings(**privacy),
        test_seed=test_seed,
    )


def job_of(privacy: dict[str, Any] | None, *, steps: int = 5, rounds: int = 4) -> Job:
    return Job(
        run="0" * 32,
        federation="sea",
        fingerprint="a" * 64,
        quantization="none",
        adapter=AdapterSettings(rank=2),
        training=TrainingSettings(local_steps=steps, batch_size=2, optimizer="sgd"),
        aggregation=SumTerms(confidentiality="secagg", adversary="active", bits=16, limit=1.0),
        privacy=None if privacy is None else PrivacySettings(**privacy),
        round=1,
        rounds=rounds,
    )


def rows_of(count: int, patients: int | None = None) -> list[EncodedExample]:
    """Return rows of so many patients; of nobody where there is no number."""
    ids, targets = np.arange(4, dtype=np.int32), np.ones(4, bool)
    names = [None if patients is None else f"p{row % patients}" for row in range(count)]
    return [EncodedExample(ids, targets, row + 1, False, name) for row, name in enumerate(names)]


TWENTY = rows_of(20)


def cost(privacy: dict[str, Any] | None, clinic: Clinic | None = None, **work: int) -> Cost:
    return cost_of(clinic or clinic_of(), job_of(privacy, **work), TWENTY, COORDINATES)


def whole_run(found: Cost, rounds: int = 4) -> float:
    return epsilon_of({found.step: found.steps * rounds}, found.delta).epsilon


# What is refused


@pytest.mark.parametrize("asked", [RECORD, SHARED, CENTRAL], ids=["local", "shared", "central"])
def test_exact_losses_need_both_sides(asked: dict[str, Any]):
    with pytest.raises(LossesNotAllowed, match="exact_losses = false in client"):
        cost({**asked, "exact_losses": True})
    allowed = cost({**asked, "exact_losses": True}, clinic_of(exact_losses=True))
    assert allowed == cost(asked) == cost(asked, clinic_of(exact_losses=True))


def test_a_clinic_that_demands_patients_refuses_a_job_that_protects_records():
    with pytest.raises(UnitNotAllowed, match="single records"):
        cost(RECORD, clinic_of(unit="patient"))


def test_a_bounded_clinic_gives_no_exact_loss_to_a_job_without_noise():
    with pytest.raises(BudgetSpent, match="nothing was computed"):
        require_losses_allowed(clinic_of(max_epsilon=8.0), job_of(None))
    require_losses_allowed(clinic_of(max_epsilon=8.0, exact_losses=True), job_of(None))
    require_losses_allowed(clinic_of(max_epsilon=8.0), job_of(RECORD))
    require_losses_allowed(clinic_of(), job_of(None))


@pytest.mark.parametrize(
    ("asked", "steps"),
    [(RECORD, 5), (SHARED, 1), ({**CENTRAL, "noise_multiplier": 0.5}, 5)],
    ids=["local", "distributed", "central"],
)
def test_too_little_noise_for_the_named_epsilon_is_refused(asked: dict[str, Any], steps: int):
    trusting = clinic_of(trust_central_noise=True)
    real = whole_run(cost(asked, trusting, steps=steps))
    with pytest.raises(PrivacyError, match="the server promises") as caught:
        cost({**asked, "epsilon": 0.98 * real}, trusting, steps=steps)
    assert caught.value.reason == "privacy-refused"
    cost({**asked, "epsilon": 1.001 * real}, trusting, steps=steps)


def test_a_promise_over_too_many_rounds_is_refused():
    promise = {**RECORD, "epsilon": 1.001 * whole_run(cost(RECORD))}
    cost(promise, rounds=4)
    with pytest.raises(PrivacyError, match="25 steps"):
        cost(promise, rounds=5)


def test_a_delta_of_one_unit_or_more_is_refused():
    many = [TWENTY[0]] * 100_000
    job = job_of({**RECORD, "delta": 1e-5})
    with pytest.raises(PrivacyError, match=r"below 1/100000"):
        cost_of(clinic_of(), job, many, COORDINATES)
    with pytest.raises(PrivacyError, match=r"below 1/100000"):
        cost_of(clinic_of(delta=1e-5), job_of(RECORD), many, COORDINATES)
    assert cost_of(clinic_of(), job_of(RECORD), many, COORDINATES).delta == 1 / 200_000
    assert cost_of(clinic_of(delta=1e-6), job, many, COORDINATES).delta == 1e-6


@pytest.mark.parametrize("colluding", [4, 5, 99])
def test_as_many_colluding_clinics_as_add_noise_are_refused(colluding: int):
    with pytest.raises(PrivacyError, match="none of it protects"):
        cost(SHARED, clinic_of(colluding_clinics=colluding))


@pytest.mark.parametrize(
    "asked",
    [
        {**SHARED, "honest_clinics": None},
        {**SHARED, "noise_multiplier": "auto", "epsilon": 3.0},
        {**CENTRAL, "noise_multiplier": "auto", "epsilon": 3.0},
    ],
    ids=["nobody shares it", "shared noise of no size", "central noise of no size"],
)
def test_noise_that_the_job_leaves_open_is_refused(asked: dict[str, Any]):
    with pytest.raises(PrivacyError, match="nothing was trained"):
        cost(asked)


RANKS = RankTerms(rule="nested", of={"north": 1}, others=2)


@pytest.mark.parametrize(
    ("asked", "changes"),
    [
        (SHARED, {"ranks": RANKS}),
        (CENTRAL, {"ranks": RANKS}),
        (SHARED, {"sends": "A"}),
        (SHARED, {"sends": "A", "ranks": RANKS}),
    ],
)
def test_noise_for_other_coordinates_than_are_sent_is_refused(
    asked: dict[str, Any], changes: dict[str, Any]
):
    with pytest.raises(PrivacyError, match="nothing was trained") as caught:
        require_noise_fits(job_of(asked).model_copy(update=changes))
    assert caught.value.reason == "privacy-refused"


@pytest.mark.parametrize(
    ("asked", "changes"),
    [
        (None, {"sends": "A", "ranks": RANKS}),
        (RECORD, {"sends": "A", "ranks": RANKS}),
        (CENTRAL, {"sends": "A"}),
        (SHARED, {"trains": "B", "sends": "B"}),
    ],
)
def test_noise_that_fits_the_part_is_accepted(
    asked: dict[str, Any] | None, changes: dict[str, Any]
):
    require_noise_fits(job_of(asked).model_copy(update=changes))


@pytest.mark.parametrize("count", [steps_of, lambda job, rows: cost_of(clinic_of(), job, rows, 9)])
def test_patients_cannot_be_protected_in_rows_that_name_none(count: Any):
    with pytest.raises(DataError, match="row 1 names no patient"):
        count(job_of({**RECORD, "unit": "patient"}), TWENTY)


# What it costs


@pytest.mark.parametrize("epsilon", [0.5, 2.0, 8.0])
def test_automatic_noise_keeps_the_promise_over_the_whole_planned_run(epsilon: float):
    found = cost({"unit": "record", "epsilon": epsilon}, rounds=6)
    assert 0.95 * epsilon < whole_run(found, rounds=6) <= epsilon
    # Of one round alone it would be far less: the noise is for all of them.
    assert whole_run(found, rounds=1) < 0.6 * epsilon
    assert found.noise_multiplier == found.step.noise_multiplier


def test_a_clinic_with_a_smaller_delta_gets_more_automatic_noise():
    auto = {"unit": "record", "epsilon": 2.0}
    strict = cost(auto, clinic_of(delta=1e-8))
    assert strict.noise_multiplier > cost(auto).noise_multiplier
    assert whole_run(strict) <= 2.0


def test_rate_and_steps_count_patients_where_patients_are_protected():
    rows, job = rows_of(40, patients=8), job_of({**RECORD, "unit": "patient"})
    passes = job.training.model_copy(update={"local_steps": None, "local_epochs": 3})
    job = job.model_copy(update={"training": passes})
    found = cost_of(clinic_of(), job, rows, COORDINATES)
    assert (found.step.sampling_rate, found.steps, found.unit) == (2 / 8, 3 * 4, "patient")
    assert steps_of(job, rows) == found.steps


def test_a_clinic_smaller_than_a_batch_is_charged_without_sampling():
    found = cost_of(clinic_of(), job_of(RECORD), rows_of(1), COORDINATES)
    assert found.step.sampling_rate == 1.0


def test_shared_noise_counts_without_the_shares_of_colluding_clinics():
    counted = [
        cost(SHARED, clinic_of(colluding_clinics=known)).step.noise_multiplier for known in range(4)
    ]
    assert counted == pytest.approx([math.sqrt((4 - known) / 4) for known in range(4)])
    found = cost(SHARED, steps=1)
    assert (found.step.noise, found.steps, found.noise_multiplier) == ("skellam", 1, 1.0)
    assert 0 < found.step.l2 <= found.step.l1


def test_the_sensitivity_of_shared_noise_grows_with_the_adapter_in_units_of_the_grid():
    small, large = (
        cost_of(clinic_of(), job_of(SHARED), TWENTY, size).step.l2 for size in (100, 10_000)
    )
    assert 5 < large / small < 20


def test_central_noise_counts_only_where_the_clinic_trusts_it():
    assert cost(CENTRAL).step == Charge(noise="none")
    trusted = cost(CENTRAL, clinic_of(trust_central_noise=True))
    assert trusted.step == Charge(noise="gaussian", noise_multiplier=1.0)
    # Who takes part is known, so that nothing amplifies.
    assert (trusted.step.sampling_rate, trusted.steps, trusted.unit) == (1.0, 1, "clinic")


def test_a_job_without_noise_costs_one_row_without_noise():
    found = cost(None)
    assert (found.step, found.steps, found.noise_multiplier) == (Charge(noise="none"), 1, 0.0)


@pytest.mark.parametrize("asked", [RECORD, SHARED, CENTRAL], ids=["local", "shared", "central"])
def test_noise_of_a_known_seed_counts_as_none(asked: dict[str, Any]):
    known = clinic_of(test_seed=7, trust_central_noise=True)
    found = cost({**asked, "epsilon": 100.0}, known, steps=1)
    assert found.step == Charge(noise="none")
    assert found.noise_multiplier == 1.0


def test_a_bounded_clinic_refuses_noise_that_is_only_promised():
    with pytest.raises(BudgetSpent, match="trust_central_noise = false"):
        cost(CENTRAL, clinic_of(max_epsilon=8.0))
    assert cost(CENTRAL, clinic_of(max_epsilon=8.0, trust_central_noise=True)).step.noise
