"""A clinic's answers to the server's messages: what it refuses, and what it lets out."""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedpeft.adapters import AdapterSchema, AdapterState, load_adapter
from fedpeft.config import AdapterSettings, TrainingSettings
from fedpeft.data import encode, read_records
from fedpeft.evaluation import score
from fedpeft.models import adapter_schema, fingerprint, initial_state
from fedpeft.protocol import (
    ARRAYS,
    CONFIG,
    EVALUATE,
    METRICS,
    NUM_EXAMPLES,
    TRAIN,
    TRAIN_NLL,
    TRAIN_TOKENS,
    VALID_NLL,
    VALID_TOKENS,
    Job,
    array_record,
    config_record,
    metric_from,
    state_from,
)
from fedpeft.training import Place, train
from fedpeft_client.app import ClinicWork, build_client_app
from fedpeft_client.clinic import Clinic
from fedpeft_client.settings import DataSettings, LimitSettings

pytestmark = pytest.mark.usefixtures("flower_identity")
TEXT, PATIENT = "Zyxomira Canarytext", "CANARY-PATIENT-77"
LORA = AdapterSettings(rank=2, alpha=4.0)
TRAINING = TrainingSettings(learning_rate=5e-3, batch_size=4, local_steps=2, max_length=64, seed=3)
Ask = Callable[..., Message]


def write(path: Path, rows: int) -> Path:
    lines = [
        json.dumps({"question": f"{TEXT} {n}?", "answer": f"{TEXT} {n * n}", "patient_id": PATIENT})
        for n in range(rows)
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def clinic(tiny_model: Path, tmp_path: Path) -> Clinic:
    data = DataSettings(train=write(tmp_path / "t.jsonl", 9), valid=write(tmp_path / "v.jsonl", 3))
    return Clinic(
        name="north",
        federation="sea",
        model=tiny_model,
        data=data,
        dtype="float32",
        limits=LimitSettings(max_rank=4, max_steps=5),
        adapter_directory=tmp_path / "adapter",
    )


def job_for(clinic: Clinic, **changes: Any) -> Job:
    job = Job(
        federation="sea",
        fingerprint=fingerprint(clinic.model),
        quantization="none",
        adapter=LORA,
        training=TRAINING,
        round=1,
        rounds=3,
    )
    return job.model_copy(update=changes)


def start_of(clinic: Clinic) -> AdapterState:
    return initial_state(adapter_schema(clinic.model, LORA), 0)


def ask(
    clinic: Clinic,
    kind: str = TRAIN,
    *,
    state: AdapterState | None = None,
    job: Job | None = None,
    work: ClinicWork | None = None,
) -> Message:
    arrays = array_record(state or start_of(clinic), "adapter")
    content = RecordDict({ARRAYS: arrays, CONFIG: config_record(job or job_for(clinic))})
    return answer(clinic, content, kind, work)


def answer(
    clinic: Clinic, content: RecordDict, kind: str = TRAIN, work: ClinicWork | None = None
) -> Message:
    app = build_client_app(work or ClinicWork(lambda _: clinic))
    context = Context(1, 1000, {}, RecordDict(), run_config={})
    return app(Message(content, 1000, kind), context)


def changed(clinic: Clinic, **changes: Any) -> Clinic:
    fields = {name: getattr(clinic, name) for name in Clinic.__slots__}
    return Clinic(**{**fields, **changes})


def not_finite(clinic: Clinic) -> dict[str, Any]:
    state = start_of(clinic)
    state.values[5] = math.nan
    return {"state": state}


def other_schema(clinic: Clinic) -> dict[str, Any]:
    schema = adapter_schema(clinic.model, AdapterSettings(rank=1))
    return {"state": initial_state(schema, 0)}


def other_base(clinic: Clinic) -> dict[str, Any]:
    own = start_of(clinic)
    schema = AdapterSchema(own.schema.tensors, "f" * 64)
    return {"state": AdapterState(schema, own.values)}


def asking(**changes: Any) -> Callable[[Clinic], dict[str, Any]]:
    return lambda clinic: {"job": job_for(clinic, **changes)}


def training(**changes: Any) -> Callable[[Clinic], dict[str, Any]]:
    return asking(training=TRAINING.model_copy(update=changes))


def without_data(clinic: Clinic) -> dict[str, Any]:
    clinic.data.train.unlink()
    assert clinic.data.valid is not None
    clinic.data.valid.unlink()
    return {}


def with_bad_data(clinic: Clinic) -> dict[str, Any]:
    for path in (clinic.data.train, clinic.data.valid):
        assert path is not None
        path.write_text(
            f'{{"question": "{TEXT}", "patient_id": "{PATIENT}", "answer": ""}}\n{TEXT}'
        )
    return {}


BOTH = {
    "other fingerprint": (asking(fingerprint="f" * 64), "other-base-model"),
    "other federation": (asking(federation="lake"), "bad-config"),
    "other schema": (other_schema, "wrong-adapter-schema"),
    "adapter of another base": (other_base, "wrong-adapter-schema"),
    "rank above the limit": (asking(adapter=AdapterSettings(rank=5)), "refused-by-clinic"),
    "adapter with NaN": (not_finite, "not-finite"),
    "unknown target": (
        asking(adapter=AdapterSettings(rank=2, target_modules=("x",))),
        "bad-adapter",
    ),
    "rows beyond the context": (training(max_length=4096), "bad-config"),
    "data missing": (without_data, "bad-data"),
    "data damaged": (with_bad_data, "bad-data"),
}
TRAIN_ONLY = {
    "steps above the limit": (training(local_steps=6), "refused-by-clinic"),
    "epochs above the limit": (training(local_steps=None, local_epochs=2), "refused-by-clinic"),
    "rate too small": (training(learning_rate=1e-60), "adapter-unchanged"),
    "rate too large": (training(learning_rate=1e38), "not-finite"),
    "8 bits on the CPU": (training(optimizer="adamw-8bit-paged"), "training-failed"),
    "round 0": (asking(round=0), "bad-config"),
}
CASES = [
    *((kind, *case) for kind in (TRAIN, EVALUATE) for case in BOTH.items()),
    *((TRAIN, *case) for case in TRAIN_ONLY.items()),
]


@pytest.mark.parametrize(
    ("kind", "case", "fault"), CASES, ids=[f"{kind}, {name}" for kind, name, _ in CASES]
)
def test_a_refusal_tells_the_server_its_reason_and_nothing_else(
    kind: str, case: str, fault: Any, clinic: Clinic, caplog: pytest.LogCaptureFixture
):
    prepare, reason = fault
    caplog.set_level(logging.DEBUG)
    reply = ask(clinic, kind, **prepare(clinic))
    assert reply.has_error()
    assert not reply.has_content()
    assert reply.error.reason == reason
    told = [record for record in caplog.records if record.name == "fedpeft_client.app"]
    assert len(told) == 1
    assert "north: " in told[0].getMessage()
    assert_no_canary(caplog, reply)


@pytest.mark.parametrize(
    ("content", "reason"),
    [({}, "bad-config"), ({CONFIG: ConfigRecord({"job": "{}"})}, "bad-config")],
)
def test_a_message_that_is_no_job_is_refused(content: dict[str, Any], reason: str, clinic: Clinic):
    assert answer(clinic, RecordDict(content)).error.reason == reason


def test_a_job_without_an_adapter_is_refused(clinic: Clinic):
    content = RecordDict({CONFIG: config_record(job_for(clinic))})
    assert answer(clinic, content).error.reason == "bad-adapter"


def test_a_clinic_goes_on_after_it_refused(clinic: Clinic):
    work = ClinicWork(lambda _: clinic)
    for prepare, reason in (*BOTH.values(), *TRAIN_ONLY.values()):
        if reason != "bad-data":
            assert ask(clinic, work=work, **prepare(clinic)).has_error()
    expected, got = ask(clinic), ask(clinic, work=work)
    assert update_of(clinic, got).tolist() == update_of(clinic, expected).tolist()


def assert_no_canary(caplog: pytest.LogCaptureFixture, reply: Message) -> None:
    shown = caplog.text + repr([record.__dict__ for record in caplog.records]) + repr(reply)
    sent = b"".join(
        part.deflate() for part in (reply.content.values() if reply.has_content() else [])
    )
    for secret in (TEXT, PATIENT, *TEXT.split()):
        assert secret not in shown
        assert secret.encode() not in sent


def update_of(clinic: Clinic, reply: Message) -> torch.Tensor:
    schema = adapter_schema(clinic.model, LORA)
    return state_from(reply.content, schema, "update", source="north").values


@pytest.mark.parametrize("kind", [TRAIN, EVALUATE])
def test_no_record_text_or_patient_leaves_or_is_logged(
    kind: str, clinic: Clinic, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)
    reply = ask(clinic, kind)
    assert reply.has_content()
    assert_no_canary(caplog, reply)


def test_the_answer_to_train_is_the_change_that_local_training_makes(clinic: Clinic, make_model):
    reply = ask(clinic)
    model = make_model(LORA)
    start = start_of(clinic)
    model.load(start)
    rows = encode(read_records(clinic.data.train), model.base.tokenizer, max_length=64).examples
    result = train(model, rows, TRAINING, Place("north", 1, 3))
    assert torch.equal(update_of(clinic, reply), model.read().minus(start).values)
    content = reply.content
    assert set(content) == {ARRAYS, METRICS}
    assert set(content.metric_records[METRICS]) == {NUM_EXAMPLES, TRAIN_NLL, TRAIN_TOKENS}
    assert metric_from(content, NUM_EXAMPLES) == 9
    assert metric_from(content, TRAIN_TOKENS) == result.target_tokens
    assert metric_from(content, TRAIN_NLL) == pytest.approx(result.loss * result.target_tokens)


def test_a_restarted_clinic_answers_to_the_byte_as_one_that_ran_on(clinic: Clinic):
    work = ClinicWork(lambda _: clinic)
    for number in (1, 2):
        ask(clinic, work=work, job=job_for(clinic, round=number))
    third = job_for(clinic, round=3)
    ran_on, restarted = ask(clinic, work=work, job=third), ask(clinic, job=third)
    assert update_of(clinic, ran_on).tolist() == update_of(clinic, restarted).tolist()


def test_the_answer_to_evaluate_is_two_sums(clinic: Clinic, make_model):
    reply = ask(clinic, EVALUATE)
    model = make_model(LORA)
    assert clinic.data.valid is not None
    rows = encode(read_records(clinic.data.valid), model.base.tokenizer, max_length=64).examples
    expected = score(model, rows)
    assert set(reply.content) == {METRICS}
    assert set(reply.content.metric_records[METRICS]) == {VALID_NLL, VALID_TOKENS}
    assert metric_from(reply.content, VALID_NLL) == pytest.approx(expected.nll)
    assert metric_from(reply.content, VALID_TOKENS) == expected.tokens


def test_without_validation_rows_the_sums_are_nothing(clinic: Clinic):
    reply = ask(changed(clinic, data=DataSettings(train=clinic.data.train)), EVALUATE)
    assert metric_from(reply.content, VALID_TOKENS) == metric_from(reply.content, VALID_NLL) == 0


def test_an_evaluated_adapter_is_kept_and_the_start_is_not(clinic: Clinic):
    assert clinic.adapter_directory is not None
    ask(clinic, EVALUATE, job=job_for(clinic, round=0))
    assert not clinic.adapter_directory.exists()
    state = start_of(clinic)
    ask(clinic, EVALUATE, state=state)
    assert torch.equal(load_adapter(clinic.adapter_directory, state.schema).values, state.values)


def test_records_are_read_again_once_they_changed(clinic: Clinic):
    work = ClinicWork(lambda _: clinic)
    counts: list[float] = []
    for rows in (9, 9, 12):
        if rows != 9:
            write(clinic.data.train, rows)
        counts.append(metric_from(ask(clinic, work=work).content, NUM_EXAMPLES))
    assert counts == [9, 9, 12]


def test_the_steps_of_training_are_told_to_the_observer(clinic: Clinic):
    seen: list[int] = []
    ask(clinic, work=ClinicWork(lambda _: clinic, lambda done: seen.append(done.step)))
    assert seen == [1, 2]
