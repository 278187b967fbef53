"""How adapters come to clinics: everybody ends up with the same bits, by the fewest bytes."""

from collections.abc import Mapping

import pytest
import torch
from flwr.app import Array
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.adapters import AdapterSchema, AdapterState, TensorSpec, orthonormal, to_bytes
from fedpeft.config import AdapterSettings, TrainingSettings
from fedpeft.errors import AdapterError, AdapterNotHeld, FedpeftError
from fedpeft.protocol import ADAPTER, CONTENT_KEY, JOB, Job, Payload, SumTerms
from fedpeft.protocol.parcel import Held, Increment, opened, whole
from fedpeft.sealing import ContentKey, open_broadcast
from fedpeft_server.rounds.channel import Accept, Channel, Letter
from fedpeft_server.rounds.delivery import Delivery, Order

NAMES = {7: "north", 8: "south", 9: "west"}
SCHEMA = AdapterSchema(
    (TensorSpec("m.lora_A.weight", (2, 200)), TensorSpec("m.lora_B.weight", (180, 2))), "a" * 64
)
TERMS = SumTerms(confidentiality="secagg", adversary="active", bits=16, limit=1.0)


def drawn(seed: int) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    return AdapterState(SCHEMA, torch.randn(SCHEMA.numel, generator=generator))


def order(held: Held, number: int = 1) -> Order:
    job = Job(
        run="0" * 32,
        federation="sea",
        fingerprint="a" * 64,
        quantization="none",
        adapter=AdapterSettings(rank=2),
        training=TrainingSettings(),
        aggregation=TERMS,
        round=number,
        rounds=9,
    )
    return Order(job, held)


FIRST = Held(drawn(1))
SECOND = Held(FIRST.adapter.with_part(drawn(2).part("A")))
THIRD = Held(SECOND.adapter, (Increment(2, to_bytes(drawn(3), "update")),))
OTHER = Held(drawn(4))


class Box:
    """What a clinic does with a letter: it holds what was signed, or says that it cannot."""

    def __init__(self) -> None:
        self.held: Held | None = None
        self.away = False
        self.failing = ""

    def receive(self, letter: Letter) -> Payload | str:
        """Return the answer, or the reason for which there is none."""
        if self.away:
            return "timeout"
        fields, parcel = letter.payload.fields, b""
        if letter.broadcast is not None:
            key = ContentKey.from_bytes(bytes.fromhex(str(fields[CONTENT_KEY])))
            parcel = open_broadcast(letter.broadcast.data, key)
        try:
            self.held = opened(parcel, self.held, str(fields[ADAPTER]))
        except FedpeftError as error:
            return error.reason
        return self.failing or Payload({"heard": str(fields[JOB])})


class Post(Channel):
    """Carries letters to boxes in this process, and keeps them."""

    def __init__(self) -> None:
        self.boxes = {name: Box() for name in NAMES.values()}
        self.sent: list[dict[str, Letter]] = []

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
        self.sent.append({NAMES[node]: letter for node, letter in letters.items()})
        failed: dict[str, str] = {}
        for name, letter in self.sent[-1].items():
            answer = self.boxes[name].receive(letter)
            try:
                if isinstance(answer, str):
                    failed[name] = answer
                else:
                    accept(name, Payload.from_bytes(answer.to_bytes(), source=name))
            except FedpeftError as error:
                failed[name] = error.reason
        return failed


class World:
    """A server's delivery over three clinics."""

    def __init__(self) -> None:
        self.post = Post()
        self.delivery = Delivery(self.post)
        self.accepted: list[str] = []

    def ask(self, asked: Order, nodes: tuple[int, ...] = tuple(NAMES)) -> dict[str, str]:
        self.post.sent.clear()
        self.accepted.clear()
        return self.delivery.ask(
            "train", 1, 1, asked, nodes, timeout_s=1.0, accept=lambda n, _: self.accepted.append(n)
        )

    def sizes(self, at: int = 0) -> dict[str, int]:
        """Return the bytes of each parcel, encrypted; 0 for none."""
        return {name: size_of(letter.broadcast) for name, letter in self.post.sent[at].items()}

    def assert_held(self, held: Held, *names: str) -> None:
        for name in names or NAMES.values():
            found = self.post.boxes[name].held
            assert found is not None
            assert found.to_bytes() == held.to_bytes()
            assert found.increments == held.increments


def size_of(broadcast: Array | None) -> int:
    return 0 if broadcast is None else len(broadcast.data)


# What goes wrong


def test_a_clinic_that_lost_its_adapter_is_asked_again_once_with_the_whole():
    world = World()
    world.ask(order(FIRST))
    world.post.boxes["south"].held = None
    assert world.ask(order(SECOND)) == {}
    assert [sorted(letters) for letters in world.post.sent] == [
        ["north", "south", "west"],
        ["south"],
    ]
    assert world.sizes(1)["south"] > len(whole(SECOND))
    assert sorted(world.accepted) == ["north", "south", "west"]
    world.assert_held(SECOND)


def test_a_clinic_that_never_holds_what_it_is_sent_is_not_asked_for_ever():
    world = World()
    world.post.boxes["south"].failing = AdapterNotHeld.reason
    assert world.ask(order(FIRST)) == {"south": "adapter-not-held"}
    assert [sorted(letters) for letters in world.post.sent] == [
        ["north", "south", "west"],
        ["south"],
    ]


@pytest.mark.parametrize("reason", ["timeout", "budget", "internal-error", "bad-seal"])
def test_no_other_failure_is_asked_again(reason: str):
    world = World()
    world.post.boxes["south"].failing = reason
    assert world.ask(order(FIRST)) == {"south": reason}
    assert len(world.post.sent) == 1


def test_a_clinic_that_missed_a_round_gets_the_whole():
    """Only what an answer showed is known to be held."""
    world = World()
    world.ask(order(FIRST))
    world.post.boxes["south"].away = True
    assert world.ask(order(SECOND)) == {"south": "timeout"}
    world.post.boxes["south"].away = False
    assert world.ask(order(THIRD)) == {}
    assert len(world.post.sent) == 1
    sizes = world.sizes()
    assert sizes["north"] == sizes["west"] < len(whole(THIRD)) < sizes["south"]
    world.assert_held(THIRD)


def test_a_clinic_that_timed_out_is_not_believed_to_hold_what_it_was_sent():
    world = World()
    world.post.boxes["south"].away = True
    world.ask(order(FIRST))
    world.post.boxes["south"].away = False
    world.ask(order(FIRST))
    assert {name: size > 0 for name, size in world.sizes().items()} == {
        "north": False,
        "south": True,
        "west": False,
    }
    world.assert_held(FIRST)


def test_a_clinic_that_was_not_asked_for_a_while_gets_the_whole():
    world = World()
    world.ask(order(FIRST))
    world.ask(order(SECOND), (7, 8))
    assert world.ask(order(THIRD)) == {}
    assert len(world.post.sent) == 1
    world.assert_held(THIRD)


def test_an_answer_that_cannot_be_used_shows_all_the_same_what_is_held():
    def unusable(name: str, payload: Payload) -> None:
        raise AdapterError(f"{name}: {payload}")

    world = World()
    failed = world.delivery.ask(
        "train", 1, 1, order(FIRST), tuple(NAMES), timeout_s=1.0, accept=unusable
    )
    assert failed == dict.fromkeys(sorted(NAMES.values()), "bad-adapter")
    world.ask(order(FIRST))
    assert set(world.sizes().values()) == {0}


# What is sent


def test_first_the_whole_then_nothing_then_what_changed():
    world = World()
    for held, least, most in (
        (FIRST, len(whole(FIRST)), len(whole(FIRST)) + 200),
        (FIRST, 0, 0),
        (SECOND, 4 * 400, 0.75 * len(whole(SECOND))),
        (SECOND, 0, 0),
        (THIRD, len(THIRD.increments[0].data), 0.75 * len(whole(THIRD))),
    ):
        assert world.ask(order(held)) == {}
        assert all(least <= size <= most for size in world.sizes().values())
        world.assert_held(held)


def test_where_everything_changed_the_whole_is_sent():
    world = World()
    world.ask(order(FIRST))
    assert world.ask(order(OTHER)) == {}
    assert set(world.sizes().values()) == {size_of_whole(OTHER)}
    world.assert_held(OTHER)


def size_of_whole(held: Held) -> int:
    world = World()
    world.ask(order(held))
    return world.sizes()["north"]


def test_a_gauge_that_the_server_tells_of_makes_the_parcel_smaller():
    state, mixing = orthonormal(FIRST.adapter, "B")
    sizes: list[int] = []
    for told in (None, mixing):
        world = World()
        world.ask(order(FIRST))
        world.ask(Order(order(FIRST).job, Held(state), told))
        world.assert_held(Held(state))
        sizes.append(world.sizes()["north"])
    assert sizes[1] < 0.7 * sizes[0]


def test_clinics_that_hold_the_same_get_one_ciphertext():
    """Flower keeps equal arrays once, so a broadcast to a hundred clinics lies there once."""
    world = World()
    world.ask(order(FIRST), (7, 8))
    letters = world.post.sent[0]
    assert letters["north"] is letters["south"]
    world.ask(order(SECOND))
    letters = world.post.sent[0]
    assert letters["north"] is letters["south"]
    assert letters["west"].broadcast is not letters["north"].broadcast
    world.assert_held(SECOND)


def test_no_two_broadcasts_have_the_same_key():
    world = World()
    keys: list[object] = []
    for held in (FIRST, OTHER, FIRST):
        world.ask(order(held))
        keys.append(world.post.sent[0]["north"].payload.fields[CONTENT_KEY])
    assert len(set(keys)) == 3


def test_every_letter_names_the_job_and_what_is_to_be_held():
    world = World()
    for _ in range(2):
        world.ask(order(FIRST, 3))
        for letter in world.post.sent[0].values():
            assert Job.from_json(str(letter.payload.fields[JOB])).round == 3
            assert letter.payload.fields[ADAPTER] == FIRST.digest


HELD = (FIRST, SECOND, THIRD, OTHER)


@given(
    rounds=st.lists(
        st.tuples(
            st.integers(0, 3),
            st.sets(st.sampled_from(sorted(NAMES)), min_size=1),
            st.sets(st.sampled_from(sorted(NAMES))),
            st.sets(st.sampled_from(sorted(NAMES))),
        ),
        max_size=6,
    )
)
def test_whoever_answers_holds_what_was_signed_whatever_happened_before(
    rounds: list[tuple[int, set[int], set[int], set[int]]],
):
    """Clinics are left out, away, or were started anew; a round takes two messages at most."""
    world = World()
    for which, asked, away, restarted in rounds:
        for node, name in NAMES.items():
            box = world.post.boxes[name]
            box.away = node in away
            box.held = None if node in restarted else box.held
        failed = world.ask(order(HELD[which]), tuple(sorted(asked)))
        present = [NAMES[node] for node in asked - away]
        assert failed == {NAMES[node]: "timeout" for node in sorted(asked & away)}
        assert sorted(world.accepted) == sorted(present)
        assert len(world.post.sent) <= 2
        if present:
            world.assert_held(HELD[which], *present)
