"""The range in which a round's coordinates are quantised: neither cut off nor too coarse."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.adapters import Factors
from fedpeft.config import AdapterSettings, FederationSettings, TrainingSettings
from fedpeft.protocol import EVALUATE, Job, RankTerms, SumTerms
from fedpeft.secagg import Quantiser, SecureSum
from fedpeft_server.rounds.quantisation_range import Ranges, next_limit

BY_ROWS = RankTerms(rule="nested", of={"c0": 2}, others=2)
ALIKE = BY_ROWS.model_copy(update={"alike": True})
TERMS = (None, BY_ROWS, ALIKE)


def ranges(training: TrainingSettings | None = None, limit: float | None = None) -> Ranges:
    content = {
        "name": "sea",
        "training": (training or TrainingSettings(local_steps=2)).model_dump(),
        "aggregation": {"confidentiality": "secagg", "limit": limit},
    }
    return Ranges(FederationSettings.model_validate(content))


def after_round_0(training: TrainingSettings, rows: int) -> Ranges:
    """Return the ranges once three clinics have told that they have ``rows`` each."""
    job = Job(
        run="0" * 32,
        federation="sea",
        fingerprint="a" * 64,
        quantization="none",
        adapter=AdapterSettings(rank=4),
        training=training,
        aggregation=SumTerms(confidentiality="secagg", adversary="active", bits=16, limit=1.0),
        round=0,
        rounds=2,
    )
    total = SecureSum(
        coordinates=np.zeros(0),
        integers={"num-examples": 3 * rows, "clipped": 0},
        survivors=("a", "b", "c"),
        threshold=3,
        width=18,
    )
    made = ranges(training)
    made.follow(next_limit(EVALUATE, job, total, 3 * rows), None, None)
    return made


@given(
    rows=st.integers(100, 3000),
    batch_size=st.integers(4, 64),
    work=st.one_of(
        st.builds(lambda n: {"local_steps": n}, st.integers(1, 500)),
        st.builds(lambda n: {"local_epochs": n}, st.integers(1, 5)),
        st.just({}),
    ),
    terms=st.sampled_from(TERMS),
)
def test_in_round_1_no_coordinate_is_cut_off_nor_rounded_to_a_few_levels(
    rows: int, batch_size: int, work: dict[str, int], terms: RankTerms | None
):
    """AdamW moves a coordinate by the learning rate a step: one way, or to and fro."""
    training = TrainingSettings.model_validate({"batch_size": batch_size, **work})
    steps = training.local_steps or (training.local_epochs or 1) * math.ceil(rows / batch_size)
    weight = 1 if terms is not None and terms.alike else rows
    limit = after_round_0(training, rows).limit("AB", terms)
    one_way = weight * steps * training.learning_rate
    to_and_fro = weight * math.sqrt(steps) * training.learning_rate
    assert one_way <= limit
    assert Quantiser(16, limit).step < 0.05 * to_and_fro


@pytest.mark.parametrize("terms", TERMS)
def test_a_range_that_is_set_stays(terms: RankTerms | None):
    fixed = ranges(limit=0.5)
    fixed.follow(7.0, "AB", terms)
    fixed.follow(9.0, None, None)
    assert fixed.limit("AB", terms) == 0.5


@pytest.mark.parametrize("at", [(sends, terms) for sends in ("A", "B", "AB") for terms in TERMS])
def test_a_round_suggests_the_range_of_those_alone_that_sum_the_like(
    at: tuple[Factors, RankTerms | None],
):
    made, untouched = ranges(), ranges()
    sends, terms = at
    made.follow(0.123, sends, terms)
    for other_sends in ("A", "B", "AB"):
        for other in TERMS:
            like = other_sends == sends and (other is ALIKE) == (terms is ALIKE)
            expected = 0.123 if like else untouched.limit(other_sends, other)
            assert made.limit(other_sends, other) == expected
