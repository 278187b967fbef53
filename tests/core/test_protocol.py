"""Messages: a job, an adapter or a number that is not as agreed is refused."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedpeft.adapters import AdapterSchema, AdapterState, TensorSpec
from fedpeft.config import AdapterSettings, PrivacySettings, TrainingSettings
from fedpeft.errors import AdapterError, ConfigError, SchemaMismatch
from fedpeft.privacy.skellam import grid_for
from fedpeft.protocol import (
    ARRAYS,
    CONFIG,
    METRICS,
    NUM_EXAMPLES,
    VALID_NLL,
    VALID_TOKENS,
    Job,
    SumTerms,
    array_record,
    config_record,
    job_from,
    mean_loss,
    metric_from,
    metric_record,
    state_from,
)
from fedpeft.protocol.privacy import ClinicPrivacy, clinic_privacy
from fedpeft.protocol.sums import (
    GRID_BITS,
    counts_alike,
    grid_limit,
    model_digest,
    value_of_unit,
)
from fedpeft.secagg import Quantiser

SCHEMA = AdapterSchema((TensorSpec("m.lora_A.weight", (2, 4)),), "a" * 64)
STATE = AdapterState(SCHEMA, torch.arange(8.0))
JOB = Job(
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


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("", "its root"),
        ("[]", "its root"),
        ("{}", "federation"),
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
        (altered(round=-1), "round"),
        (altered(round=10), "its root"),
        (altered(rounds=0), "rounds"),
    ],
)
def test_a_job_that_is_not_understood_is_refused_with_its_place(text: str, where: str):
    with pytest.raises(ConfigError) as caught:
        job_from(RecordDict({CONFIG: ConfigRecord({"job": text})}))
    assert f"(at {where})" in str(caught.value)


def test_what_the_server_sent_is_not_repeated_in_the_error():
    with pytest.raises(ConfigError) as caught:
        Job.from_json(altered(federation="Mrs Canary"))
    assert "Canary" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "content",
    [
        {},
        {CONFIG: ConfigRecord({})},
        {CONFIG: ConfigRecord({"job": 3})},
        {CONFIG: MetricRecord({})},
    ],
)
def test_a_message_without_a_job_is_refused(content: dict[str, Any]):
    with pytest.raises(ConfigError, match="carries no job"):
        job_from(RecordDict(content))


def test_a_job_arrives_as_it_was_sent():
    noisy = PrivacySettings(unit="patient", noise_multiplier=0.7, delta=3e-7, clip=0.1)
    for job in (JOB, JOB.model_copy(update={"privacy": noisy})):
        assert job_from(RecordDict({CONFIG: config_record(job)})) == job


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
    assert counts_alike(privacy) is alike


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


@pytest.mark.parametrize(
    "content",
    [
        {},
        {ARRAYS: ArrayRecord()},
        {ARRAYS: MetricRecord({})},
        {ARRAYS: ArrayRecord({"adapter": Array("float32", (8,), "numpy.ndarray", bytes(32))})},
    ],
)
def test_a_message_without_an_adapter_is_refused(content: dict[str, Any]):
    with pytest.raises(AdapterError, match="from north carries no adapter"):
        state_from(RecordDict(content), SCHEMA, "adapter", source="north")


def test_an_adapter_that_lost_a_byte_is_refused():
    record = array_record(STATE, "adapter")
    record["adapter"].data = record["adapter"].data[:-1]
    with pytest.raises(SchemaMismatch):
        state_from(RecordDict({ARRAYS: record}), SCHEMA, "adapter", source="north")


def test_an_update_is_not_taken_for_an_adapter():
    content = RecordDict({ARRAYS: array_record(STATE, "update")})
    with pytest.raises(SchemaMismatch):
        state_from(content, SCHEMA, "adapter", source="north")


def test_an_adapter_arrives_as_it_was_sent_and_in_one_array():
    record = array_record(STATE, "adapter")
    assert len(record) == 1
    got = state_from(RecordDict({ARRAYS: record}), SCHEMA, "adapter", source="north")
    assert torch.equal(got.values, STATE.values)


@pytest.mark.parametrize("value", [-1, -0.5, math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_refused(value: float):
    content = RecordDict({METRICS: MetricRecord({NUM_EXAMPLES: value})})
    with pytest.raises(AdapterError, match="no usable num-examples"):
        metric_from(content, NUM_EXAMPLES)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {METRICS: MetricRecord({})},
        {METRICS: ConfigRecord({NUM_EXAMPLES: 3})},
        {METRICS: MetricRecord({NUM_EXAMPLES: [3, 4]})},
    ],
)
def test_a_missing_number_is_refused(content: dict[str, Any]):
    with pytest.raises(AdapterError, match="no usable num-examples"):
        metric_from(RecordDict(content), NUM_EXAMPLES)


def test_the_mean_loss_is_the_quotient_of_its_sums():
    metrics = metric_record({VALID_NLL: 6.0, VALID_TOKENS: 4})
    assert mean_loss(metrics, VALID_NLL, VALID_TOKENS) == 1.5
    assert (
        mean_loss(metric_record({VALID_NLL: 0.0, VALID_TOKENS: 0}), VALID_NLL, VALID_TOKENS) is None
    )
