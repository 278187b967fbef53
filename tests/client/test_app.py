"""A clinic's answers to the server's messages: what it refuses, and what it lets out."""

import dataclasses
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

from fedpeft.adapters import AdapterSchema, AdapterState, from_bytes, load_adapter
from fedpeft.config import AdapterSettings, PrivacySettings, TrainingSettings
from fedpeft.data import encode, read_records
from fedpeft.evaluation import score
from fedpeft.models import adapter_schema, fingerprint, initial_state
from fedpeft.privacy.accounting import epsilon_of
from fedpeft.privacy.charge import Charge
from fedpeft.privacy.ledger import Ledger
from fedpeft.protocol import (
    ADAPTER,
    CONTENT_KEY,
    EVALUATE,
    JOB,
    MAX_RANK,
    NUM_EXAMPLES,
    TRAIN,
    TRAIN_NLL,
    TRAIN_TOKENS,
    VALID_NLL,
    VALID_TOKENS,
    Job,
    Payload,
    SumTerms,
    carried,
    carry,
    raw,
)
from fedpeft.protocol.parcel import Held, change, whole
from fedpeft.protocol.privacy import PRIVACY, ClinicPrivacy, clinic_privacy
from fedpeft.sealing import SERVER, Identity, clinic_role, open_sealed, seal, seal_broadcast
from fedpeft.sealing import Context as Sealing
from fedpeft.training import Observer, Place, train
from fedpeft_client.rounds.app import ClinicDesk, build_client_app
from fedpeft_client.rounds.clinic import Clinic, Membership
from fedpeft_client.rounds.work import ClinicWork
from fedpeft_client.settings import (
    BudgetSettings,
    ConfidentialitySettings,
    DataSettings,
    LimitSettings,
)

pytestmark = pytest.mark.usefixtures("flower_identity")
TEXT, PATIENT = "Zyxomira Canarytext", "CANARY-PATIENT-77"
LORA = AdapterSettings(rank=2, alpha=4.0)
TRAINING = TrainingSettings(learning_rate=5e-3, batch_size=4, local_steps=2, max_length=64, seed=3)
Ask = Callable[..., Message]
RUN = 1  # as the fixture flower_identity has it
NORTH, SERVER_IDENTITY = Identity.generate(), Identity.generate()
SEALED = SumTerms(confidentiality="sealed", adversary="active", bits=16, limit=1.0)


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
        membership=Membership(NORTH, SERVER_IDENTITY.public),
        model=tiny_model,
        data=data,
        ledger=tmp_path / "ledger.sqlite",
        dtype="float32",
        limits=LimitSettings(max_rank=4, max_steps=5),
        aggregation=ConfidentialitySettings(require_secagg=False),
        adapter_directory=tmp_path / "adapter",
    )


def job_for(clinic: Clinic, **changes: Any) -> Job:
    job = Job(
        run="0" * 32,
        federation="sea",
        fingerprint=fingerprint(clinic.model),
        quantization="none",
        adapter=LORA,
        training=TRAINING,
        aggregation=SEALED,
        round=1,
        rounds=3,
    )
    return job.model_copy(update=changes)


def start_of(clinic: Clinic) -> AdapterState:
    return initial_state(adapter_schema(clinic.model, LORA), 0)


def desk_of(clinic: Clinic, observe: Observer | None = None) -> ClinicDesk:
    return ClinicDesk(lambda _: clinic, ClinicWork(observe))


def context_of(clinic: Clinic, number: int, kind: str) -> Sealing:
    return Sealing(
        federation="sea",
        run=RUN,
        round=number,
        attempt=1,
        sender=SERVER,
        receiver=clinic_role(clinic.name),
        purpose=kind,
        schema=start_of(clinic).schema.hash,
    )


@dataclasses.dataclass(frozen=True)
class Reply:
    """A clinic's answer: what travels of it, and what the server reads in it."""

    message: Message
    payload: Payload | None

    @property
    def reason(self) -> str:
        """Why the clinic refused."""
        assert self.payload is None
        return str(self.message.error.reason)

    @property
    def opened(self) -> Payload:
        assert self.payload is not None
        return self.payload

    def number(self, name: str) -> float:
        value = self.opened.fields[name]
        assert isinstance(value, int | float)
        return value


def ask(
    clinic: Clinic,
    kind: str = TRAIN,
    *,
    state: AdapterState | None = None,
    job: Job | None = None,
    desk: ClinicDesk | None = None,
) -> Reply:
    asked, held = job or job_for(clinic), Held(state or start_of(clinic))
    payload, adapter = bringing(whole(held), held, asked)
    return answer(clinic, payload, kind, desk, adapter=adapter, number=asked.round)


def bringing(parcel: bytes, held: Held, job: Job) -> tuple[Payload, bytes]:
    """Return what a message that begins work says, and the broadcast that goes with it."""
    adapter, key = seal_broadcast(parcel)
    fields = {JOB: job.to_json(), ADAPTER: held.digest, CONTENT_KEY: key.to_bytes().hex()}
    return Payload({**fields}), adapter


def answer(
    clinic: Clinic,
    payload: Payload,
    kind: str = TRAIN,
    desk: ClinicDesk | None = None,
    *,
    adapter: bytes | None = None,
    number: int = 1,
) -> Reply:
    """Seal a payload as the server does, and return the clinic's answer opened."""
    about = context_of(clinic, number, kind)
    sealed = seal(payload.to_bytes(), about, sender=SERVER_IDENTITY, receiver=NORTH.public)
    content = carry(sealed, None if adapter is None else raw(adapter))
    reply = deliver(clinic, content, kind, desk)
    return Reply(reply, None if reply.has_error() else opened(reply, about))


def deliver(
    clinic: Clinic, content: RecordDict, kind: str = TRAIN, desk: ClinicDesk | None = None
) -> Message:
    app = build_client_app(desk or desk_of(clinic))
    context = Context(RUN, 1000, {}, RecordDict(), run_config={})
    return app(Message(content, 1000, kind), context)


def opened(reply: Message, about: Sealing) -> Payload:
    sealed, broadcast = carried(reply.content, source="north")
    assert broadcast is None
    data = open_sealed(
        sealed, about.answer(), sender=NORTH.public, receiver=SERVER_IDENTITY, max_bytes=1 << 20
    )
    return Payload.from_bytes(data, source="north")


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
    "rank above the limit": (asking(adapter=AdapterSettings(rank=5)), "rank-limit"),
    "steps above the limit": (training(local_steps=6), "steps-limit"),
    "epochs above the limit": (training(local_steps=None, local_epochs=2), "steps-limit"),
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
    assert reply.message.has_error()
    assert not reply.message.has_content()
    assert reply.reason == reason
    told = [record for record in caplog.records if record.name == "fedpeft_client.rounds.app"]
    assert len(told) == 1
    assert "north: " in told[0].getMessage()
    assert_no_canary(caplog, reply)


@pytest.mark.parametrize(
    ("fields", "reason"), [({}, "bad-seal"), ({JOB: 3}, "bad-seal"), ({JOB: "{}"}, "bad-config")]
)
def test_a_message_that_is_no_job_is_refused(fields: dict[str, Any], reason: str, clinic: Clinic):
    assert answer(clinic, Payload(fields)).reason == reason


def test_a_job_without_an_adapter_is_refused(clinic: Clinic):
    job, held = job_for(clinic).to_json(), Held(start_of(clinic))
    assert answer(clinic, Payload({JOB: job})).reason == "bad-seal"
    assert answer(clinic, Payload({JOB: job, ADAPTER: 3})).reason == "bad-seal"
    assert answer(clinic, Payload({JOB: job, ADAPTER: held.digest})).reason == "adapter-not-held"


@pytest.mark.parametrize("kind", [TRAIN, EVALUATE])
def test_a_clinic_that_was_started_anew_says_that_it_holds_nothing(kind: str, clinic: Clinic):
    held, job = Held(start_of(clinic)), job_for(clinic)
    next_one = Held(held.adapter.with_part(held.adapter.plus(held.adapter).part("A")))
    parcel = change(held, next_one, None)
    assert parcel is not None
    payload, adapter = bringing(parcel, next_one, job)
    desk = desk_of(clinic)
    assert answer(clinic, payload, kind, desk, adapter=adapter).reason == "adapter-not-held"
    ask(clinic, kind, desk=desk)
    found = answer(clinic, payload, kind, desk, adapter=adapter)
    expected = ask(clinic, kind, state=next_one.adapter)
    assert found.opened == expected.opened


def test_what_is_held_need_not_be_sent_again(clinic: Clinic):
    desk, job = desk_of(clinic), job_for(clinic, round=2)
    first = ask(clinic, EVALUATE, desk=desk)
    held = Payload({JOB: job.to_json(), ADAPTER: Held(start_of(clinic)).digest})
    again = answer(clinic, held, TRAIN, desk, number=2)
    assert first.number(VALID_TOKENS) > 0
    assert again.opened == ask(clinic, job=job).opened


def test_what_is_not_sealed_is_refused(clinic: Clinic):
    parcel = raw(whole(Held(start_of(clinic))))
    config = ConfigRecord({JOB: job_for(clinic).to_json()})
    content = RecordDict({"arrays": ArrayRecord({"adapter": parcel}), "config": config})
    assert deliver(clinic, content).error.reason == "bad-seal"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"run": RUN + 1}, "wrong-context"),
        ({"federation": "lake"}, "wrong-context"),
        ({"receiver": clinic_role("south")}, "wrong-context"),
        ({"sender": clinic_role("south")}, "wrong-context"),
        ({"purpose": EVALUATE}, "wrong-context"),
        ({"purpose": f"{TRAIN}/reply"}, "wrong-context"),
        ({"round": 2}, "bad-config"),
        ({"schema": "a" * 64}, "wrong-context"),
    ],
)
def test_a_message_from_another_place_does_not_open(
    change: dict[str, Any], reason: str, clinic: Clinic
):
    held = Held(start_of(clinic))
    payload, adapter = bringing(whole(held), held, job_for(clinic))
    about = dataclasses.replace(context_of(clinic, 1, TRAIN), **change)
    sealed = seal(payload.to_bytes(), about, sender=SERVER_IDENTITY, receiver=NORTH.public)
    assert deliver(clinic, carry(sealed, raw(adapter))).error.reason == reason


def test_a_message_signed_by_another_server_does_not_open(clinic: Clinic):
    about, other = context_of(clinic, 1, TRAIN), Identity.generate()
    sealed = seal(Payload().to_bytes(), about, sender=other, receiver=NORTH.public)
    assert deliver(clinic, carry(sealed)).error.reason == "wrong-signature"


def test_another_adapter_than_the_signed_one_is_refused(clinic: Clinic):
    held = Held(start_of(clinic))
    payload, _ = bringing(whole(held), held, job_for(clinic))
    other, _ = seal_broadcast(whole(held))
    assert answer(clinic, payload, adapter=other).reason == "bad-seal"
    twice = Held(held.adapter.plus(held.adapter))
    payload, adapter = bringing(whole(twice), held, job_for(clinic))
    assert answer(clinic, payload, adapter=adapter).reason == "adapter-not-held"


def test_a_message_of_a_round_gone_by_is_refused(clinic: Clinic):
    desk = desk_of(clinic)
    assert ask(clinic, desk=desk, job=job_for(clinic, round=2)).payload is not None
    assert ask(clinic, desk=desk).reason == "wrong-context"


def test_a_clinic_that_demands_secure_aggregation_refuses_a_sealed_job(clinic: Clinic):
    strict = changed(clinic, aggregation=ConfidentialitySettings())
    assert ask(strict).reason == "secagg-required"
    assert ask(strict, EVALUATE).reason == "secagg-required"


@pytest.mark.parametrize("kind", [TRAIN, EVALUATE])
def test_a_secagg_job_is_not_answered_in_the_open(kind: str, clinic: Clinic):
    terms = SEALED.model_copy(update={"confidentiality": "secagg"})
    assert ask(clinic, kind, job=job_for(clinic, aggregation=terms)).reason == "bad-config"


def test_a_later_step_of_a_sum_that_never_began_is_refused(clinic: Clinic):
    assert answer(clinic, Payload(), "train.masked").reason == "out-of-order"


def test_a_clinic_goes_on_after_it_refused(clinic: Clinic):
    desk = desk_of(clinic)
    for prepare, reason in (*BOTH.values(), *TRAIN_ONLY.values()):
        if reason != "bad-data":
            assert ask(clinic, desk=desk, **prepare(clinic)).message.has_error()
    expected, got = ask(clinic), ask(clinic, desk=desk)
    assert update_of(clinic, got).tolist() == update_of(clinic, expected).tolist()


def assert_no_canary(caplog: pytest.LogCaptureFixture, reply: Reply) -> None:
    message = reply.message
    shown = caplog.text + repr([record.__dict__ for record in caplog.records]) + repr(reply)
    sent = b"".join(
        part.deflate() for part in (message.content.values() if message.has_content() else [])
    )
    if reply.payload is not None:
        sent += reply.payload.to_bytes()
    for secret in (TEXT, PATIENT, *TEXT.split()):
        assert secret not in shown
        assert secret.encode() not in sent


def update_of(clinic: Clinic, reply: Reply) -> torch.Tensor:
    schema = adapter_schema(clinic.model, LORA)
    return from_bytes(reply.opened.blob, schema, "update", source="north").values


@pytest.mark.parametrize("kind", [TRAIN, EVALUATE])
def test_no_record_text_or_patient_leaves_or_is_logged(
    kind: str, clinic: Clinic, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)
    reply = ask(clinic, kind)
    assert reply.message.has_content()
    assert_no_canary(caplog, reply)


def test_the_answer_to_train_is_the_change_that_local_training_makes(clinic: Clinic, make_model):
    reply = ask(clinic)
    model = make_model(LORA)
    start = start_of(clinic)
    model.load(start)
    rows = encode(read_records(clinic.data.train), model.base.tokenizer, max_length=64).examples
    result = train(model, rows, TRAINING, Place("north", 1, 3))
    assert torch.equal(update_of(clinic, reply), model.read().minus(start).values)
    assert set(reply.opened.fields) == {NUM_EXAMPLES, TRAIN_NLL, TRAIN_TOKENS}
    assert reply.number(NUM_EXAMPLES) == 9
    assert reply.number(TRAIN_TOKENS) == result.target_tokens
    assert reply.number(TRAIN_NLL) == pytest.approx(result.loss * result.target_tokens)


def test_a_restarted_clinic_answers_to_the_byte_as_one_that_ran_on(clinic: Clinic):
    desk = desk_of(clinic)
    for number in (1, 2):
        ask(clinic, desk=desk, job=job_for(clinic, round=number))
    third = job_for(clinic, round=3)
    ran_on, restarted = ask(clinic, desk=desk, job=third), ask(clinic, job=third)
    assert update_of(clinic, ran_on).tolist() == update_of(clinic, restarted).tolist()


def test_the_answer_to_evaluate_is_two_sums_and_what_the_box_can_train(clinic: Clinic, make_model):
    reply = ask(clinic, EVALUATE)
    model = make_model(LORA)
    assert clinic.data.valid is not None
    rows = encode(read_records(clinic.data.valid), model.base.tokenizer, max_length=64).examples
    expected = score(model, rows)
    assert set(reply.opened.fields) == {VALID_NLL, VALID_TOKENS, MAX_RANK}
    assert reply.opened.blob == b""
    assert reply.number(VALID_NLL) == pytest.approx(expected.nll)
    assert reply.number(VALID_TOKENS) == expected.tokens
    assert reply.number(MAX_RANK) == clinic.limits.max_rank == 4


def test_without_validation_rows_the_sums_are_nothing(clinic: Clinic):
    reply = ask(changed(clinic, data=DataSettings(train=clinic.data.train)), EVALUATE)
    assert reply.number(VALID_TOKENS) == reply.number(VALID_NLL) == 0


def test_an_evaluated_adapter_is_kept_and_the_start_is_not(clinic: Clinic):
    assert clinic.adapter_directory is not None
    ask(clinic, EVALUATE, job=job_for(clinic, round=0))
    assert not clinic.adapter_directory.exists()
    state = start_of(clinic)
    ask(clinic, EVALUATE, state=state)
    assert torch.equal(load_adapter(clinic.adapter_directory, state.schema).values, state.values)


def test_records_are_read_again_once_they_changed(clinic: Clinic):
    desk = desk_of(clinic)
    counts: list[float] = []
    for rows in (9, 9, 12):
        if rows != 9:
            write(clinic.data.train, rows)
        counts.append(ask(clinic, desk=desk).number(NUM_EXAMPLES))
    assert counts == [9, 9, 12]


def test_the_steps_of_training_are_told_to_the_observer(clinic: Clinic):
    seen: list[int] = []
    ask(clinic, desk=desk_of(clinic, lambda done: seen.append(done.step)))
    assert seen == [1, 2]


# Jobs with noise

NOISY = PrivacySettings(unit="record", noise_multiplier=1.0)
STEP = Charge(noise="gaussian", sampling_rate=4 / 9, noise_multiplier=1.0)


def bounded(clinic: Clinic, **privacy: Any) -> Clinic:
    return changed(clinic, privacy=BudgetSettings(**privacy))


def noisy_job(clinic: Clinic, number: int = 1, **changes: Any) -> Job:
    return job_for(clinic, privacy=NOISY.model_copy(update=changes), round=number)


def spent(clinic: Clinic) -> dict[Charge, int]:
    with Ledger(clinic.ledger) as ledger:
        return {k: v for each in ledger.datasets() for k, v in ledger.charges(each.id).items()}


def loss_told(reply: Reply) -> ClinicPrivacy:
    return clinic_privacy(str(reply.opened.fields[PRIVACY]), source="north")


@pytest.mark.parametrize("kind", [TRAIN, EVALUATE])
def test_a_bounded_clinic_refuses_a_job_without_noise_and_says_budget_only(
    kind: str, clinic: Clinic, caplog: pytest.LogCaptureFixture
):
    seen: list[object] = []
    strict = bounded(clinic, max_epsilon=100.0)
    reply = ask(strict, kind, desk=desk_of(strict, seen.append))
    assert not reply.message.has_content()
    assert (reply.reason, seen) == ("budget", [])
    assert_no_canary(caplog, reply)
    assert not strict.ledger.exists() or spent(strict) == {}


def test_the_round_beyond_the_bound_is_refused_and_costs_nothing(clinic: Clinic):
    limit = 1.0001 * epsilon_of({STEP: 4}, 1e-5).epsilon
    strict = bounded(clinic, max_epsilon=limit)
    desk = desk_of(strict)
    for number in (1, 2):
        told = loss_told(ask(strict, desk=desk, job=noisy_job(clinic, number)))
        assert told.epsilon is not None and told.epsilon <= limit
    reply = ask(strict, desk=desk, job=noisy_job(clinic, 3))
    assert (reply.message.has_content(), reply.reason) == (False, "budget")
    assert f"{limit}" not in repr(reply.message.error)
    assert spent(strict) == {STEP: 4}


@pytest.mark.parametrize("kind", [TRAIN, EVALUATE])
def test_exact_losses_are_refused_by_a_clinic_that_does_not_allow_them(kind: str, clinic: Clinic):
    reply = ask(clinic, kind, job=noisy_job(clinic, exact_losses=True))
    assert reply.reason == "losses-not-allowed"


def test_a_noisy_answer_has_no_loss_and_no_token_in_it(clinic: Clinic):
    reply = ask(clinic, job=noisy_job(clinic))
    assert set(reply.opened.fields) == {NUM_EXAMPLES, TRAIN_NLL, TRAIN_TOKENS, PRIVACY}
    assert reply.number(NUM_EXAMPLES) == 9
    assert reply.number(TRAIN_NLL) == reply.number(TRAIN_TOKENS) == 0


def test_beside_noise_validation_rows_are_not_even_read(clinic: Clinic):
    assert clinic.data.valid is not None
    clinic.data.valid.unlink()
    reply = ask(clinic, EVALUATE, job=noisy_job(clinic))
    assert reply.number(VALID_NLL) == reply.number(VALID_TOKENS) == 0


@pytest.mark.parametrize("kind", [TRAIN, EVALUATE])
def test_exact_losses_are_told_where_both_sides_want_them(kind: str, clinic: Clinic):
    both = bounded(clinic, exact_losses=True)
    reply = ask(both, kind, job=noisy_job(clinic, exact_losses=True))
    names = (TRAIN_NLL, TRAIN_TOKENS) if kind == TRAIN else (VALID_NLL, VALID_TOKENS)
    assert min(reply.number(name) for name in names) > 0


def test_epsilon_goes_on_over_a_restart_a_renamed_file_and_another_rank(clinic: Clinic):
    first = loss_told(ask(clinic, job=noisy_job(clinic)))
    renamed = clinic.data.train.rename(clinic.data.train.with_name("renamed.jsonl"))
    moved = changed(clinic, data=clinic.data.model_copy(update={"train": renamed}))
    second = loss_told(ask(moved, job=noisy_job(clinic)))
    assert (first.steps, second.steps) == (2, 4)
    assert second.epsilon == epsilon_of({STEP: 4}, 1e-5).epsilon


def test_what_a_noisy_job_may_not_do_is_refused_with_its_reason(clinic: Clinic):
    changes: list[dict[str, Any]] = [
        {"epsilon": 0.1},
        {"mechanism": "distributed", "honest_clinics": 1},
    ]
    for asked in changes:
        assert ask(clinic, job=noisy_job(clinic, **asked)).reason == "privacy-refused"
    assert spent(clinic) == {}


def test_a_round_with_noise_that_is_repeated_is_paid_once_and_answered_alike(clinic: Clinic):
    desk, job = desk_of(clinic), noisy_job(clinic)
    first, again = (ask(clinic, desk=desk, job=job) for _ in range(2))
    assert spent(clinic) == {STEP: 2}
    assert first.opened.blob == again.opened.blob
    other = ask(clinic, desk=desk, job=job, state=start_of(clinic).plus(start_of(clinic)))
    assert other.opened.blob != first.opened.blob
    assert spent(clinic) == {STEP: 4}


def test_a_clinic_that_demands_patients_refuses_jobs_for_records(clinic: Clinic):
    strict = bounded(clinic, unit="patient")
    assert ask(strict, job=noisy_job(clinic)).reason == "unit-not-allowed"
    assert not strict.ledger.exists() or spent(strict) == {}
