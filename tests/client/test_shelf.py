"""What a clinic holds between two rounds: a change is taken from it, and from nothing else."""

from pathlib import Path
from typing import cast

import pytest
import torch
from flwr.app import Message

from fedpeft.adapters import AdapterSchema, AdapterState, TensorSpec, to_bytes
from fedpeft.errors import AdapterNotHeld, FedpeftError, SealingError
from fedpeft.protocol import ADAPTER, CONTENT_KEY, Payload
from fedpeft.protocol.parcel import Held, Increment, change, whole
from fedpeft.sealing import SERVER, Identity, clinic_role, seal_broadcast
from fedpeft.sealing import Context as Sealing
from fedpeft_client.rounds.clinic import Clinic, Membership
from fedpeft_client.rounds.mailbox import Request
from fedpeft_client.rounds.shelf import Shelf
from fedpeft_client.settings import DataSettings

SCHEMA = AdapterSchema(
    (TensorSpec("m.lora_A.weight", (2, 40)), TensorSpec("m.lora_B.weight", (30, 2))), "a" * 64
)
MEMBERSHIP = Membership(Identity.generate(), Identity.generate().public)


def drawn(seed: int) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    return AdapterState(SCHEMA, torch.randn(SCHEMA.numel, generator=generator))


FIRST = Held(drawn(1))
SECOND = Held(FIRST.adapter.with_part(drawn(2).part("B")))
THIRD = Held(SECOND.adapter, (Increment(2, to_bytes(drawn(3), "update")),))


def clinic(name: str = "north") -> Clinic:
    return Clinic(
        name=name,
        federation="sea",
        membership=MEMBERSHIP,
        model=Path("model"),
        data=DataSettings(train=Path("t.jsonl")),
        ledger=Path("ledger.sqlite"),
    )


def request(held: Held, parcel: bytes | None) -> Request:
    """Return the server's message that a clinic is to hold this; a parcel may bring it."""
    about = Sealing(
        federation="sea",
        run=1,
        round=1,
        attempt=1,
        sender=SERVER,
        receiver=clinic_role("north"),
        purpose="train",
        schema=SCHEMA.hash,
    )
    message = cast("Message", None)  # a shelf does not look at it
    if parcel is None:
        return Request(message, about, Payload({ADAPTER: held.digest}), None, clinic())
    data, key = seal_broadcast(parcel)
    fields = Payload({ADAPTER: held.digest, CONTENT_KEY: key.to_bytes().hex()})
    return Request(message, about, fields, data, clinic())


def changed(basis: Held, target: Held) -> bytes:
    found = change(basis, target, None)
    assert found is not None
    return found


def values(held: Held) -> bytes:
    return held.to_bytes() + b"".join(one.data for one in held.increments)


# What is refused


@pytest.mark.parametrize("parcel", [None, changed(FIRST, SECOND)], ids=["nothing", "a change"])
def test_a_clinic_that_was_started_anew_asks_for_the_whole(parcel: bytes | None):
    shelf = Shelf()
    shelf.take(clinic(), request(FIRST, whole(FIRST)))
    with pytest.raises(AdapterNotHeld):
        Shelf().take(clinic(), request(SECOND, parcel))
    found = Shelf().take(clinic(), request(SECOND, whole(SECOND)))
    assert values(found) == values(SECOND)


def test_a_change_of_another_clinics_adapter_is_refused():
    shelf = Shelf()
    shelf.take(clinic("north"), request(FIRST, whole(FIRST)))
    shelf.take(clinic("south"), request(THIRD, whole(THIRD)))
    with pytest.raises(AdapterNotHeld):
        shelf.take(clinic("south"), request(SECOND, changed(FIRST, SECOND)))


def test_what_is_not_the_signed_adapter_is_refused_and_what_was_held_stays():
    shelf = Shelf()
    shelf.take(clinic(), request(FIRST, whole(FIRST)))
    wrong: list[tuple[Request, type[FedpeftError]]] = [
        (request(THIRD, whole(SECOND)), AdapterNotHeld),
        (request(SECOND, whole(SECOND)[:-1]), SealingError),
        (request(SECOND, b"nonsense"), SealingError),
    ]
    for asked, error in wrong:
        with pytest.raises(error):
            shelf.take(clinic(), asked)
        assert values(shelf.take(clinic(), request(FIRST, None))) == values(FIRST)


def test_a_message_that_names_no_adapter_is_refused():
    asked = request(FIRST, whole(FIRST))
    del asked.payload.fields[ADAPTER]
    with pytest.raises(SealingError):
        Shelf().take(clinic(), asked)


# What is held


def test_what_is_held_already_needs_no_parcel():
    shelf = Shelf()
    first = shelf.take(clinic(), request(FIRST, whole(FIRST)))
    assert shelf.take(clinic(), request(FIRST, None)) is first


def test_rounds_follow_each_other_by_what_changed():
    shelf = Shelf()
    shelf.take(clinic(), request(FIRST, whole(FIRST)))
    for basis, target in ((FIRST, SECOND), (SECOND, THIRD), (THIRD, FIRST)):
        parcel = change(basis, target, None) or whole(target)
        assert values(shelf.take(clinic(), request(target, parcel))) == values(target)
    with pytest.raises(AdapterNotHeld):
        shelf.take(clinic(), request(THIRD, changed(SECOND, THIRD)))


def test_clinics_of_one_process_share_what_they_hold():
    shelf = Shelf()
    held = [
        shelf.take(clinic(f"c{number}"), request(FIRST, whole(FIRST) if number < 2 else None))
        for number in range(4)
    ]
    assert all(each is held[0] for each in held)
    moved = [
        shelf.take(clinic(name), request(SECOND, changed(FIRST, SECOND))) for name in ("c0", "c1")
    ]
    assert moved[0] is moved[1]
    # The others have not moved, and take the change from where they are.
    assert shelf.take(clinic("c3"), request(FIRST, None)) is held[0]
