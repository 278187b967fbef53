"""The clinic's ledger at work: what was spent stays spent, and the clinic's own bound decides."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft.config import AdapterSettings, PrivacySettings, TrainingSettings
from fedpeft.data import EncodedExample, EncodedSet
from fedpeft.errors import BudgetSpent, LedgerDamaged, PrivacyError
from fedpeft.privacy.accounting import epsilon_of
from fedpeft.privacy.charge import Charge
from fedpeft.privacy.ledger import Ledger
from fedpeft.protocol import Job, SumTerms
from fedpeft.protocol.privacy import ClinicPrivacy
from fedpeft.sealing import Identity
from fedpeft_client.rounds.clinic import Clinic, Membership
from fedpeft_client.rounds.cost import Cost
from fedpeft_client.rounds.protection import Protection, Protector
from fedpeft_client.rounds.records import ClinicRows
from fedpeft_client.settings import BudgetSettings, DataSettings

COORDINATES, STEPS = 4096, 3
NOISY = PrivacySettings(unit="record", noise_multiplier=1.0)
SHARED = PrivacySettings(
    unit="record", mechanism="distributed", noise_multiplier=1.0, honest_clinics=4
)
MEMBERSHIP = Membership(Identity.generate(), Identity.generate().public)


@pytest.fixture
def clinic(tmp_path: Path) -> Clinic:
    return Clinic(
        name="north",
        federation="sea",
        membership=MEMBERSHIP,
        model=Path("model"),
        data=DataSettings(train=Path("rows.jsonl")),
        ledger=tmp_path / "ledger.sqlite",
    )


def bounded(clinic: Clinic, **privacy: Any) -> Clinic:
    return replace(clinic, privacy=BudgetSettings(**privacy))


def rows_of(*people: str) -> ClinicRows:
    ids, targets = np.arange(4, dtype=np.int32), np.ones(4, bool)
    rows = [EncodedExample(ids, targets, at + 1, False, name) for at, name in enumerate(people)]
    return ClinicRows(EncodedSet(tuple(rows), 0, 0, 4, 4, 8), tuple(sorted(people)))


PEOPLE = [f"patient-{number}" for number in range(20)]
ROWS = rows_of(*PEOPLE)


def job_of(privacy: PrivacySettings | None = NOISY, number: int = 1, **changes: Any) -> Job:
    job = Job(
        run="0" * 32,
        federation="sea",
        fingerprint="a" * 64,
        quantization="none",
        adapter=AdapterSettings(rank=2),
        training=TrainingSettings(local_steps=STEPS, batch_size=2),
        aggregation=SumTerms(confidentiality="secagg", adversary="active", bits=16, limit=1.0),
        privacy=privacy,
        round=number,
        rounds=50,
    )
    return job.model_copy(update=changes)


def train(
    clinic: Clinic,
    job: Job | None = None,
    *,
    protector: Protector | None = None,
    run: int = 1,
    rows: ClinicRows = ROWS,
    coordinates: int = COORDINATES,
) -> ClinicPrivacy:
    """Charge a whole round as training does, and return what the server is told of it."""
    job, at = job or job_of(), protector or Protector()
    opened = at.open(clinic, job, run, rows, coordinates)
    for step in range(1, opened.cost.steps + 1):
        opened.charge(step)
    return opened.report(job.privacy or NOISY, clinic.privacy.colluding_clinics)


def charged(clinic: Clinic, rows: ClinicRows = ROWS) -> dict[Charge, int]:
    with Ledger(clinic.ledger) as ledger:
        return ledger.charges(ledger.dataset(rows.keys).id)


def epsilon_after(rounds: int, of: Charge | None = None) -> float:
    step = of or Charge(noise="gaussian", sampling_rate=2 / 20, noise_multiplier=1.0)
    return epsilon_of({step: STEPS * rounds}, 1e-5).epsilon


# What is refused


def test_a_job_without_noise_is_refused_and_not_charged_where_there_is_a_bound(clinic: Clinic):
    strict = bounded(clinic, max_epsilon=1000.0)
    with pytest.raises(BudgetSpent, match="trains without noise") as caught:
        train(strict, job_of(None))
    assert caught.value.reason == "budget"
    assert charged(strict) == {}


def test_the_round_that_would_pass_the_bound_is_refused_before_its_first_step(clinic: Clinic):
    limit = 1.0001 * epsilon_after(2)
    strict, protector = bounded(clinic, max_epsilon=limit), Protector()
    told = [train(strict, job_of(number=at), protector=protector).epsilon for at in (1, 2)]
    before = charged(strict)
    with pytest.raises(BudgetSpent, match="round 3 of run 1 is refused"):
        train(strict, job_of(number=3), protector=protector)
    assert charged(strict) == before
    assert told[-1] is not None and told[-1] <= limit
    assert sum(before.values()) == 2 * STEPS


@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
def test_no_sequence_of_rounds_passes_the_bound(noise: float, clinic: Clinic):
    strict, protector = bounded(clinic, max_epsilon=6.0), Protector()
    job = job_of(NOISY.model_copy(update={"noise_multiplier": noise}))
    for number in range(1, 5):
        try:
            train(strict, job.model_copy(update={"round": number}), protector=protector)
        except BudgetSpent:
            break
    assert epsilon_of(charged(strict), 1e-5).epsilon <= 6.0


def test_data_trained_on_without_noise_once_are_refused_under_a_bound_for_good(clinic: Clinic):
    train(clinic, job_of(None))
    with pytest.raises(BudgetSpent, match="trained on without noise before"):
        train(bounded(clinic, max_epsilon=1000.0))


def test_central_noise_that_is_not_trusted_is_refused_under_a_bound(clinic: Clinic):
    central = PrivacySettings(unit="clinic", mechanism="central", noise_multiplier=5.0)
    with pytest.raises(BudgetSpent, match="only promised by the server"):
        train(bounded(clinic, max_epsilon=1000.0), job_of(central))
    train(bounded(clinic, max_epsilon=1000.0, trust_central_noise=True), job_of(central))


def test_a_job_whose_noise_is_all_known_to_colluders_is_refused_and_not_charged(clinic: Clinic):
    careful = bounded(clinic, colluding_clinics=4)
    with pytest.raises(PrivacyError, match="none of it protects"):
        train(careful, job_of(SHARED))
    assert charged(careful) == {}


def test_a_ledger_that_was_removed_is_no_new_beginning(clinic: Clinic):
    train(clinic)
    clinic.ledger.unlink()
    with pytest.raises(LedgerDamaged):
        train(clinic)


# What was spent stays spent


BEGINNINGS: dict[str, dict[str, Any]] = {
    "the next round": {"job": job_of(number=2)},
    "the same round again": {},
    "another run of the server": {"run": 2},
    "another base model": {"job": job_of(fingerprint="b" * 64)},
    "another rank": {"job": job_of(adapter=AdapterSettings(rank=8)), "coordinates": 999},
    "a renamed file": {"rows": rows_of(*PEOPLE)},
    "the rows in another order": {"rows": rows_of(*reversed(PEOPLE))},
}


@pytest.mark.parametrize("restarted", [False, True], ids=["same process", "restarted"])
@pytest.mark.parametrize("name", BEGINNINGS)
def test_epsilon_does_not_begin_again(name: str, restarted: bool, clinic: Clinic):
    protector = Protector()
    train(clinic, protector=protector)
    again = train(clinic, protector=None if restarted else protector, **BEGINNINGS[name])
    assert again.steps == 2 * STEPS
    assert again.epsilon == epsilon_after(2) > epsilon_after(1)


def test_a_patient_more_makes_no_new_data_set(clinic: Clinic):
    train(clinic)
    more = rows_of(*PEOPLE, "patient-new")
    assert train(clinic, rows=more).steps == 2 * STEPS
    assert charged(clinic, more) == charged(clinic)


def test_what_other_federations_spent_counts_for_the_bound_and_is_not_told(clinic: Clinic):
    lake = replace(clinic, federation="lake")
    train(lake, job_of(federation="lake"))
    told = train(clinic)
    assert (told.steps, told.epsilon) == (STEPS, epsilon_after(1))
    with pytest.raises(BudgetSpent, match=r"from epsilon .* to .* past"):
        train(bounded(clinic, max_epsilon=1.0001 * epsilon_after(2)))


def test_a_job_without_noise_is_recorded_as_one_row_without_noise(clinic: Clinic):
    train(clinic, job_of(None))
    assert charged(clinic) == {Charge(noise="none"): 1}
    told = train(clinic, job_of(number=2))
    assert (told.epsilon, told.epsilon_rdp, told.steps) == (None, None, 1 + STEPS)


def test_two_clinics_of_a_machine_may_share_a_ledger(clinic: Clinic):
    south, protector = replace(clinic, name="south"), Protector()
    other = rows_of("someone", "else")
    train(clinic, protector=protector)
    apart = train(south, protector=protector, rows=other)
    assert apart.steps == STEPS
    # A patient of both is protected in both: it is one data set from then on.
    both = train(south, protector=protector, rows=rows_of("someone", PEOPLE[0]))
    assert both.steps == 3 * STEPS
    with Ledger(clinic.ledger) as ledger:
        assert ledger.verify() == []


def test_the_person_at_the_box_is_told_once_what_the_ledger_knows(clinic: Clinic):
    told: list[str] = []
    first = Protector(told.append)
    for number in (1, 2):
        train(clinic, job_of(number=number), protector=first)
    train(clinic, protector=Protector(told.append))
    assert len(told) == 2
    assert "begins with nothing spent" in told[0]
    assert "what was spent counts" in told[1]
    assert not any(name in "".join(told) for name in PEOPLE)


# What is told


def test_the_report_is_of_the_steps_charged_and_of_no_record(clinic: Clinic):
    told = train(bounded(clinic, delta=1e-6), job_of(NOISY.model_copy(update={"clip": 0.5})))
    spent = epsilon_of({Charge(noise="gaussian", sampling_rate=0.1, noise_multiplier=1.0): 3}, 1e-6)
    assert told.model_dump() == {
        "epsilon": spent.epsilon,
        "delta": 1e-6,
        "epsilon_rdp": spent.epsilon_rdp,
        "steps": 3,
        "noise_multiplier": 1.0,
        "clip": 0.5,
        "epsilon_outside": None,
        "epsilon_alone": None,
    }


def test_other_people_in_as_many_rows_give_the_same_report(clinic: Clinic):
    others = rows_of(*(f"stranger-{number}" for number in range(20)))
    assert train(clinic, rows=others) == train(clinic)


@pytest.mark.parametrize("colluding", [0, 1, 3])
def test_the_more_noise_a_reader_must_face_the_smaller_epsilon(colluding: int, clinic: Clinic):
    told = train(bounded(clinic, colluding_clinics=colluding), job_of(SHARED))
    views = (told.epsilon_outside, told.epsilon, told.epsilon_alone)
    outside, against_server, alone = (math.inf if view is None else view for view in views)
    assert 0 < outside <= against_server <= alone < math.inf
    assert (outside == against_server) == (colluding == 0)
    assert (alone == against_server) == (colluding == 3)


def test_ten_shares_give_the_figures_of_the_literature_in_their_order():
    """The share 0.35, rate 0.02, 500 steps, delta 1e-5: 51.1 alone, 2.27 in the sum of ten."""
    views: dict[int, Any] = {}
    settings = SHARED.model_copy(update={"honest_clinics": 10})
    for colluding in (0, 3):
        multiplier = 0.35 * math.sqrt(10 - colluding)
        step = Charge(
            noise="skellam", sampling_rate=0.02, noise_multiplier=multiplier, l2=2e4, l1=2e6
        )
        cost = Cost(unit="record", step=step, steps=1, delta=1e-5, noise_multiplier=multiplier)
        opened = Protection(cost=cost, charge=lambda _: None, _losses=lambda of=step: {of: 500})
        views[colluding] = opened.report(settings, colluding)
    whole, some = views[0], views[3]
    # Rényi accounting, which is all there is for Skellam noise, is above these figures: by
    # 10 to 20 % where they mean something, by far more where there is little noise.
    assert 2.27 <= whole.epsilon <= 1.25 * 2.27
    assert 3.28 <= some.epsilon <= 1.25 * 3.28
    assert 51.1 <= some.epsilon_alone < math.inf
    assert some.epsilon_outside == pytest.approx(whole.epsilon)
    assert some.epsilon_alone == pytest.approx(whole.epsilon_alone)


def test_noise_that_a_clinic_added_alone_is_not_taken_for_shared_noise(clinic: Clinic):
    train(clinic)
    told = train(clinic, job_of(SHARED, training=job_of().training), run=2)
    own = epsilon_after(1)
    views = (told.epsilon_outside, told.epsilon, told.epsilon_alone)
    assert all(view is not None and view > own for view in views)
    gaussian = [each for each in charged(clinic) if each.noise == "gaussian"]
    (shared,) = [each for each in charged(clinic) if each.noise == "skellam"]
    whole = replace(shared, noise_multiplier=shared.noise_multiplier * math.sqrt(4 / 3))
    assert told.epsilon_outside == pytest.approx(
        epsilon_of({gaussian[0]: STEPS, whole: 1}, 1e-5).epsilon
    )


def test_shares_of_an_earlier_number_of_clinics_are_never_taken_for_larger(clinic: Clinic):
    train(clinic, job_of(SHARED.model_copy(update={"honest_clinics": 40})))
    alone = train(clinic, job_of(SHARED.model_copy(update={"honest_clinics": 2})), run=2)
    assert alone.epsilon is not None and alone.epsilon_outside is not None
    assert alone.epsilon_outside <= alone.epsilon
    assert alone.epsilon_alone is None


def test_a_known_seed_is_told_as_no_bound(clinic: Clinic):
    told = train(replace(clinic, test_seed=5))
    assert (told.epsilon, told.epsilon_rdp) == (None, None)
    shared = train(replace(clinic, test_seed=5), job_of(SHARED))
    assert (shared.epsilon, shared.epsilon_outside, shared.epsilon_alone) == (None, None, None)
