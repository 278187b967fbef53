"""Messages: a job, an adapter or a number that is not as agreed is refused."""

import contextlib
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.config import AdapterSettings, PrivacySettings, TrainingSettings
from fedpeft.errors import AdapterError, ConfigError, SealingError
from fedpeft.privacy.skellam import grid_for
from fedpeft.protocol import JOB as JOB_FIELD
from fedpeft.protocol import Job, Payload, RankTerms, SumTerms
from fedpeft.protocol.privacy import ClinicPrivacy, clinic_privacy
from fedpeft.protocol.sums import (
    GRID_BITS,
    counts_alike,
    grid_limit,
    integers_of,
    levels_of,
    model_digest,
    value_of_unit,
)
from fedpeft.secagg import Layout, Quantiser

JOB = Job(
    run="0" * 32,
    federation="north-sea",
    fingerprint="a" * 64,
    quantization="nf4",
    adapter=AdapterSettings(rank=3, target_modules=("q_proj",)),
    training=TrainingSettings(learning_rate=3e-4, local_steps=7, proximal_mu=0.1),
    aggregation=SumTerms(confidentiality="secagg", adversary="active", bits=16, limit=2.5),
    round=2,
    rounds=9,
)


def altered(**changes: Any) -> str:
    return json.dumps({**json.loads(JOB.to_json()), **changes})


RANKS = RankTerms(rule="nested", of={"a": 1, "b": 3, "c": 2}, others=1)
ALIKE = RANKS.model_copy(update={"alike": True})


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("", "its root"),
        ("[]", "its root"),
        ("{}", "federation"),
        (altered(protocol=5), "protocol"),
        (altered(protocol=3), "protocol"),
        (altered(protocol=2), "protocol"),
        (altered(protocol=1), "protocol"),
        (altered(protocol=0), "protocol"),
        (altered(fingerprint="../x"), "fingerprint"),
        (altered(federation="a/b"), "federation"),
        (altered(adapter={"rank": 0}), "adapter.rank"),
        (altered(training={"learning_rate": -1}), "training.learning_rate"),
        (altered(training={"learning_rate": 1e999}), "training.learning_rate"),
        (altered(training={"data": "/etc/passwd"}), "training.data"),
        (altered(aggregation={"bits": 99}), "aggregation.confidentiality"),
        (altered(code="print(1)"), "code"),
        (altered(privacy={}), "privacy.unit"),
        (altered(privacy={"unit": "clinic", "noise_multiplier": 1.0}), "privacy"),
        (altered(privacy={"unit": "record", "noise_multiplier": 0}), "privacy"),
        (
            altered(privacy={"unit": "record", "noise_multiplier": 1e999}),
            "privacy.noise_multiplier.float",
        ),
        (altered(privacy={"unit": "record", "epsilon": 1.0, "delta": 0.1}), "privacy.delta"),
        (altered(trains="BA"), "trains"),
        (altered(trains="A", sends="AB"), "its root"),
        (altered(trains="A", sends="B"), "its root"),
        (altered(trains="", sends=""), "trains"),
        (altered(ranks={"rule": "same", "of": {}, "others": 1}), "ranks.rule"),
        (altered(ranks={"rule": "nested", "of": {"a": 0}, "others": 1}), "ranks.of.a"),
        (altered(ranks={"rule": "nested", "of": {"a/b": 1}, "others": 1}), "ranks.of.a/b.[key]"),
        (altered(ranks={"rule": "nested", "of": {}}), "ranks.others"),
        (altered(ranks={"rule": "nested", "of": {}, "others": 1, "alike": 2}), "ranks.alike"),
        (altered(ranks={"rule": "nested", "of": {"a": 4}, "others": 1}), "its root"),
        (altered(ranks={"rule": "nested", "of": {"a": 1}, "others": 4}), "its root"),
        (altered(base_change=["../x"]), "base_change.0"),
        (altered(base_change="a" * 64), "base_change"),
        (altered(round=-1), "round"),
        (altered(round=10), "its root"),
        (altered(rounds=0), "rounds"),
    ],
)
def test_a_job_that_is_not_understood_is_refused_with_its_place(text: str, where: str):
    with pytest.raises(ConfigError) as caught:
        Job.from_json(text)
    assert f"(at {where})" in str(caught.value)


def test_what_the_server_sent_is_not_repeated_in_the_error():
    with pytest.raises(ConfigError) as caught:
        Job.from_json(altered(federation="Mrs Canary"))
    assert "Canary" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("fields", [{}, {"job": 3}, {"JOB": "{}"}])
def test_a_message_without_a_job_is_refused(fields: dict[str, Any]):
    with pytest.raises(SealingError, match="a message from the server is not understood"):
        Payload(fields).text(JOB_FIELD, source="the server")


NOISY = PrivacySettings(unit="patient", noise_multiplier=0.7, delta=3e-7, clip=0.1)
OTHER_JOBS: dict[str, dict[str, Any]] = {
    "noise": {"privacy": NOISY},
    "one factor": {"trains": "A", "sends": "A"},
    "a factor that stays": {"sends": "A"},
    "ranks": {"ranks": RANKS},
    "ranks that count alike": {"ranks": ALIKE},
    "products": {"base_change": ("b" * 64, "c" * 64)},
}


@pytest.mark.parametrize("change", [{}, *OTHER_JOBS.values()], ids=["plain", *OTHER_JOBS])
def test_a_job_arrives_as_it_was_sent(change: dict[str, Any]):
    job = JOB.model_copy(update=change)
    assert Job.from_json(job.to_json()) == job


def test_clinics_given_another_job_are_given_another_model():
    """So that they fail to add up, rather than add what does not belong together."""
    jobs = [JOB, *(JOB.model_copy(update=change) for change in OTHER_JOBS.values())]
    for other in ({"of": {**RANKS.of, "a": 2}}, {"others": 2}):
        jobs.append(JOB.model_copy(update={"ranks": RANKS.model_copy(update=other)}))
    assert len({model_digest(job, b"adapter") for job in jobs}) == len(jobs)
    assert model_digest(JOB, b"adapter") != model_digest(JOB, b"another")


def test_clinics_given_other_noise_are_given_another_model():
    noisy = PrivacySettings(unit="patient", noise_multiplier=0.7)
    less = noisy.model_copy(update={"noise_multiplier": 0.1})
    jobs = [JOB.model_copy(update={"privacy": each}) for each in (None, noisy, less)]
    assert len({model_digest(job, b"adapter") for job in jobs}) == 3


SHARED = PrivacySettings(
    unit="record", mechanism="distributed", noise_multiplier=1.0, honest_clinics=3, clip=0.5
)


def test_a_coordinate_of_shared_noise_is_a_whole_number_of_no_rounding():
    limit = grid_limit()
    assert limit == 2 ** (GRID_BITS - 1) - 1 < 2**24  # exact in float32
    values = np.array([-limit, -1.0, 0.0, 1.0, limit], np.float32)
    words = np.zeros(values.size, np.uint32)
    quantiser = Quantiser(GRID_BITS, limit)
    assert quantiser.quantise(values, 1, words) == 0
    assert quantiser.dequantise(words, 1).tolist() == values.tolist()


def test_a_unit_of_a_shared_sum_is_one_step_against_the_gradient():
    training = TrainingSettings(
        optimizer="sgd", learning_rate=0.3, warmup_steps=4, batch_size=5, local_steps=1
    )
    job = JOB.model_copy(update={"privacy": SHARED, "training": training})
    assert value_of_unit(job, 4096) == pytest.approx(-0.15 * grid_for(0.5, 4096) / 5)
    assert value_of_unit(JOB, 4096) == 1.0


@pytest.mark.parametrize(
    ("mechanism", "alike"), [(None, False), ("local", False), ("distributed", True)]
)
def test_clinics_count_alike_where_noise_is_added_to_their_sum(mechanism: Any, alike: bool):
    privacy = mechanism and SHARED.model_copy(update={"mechanism": mechanism})
    assert counts_alike(JOB.model_copy(update={"privacy": privacy})) is alike


LOSS: dict[str, Any] = {
    "epsilon": 2.5,
    "delta": 1e-5,
    "epsilon_rdp": None,
    "steps": 7,
    "noise_multiplier": 1.0,
    "clip": 0.5,
}


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon": -1},
        {"epsilon": 1e999},
        {"delta": 0},
        {"delta": 1},
        {"steps": -1},
        {"steps": 1.5},
        {"clip": 0},
        {"name": "Mrs Canary"},
    ],
)
def test_a_loss_that_is_none_is_refused_and_not_repeated(change: dict[str, Any]):
    with pytest.raises(AdapterError, match="clinic north reports no usable") as caught:
        clinic_privacy(json.dumps({**LOSS, **change}), source="clinic north")
    assert "Canary" not in str(caught.value)
    told = clinic_privacy(json.dumps(LOSS), source="clinic north")
    assert told == ClinicPrivacy(**LOSS)


# Ranks


def test_at_one_rank_the_integers_of_a_sum_are_those_of_every_release():
    assert integers_of(JOB) == ("num-examples", "nll", "tokens", "clipped", "within-clip")
    assert levels_of(JOB) == (3,)


def test_where_ranks_differ_the_weights_of_every_level_are_summed_too():
    job = JOB.model_copy(update={"ranks": RANKS})
    assert levels_of(job) == (1, 2, 3)
    levels = tuple(f"weight-of-rank-{level}" for level in (1, 2, 3))
    assert integers_of(job) == (*integers_of(JOB), *levels)
    assert Layout(9, integers_of(job), 16, 3).words > Layout(9, integers_of(JOB), 16, 3).words


def test_a_clinic_that_is_not_named_takes_part_at_the_rank_of_the_others():
    assert [RANKS.rank(name) for name in ("a", "b", "c", "d")] == [1, 3, 2, 1]


@pytest.mark.parametrize(("alike", "ranks"), [(False, None), (False, RANKS), (True, ALIKE)])
def test_clinics_count_by_their_rows_unless_the_ranks_of_a_job_say_otherwise(
    alike: bool, ranks: RankTerms | None
):
    assert counts_alike(JOB.model_copy(update={"ranks": ranks})) is alike


# What stands inside a sealed message


def refused(data: bytes) -> None:
    with pytest.raises(SealingError, match="a message from north is not understood"):
        Payload.from_bytes(data, source="north")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "null",
        "{",
        '{"a": true}',
        '{"a": null}',
        '{"a": []}',
        '{"a": {}}',
        '{"a": NaN}',
        '{"a": Infinity}',
        '{"a": -Infinity}',
        '{"a": ' + "[" * 100_000,
        '{"a": ' + "1" * 5000 + "}",
    ],
)
def test_fields_that_are_no_strings_and_numbers_are_refused(text: str):
    refused(len(text).to_bytes(4, "little") + text.encode())


@given(data=st.binary(max_size=60))
def test_bytes_that_are_no_payload_are_refused_or_read(data: bytes):
    with contextlib.suppress(SealingError):
        Payload.from_bytes(data, source="north")


def test_a_payload_that_lost_its_end_is_refused():
    data = Payload({"a": 1, "b": "two"}).to_bytes()
    for length in range(len(data)):
        refused(data[:length])


@given(
    fields=st.dictionaries(
        st.text(max_size=5),
        st.text(max_size=9) | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
        max_size=4,
    ),
    blob=st.binary(max_size=99),
)
def test_a_payload_arrives_as_it_was_sent(fields: dict[str, Any], blob: bytes):
    assert Payload.from_bytes(Payload(fields, blob).to_bytes(), source="north") == Payload(
        fields, blob
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_not_even_sent(value: float):
    with pytest.raises(ValueError, match="JSON"):
        Payload({"num-examples": value}).to_bytes()
