"""What a secure sum stands for: the mean of each column over those who trained it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedpeft.adapters import AdapterSchema, AdapterState, Factors, TensorSpec
from fedpeft.config import AdapterSettings, PrivacySettings, TrainingSettings
from fedpeft.protocol import Job, RankTerms, SumTerms
from fedpeft.protocol.sums import GRID_BITS, grid_limit, value_of_unit, weight_of_level
from fedpeft.secagg import SecureSum
from fedpeft_server.rounds.summed import mean_of, verdicts_of

RANK = 4
SCHEMA = AdapterSchema(
    (
        TensorSpec("m.lora_A.weight", (RANK, 5)),
        TensorSpec("m.lora_B.weight", (6, RANK)),
        TensorSpec("n.lora_A.weight", (RANK, 2)),
        TensorSpec("n.lora_B.weight", (3, RANK)),
    ),
    "a" * 64,
)
Dense = dict[str, NDArray[np.float64]]
Clinic = tuple[int, int, int]
"""Rank, rows, and a seed of its update."""


def job_of(ranks: RankTerms | None, **changes: Any) -> Job:
    job = Job(
        run="0" * 32,
        federation="sea",
        fingerprint="a" * 64,
        quantization="none",
        adapter=AdapterSettings(rank=RANK),
        training=TrainingSettings(),
        aggregation=SumTerms(confidentiality="secagg", adversary="active", bits=16, limit=1.0),
        ranks=ranks,
        round=1,
        rounds=2,
    )
    return job.model_copy(update=changes)


def update_of(clinic: Clinic) -> Dense:
    """Return the first columns of B and rows of A, the others zero."""
    rank, _, seed = clinic
    random = np.random.default_rng(seed)
    dense: Dense = {}
    for spec in SCHEMA.tensors:
        dense[spec.name] = random.normal(size=spec.shape)
        if spec.factor == "A":
            dense[spec.name][rank:] = 0
        else:
            dense[spec.name][:, rank:] = 0
    return dense


def terms_of(clinics: list[Clinic], *, alike: bool = False) -> RankTerms:
    ranks = {f"c{at}": rank for at, (rank, _, _) in enumerate(clinics)}
    return RankTerms(rule="nested", of=ranks, others=min(ranks.values()), alike=alike)


def summed(
    clinics: list[Clinic], part: AdapterSchema, *, alike: bool = False, levels: bool = True
) -> SecureSum:
    """Return what the protocol gives the server of these clinics."""
    weights = [1 if alike else rows for _, rows, _ in clinics]
    vectors = [
        weight * np.concatenate([update_of(clinic)[spec.name].ravel() for spec in part.tensors])
        for weight, clinic in zip(weights, clinics, strict=True)
    ]
    integers = {"num-examples": sum(rows for _, rows, _ in clinics)}
    for level in {rank for rank, _, _ in clinics} if levels else ():
        high = [w for w, (rank, _, _) in zip(weights, clinics, strict=True) if rank >= level]
        integers[weight_of_level(level)] = sum(high)
    names = tuple(f"c{at}" for at in range(len(clinics)))
    return SecureSum(
        coordinates=np.sum(vectors, axis=0),
        integers=integers,
        survivors=names,
        threshold=3,
        width=20,
    )


def expected(clinics: list[Clinic], part: AdapterSchema, *, alike: bool = False) -> Dense:
    """Return the mean of each column over the clinics that have it; zero where none has."""
    mean: Dense = {}
    for spec in part.tensors:
        mean[spec.name] = np.zeros(spec.shape)
        for column in range(RANK):
            place = np.s_[column] if spec.factor == "A" else np.s_[:, column]
            total, weights = 0.0, 0
            for clinic in clinics:
                if clinic[0] > column:
                    weight = 1 if alike else clinic[1]
                    total = total + weight * update_of(clinic)[spec.name][place]
                    weights += weight
            if weights:
                mean[spec.name][place] = total / weights
    return mean


def assert_close(found: AdapterState, reference: Dense) -> None:
    assert found.tensors().keys() == reference.keys()
    for name, tensor in found.tensors().items():
        assert float(np.abs(tensor.double().numpy() - reference[name]).max()) < 1e-6


CLINICS = st.lists(
    st.tuples(st.integers(1, RANK), st.integers(1, 1000), st.integers(0, 99)),
    min_size=1,
    max_size=6,
)


@given(clinics=CLINICS, sends=st.sampled_from(["A", "B", "AB"]))
def test_a_column_is_the_mean_over_those_who_trained_it(clinics: list[Clinic], sends: Factors):
    part = SCHEMA.part(sends)
    found = mean_of(summed(clinics, part), job_of(terms_of(clinics)), part)
    assert_close(found, expected(clinics, part))


@given(clinics=CLINICS, sends=st.sampled_from(["A", "B", "AB"]))
def test_where_clinics_count_alike_their_columns_do_too(clinics: list[Clinic], sends: Factors):
    part = SCHEMA.part(sends)
    job = job_of(terms_of(clinics, alike=True))
    found = mean_of(summed(clinics, part, alike=True), job, part)
    assert_close(found, expected(clinics, part, alike=True))


@given(clinics=CLINICS)
def test_under_noise_of_the_server_too_columns_count_alike(clinics: list[Clinic]):
    central = PrivacySettings(unit="clinic", mechanism="central", noise_multiplier=1.0)
    job = job_of(terms_of(clinics), privacy=central)
    found = mean_of(summed(clinics, SCHEMA, alike=True), job, SCHEMA)
    assert_close(found, expected(clinics, SCHEMA, alike=True))


@given(clinics=CLINICS, data=st.data())
def test_permuting_clinics_changes_nothing(clinics: list[Clinic], data: st.DataObject):
    turned = data.draw(st.permutations(clinics))
    found, other = (
        mean_of(summed(each, SCHEMA), job_of(terms_of(each)), SCHEMA) for each in (clinics, turned)
    )
    assert float((found.values - other.values).abs().max()) < 1e-6


@given(clinics=CLINICS)
def test_at_one_rank_it_is_the_mean_by_rows(clinics: list[Clinic]):
    level = [(RANK, rows, seed) for _, rows, seed in clinics]
    found = mean_of(summed(level, SCHEMA, levels=False), job_of(None), SCHEMA)
    assert_close(found, expected(level, SCHEMA))
    same = mean_of(summed(level, SCHEMA), job_of(terms_of(level)), SCHEMA)
    assert float((found.values - same.values).abs().max()) < 1e-6


@pytest.mark.parametrize("sends", ["A", "B", "AB"])
def test_a_column_that_nobody_trained_any_more_stays_as_it_is(sends: Factors):
    """All clinics of the highest rank fell away: their level is of weight zero."""
    part, clinics = SCHEMA.part(sends), [(1, 5, 1), (2, 7, 2), (1, 9, 3)]
    total = summed(clinics, part)
    total.integers[weight_of_level(4)] = 0
    ranks = terms_of([*clinics, (4, 9, 4)])
    found = mean_of(total, job_of(ranks), part)
    assert_close(found, expected(clinics, part))
    for spec, tensor in zip(part.tensors, found.tensors().values(), strict=True):
        untrained = tensor[2:] if spec.factor == "A" else tensor[:, 2:]
        assert not untrained.any()


def test_whole_numbers_of_a_grid_are_wrapped_and_divided_by_the_clinics():
    """Of shared noise a coordinate counts modulo 2^24 - 1, and the sum is one step."""
    shared = PrivacySettings(
        unit="record", mechanism="distributed", noise_multiplier=1.0, honest_clinics=3
    )
    training = TrainingSettings(optimizer="sgd", local_steps=1)
    job = job_of(None, privacy=shared, training=training)
    turn = 2 * int(grid_limit()) + 1
    assert turn == 2**GRID_BITS - 1
    values = np.arange(SCHEMA.numel, dtype=np.float64) - 20
    total = SecureSum(
        coordinates=np.add(values, turn * (np.arange(SCHEMA.numel) % 3 - 1), dtype=np.float64),
        integers={"num-examples": 999},
        survivors=("a", "b", "c", "d"),
        threshold=3,
        width=26,
    )
    found = mean_of(total, job, SCHEMA).values.double().numpy()
    unit = value_of_unit(job, SCHEMA.numel)
    assert unit < 0
    assert np.allclose(found, values / 4 * unit, rtol=1e-6)


@pytest.mark.parametrize(
    ("told", "accepted", "counts"),
    [(0, 0, True), (3, 0, True), (3, 3, True), (2, 3, False), (4, 1, False), (0, 1, False)],
)
def test_verdicts_that_do_not_add_up_are_not_counted(told: int, accepted: int, counts: bool):
    total = summed([(RANK, 5, 1), (RANK, 6, 2), (RANK, 7, 3)], SCHEMA)
    total = replace(total, integers={**total.integers, "verdicts": told, "accepted": accepted})
    assert verdicts_of(total) == ((told, accepted) if counts else None)


def test_a_sum_of_a_job_that_asks_for_no_verdicts_counts_none():
    assert verdicts_of(summed([(RANK, 5, 1), (RANK, 6, 2), (RANK, 7, 3)], SCHEMA)) == (0, 0)
