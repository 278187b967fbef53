"""What the integers and columns of a sum of different ranks say of a single clinic.

Rows enter the integers of a sum linearly. So of all that a server can add, subtract and
scale from one opened sum, each clinic's rows have a factor, and a number that says
something of fewer than three clinics is one whose factors are zero for all others.
"""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedpeft.adapters import AdapterSchema, AdapterState, TensorSpec
from fedpeft.config import LEAST_SUMMANDS, AdapterSettings, TrainingSettings
from fedpeft.errors import TooFewClinics
from fedpeft.protocol import TRAIN, Job, RankTerms, SumTerms
from fedpeft.protocol.sums import integers_of, weight_of_level
from fedpeft_client.rounds.learning import Trained
from fedpeft_client.sums.summing import _agreement, _summand
from fedpeft_server.rounds.ranks import RankPlan

RANK = 5
SCHEMA = AdapterSchema((TensorSpec("m.lora_B.weight", (2, RANK)),), "a" * 64)
NAMES = [f"c{number}" for number in range(10)]
RANKS = st.integers(1, RANK)
JOB = Job(
    run="0" * 32,
    federation="sea",
    fingerprint="a" * 64,
    quantization="none",
    adapter=AdapterSettings(rank=RANK),
    training=TrainingSettings(),
    aggregation=SumTerms(confidentiality="secagg", adversary="active", bits=16, limit=1.0),
    trains="B",
    sends="B",
    round=1,
    rounds=2,
)
Factors = NDArray[np.int64]


def job_of(ranks: RankTerms | None) -> Job:
    return JOB.model_copy(update={"ranks": ranks})


def sent(job: Job, name: str, rows: int) -> tuple[dict[str, int], NDArray[np.float64]]:
    """Return the integers and the weighted coordinates that a clinic of ``rows`` rows adds."""
    part = SCHEMA.part("B", job.ranks.rank(name) if job.ranks else RANK)
    update = AdapterState(part, torch.ones(part.numel))
    added = _summand(Trained(update=update, rows=rows), job, name)
    integers = {each: added.integers.get(each, 0) for each in integers_of(job)}
    return integers, added.weight * added.values.astype(np.float64)


def factors_of(job: Job, clinics: Sequence[str]) -> Factors:
    """Return (integers, clinics): by how much each integer grows with each clinic's rows."""
    grown: list[list[int]] = []
    for name in clinics:
        (few, _), (many, _) = sent(job, name, 1), sent(job, name, 2)
        grown.append([many[each] - few[each] for each in integers_of(job)])
    return np.array(grown).T


def alike_in_all(factors: Factors, at: int) -> int:
    """Return how many clinics have the factors of clinic ``at`` in every integer.

    Whatever is computed from the integers has the same factor for all of them.
    """
    return int((factors == factors[:, [at]]).all(axis=0).sum())


def agrees(job: Job, name: str, clinics: Sequence[str]) -> bool:
    try:
        _agreement(job, name, TRAIN)(clinics)
    except TooFewClinics:
        return False
    return True


def assert_hidden(job: Job, name: str, clinics: Sequence[str]) -> None:
    """No opened number depends on the clinic's rows or columns and on fewer than two others'."""
    assert alike_in_all(factors_of(job, clinics), clinics.index(name)) >= LEAST_SUMMANDS
    adds = {each: sent(job, each, 7)[1] != 0 for each in clinics}
    beside = np.sum([adds[each] for each in clinics], axis=0)
    assert beside[adds[name]].min() >= LEAST_SUMMANDS


ANY_TERMS = st.builds(
    lambda of, others, alike: RankTerms(rule="nested", of=of, others=others, alike=alike),
    of=st.dictionaries(st.sampled_from(NAMES), RANKS),
    others=RANKS,
    alike=st.booleans(),
)
SOME = st.sets(st.sampled_from(NAMES), min_size=LEAST_SUMMANDS).map(sorted)


@given(ranks=ANY_TERMS, clinics=SOME)
def test_who_agrees_to_a_sum_is_hidden_in_it_whatever_the_server_made_up(
    ranks: RankTerms, clinics: list[str]
):
    """Also where no other clinic of the sum checks anything."""
    job = job_of(ranks)
    for name in clinics:
        if agrees(job, name, clinics):
            assert_hidden(job, name, clinics)


ABLE = st.dictionaries(st.sampled_from(NAMES), RANKS, min_size=LEAST_SUMMANDS)


@given(able=ABLE)
def test_every_clinic_agrees_to_what_the_server_plans_and_is_hidden_in_it(able: dict[str, int]):
    plan, clinics = RankPlan("nested", RANK, hidden=True), sorted(able)
    plan.heard(able)
    job = job_of(plan.terms(clinics))
    for name in clinics:
        assert agrees(job, name, clinics)
        assert_hidden(job, name, clinics)


@given(able=ABLE, data=st.data())
def test_what_is_left_of_a_plan_hides_who_agrees_to_it(able: dict[str, int], data: st.DataObject):
    plan = RankPlan("nested", RANK, hidden=True)
    plan.heard(able)
    job = job_of(plan.terms(able))
    left = sorted(data.draw(st.sets(st.sampled_from(sorted(able)), min_size=LEAST_SUMMANDS)))
    for name in left:
        if agrees(job, name, left):
            assert_hidden(job, name, left)


@given(able=ABLE, data=st.data())
def test_no_difference_of_opened_integers_is_a_clinics_rows(
    able: dict[str, int], data: st.DataObject
):
    """In plain numbers: all rows differ, and each sum of some of them is of those alone."""
    plan, clinics = RankPlan("nested", RANK, hidden=True), sorted(able)
    plan.heard(able)
    job = job_of(plan.terms(clinics))
    order = data.draw(st.permutations(range(len(clinics))))
    rows = {name: 1000 * 2**at for name, at in zip(clinics, order, strict=True)}
    opened = {0}
    for each in integers_of(job):
        opened.add(sum(sent(job, name, rows[name])[0][each] for name in clinics))
    differences = {abs(one - other) for one in opened for other in opened}
    # A count of clinics may stand beside rows, so what is near to them counts as them.
    for difference in differences:
        assert all(abs(difference - own) > len(clinics) for own in rows.values())


@pytest.mark.parametrize(("alike", "shown"), [(False, True), (True, False)])
def test_by_rows_a_lone_clinics_would_be_a_difference_which_is_why_it_is_refused(
    alike: bool, shown: bool
):
    of = {"c0": 4, "c1": 4, "c2": 4, "c3": 2}
    job = job_of(RankTerms(rule="nested", of=of, others=2, alike=alike))
    opened = {
        each: sum(sent(job, name, 10 + int(name[1:]))[0][each] for name in of)
        for each in integers_of(job)
    }
    apart = opened["num-examples"] - opened[weight_of_level(4)]
    assert (apart == 13) is shown
    assert (alike_in_all(factors_of(job, list(of)), 3) == 1) is shown
    assert [agrees(job, name, list(of)) for name in of] == [not shown] * 4
