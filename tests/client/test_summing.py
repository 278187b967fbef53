"""A clinic's part in a sum of different ranks: what it adds, and when it reveals nothing."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedpeft.adapters import AdapterSchema, AdapterState, TensorSpec
from fedpeft.config import AdapterSettings, PrivacySettings, TrainingSettings
from fedpeft.errors import TooFewClinics
from fedpeft.protocol import Job, RankTerms, SumTerms
from fedpeft.protocol.parcel import Held
from fedpeft.protocol.sums import integers_of, levels_of, model_digest, weight_of_level
from fedpeft.sealing import SERVER, Context, Identity, clinic_role
from fedpeft.secagg import STAGES, Aggregation, Quantiser, SecureSum, Session, State, Terms
from fedpeft_client.rounds.clinic import Clinic, Membership
from fedpeft_client.rounds.learning import Trained
from fedpeft_client.rounds.work import Assignment, Measured
from fedpeft_client.settings import ConfidentialitySettings, DataSettings
from fedpeft_client.sums.summing import SecureSums, _summand

RANK = 4
SCHEMA = AdapterSchema(
    (TensorSpec("m.lora_A.weight", (RANK, 5)), TensorSpec("m.lora_B.weight", (6, RANK))), "a" * 64
)
LIMIT = 64.0
IDENTITIES = {f"c{number}": Identity.generate() for number in range(8)}
OWNER = Identity.generate()
Kind = Literal["train", "evaluate"]


def terms_of(ranks: Mapping[str, int], *, alike: bool = False) -> RankTerms:
    return RankTerms(rule="nested", of=dict(ranks), others=min(ranks.values()), alike=alike)


def job_of(ranks: Mapping[str, int] | None, *, alike: bool = False, **changes: Any) -> Job:
    job = Job(
        run="0" * 32,
        federation="sea",
        fingerprint="a" * 64,
        quantization="none",
        adapter=AdapterSettings(rank=RANK),
        training=TrainingSettings(),
        aggregation=SumTerms(confidentiality="secagg", adversary="curious", bits=24, limit=LIMIT),
        ranks=None if ranks is None else terms_of(ranks, alike=alike),
        round=1,
        rounds=2,
    )
    return job.model_copy(update=changes)


def update_of(name: str, rank: int = RANK) -> AdapterState:
    part = SCHEMA.part("AB", rank)
    generator = torch.Generator().manual_seed(int(name[1:]))
    return AdapterState(part, torch.rand(part.numel, generator=generator) - 0.5)


def trained(update: AdapterState, rows: int) -> Trained:
    return Trained(update=update, rows=rows)


def rows_of(name: str) -> int:
    return 3 + 4 * int(name[1:])


def dense(update: AdapterState) -> NDArray[np.float64]:
    """Return an update of any rank in the shape of the whole adapter, made here by hand."""
    rank, tensors = update.schema.rank, update.tensors()
    a, b = np.zeros((RANK, 5)), np.zeros((6, RANK))
    a[:rank] = tensors["m.lora_A.weight"].numpy()
    b[:, :rank] = tensors["m.lora_B.weight"].numpy()
    return np.concatenate([a.ravel(), b.ravel()])


class World:
    """The clinics of one sum, of which each has its own process, and the server's side."""

    def __init__(
        self, ranks: Mapping[str, int], kind: Kind = "train", *, alike: bool = False
    ) -> None:
        self.job, self.kind, self.ranks = job_of(ranks, alike=alike), kind, ranks
        self.assignment = Assignment(
            self.job, Held(AdapterState(SCHEMA, torch.zeros(SCHEMA.numel))), SCHEMA.hash, 1
        )
        self.sums = {name: SecureSums(lambda _clinic, _peers: None) for name in ranks}
        self.server = Aggregation(
            Session(
                federation="sea",
                run=1,
                round=1,
                attempt=1,
                kind=kind,
                model=model_digest(self.job, self.assignment.held.to_bytes()),
            ),
            Terms(
                identities={name: IDENTITIES[name].public.signing_bytes for name in ranks},
                adversary="curious",
                threshold=None,
                minimum=3,
                coordinates=SCHEMA.numel if kind == "train" else 0,
                integers=integers_of(self.job),
                quantiser=Quantiser(24, LIMIT),
            ),
        )

    def ask(self, name: str, request: bytes) -> bytes:
        clinic = Clinic(
            name=name,
            federation="sea",
            membership=Membership(IDENTITIES[name], OWNER.public),
            model=Path("model"),
            data=DataSettings(train=Path("t.jsonl")),
            ledger=Path("ledger.sqlite"),
            aggregation=ConfidentialitySettings(adversary="curious"),
        )
        context = Context(
            federation="sea",
            run=1,
            round=1,
            attempt=1,
            sender=SERVER,
            receiver=clinic_role(name),
            purpose=f"{self.kind}.{self.server.stage}",
            schema=SCHEMA.hash,
        )
        if self.server.stage != STAGES[0]:
            return self.sums[name].go_on(clinic, context, self.server.stage, request)
        rank = self.job.ranks.rank(name) if self.job.ranks else RANK
        found = (
            trained(update_of(name, rank), rows_of(name))
            if self.kind == "train"
            else Measured(nll=2.0, tokens=5, rows=rows_of(name))
        )
        return self.sums[name].begin(clinic, context, self.assignment, found)

    def step(self, lost: Collection[str] = ()) -> set[str]:
        """Carry one stage but for the answers of ``lost``; return who reveals nothing."""
        refusing: set[str] = set()
        for name, request in self.server.requests().items():
            try:
                answer = self.ask(name, request)
            except TooFewClinics as error:
                assert "would show what single ones sent" in str(error)
                assert self.sums[name]._sums[name].session.state is State.ENDED
                refusing.add(name)
            else:
                if name not in lost:
                    self.server.receive(name, answer)
        if not refusing:
            self.server.close()
        return refusing

    def until(self, stage: str) -> set[str]:
        """Carry all stages before ``stage``, or until somebody reveals nothing."""
        refusing: set[str] = set()
        while self.server.stage != stage and not refusing:
            refusing = self.step()
        return refusing

    def all(self) -> SecureSum:
        assert self.until("done") == set()
        return self.server.result


# When a clinic reveals nothing


@pytest.mark.parametrize(
    ("ranks", "refusing"),
    [
        ({"c0": 2, "c1": 2, "c2": 2, "c3": 4, "c4": 4}, {"c3", "c4"}),
        ({"c0": 2, "c1": 2, "c2": 2, "c3": 4}, {"c3"}),
        ({"c0": 2, "c1": 2, "c2": 3, "c3": 4}, {"c2", "c3"}),
        ({"c0": 1, "c1": 2, "c2": 3, "c3": 4}, {"c2", "c3"}),
    ],
)
def test_a_clinic_that_too_few_train_beside_masks_nothing(
    ranks: dict[str, int], refusing: set[str]
):
    world = World(ranks, alike=True)
    assert world.until("masked") == set()
    assert world.step() == refusing
    # Before anything that depends on its update has left: it never masked.
    assert world.server.stage == "masked"


@pytest.mark.parametrize(
    "ranks",
    [
        {"c0": 2, "c1": 2, "c2": 2, "c3": 4},
        {"c0": 4, "c1": 4, "c2": 4, "c3": 2},
        {"c0": 2, "c1": 2, "c2": 2, "c3": 4, "c4": 4},
        {"c0": 1, "c1": 1, "c2": 1, "c3": 2, "c4": 4, "c5": 4, "c6": 4},
    ],
)
def test_by_rows_a_rank_of_one_or_two_is_refused_by_every_clinic(ranks: dict[str, int]):
    """Also by those who are safe themselves, as the lone clinic's rows would be opened."""
    world = World(ranks)
    assert world.until("masked") == set()
    assert world.step() == set(ranks)
    assert world.server.stage == "masked"


def test_by_rows_two_at_the_lowest_rank_are_refused_though_all_train_their_columns():
    ranks = {"c0": 1, "c1": 1, "c2": 4, "c3": 4, "c4": 4}
    assert World(ranks).until("done") == set(ranks)
    assert len(World(ranks, alike=True).all().survivors) == 5


def test_a_clinic_whose_companions_fell_away_before_masking_masks_nothing():
    world = World({"c0": 2, "c1": 2, "c2": 4, "c3": 4, "c4": 4}, alike=True)
    world.until("shares")
    assert world.step(lost={"c4"}) == set()
    assert world.step() == {"c2", "c3"}


def test_a_clinic_whose_companions_fell_away_after_masking_does_not_vouch():
    """It has masked already; without its share of the secrets the sum is not opened."""
    world = World({"c0": 2, "c1": 2, "c2": 4, "c3": 4, "c4": 4}, alike=True)
    world.until("masked")
    assert world.step(lost={"c4"}) == set()
    assert world.server.stage == "check"
    assert world.step() == {"c2", "c3"}


def test_companions_of_a_lower_rank_may_fall_away():
    ranks = {"c0": 2, "c1": 2, "c2": 4, "c3": 4, "c4": 4}
    world = World(ranks, alike=True)
    world.until("masked")
    assert world.step(lost={"c0"}) == set()
    assert world.all().survivors == ("c1", "c2", "c3", "c4")


TWO_RANKS = {"c0": 2, "c1": 2, "c2": 2, "c3": 4, "c4": 4, "c5": 4, "c6": 4, "c7": 4}


@pytest.mark.parametrize("stage", ["shares", "masked"])
@pytest.mark.parametrize("lost", [{"c0"}, {"c1", "c2"}, {"c3", "c4", "c5"}])
def test_by_rows_nobody_goes_on_where_a_rank_is_left_with_one_or_two(stage: str, lost: set[str]):
    world = World(TWO_RANKS)
    world.until(stage)
    assert world.step(lost) == set()
    assert world.step() == set(TWO_RANKS) - lost


@pytest.mark.parametrize("stage", ["shares", "masked"])
def test_by_rows_a_rank_may_fall_away_as_a_whole(stage: str):
    world = World(TWO_RANKS)
    world.until(stage)
    assert world.step({"c0", "c1", "c2"}) == set()
    total = world.all()
    assert total.survivors == ("c3", "c4", "c5", "c6", "c7")
    rows = sum(rows_of(name) for name in total.survivors)
    assert total.integers["num-examples"] == rows
    assert [total.integers[weight_of_level(level)] for level in (2, 4)] == [rows, rows]


def test_an_evaluation_has_no_columns_and_is_not_refused():
    total = World({"c0": 1, "c1": 2, "c2": 3, "c3": 4}, "evaluate").all()
    assert total.coordinates.size == 0
    assert total.integers["tokens"] == 20
    assert total.integers["num-examples"] == sum(rows_of(f"c{n}") for n in range(4))


# What a clinic adds


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_columns_that_a_clinic_did_not_train_are_zero_in_what_it_adds(rank: int):
    job = job_of({"c0": rank, "c1": 1, "c2": 4})
    update = update_of("c0", rank)
    found = _summand(trained(update, 7), job, "c0")
    assert np.array_equal(found.values, dense(update).astype(np.float32))
    for level in levels_of(job):
        assert found.integers[weight_of_level(level)] == (7 if level <= rank else 0)


@pytest.mark.parametrize("sends", ["A", "B"])
def test_of_one_factor_too_the_rest_is_zero(sends: Any):
    job = job_of({"c0": 2, "c1": 4}, trains=sends, sends=sends)
    update = update_of("c0", 2).part(sends)
    found = _summand(trained(update, 7), job, "c0").values
    a, b = np.split(dense(update_of("c0", 2)).astype(np.float32), [RANK * 5])
    assert np.array_equal(found, a if sends == "A" else b)


def test_at_one_rank_an_update_is_added_as_it_is():
    found = _summand(trained(update_of("c1"), 7), job_of(None), "c1")
    assert found.values.tolist() == update_of("c1").values.tolist()
    assert set(found.integers) == {"num-examples", "nll", "tokens", "within-clip"}


def test_under_shared_noise_clinics_and_their_columns_count_alike():
    shared = PrivacySettings(
        unit="clinic", mechanism="central", noise_multiplier=1.0, honest_clinics=3
    )
    job = job_of({"c0": 2, "c1": 4}, privacy=shared)
    found = _summand(trained(update_of("c0", 2), 7), job, "c0")
    assert (found.weight, found.integers["num-examples"]) == (1, 7)
    assert [found.integers[weight_of_level(level)] for level in (2, 4)] == [1, 0]


def test_the_sum_has_every_column_with_the_weights_of_who_trained_it():
    total = World(TWO_RANKS).all()
    parts = [rows_of(name) * dense(update_of(name, rank)) for name, rank in TWO_RANKS.items()]
    step = LIMIT / Quantiser(24, LIMIT).centre
    assert float(np.abs(total.coordinates - sum(parts)).max()) <= 8 * step
    for level in (2, 4):
        rows = sum(rows_of(name) for name, rank in TWO_RANKS.items() if rank >= level)
        assert total.integers[weight_of_level(level)] == rows


def test_where_clinics_count_alike_the_sum_has_their_number_and_all_rows_together():
    ranks = {"c0": 1, "c1": 3, "c2": 4, "c3": 4, "c4": 4}
    total = World(ranks, alike=True).all()
    parts = [dense(update_of(name, rank)) for name, rank in ranks.items()]
    step = LIMIT / Quantiser(24, LIMIT).centre
    assert float(np.abs(total.coordinates - sum(parts)).max()) <= 5 * step
    assert [total.integers[weight_of_level(level)] for level in (1, 3, 4)] == [5, 4, 3]
    assert total.integers["num-examples"] == sum(rows_of(name) for name in ranks)
