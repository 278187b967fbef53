"""Single answers that the server opens: what is not exactly what was asked for is not used."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from fedpeft.adapters import AdapterSchema, AdapterState, TensorSpec, to_bytes
from fedpeft.config import AdapterSettings, PrivacySettings, TrainingSettings
from fedpeft.errors import AdapterError, FedpeftError
from fedpeft.protocol import Job, Payload, RankTerms, SumTerms
from fedpeft.protocol.parcel import Held
from fedpeft_server.rounds.channel import Accept, Channel, Letter
from fedpeft_server.rounds.collection import Collected, Sums
from fedpeft_server.rounds.delivery import Delivery, Order
from fedpeft_server.rounds.opened import OpenedCollector

NAMES = {7: "north", 8: "south", 9: "west"}
SCHEMA = AdapterSchema(
    (TensorSpec("m.lora_A.weight", (3, 4)), TensorSpec("m.lora_B.weight", (5, 3))), "a" * 64
)
RANKS = RankTerms(rule="truncated", of={"north": 2, "south": 3, "west": 1}, others=1)
NUMBERS: dict[str, Any] = {"num-examples": 4, "train-nll": 6.0, "train-tokens": 3}
SCORES: dict[str, Any] = {"valid-nll": 8.0, "valid-tokens": 4, "max-rank": 2}


def job_of(**changes: Any) -> Job:
    job = Job(
        run="0" * 32,
        federation="sea",
        fingerprint="a" * 64,
        quantization="none",
        adapter=AdapterSettings(rank=3),
        training=TrainingSettings(),
        aggregation=SumTerms(confidentiality="sealed", adversary="active", bits=16, limit=1.0),
        round=1,
        rounds=2,
    )
    return job.model_copy(update=changes)


class Post(Channel):
    """Brings the answers that it was given, as the wire would."""

    def __init__(self, answers: Mapping[str, Payload | str]) -> None:
        self._answers = answers

    def names(self) -> dict[int, str]:
        return NAMES

    def ask(
        self,
        message_type: str,
        number: int,
        attempt: int,
        letters: Mapping[int, Letter],
        *,
        timeout_s: float,
        accept: Accept,
    ) -> dict[str, str]:
        del message_type, number, attempt, timeout_s
        failed: dict[str, str] = {}
        for name in (NAMES[node] for node in letters):
            answer = self._answers.get(name, "timeout")
            try:
                if isinstance(answer, str):
                    failed[name] = answer
                else:
                    accept(name, Payload.from_bytes(answer.to_bytes(), source=name))
            except FedpeftError as error:
                failed[name] = error.reason
        return failed


class Sunk:
    """What the strategy is given."""

    def __init__(self) -> None:
        self.got: list[tuple[AdapterState, float]] = []

    def __call__(self, update: AdapterState, weight: float) -> None:
        self.got.append((update, weight))


def update_of(schema: AdapterSchema = SCHEMA, value: float = 0.5) -> bytes:
    return to_bytes(AdapterState(schema, torch.full((schema.numel,), value)), "update")


def collect(
    kind: Any, answers: Mapping[str, Payload | str], job: Job | None = None, sink: Any = None
) -> tuple[Collected, list[tuple[AdapterState, float]]]:
    sunk = sink or Sunk()
    collector = OpenedCollector(Delivery(Post(answers)), SCHEMA, 1.0)
    held = Held(AdapterState(SCHEMA, torch.zeros(SCHEMA.numel)))
    found = collector.collect(kind, 1, 1, Order(job or job_of(), held), sorted(NAMES), sunk)
    return found, sunk.got if isinstance(sunk, Sunk) else []


def refused(kind: str, payload: Payload, job: Job | None = None) -> str:
    """Return why the answer of one clinic among three is not used, though the others' are."""
    good = Payload(NUMBERS, update_of()) if kind == "train" else Payload(SCORES)
    if job is not None and kind == "train":
        good = "timeout"
    found, got = collect(kind, {"north": payload, "south": good, "west": good}, job)
    assert "north" not in found.participants
    assert "north" not in found.losses
    assert "north" not in found.max_ranks
    assert len(got) == len(found.participants) * (kind == "train")
    if not isinstance(good, str):
        assert found.participants == ("south", "west")
    return found.failed["north"]


# What is refused

BAD_NUMBERS: dict[str, Any] = {
    "missing": None,
    "yes": True,
    "no": False,
    "text": "3",
    "empty": "",
    "negative": -1,
    "negative, too": -0.5,
    "beyond any count": 1e300,
    "beyond any float": 10**400,
}
bad_numbers = pytest.mark.parametrize("value", BAD_NUMBERS.values(), ids=list(BAD_NUMBERS))


@pytest.mark.parametrize("value", [2, -1, 0.5, "1"])
def test_a_verdict_that_is_neither_yes_nor_no_is_not_used(value: Any):
    asking = job_of().model_copy(update={"asks_verdict": True})
    assert refused("evaluate", Payload({**SCORES, "verdict": value}), asking) == "bad-adapter"


def test_a_verdict_that_nobody_asked_for_is_not_used():
    assert refused("evaluate", Payload({**SCORES, "verdict": 1})) == "bad-adapter"


def test_verdicts_are_counted_and_may_be_missing():
    asking = job_of().model_copy(update={"asks_verdict": True})
    answers = {
        "north": Payload({**SCORES, "verdict": 1}),
        "south": Payload({**SCORES, "verdict": 0}),
        "west": Payload(SCORES),
    }
    sums = collect("evaluate", answers, asking)[0].sums
    assert (sums.verdicts, sums.accepted) == (2, 1)


@bad_numbers
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_of_training_that_is_none_is_refused(name: str, value: Any):
    fields = {**NUMBERS, name: value}
    if value is None:
        del fields[name]
    assert refused("train", Payload(fields, update_of())) in ("bad-adapter", "bad-seal")


@bad_numbers
@pytest.mark.parametrize("name", ["valid-nll", "valid-tokens"])
def test_a_number_of_evaluation_that_is_none_is_refused(name: str, value: Any):
    fields = {**SCORES, name: value}
    if value is None:
        del fields[name]
    assert refused("evaluate", Payload(fields)) in ("bad-adapter", "bad-seal")


@pytest.mark.parametrize("rank", [None, True, "3", -1, 0, 2.0, 1.5])
def test_a_largest_rank_that_is_no_whole_number_from_1_is_refused(rank: Any):
    fields = {**SCORES, "max-rank": rank}
    if rank is None:
        del fields["max-rank"]
    assert refused("evaluate", Payload(fields)) in ("bad-adapter", "bad-seal")


@pytest.mark.parametrize("rows", [0, 0.5])
def test_an_update_of_no_rows_is_refused(rows: float):
    payload = Payload({**NUMBERS, "num-examples": rows}, update_of())
    assert refused("train", payload) == "bad-adapter"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_an_update_that_is_not_finite_is_refused(value: float):
    assert refused("train", Payload(NUMBERS, update_of(value=value))) == "not-finite"


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        ({}, SCHEMA.part("A")),
        ({}, SCHEMA.part("B")),
        ({}, SCHEMA.part("AB", 2)),
        ({"trains": "A", "sends": "A"}, SCHEMA),
        ({"trains": "A", "sends": "A"}, SCHEMA.part("B")),
        ({"sends": "B"}, SCHEMA.part("A")),
        ({"ranks": RANKS}, SCHEMA),
        ({"ranks": RANKS}, SCHEMA.part("AB", 1)),
        ({"ranks": RANKS, "trains": "B", "sends": "B"}, SCHEMA.part("A", 2)),
        ({"ranks": RANKS, "trains": "B", "sends": "B"}, SCHEMA.part("B", 3)),
    ],
)
def test_an_update_of_another_part_or_rank_than_was_asked_for_is_refused(
    asked: dict[str, Any], sent: AdapterSchema
):
    reason = refused("train", Payload(NUMBERS, update_of(sent)), job_of(**asked))
    assert reason == "wrong-adapter-schema"


def test_an_adapter_is_not_taken_for_an_update():
    whole = to_bytes(AdapterState(SCHEMA, torch.ones(SCHEMA.numel)), "adapter")
    for blob in (whole, b"", update_of()[:-1], update_of() + b"\0"):
        assert refused("train", Payload(NUMBERS, blob)) == "wrong-adapter-schema"


def test_a_clinic_that_does_not_say_what_noise_cost_it_is_not_a_participant():
    noisy = job_of(privacy=PrivacySettings(unit="record", noise_multiplier=1.0))
    found, got = collect("train", {"north": Payload(NUMBERS, update_of())}, noisy)
    assert (found.participants, found.failed["north"]) == ((), "bad-adapter")
    assert got == []


def test_an_update_that_the_strategy_refuses_is_not_counted():
    def refusing(update: AdapterState, weight: float) -> None:
        raise AdapterError(f"{update}, {weight}")

    found, _ = collect("train", {"north": Payload(NUMBERS, update_of())}, sink=refusing)
    assert found.participants == ()
    assert found.sums == Sums()
    assert found.failed["north"] == "bad-adapter"


# What is used


@pytest.mark.parametrize(
    ("asked", "rank", "factors"),
    [
        ({}, 3, "AB"),
        ({"trains": "A", "sends": "A"}, 3, "A"),
        ({"sends": "B"}, 3, "B"),
        ({"ranks": RANKS}, 2, "AB"),
        ({"ranks": RANKS, "trains": "B", "sends": "B"}, 2, "B"),
    ],
)
def test_the_part_that_was_asked_for_is_handed_over(asked: dict[str, Any], rank: int, factors: Any):
    part = SCHEMA.part(factors, rank)
    answers = {"north": Payload(NUMBERS, update_of(part, 0.25))}
    found, ((update, weight),) = collect("train", answers, job_of(**asked))
    assert (update.schema, weight) == (part, 4)
    assert set(update.values.tolist()) == {0.25}
    assert (found.participants, found.failed) == (
        ("north",),
        {"south": "timeout", "west": "timeout"},
    )


def test_training_is_summed_and_nothing_of_one_clinic_is_kept():
    answers = {
        name: Payload({"num-examples": rows, "train-nll": 1.5, "train-tokens": 3}, update_of())
        for name, rows in (("north", 4), ("south", 5), ("west", 6))
    }
    found, got = collect("train", answers)
    assert [weight for _, weight in got] == [4, 5, 6]
    assert found.participants == ("north", "south", "west")
    assert found.sums == Sums(rows=15, nll=4.5, tokens=9)
    assert found.losses == {}


def test_losses_and_ranks_of_an_evaluation_are_known_by_clinic():
    nothing: dict[str, Any] = {"valid-nll": 0.0, "valid-tokens": 0, "max-rank": 9}
    found, got = collect(
        "evaluate", {"south": Payload(SCORES), "north": Payload(nothing), "west": "budget"}
    )
    assert got == []
    assert found.losses == {"south": 2.0}
    assert found.max_ranks == {"north": 9, "south": 2}
    assert found.participants == ("north", "south")
    assert (found.sums.loss, found.failed) == (2.0, {"west": "budget"})
    assert collect("evaluate", {})[0].sums.loss is None
