"""Rounds under protection: what is charged, what leaves, and how much noise is in it."""

import dataclasses
import json
import math
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedpeft.config import AdapterSettings, PrivacySettings, TrainingSettings
from fedpeft.errors import BudgetSpent, NotFinite, TooFewClinics
from fedpeft.models import adapter_schema, fingerprint, initial_state
from fedpeft.privacy.charge import Charge
from fedpeft.privacy.ledger import Ledger
from fedpeft.privacy.noise import GaussianNoise
from fedpeft.privacy.skellam import grid_for, sensitivities
from fedpeft.protocol import Job, SumTerms
from fedpeft.protocol.parcel import Held
from fedpeft.protocol.sums import GRID_BITS, INTEGERS, grid_limit, model_digest, value_of_unit
from fedpeft.sealing import SERVER, Context, Identity, clinic_role
from fedpeft.secagg import STAGES, Aggregation, Quantiser, Session, State, Terms
from fedpeft.training import StepDone
from fedpeft_client.rounds.clinic import Clinic, Membership
from fedpeft_client.rounds.learning import Trained
from fedpeft_client.rounds.work import Assignment, ClinicWork
from fedpeft_client.settings import BudgetSettings, DataSettings
from fedpeft_client.sums.summing import SecureSums, _summand

LORA = AdapterSettings(rank=2, alpha=4.0)
STEPS, CLINICS = 4, 4
LOCAL = PrivacySettings(unit="record", noise_multiplier=0.8)
CENTRAL = PrivacySettings(unit="clinic", mechanism="central", noise_multiplier=1.0)
SHARED = PrivacySettings(
    unit="patient", mechanism="distributed", noise_multiplier=0.8, honest_clinics=CLINICS
)


@pytest.fixture
def clinic(tiny_model: Path, tmp_path: Path) -> Clinic:
    return clinic_of(tiny_model, tmp_path, "north")


def clinic_of(model: Path, folder: Path, name: str, rows: int = 12, **changes: Any) -> Clinic:
    file = folder / f"{name}.jsonl"
    lines = [
        {
            "question": f"{name} {at}?",
            "answer": f"It is {at * at}.",
            "patient_id": f"{name}{at // 2}",
        }
        for at in range(rows)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    identity = Identity.generate()
    clinic = Clinic(
        name=name,
        federation="sea",
        membership=Membership(identity, identity.public),
        model=model,
        data=DataSettings(train=file, valid=file),
        ledger=folder / f"{name}.sqlite",
        dtype="float32",
    )
    return dataclasses.replace(clinic, **changes)


def job_for(clinic: Clinic, privacy: PrivacySettings | None, **changes: Any) -> Job:
    shared = privacy is not None and privacy.mechanism == "distributed"
    job = Job(
        run="0" * 32,
        federation="sea",
        fingerprint=fingerprint(clinic.model),
        quantization="none",
        adapter=LORA,
        training=TrainingSettings(
            optimizer="sgd",
            learning_rate=0.5,
            batch_size=4,
            local_steps=1 if shared else STEPS,
            max_length=64,
        ),
        aggregation=SumTerms(
            confidentiality="secagg",
            adversary="active",
            bits=GRID_BITS if shared else 16,
            limit=grid_limit() if shared else 1.0,
        ),
        privacy=privacy,
        round=1,
        rounds=3,
    )
    return job.model_copy(update=changes)


def assigned(clinic: Clinic, job: Job) -> Assignment:
    state = initial_state(adapter_schema(clinic.model, LORA), 0)
    return Assignment(job, Held(state), state.schema.hash, 1)


def train(
    clinic: Clinic,
    privacy: PrivacySettings | None,
    work: ClinicWork | None = None,
    **changes: Any,
) -> Trained:
    job = job_for(clinic, privacy, **changes)
    return (work or ClinicWork()).train(clinic, assigned(clinic, job))


def charged(clinic: Clinic) -> dict[Charge, int]:
    total: dict[Charge, int] = {}
    with Ledger(clinic.ledger) as ledger:
        for dataset in ledger.datasets():
            total |= ledger.charges(dataset.id)
    return total


# What breaks


def test_a_crash_inside_a_step_leaves_that_step_charged(
    clinic: Clinic, monkeypatch: pytest.MonkeyPatch
):
    drawn: list[int] = []
    real = GaussianNoise.add_to

    def crash(noise: GaussianNoise, total: torch.Tensor, scale: float) -> None:
        drawn.append(len(drawn))
        if len(drawn) == 2:
            raise MemoryError
        real(noise, total, scale)

    monkeypatch.setattr(GaussianNoise, "add_to", crash)
    with pytest.raises(MemoryError):
        train(clinic, LOCAL)
    assert sum(charged(clinic).values()) == 2


@pytest.mark.parametrize("executed", [1, 3])
def test_a_kill_in_the_middle_of_a_round_charges_what_ran_and_one_step_at_most(
    executed: int, clinic: Clinic
):
    """The peers' fault: to charge the steps that a round was expected to have."""

    def kill(done: StepDone) -> None:
        if done.step == executed:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        try:
            train(clinic, LOCAL, ClinicWork(kill))
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert executed <= sum(charged(clinic).values()) <= executed + 1
    again = train(clinic, LOCAL)
    assert again.privacy is not None
    assert again.privacy.steps == sum(charged(clinic).values()) >= executed + STEPS


def test_a_refused_round_reads_nothing_and_changes_nothing(clinic: Clinic):
    strict = dataclasses.replace(clinic, privacy=BudgetSettings(max_epsilon=0.01))
    seen: list[StepDone] = []
    with pytest.raises(BudgetSpent):
        train(strict, LOCAL, ClinicWork(seen.append))
    assert (seen, charged(strict)) == ([], {})


def test_an_update_that_is_not_finite_stays_charged(clinic: Clinic):
    wild = job_for(clinic, CENTRAL).training.model_copy(update={"learning_rate": 1e38})
    with pytest.raises(NotFinite):
        train(clinic, CENTRAL, training=wild)
    assert charged(clinic) == {Charge(noise="none"): 1}


# What leaves


@pytest.mark.parametrize("privacy", [LOCAL, CENTRAL, SHARED], ids=["local", "central", "shared"])
def test_no_loss_and_no_token_count_leaves_beside_noise(privacy: PrivacySettings, clinic: Clinic):
    trained = train(clinic, privacy)
    assert (trained.nll, trained.tokens, trained.rows) == (0.0, 0, 12)
    assert trained.update.norm() > 0


@pytest.mark.parametrize("privacy", [LOCAL, CENTRAL], ids=["local", "central"])
def test_exact_losses_leave_where_both_sides_want_them(privacy: PrivacySettings, clinic: Clinic):
    both = dataclasses.replace(clinic, privacy=BudgetSettings(exact_losses=True))
    trained = train(both, privacy.model_copy(update={"exact_losses": True}))
    assert trained.nll > 0
    assert trained.tokens > 0


def test_only_noisy_rounds_report_a_loss_of_privacy(clinic: Clinic):
    assert train(clinic, None).privacy is None
    assert train(clinic, CENTRAL).privacy is None
    local = train(clinic, LOCAL).privacy
    assert local is not None
    assert local.epsilon is None  # the data were used without noise above
    assert local.steps == 2 + STEPS


@pytest.mark.parametrize(("clip", "within"), [(1e-3, False), (1e3, True)])
def test_under_central_noise_an_update_is_cut_to_the_clip(
    clip: float, within: bool, clinic: Clinic
):
    trained = train(clinic, CENTRAL.model_copy(update={"clip": clip}))
    assert trained.update.norm() <= clip * (1 + 1e-6)
    assert trained.within_clip is within
    if within:
        assert torch.equal(trained.update.values, train(clinic, None).update.values)
    else:
        assert trained.update.norm() == pytest.approx(clip)


# How much noise


def test_only_a_simulations_seed_makes_a_round_repeat(clinic: Clinic):
    known = [train(dataclasses.replace(clinic, test_seed=3), LOCAL) for _ in range(2)]
    other = train(dataclasses.replace(clinic, test_seed=4), LOCAL)
    assert torch.equal(known[0].update.values, known[1].update.values)
    assert not torch.equal(known[0].update.values, other.update.values)
    assert charged(clinic).keys() == {Charge(noise="none")}


@pytest.mark.parametrize("privacy", [LOCAL, SHARED], ids=["local", "shared"])
def test_a_seed_in_a_servers_job_is_not_listened_to(privacy: PrivacySettings, clinic: Clinic):
    seeded = privacy.model_copy(update={"test_seed": 3})
    one, other = (train(clinic, seeded).update.values for _ in range(2))
    assert not torch.equal(one, other)
    assert {charge.noise for charge in charged(clinic)} <= {"gaussian", "skellam"}


def test_the_noise_of_a_local_round_is_that_of_its_steps(clinic: Clinic):
    strong = LOCAL.model_copy(update={"noise_multiplier": 50.0, "clip": 0.3})
    update = train(clinic, strong).update.values
    rate, expected = 0.5, 4
    per_step = rate * 50.0 * 0.3 / expected
    assert float(update.std()) == pytest.approx(per_step * math.sqrt(STEPS), rel=0.1)


@pytest.fixture(scope="module")
def shares(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory):
    """Four clinics of different size with a share each, from known seeds: (clinics, trained)."""
    folder, work = tmp_path_factory.mktemp("shares"), ClinicWork()
    clinics = [
        clinic_of(tiny_model, folder, f"c{at}", 6 + 10 * at, test_seed=at) for at in range(CLINICS)
    ]
    return clinics, [train(each, SHARED, work) for each in clinics]


def test_shares_are_whole_numbers_of_a_part_of_the_variance(shares: Any):
    _, trained = shares
    size = trained[0].update.schema.numel
    l2, _ = sensitivities(SHARED.clip, size, grid_for(SHARED.clip, size))
    for one in trained:
        assert torch.equal(one.update.values, one.update.values.round())
        spread = float(one.update.values.double().std())
        assert spread == pytest.approx(0.8 * l2 / math.sqrt(CLINICS), rel=0.06)


def test_the_shares_of_all_honest_clinics_add_to_the_whole_noise(shares: Any):
    _, trained = shares
    size = trained[0].update.schema.numel
    l2, _ = sensitivities(SHARED.clip, size, grid_for(SHARED.clip, size))
    total = torch.stack([one.update.values.double() for one in trained]).sum(dim=0)
    assert float(total.std()) == pytest.approx(0.8 * l2, rel=0.06)
    fewer = float((total - trained[0].update.values.double()).std())
    assert fewer == pytest.approx(0.8 * l2 * math.sqrt(3 / 4), rel=0.06)


class Sum:
    """The clinics' own sides of a secure sum over ``trained``, with answers that may be lost."""

    def __init__(
        self, clinics: Sequence[Clinic], trained: Sequence[Trained], honest: int = CLINICS
    ) -> None:
        job = job_for(clinics[0], SHARED.model_copy(update={"honest_clinics": honest}))
        self.assignment = assigned(clinics[0], job)
        self.context = Context(
            federation="sea",
            run=1,
            round=1,
            attempt=1,
            sender=SERVER,
            receiver=clinic_role("north"),
            purpose="train",
            schema=self.assignment.schema,
        )
        self.members = {each.name: (each, one) for each, one in zip(clinics, trained, strict=True)}
        self.sums = SecureSums(lambda _clinic, _peers: None)
        terms, model = job.aggregation, model_digest(job, self.assignment.held.to_bytes())
        # Of the least number of clinics this server says nothing: each clinic sees to it.
        self.server = Aggregation(
            Session(federation="sea", run=1, round=1, attempt=1, kind="train", model=model),
            Terms(
                identities={
                    each.name: each.membership.identity.public.signing_bytes for each in clinics
                },
                adversary="active",
                threshold=None,
                minimum=3,
                coordinates=trained[0].update.schema.numel,
                integers=INTEGERS,
                quantiser=Quantiser(terms.bits, terms.limit),
            ),
        )

    def ask(self, name: str, request: bytes) -> bytes:
        clinic, one = self.members[name]
        if self.server.stage == STAGES[0]:
            return self.sums.begin(clinic, self.context, self.assignment, one)
        return self.sums.go_on(clinic, self.context, self.server.stage, request)

    def state_of(self, name: str) -> State:
        return self.sums._sums[name].session.state

    def step(self, lost: str = "") -> None:
        for name, request in self.server.requests().items():
            answer = self.ask(name, request)
            if name != lost:
                self.server.receive(name, answer)
        self.server.close()

    def all(self) -> Any:
        for _ in STAGES:
            self.step()
        return self.server.result


def summed(trained: Sequence[Trained]) -> NDArray[np.int64]:
    return sum((one.update.values.numpy().astype(np.int64) for one in trained), start=np.int64(0))  # pyright: ignore[reportReturnType]


def test_the_secure_sum_is_the_sum_of_whole_numbers_exactly(shares: Any):
    clinics, trained = shares
    found = Sum(clinics, trained).all()
    assert np.array_equal(found.coordinates, summed(trained).astype(np.float64))
    assert found.survivors == tuple(each.name for each in clinics)


def test_in_the_secure_sum_there_is_no_loss_no_token_and_no_weight(shares: Any):
    """The peers' fault: weights by rows, where the noise is for equal ones."""
    clinics, trained = shares
    integers = Sum(clinics, trained).all().integers
    rows = 6 + 16 + 26 + 36
    assert integers == {"num-examples": rows, "nll": 0, "tokens": 0, "clipped": 0, "within-clip": 0}
    job = job_for(clinics[0], SHARED)
    assert {_summand(one, job, "c0").weight for one in trained} == {1}
    plain = job_for(clinics[0], None)
    assert [_summand(one, plain, "c0").weight for one in trained] == [6, 16, 26, 36]


@pytest.mark.parametrize("stage", ["keys", "shares", "masked", "check"])
def test_no_clinic_opens_a_sum_of_fewer_than_the_noise_needs(stage: str, shares: Any):
    clinics, trained = shares
    world = Sum(clinics, trained)
    while world.server.stage != stage:
        world.step()
    world.step(lost="c2")
    # Three would be enough for the secure sum itself, and is for the server.
    refused: set[str] = set()
    while world.server.stage != "done" and not refused:
        for name, request in world.server.requests().items():
            try:
                world.server.receive(name, world.ask(name, request))
            except TooFewClinics:
                refused.add(name)
        if not refused:
            world.server.close()
    assert refused >= {"c0", "c1", "c3"}
    assert all(world.state_of(name) is State.ENDED for name in refused)


def test_where_the_noise_needs_fewer_a_lost_clinic_is_no_obstacle(shares: Any):
    clinics, trained = shares
    world = Sum(clinics, trained, honest=3)
    world.step()
    world.step(lost="c2")
    while world.server.stage != "done":
        world.step()
    others = [*trained[:2], trained[3]]
    assert np.array_equal(world.server.result.coordinates, summed(others).astype(np.float64))


def test_a_distributed_round_is_one_charged_step_that_moves_against_the_gradient(shares: Any):
    clinics, trained = shares
    told = trained[0].privacy
    assert told.steps == 1
    assert sum(charged(clinics[0]).values()) == 1
    size = trained[0].update.schema.numel
    job = job_for(clinics[0], SHARED)
    assert value_of_unit(job, size) == -0.5 * grid_for(SHARED.clip, size) / 4
