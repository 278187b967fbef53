"""What a clinic computes for a job: parts, ranks, its own factors, and a base that changed."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedpeft.adapters import (
    AdapterState,
    at_rank,
    combined,
    load_adapter,
    load_settings_of,
    to_bytes,
)
from fedpeft.config import AdapterSettings, PrivacySettings, TrainingSettings
from fedpeft.errors import (
    ConfigError,
    ModelError,
    NotFinite,
    PolicyRefused,
    PrivacyError,
    SchemaMismatch,
    StorageError,
    WrongContext,
)
from fedpeft.models import adapter_schema, fingerprint, initial_state
from fedpeft.privacy.ledger import Ledger
from fedpeft.protocol import Job, RankTerms, SumTerms
from fedpeft.protocol.parcel import Held, Increment
from fedpeft.sealing import Identity
from fedpeft.training import StepDone
from fedpeft_client.rounds.clinic import Clinic, Membership
from fedpeft_client.rounds.work import Assignment, ClinicWork
from fedpeft_client.settings import DataSettings, LimitSettings

RANK = 4
LORA = AdapterSettings(rank=RANK, alpha=8.0)
LOCAL = PrivacySettings(unit="record", noise_multiplier=0.8)
CENTRAL = PrivacySettings(unit="clinic", mechanism="central", noise_multiplier=1.0)
SHARED = PrivacySettings(
    unit="record", mechanism="distributed", noise_multiplier=0.8, honest_clinics=3
)
OWN_B: dict[str, Any] = {"trains": "AB", "sends": "A"}


@pytest.fixture
def clinic(tiny_model: Path, tmp_path: Path) -> Clinic:
    file = tmp_path / "rows.jsonl"
    lines = [{"question": f"What is {at}?", "answer": f"It is {at * at}."} for at in range(8)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    identity = Identity.generate()
    return Clinic(
        name="north",
        federation="sea",
        membership=Membership(identity, identity.public),
        model=tiny_model,
        data=DataSettings(train=file, valid=file),
        ledger=tmp_path / "ledger.sqlite",
        dtype="float32",
        adapter_directory=tmp_path / "adapter",
        personal_directory=tmp_path / "personal",
    )


def ranks(rule: Any, own: int, others: int = RANK) -> RankTerms:
    return RankTerms(rule=rule, of={"north": own}, others=others)


def job_for(clinic: Clinic, **changes: Any) -> Job:
    fields: dict[str, Any] = {
        "federation": "sea",
        "run": "1" * 32,
        "fingerprint": fingerprint(clinic.model),
        "quantization": "none",
        "adapter": LORA,
        "training": TrainingSettings(
            learning_rate=1e-2, batch_size=4, local_steps=2, max_length=64
        ),
        "aggregation": SumTerms(confidentiality="secagg", adversary="active", bits=16, limit=1.0),
        "round": 1,
        "rounds": 9,
    }
    return Job(**(fields | changes))


def noise(clinic: Clinic, size: float = 0.1, seed: int = 3, rank: int = RANK) -> AdapterState:
    schema = adapter_schema(clinic.model, LORA).of_rank(rank)
    values = torch.randn(schema.numel, generator=torch.Generator().manual_seed(seed)) * size
    return AdapterState(schema, values)


def assigned(
    job: Job, state: AdapterState, increments: Sequence[Increment] = (), run: int = 1
) -> Assignment:
    return Assignment(job, Held(state, tuple(increments)), state.schema.hash, run)


def increments_of(clinic: Clinic, *of_ranks: int) -> list[Increment]:
    states = [noise(clinic, 0.05, 20 + at, rank) for at, rank in enumerate(of_ranks)]
    return [Increment(state.schema.rank, to_bytes(state, "update")) for state in states]


def train(clinic: Clinic, state: AdapterState, work: ClinicWork | None = None, **changes: Any):
    return (work or ClinicWork()).train(clinic, assigned(job_for(clinic, **changes), state))


def evaluate(clinic: Clinic, state: AdapterState, work: ClinicWork | None = None, **changes: Any):
    return (work or ClinicWork()).evaluate(clinic, assigned(job_for(clinic, **changes), state))


def steps_charged(clinic: Clinic) -> int:
    with Ledger(clinic.ledger) as ledger:
        return sum(sum(ledger.charges(one.id).values()) for one in ledger.datasets())


def saved(clinic: Clinic) -> AdapterState:
    assert clinic.adapter_directory is not None
    settings = load_settings_of(clinic.adapter_directory)
    return load_adapter(clinic.adapter_directory, adapter_schema(clinic.model, settings))


# What is refused


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"privacy": SHARED, "ranks": ranks("nested", 2)}, "clinics of different ranks"),
        ({"privacy": SHARED, **OWN_B}, "factors that stay on the box"),
        ({"privacy": CENTRAL, "ranks": ranks("truncated", 2)}, "clinics of different ranks"),
    ],
)
def test_noise_that_does_not_fit_the_part_is_refused_and_nothing_is_computed(
    changes: dict[str, Any], told: str, clinic: Clinic
):
    seen: list[StepDone] = []
    with pytest.raises(PrivacyError, match=rf"{told}.*nothing was trained"):
        train(clinic, noise(clinic), ClinicWork(seen.append), **changes)
    assert seen == []
    assert not clinic.ledger.exists()


@pytest.mark.parametrize("rule", ["nested", "truncated", "stacked"])
def test_the_limit_is_on_the_rank_that_the_clinic_itself_trains(rule: str, clinic: Clinic):
    strict = dataclasses.replace(clinic, limits=LimitSettings(max_rank=2))
    state = noise(clinic)
    for own in (None, ranks(rule, 3, 2)):
        seen: list[StepDone] = []
        with pytest.raises(PolicyRefused, match="max_rank = 2"):
            train(strict, state, ClinicWork(seen.append), ranks=own)
        assert seen == []
    assert train(strict, state, ranks=ranks(rule, 2, 3)).update.schema.rank == 2


@pytest.mark.parametrize("rule", [None, "nested", "truncated", "stacked"])
def test_a_clinic_of_a_low_rank_is_heard_before_anybody_knows_its_rank(
    rule: str | None, clinic: Clinic
):
    """Its answer in round 0 is what tells the server its largest rank."""
    strict = dataclasses.replace(clinic, limits=LimitSettings(max_rank=2))
    state, own = noise(clinic), rule and ranks(rule, 3, 2)
    measured = evaluate(strict, state, ranks=own)
    assert measured.tokens > 0
    assert measured == evaluate(clinic, state, ranks=own)


def test_an_adapter_of_the_clinics_rank_alone_is_refused(clinic: Clinic):
    """All clinics hold the whole adapter, and train their part of it."""
    for do in (train, evaluate):
        with pytest.raises(WrongContext):
            do(clinic, noise(clinic, rank=2), ranks=ranks("truncated", 2))


def test_products_that_the_job_does_not_name_are_refused(clinic: Clinic):
    state, (one, two) = noise(clinic), increments_of(clinic, 2, 3)
    for named, came in (
        ([one], []),
        ([], [one]),
        ([one], [two]),
        ([one, two], [two, one]),
        ([one, two], [one]),
    ):
        job = job_for(clinic, base_change=tuple(each.digest for each in named))
        for do in (ClinicWork().train, ClinicWork().evaluate):
            with pytest.raises(ConfigError, match="are others: nothing was computed"):
                do(clinic, assigned(job, state, came))


@pytest.mark.parametrize("kind", ["adapter", "rank", "nan"])
def test_products_that_cannot_be_used_are_refused(kind: str, clinic: Clinic):
    product = noise(clinic, rank=2)
    if kind == "nan":
        product.values[5] = torch.nan
    data = to_bytes(product, "adapter" if kind == "adapter" else "update")
    increment = Increment(3 if kind == "rank" else 2, data)
    job = job_for(clinic, base_change=(increment.digest,))
    with pytest.raises((SchemaMismatch, NotFinite), match="the server"):
        ClinicWork().train(clinic, assigned(job, noise(clinic), [increment]))


def test_a_quantised_base_is_not_changed(clinic: Clinic):
    increments = increments_of(clinic, 2)
    job = job_for(clinic, quantization="nf4", base_change=(increments[0].digest,))
    with pytest.raises(ModelError, match='use strategy "alternating"'):
        ClinicWork().train(clinic, assigned(job, noise(clinic), increments))


# Parts


@pytest.mark.parametrize("factors", ["A", "B", "AB"])
@pytest.mark.parametrize("privacy", [None, LOCAL, CENTRAL], ids=["none", "local", "central"])
def test_the_update_is_the_change_of_the_part_that_is_sent(
    factors: Any, privacy: PrivacySettings | None, clinic: Clinic
):
    state = noise(clinic)
    update = train(clinic, state, trains=factors, sends=factors, privacy=privacy).update
    assert update.schema == state.schema.part(factors)
    assert update.values.count_nonzero() > 0.9 * update.schema.numel


@pytest.mark.parametrize("factors", ["A", "B"])
def test_a_shared_sum_has_the_coordinates_of_the_part(factors: Any, clinic: Clinic):
    state = noise(clinic)
    trained = train(clinic, state, trains=factors, sends=factors, privacy=SHARED)
    assert trained.update.schema == state.schema.part(factors)
    assert torch.equal(trained.update.values, trained.update.values.round())


def test_a_round_of_both_after_one_of_b_is_as_on_a_fresh_box(clinic: Clinic):
    work, state = ClinicWork(), noise(clinic)
    train(clinic, state, work, trains="B", sends="B")
    evaluate(clinic, state, work, trains="B", sends="B")
    again = train(clinic, state, work).update
    assert torch.equal(again.values, train(clinic, state).update.values)


# Ranks


@pytest.mark.parametrize("factors", ["A", "B", "AB"])
@pytest.mark.parametrize("rule", ["nested", "truncated", "stacked"])
def test_a_clinic_of_lower_rank_sends_its_first_columns(rule: str, factors: Any, clinic: Clinic):
    state = noise(clinic)
    update = train(clinic, state, trains=factors, sends=factors, ranks=ranks(rule, 2)).update
    assert update.schema == state.schema.part(factors, 2)
    assert update.values.count_nonzero() > 0.9 * update.schema.numel


@pytest.mark.parametrize("rule", ["truncated", "stacked"])
def test_without_the_rest_training_is_that_of_a_smaller_adapter_at_the_same_scale(
    rule: str, clinic: Clinic
):
    state = noise(clinic)
    found = train(clinic, state, ranks=ranks(rule, 2)).update
    small = AdapterSettings(rank=2, alpha=4.0)
    expected = train(clinic, state.part("AB", 2), adapter=small).update
    assert torch.equal(found.values, expected.values)


def test_nested_training_sees_the_rest(clinic: Clinic):
    state = noise(clinic)
    other = state.with_part(state.part("AB", 2))
    beyond = AdapterState(state.schema, state.values * 2).with_part(state.part("AB", 2))
    updates = [train(clinic, one, ranks=ranks("nested", 2)).update for one in (other, beyond)]
    assert not torch.allclose(updates[0].values, updates[1].values)


def test_the_full_rank_under_a_rule_is_as_without_one(clinic: Clinic):
    state = noise(clinic)
    expected = train(clinic, state).update
    for rule in ("nested", "truncated", "stacked"):
        found = train(clinic, state, ranks=ranks(rule, RANK)).update
        assert torch.equal(found.values, expected.values)


def test_a_clinic_of_lower_rank_keeps_what_it_uses(clinic: Clinic):
    state, measured = noise(clinic), {}
    for rule in ("nested", "truncated", "stacked"):
        measured[rule] = evaluate(clinic, state, ranks=ranks(rule, 2)).nll
        kept = saved(clinic)
        expected = state.part("AB", 2) if rule == "truncated" else state
        assert torch.equal(kept.values, expected.values)
    whole = evaluate(clinic, state).nll
    small = evaluate(clinic, state.part("AB", 2), adapter=at_rank(LORA, 2)).nll
    assert measured == {"nested": whole, "truncated": small, "stacked": whole}
    assert small != whole


# A base that changed


def test_a_changed_base_gives_what_the_combined_adapter_gives_on_the_unchanged_one(
    clinic: Clinic,
):
    state, increments = noise(clinic), increments_of(clinic, 2, 3)
    job = job_for(clinic, base_change=tuple(one.digest for one in increments))
    measured = ClinicWork().evaluate(clinic, assigned(job, state, increments))
    whole = combined(state, [noise(clinic, 0.05, 20, 2), noise(clinic, 0.05, 21, 3)])
    assert whole.schema.rank == RANK + 5
    plain = evaluate(clinic, whole, adapter=at_rank(LORA, RANK + 5))
    assert measured.nll == pytest.approx(plain.nll, rel=1e-5)
    assert measured.nll != pytest.approx(evaluate(clinic, state).nll, rel=1e-3)


@pytest.mark.parametrize("of_ranks", [(2, 3), (40, 30, 7)], ids=["stacked", "compressed"])
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_what_is_kept_of_a_changed_base_works_with_stock_peft_on_the_files(
    of_ranks: tuple[int, ...], clinic: Clinic
):
    state, increments = noise(clinic), increments_of(clinic, *of_ranks)
    job = job_for(clinic, base_change=tuple(one.digest for one in increments))
    work = ClinicWork()
    work.evaluate(clinic, assigned(job, state, increments))
    network = AutoModelForCausalLM.from_pretrained(clinic.model, dtype=torch.float32)
    stock: Any = PeftModel.from_pretrained(network, str(clinic.adapter_directory)).eval()
    model: Any = work._workbench._adapted
    model.eval_mode()
    tokens = torch.tensor([[5, 9, 200, 31, 7, 64]])
    with torch.no_grad():
        found = stock(input_ids=tokens).logits
        expected = model.base.network(input_ids=tokens).logits
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    assert load_settings_of(clinic.adapter_directory or Path()).rank == min(
        RANK + sum(of_ranks), 32
    )


def test_a_plain_job_after_a_changed_one_gets_the_untouched_base(clinic: Clinic):
    state, increments, work = noise(clinic), increments_of(clinic, 2), ClinicWork()
    job = job_for(clinic, base_change=(increments[0].digest,))
    changed = work.train(clinic, assigned(job, state, increments)).update
    plain = train(clinic, state, work).update
    assert torch.equal(plain.values, train(clinic, state).update.values)
    assert not torch.equal(plain.values, changed.values)


# The clinic's own factors


def next_round(clinic: Clinic, number: int, work: ClinicWork | None = None, run: str = "1") -> Any:
    """Train round ``number`` from an adapter of the server's whose B is zero."""
    state = initial_state(adapter_schema(clinic.model, LORA), number)
    assignment = assigned(job_for(clinic, round=number, run=run * 32, **OWN_B), state)
    return (work or ClinicWork()).train(clinic, assignment).update


def personal(clinic: Clinic) -> dict[str, bytes]:
    folder = clinic.personal_directory or Path()
    return {path.name: path.read_bytes() for path in folder.rglob("*.safetensors")}


def test_only_the_part_that_is_sent_leaves(clinic: Clinic):
    update = next_round(clinic, 1)
    assert update.schema == adapter_schema(clinic.model, LORA).part("A")
    assert update.norm() > 0
    assert list(personal(clinic)) == ["1.safetensors"]


def test_a_box_that_restarts_goes_on_as_one_that_did_not(clinic: Clinic, tmp_path: Path):
    through, work = dataclasses.replace(clinic, personal_directory=None), ClinicWork()
    for number in (1, 2, 3):
        expected = next_round(through, number, work)
        found = next_round(clinic, number, ClinicWork())
        assert torch.equal(found.values, expected.values)
    forgetful = dataclasses.replace(clinic, personal_directory=tmp_path / "other")
    assert not torch.equal(next_round(forgetful, 3).values, expected.values)  # pyright: ignore[reportPossiblyUnboundVariable]


def test_a_repeated_round_starts_from_the_round_before_and_not_from_its_own_try(clinic: Clinic):
    next_round(clinic, 1)
    first, kept = next_round(clinic, 2), personal(clinic)
    assert torch.equal(next_round(clinic, 2).values, first.values)
    assert personal(clinic) == kept


def test_a_round_that_fails_keeps_nothing(clinic: Clinic):
    next_round(clinic, 1)
    kept = personal(clinic)

    def fail(_done: StepDone) -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        next_round(clinic, 2, ClinicWork(fail))
    assert personal(clinic) == kept


def test_another_run_begins_without_the_factors_of_the_last(clinic: Clinic):
    first = next_round(clinic, 1)
    next_round(clinic, 2)
    assert torch.equal(next_round(clinic, 1, run="2").values, first.values)


def test_a_damaged_file_stops_the_round_before_anything_is_charged(clinic: Clinic):
    next_round(clinic, 1)
    charged = steps_charged(clinic)
    (path,) = (clinic.personal_directory or Path()).rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(StorageError, match="personal factors"):
        next_round(clinic, 2)
    assert steps_charged(clinic) == charged


@pytest.mark.parametrize("own", [RANK, 2])
def test_what_is_measured_and_kept_is_the_personal_adapter(own: int, clinic: Clinic):
    terms = None if own == RANK else ranks("truncated", own)
    sent = initial_state(adapter_schema(clinic.model, LORA), 1)
    work = ClinicWork()
    changes: dict[str, Any] = {**OWN_B, "ranks": terms}
    before = evaluate(clinic, sent, work, **changes, round=0)
    update = train(clinic, sent, work, **changes).update
    after = evaluate(clinic, sent, work, **changes)
    assert after.nll != before.nll
    kept = saved(clinic)
    assert torch.equal(kept.part("A").values, sent.part("A", own).values)
    assert kept.part("B").norm() > 0
    assert update.schema == sent.schema.part("A", own)
    (path,) = (clinic.personal_directory or Path()).rglob("*.safetensors")
    from safetensors.torch import load_file

    tensors = load_file(path)
    assert all(torch.equal(kept.tensors()[name], tensor) for name, tensor in tensors.items())


def test_a_clinic_keeps_a_where_b_is_sent(clinic: Clinic):
    state = noise(clinic)
    changes: dict[str, Any] = {"trains": "AB", "sends": "B"}
    update = train(clinic, state, **changes).update
    assert update.schema == state.schema.part("B")
    evaluate(clinic, state, **changes)
    kept = saved(clinic)
    assert torch.equal(kept.part("B").values, state.part("B").values)
    assert not torch.equal(kept.part("A").values, state.part("A").values)


def test_clinics_of_one_process_keep_their_own_in_memory(clinic: Clinic):
    work = ClinicWork()
    pair = [dataclasses.replace(clinic, name=n, personal_directory=None) for n in ("c0", "c1")]
    next_round(pair[0], 1, work)
    expected = next_round(pair[1], 2, ClinicWork())
    assert torch.equal(next_round(pair[1], 2, work).values, expected.values)
    assert personal(clinic) == {}


@pytest.mark.parametrize("privacy", [LOCAL, CENTRAL], ids=["local", "central"])
def test_under_noise_the_kept_factors_stay_and_the_sent_ones_are_bounded(
    privacy: PrivacySettings, clinic: Clinic
):
    tight = privacy.model_copy(update={"clip": 1e-3})
    state = noise(clinic)
    trained = train(clinic, state, **OWN_B, privacy=tight)
    assert trained.update.schema == state.schema.part("A")
    if privacy is CENTRAL:
        assert trained.update.norm() <= 1e-3 * (1 + 1e-6)
    assert list(personal(clinic)) == ["1.safetensors"]
