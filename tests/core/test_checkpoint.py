"""A round that is stopped after any step and goes on leaves what it would have left."""

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from safetensors.torch import load

from fedpeft.config import AdapterSettings, TrainingSettings
from fedpeft.data import EncodedExample
from fedpeft.errors import PrivacyError, StorageError
from fedpeft.models import AdaptedModel
from fedpeft.privacy.charge import Charge
from fedpeft.privacy.law import Law, RoundEntry
from fedpeft.privacy.ledger import Ledger
from fedpeft.privacy.noise import GaussianNoise
from fedpeft.privacy.sampling import PoissonSampler
from fedpeft.privacy.skellam import SkellamNoise
from fedpeft.training import Checkpoint, Place, PrivateRound, train
from fedpeft.training.checkpoint import begin
from fedpeft.training.steps import Totals

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
LENGTHS = [9, 30, 14, 5, 22, 17, 8, 12, 11]
PLACE = Place("north", 2, 4)
LORA = AdapterSettings(rank=2, alpha=4.0, dropout=0.2)
STEPS = 5
ADAM = TrainingSettings(
    learning_rate=5e-3,
    weight_decay=0.1,
    batch_size=4,
    micro_batch_size=2,
    local_steps=STEPS,
    schedule="cosine",
    warmup_steps=7,
    proximal_mu=0.1,
)
SGD = ADAM.model_copy(update={"optimizer": "sgd", "learning_rate": 0.5})


class Kept:
    """Checkpoints in memory as their bytes; every step, or only how the round begins."""

    def __init__(self, newest: bytes | None = None, *, every: bool = True) -> None:
        self.files: dict[int, bytes] = {}
        self._newest, self._every = newest, every

    def newest(self) -> Checkpoint | None:
        return None if self._newest is None else Checkpoint.from_bytes(self._newest)

    def offer(self, step: int, take: Callable[[], Checkpoint]) -> None:
        if self._every or step == 0:
            self.files[step] = take().to_bytes()


def private() -> PrivateRound:
    """With new secret keys each time."""
    return PrivateRound(
        unit="patient",
        clip=0.5,
        records_per_patient=2,
        charge=lambda _step: None,
        sampler=PoissonSampler(),
        noise_multiplier=0.3,
        noise=GaussianNoise(),
    )


@pytest.fixture
def rows(make_rows) -> list[EncodedExample]:
    return [
        dataclasses.replace(row, patient_id=f"p{at // 3}")
        for at, row in enumerate(make_rows(LENGTHS))
    ]


def weights_after(
    model: AdaptedModel,
    rows: Sequence[EncodedExample],
    settings: TrainingSettings,
    kept: Kept,
    *,
    noisy: bool,
) -> bytes:
    """Train from the same start; return the bytes of the adapter and of the summed losses."""
    torch.manual_seed(11)
    with torch.no_grad():
        model.weights.copy_(torch.randn(model.weights.numel()) * 0.1)
    torch.manual_seed(id(kept) % 1000)  # what the process drew before must not matter
    result = train(
        model, rows, settings, PLACE, private=private() if noisy else None, checkpoints=kept
    )
    figures = dataclasses.replace(result, seconds=0.0)
    return model.weights.detach().numpy().tobytes() + repr(figures).encode()


@pytest.mark.parametrize("noisy", [False, True], ids=["plain", "private"])
@pytest.mark.parametrize("settings", [ADAM, SGD], ids=["adam", "sgd"])
def test_a_round_stopped_after_any_step_leaves_the_same_bytes(make_model, rows, settings, noisy):
    model, whole = make_model(LORA), Kept()
    expected = weights_after(model, rows, settings, whole, noisy=noisy)
    assert sorted(whole.files) == list(range(STEPS + 1))
    for step, data in whole.files.items():
        again = Kept(data)
        assert weights_after(model, rows, settings, again, noisy=noisy) == expected
        assert sorted(again.files) == list(range(step + 1, STEPS + 1))


def test_when_checkpoints_are_made_changes_nothing(make_model, rows):
    model, whole = make_model(LORA), Kept()
    expected = weights_after(model, rows, ADAM, whole, noisy=True)
    seldom = Kept(whole.files[0], every=False)
    assert weights_after(model, rows, ADAM, seldom, noisy=True) == expected
    assert not seldom.files


def test_a_plain_round_with_checkpoints_is_one_without(make_model, rows):
    model = make_model(LORA)
    start = model.weights.detach().clone()
    train(model, rows, ADAM, PLACE)
    expected = model.weights.detach().clone()
    with torch.no_grad():
        model.weights.copy_(start)
    train(model, rows, ADAM, PLACE, checkpoints=Kept())
    assert torch.equal(model.weights.detach(), expected)


def test_a_private_round_draws_fresh_noise_unless_it_goes_on(make_model, rows):
    model = make_model(LORA)
    first, second = (weights_after(model, rows, ADAM, Kept(), noisy=True) for _ in range(2))
    assert first != second


def test_each_checkpoint_has_keys_of_its_own(make_model, rows):
    """The key of an earlier one would tell the noise that is in the weights of a later one."""
    whole = Kept()
    weights_after(make_model(LORA), rows, ADAM, whole, noisy=True)
    found = [Checkpoint.from_bytes(data).keys for data in whole.files.values()]
    assert all(set(each) == {"sampler", "noise"} for each in found)
    assert len({key for each in found for key in each.values()}) == 2 * (STEPS + 1)


def test_the_keys_are_in_no_text_of_a_checkpoint(make_model, rows):
    whole = Kept()
    weights_after(make_model(LORA), rows, ADAM, whole, noisy=True)
    checkpoint = Checkpoint.from_bytes(whole.files[2])
    assert "sampler" not in repr(checkpoint)
    assert "totals" in repr(checkpoint)


@pytest.mark.parametrize("kind", [PoissonSampler, GaussianNoise, SkellamNoise])
def test_draws_go_on_from_their_key(kind):
    first, second = kind(), kind()
    second.go_on(first.renew())
    if isinstance(first, SkellamNoise):
        drawn = [each.draw(100, 9.0).tolist() for each in (first, second)]
    elif isinstance(first, GaussianNoise):
        drawn = [each.draw(100).tolist() for each in (first, second)]
    else:
        drawn = [each.sample(100, 0.5).tolist() for each in (first, second)]
    assert drawn[0] == drawn[1]
    assert first.renew() == second.renew()


def test_keys_are_not_renewed_in_a_forked_process(monkeypatch):
    draws = PoissonSampler()
    monkeypatch.setattr("os.getpid", lambda: -1)
    with pytest.raises(PrivacyError, match="forked process"):
        draws.renew()


def test_a_sum_of_one_step_begins_again_with_the_keys_that_it_had():
    kept = Kept()
    (sampler, noise), (other, again) = ((PoissonSampler(), SkellamNoise()) for _ in range(2))
    begin(kept, {"sampler": sampler, "noise": noise})
    begin(Kept(kept.files[0]), {"sampler": other, "noise": again})
    assert noise.draw(50, 4.0).tolist() == again.draw(50, 4.0).tolist()
    assert sampler.renew() == other.renew()


def test_a_file_is_safetensors_and_json():
    optimizer = {"step": torch.tensor(3.0), "exp_avg": torch.ones(4), "number": 2}
    kept = Checkpoint(
        totals=Totals(steps=3, loss=0.1 + 0.2),
        weights=torch.arange(4.0),
        optimizer=optimizer,
        generators={"cpu": torch.get_rng_state()},
        keys={"noise": bytes(range(32))},
    )
    data = kept.to_bytes()
    assert {"weights", "optimizer.step", "optimizer.exp_avg", "generator.cpu"} == set(load(data))
    again = Checkpoint.from_bytes(data)
    assert (again.totals, again.keys) == (kept.totals, kept.keys)
    assert torch.equal(again.weights, kept.weights)
    assert again.optimizer["number"] == 2
    assert again.to_bytes() == data


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: data[:7],
        lambda data: data[:-1],
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data.replace(b'\\"schema\\": 1', b'\\"schema\\": 2'),
        lambda data: data.replace(b"totals", b"totalz"),
        lambda data: data.replace(b"unusable", b"unusablf"),
    ],
)
def test_what_is_no_checkpoint_of_this_release_is_refused(spoil):
    data = Checkpoint(totals=Totals()).to_bytes()
    assert spoil(data) != data
    with pytest.raises(StorageError):
        Checkpoint.from_bytes(spoil(data))


# What is charged


def test_an_attempt_is_charged_once_for_a_step_and_another_one_again(tmp_path):
    step = Charge(noise="gaussian", sampling_rate=0.1, noise_multiplier=1.0)
    entry = RoundEntry(federation="sea", run="1", round=2, unit="patient", attempt="a" * 64)
    place = (entry, step, 4, Law())
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        dataset = ledger.dataset(["patient 1"]).id
        budget = ledger.open_round(dataset, *place)
        for number in (1, 2):
            budget.charge(number)
        again = ledger.open_round(dataset, *place)
        for number in (2, 3):
            again.charge(number)
        assert ledger.charges(dataset) == {step: 3}
        again.charge(2)  # not the one of before: it has been taken already
        assert ledger.charges(dataset) == {step: 4}
        for other in (dataclasses.replace(entry, attempt=name) for name in ("b" * 64, "")):
            ledger.open_round(dataset, other, *place[1:]).charge(1)
        assert ledger.charges(dataset) == {step: 6}
        assert ledger.verify() == []


def test_steps_without_an_attempt_are_charged_each_time(tmp_path):
    step = Charge(noise="none")
    entry = RoundEntry(federation="sea", run="1", round=2, unit="record")
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        dataset = ledger.dataset(["record 1"]).id
        for _ in range(3):
            ledger.open_round(dataset, entry, step, 1, Law()).charge(1)
        assert ledger.charges(dataset) == {step: 3}
