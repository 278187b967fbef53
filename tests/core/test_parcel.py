"""Parcels: what a clinic puts together is the signed adapter to the bit, or it is refused."""

import dataclasses
import json
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fedpeft.adapters import (
    AdapterSchema,
    AdapterState,
    Mixing,
    TensorSpec,
    orthonormal,
    to_bytes,
)
from fedpeft.adapters.wire import HEADER_BYTES
from fedpeft.errors import AdapterNotHeld, SchemaMismatch, SealingError
from fedpeft.protocol.parcel import MAGIC, Held, Increment, change, opened, whole

START = len(MAGIC) + 4


def schema_of(inputs: int = 300, outputs: int = 260, rank: int = 3) -> AdapterSchema:
    """Return two modules, wide enough for a mixing to be worth its bytes."""
    specs: list[TensorSpec] = []
    for module, wide in (("m", 0), ("n", 8)):
        specs.append(TensorSpec(f"{module}.lora_A.weight", (rank, inputs + wide)))
        specs.append(TensorSpec(f"{module}.lora_B.weight", (outputs + wide, rank)))
    return AdapterSchema(tuple(specs), "a" * 64)


SCHEMA = schema_of()


def drawn(seed: int, schema: AdapterSchema = SCHEMA) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    return AdapterState(schema, torch.randn(schema.numel, generator=generator))


def product(seed: int, rank: int, schema: AdapterSchema = SCHEMA) -> Increment:
    return Increment(rank, to_bytes(drawn(seed, schema.of_rank(rank)), "update"))


STATE = drawn(1)
P1, P2, P3 = product(11, 2), product(12, 5), product(13, 1)
NEW_A, NEW_B = STATE.with_part(drawn(2).part("A")), STATE.with_part(drawn(3).part("B"))
GAUGE_B, MIXED_A = orthonormal(STATE, "B")
"""Both factors new, A by a product with small matrices."""
GAUGE_A, MIXED_B = orthonormal(STATE, "A")
ONLY_MIXED_A = MIXED_A.applied(STATE)
GUESS_OF_NOTHING = Mixing("B", np.zeros((2, 3, 3)))

# basis, target, mixing: everything that a round can leave behind
CHANGES: dict[str, tuple[Held, Held, Mixing | None]] = {
    "nothing": (Held(STATE), Held(STATE), None),
    "nothing, with products": (Held(STATE, (P1, P2)), Held(STATE, (P1, P2)), None),
    "A": (Held(STATE), Held(NEW_A), None),
    "B": (Held(STATE), Held(NEW_B), None),
    "B, with a guess that is none": (Held(STATE), Held(NEW_B), GUESS_OF_NOTHING),
    "A mixed": (Held(STATE), Held(ONLY_MIXED_A), MIXED_A),
    "A mixed, B replaced": (Held(STATE), Held(GAUGE_B), MIXED_A),
    "B mixed, A replaced": (Held(STATE), Held(GAUGE_A), MIXED_B),
    "A mixed, B replaced, a product": (Held(STATE, (P1,)), Held(GAUGE_B, (P1, P2)), MIXED_A),
    "a product": (Held(STATE), Held(STATE, (P1,)), None),
    "a second and a third product": (Held(STATE, (P1,)), Held(STATE, (P1, P2, P3)), None),
    "A and a product": (Held(STATE, (P1,)), Held(NEW_A, (P1, P3)), None),
    "both, beside a product": (Held(STATE, (P2,)), Held(drawn(4), (P2,)), None),
}
NO_CHANGES: dict[str, tuple[Held, Held, Mixing | None]] = {
    "both": (Held(STATE), Held(drawn(4)), None),
    "both, with a guess that is none": (Held(STATE), Held(drawn(4)), GUESS_OF_NOTHING),
    "products that do not go on": (Held(STATE, (P1, P2)), Held(STATE, (P2, P1)), None),
    "fewer products": (Held(STATE, (P1, P2)), Held(STATE, (P1,)), None),
    "another base model": (Held(STATE), Held(drawn(1, schema_of(310))), None),
}
changes = pytest.mark.parametrize("case", CHANGES.values(), ids=list(CHANGES))


def parcel_of(case: tuple[Held, Held, Mixing | None]) -> bytes:
    found = change(*case)
    assert found is not None
    return found


def bits(held: Held) -> tuple[bytes, list[tuple[int, bytes]]]:
    return held.to_bytes(), [(one.rank, one.data) for one in held.increments]


def with_header(parcel: bytes, **changed: Any) -> bytes:
    """Return the parcel with other values in its header."""
    (length,) = struct.unpack_from("<I", parcel, len(MAGIC))
    header = json.loads(parcel[START : START + length])
    text = json.dumps({**header, **changed}).encode()
    return MAGIC + struct.pack("<I", len(text)) + text + parcel[START + length :]


def refused(parcel: bytes, held: Held | None, digest: str) -> None:
    with pytest.raises((SealingError, AdapterNotHeld, SchemaMismatch)):
        opened(parcel, held, digest)


# What is refused


@dataclasses.dataclass(frozen=True)
class Sent:
    """A parcel of a few hundred bytes, which can be damaged in every way.

    ``spare`` are the places of the matrices, whose last bits may make no difference.
    """

    parcel: bytes
    held: Held | None
    target: Held
    spare: range = range(0)

    def assert_refused(self, parcel: bytes, at: int = -1) -> None:
        """It is refused, unless all that differs are bits at ``at`` that mean nothing."""
        if at in self.spare:
            try:
                assert bits(opened(parcel, self.held, self.target.digest)) == bits(self.target)
            except AdapterNotHeld:
                return
        else:
            refused(parcel, self.held, self.target.digest)


def small_cases() -> dict[str, Sent]:
    state = drawn(5, schema_of(9, 8, 2))
    gauge, mixing = orthonormal(state, "B")
    more, last = product(6, 1, state.schema), product(7, 2, state.schema)
    one, other = Held(state, (more,)), Held(gauge, (more, last))
    found = change(one, other, mixing)
    assert found is not None
    end = len(found) - len(last.data)
    return {
        "whole": Sent(whole(one), None, one),
        "whole after": Sent(whole(other), one, other),
        "change": Sent(found, one, other, range(end - mixing.matrices.nbytes, end)),
    }


SMALL = small_cases()
small = pytest.mark.parametrize("sent", SMALL.values(), ids=list(SMALL))


@small
def test_a_parcel_that_lost_its_end_is_refused(sent: Sent):
    for length in range(1, len(sent.parcel)):
        sent.assert_refused(sent.parcel[:length])


@small
@given(data=st.data())
def test_a_changed_byte_is_refused(sent: Sent, data: st.DataObject):
    damaged = bytearray(sent.parcel)
    at = data.draw(st.integers(0, len(damaged) - 1))
    damaged[at] ^= data.draw(st.integers(1, 255))
    sent.assert_refused(bytes(damaged), at)


@small
@pytest.mark.parametrize("bit", [0x01, 0x10, 0x40, 0x80])
def test_every_byte_counts(sent: Sent, bit: int):
    for at in range(len(sent.parcel)):
        damaged = bytearray(sent.parcel)
        damaged[at] ^= bit
        sent.assert_refused(bytes(damaged), at)


@small
@given(data=st.data())
def test_a_piece_cut_out_or_put_in_is_refused(sent: Sent, data: st.DataObject):
    begin = data.draw(st.integers(0, sent.spare.start or len(sent.parcel)))
    end = data.draw(st.integers(begin, sent.spare.start or len(sent.parcel)))
    put = data.draw(st.binary(max_size=40))
    found = sent.parcel[:begin] + put + sent.parcel[end:]
    if found != sent.parcel:
        sent.assert_refused(found)


@given(data=st.binary(max_size=200), marked=st.booleans())
@example(data=b"", marked=True)
@example(data=struct.pack("<I", 2) + b"{}", marked=True)
@example(data=struct.pack("<I", 4000) + b"[" * 4000, marked=True)
def test_what_is_no_parcel_is_refused(data: bytes, marked: bool):
    refused((MAGIC if marked else b"") + data, Held(STATE), "0" * 64)


HEADERS: list[dict[str, Any]] = [
    {"tensors": []},
    {"tensors": [["m.lora_A.weight", 3, 300]]},
    {"tensors": [["m.lora_C.weight", 3, 300]]},
    {"tensors": [["m.lora_A.weight", 0, 300], ["m.lora_B.weight", 260, -1]]},
    {"tensors": [["m.lora_B.weight", 2, 2], ["m.lora_A.weight", 2, 2]]},
    {"tensors": [["m.lora_A.weight", 2, 2], ["m.lora_A.weight", 2, 2]]},
    {"tensors": [["m.lora_A.weight", 2, 9], ["m.lora_B.weight", 9, 3]]},
    {"dtype": "float64"},
    {"dtype": "bfloat16"},
    {"fingerprint": "b" * 64},
    {"replaced": "A"},
    {"replaced": "C"},
    {"mixed": "B"},
    {"mixed": "AB"},
    {"kept_products": 1},
    {"kept_products": -1},
    {"products": [{"rank": 1, "length": 5}]},
    {"products": [{"rank": 0, "length": 100}]},
    {"basis": "b" * 64},
    {"code": "print(1)"},
]


@pytest.mark.parametrize("changed", HEADERS)
def test_a_header_that_says_something_else_is_refused(changed: dict[str, Any]):
    target = Held(STATE, (P1,))
    refused(with_header(whole(target), **changed), Held(NEW_A), target.digest)
    case = CHANGES["A mixed, B replaced, a product"]
    told = {"kept_products": 2} if changed == {"kept_products": 1} else changed
    refused(with_header(parcel_of(case), **told), case[0], case[1].digest)


def test_a_whole_is_not_taken_from_what_is_held():
    held = Held(STATE)
    empty: dict[str, Any] = {"replaced": "", "mixed": "", "products": []}
    for told in (empty, {**empty, "replaced": "B"}, {**empty, "mixed": "A"}):
        with pytest.raises(SealingError):
            opened(with_header(whole(held), **told), held, held.digest)


def test_a_product_of_another_rank_than_it_says_is_refused():
    """The digest is one of the bytes alone, so it does not tell."""
    target = Held(STATE, (P2,))
    told = with_header(whole(target), products=[{"rank": 4, "length": len(P2.data)}])
    with pytest.raises(SchemaMismatch):
        opened(told, None, target.digest)


@pytest.mark.parametrize(
    "changed",
    [
        {"tensors": [["m.lora_A.weight", 2**40, 2**40], ["m.lora_B.weight", 2**40, 2**40]]},
        {"products": [{"rank": 2**40, "length": 2**60}]},
        {"products": [{"rank": 2**40, "length": len(P1.data)}]},
        {"products": [{"rank": 1, "length": 10**400}]},
        {"kept_products": 2**62},
    ],
)
def test_sizes_that_are_only_claimed_are_not_allocated(changed: dict[str, Any]):
    target = Held(STATE, (P1,))
    for parcel, held in ((whole(target), None), (parcel_of((Held(STATE), target, None)), target)):
        told = with_header(parcel, **changed)
        tracemalloc.start()
        refused(told, held, target.digest)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most < 10 * len(told)


def test_a_header_longer_than_the_parcel_is_refused():
    parcel = whole(Held(STATE))
    told = MAGIC + struct.pack("<I", 2**32 - 1) + parcel[START:]
    with pytest.raises(SealingError):
        opened(told, None, Held(STATE).digest)


@changes
def test_another_adapter_than_the_signed_one_is_refused(case: tuple[Held, Held, Mixing | None]):
    basis, target, _ = case
    for parcel, held in ((parcel_of(case), basis), (whole(target), None)):
        with pytest.raises(AdapterNotHeld):
            opened(parcel, held, Held(drawn(9)).digest)


@changes
def test_a_change_of_what_a_clinic_does_not_hold_is_refused(
    case: tuple[Held, Held, Mixing | None],
):
    for held in (None, Held(drawn(9)), Held(drawn(9), (P3,))):
        with pytest.raises(AdapterNotHeld, match="sends the whole adapter then"):
            opened(parcel_of(case), held, case[1].digest)


@pytest.mark.parametrize("held", [None, Held(NEW_A), Held(STATE, (P1,))])
def test_nothing_is_not_enough_for_who_holds_something_else(held: Held | None):
    with pytest.raises(AdapterNotHeld):
        opened(b"", held, Held(STATE).digest)


# What arrives


def test_nothing_brings_what_is_held_already():
    held = Held(STATE, (P1,))
    assert opened(b"", held, held.digest) is held


@pytest.mark.parametrize("target", [Held(STATE), Held(STATE, (P1,)), Held(GAUGE_B, (P2, P1, P3))])
@pytest.mark.parametrize("held", [None, Held(STATE), Held(drawn(9), (P2,))])
def test_a_whole_arrives_to_the_bit_whatever_was_held(target: Held, held: Held | None):
    assert bits(opened(whole(target), held, target.digest)) == bits(target)


@changes
def test_a_change_arrives_to_the_bit(case: tuple[Held, Held, Mixing | None]):
    basis, target, _ = case
    before = bits(basis)
    assert bits(opened(parcel_of(case), basis, target.digest)) == bits(target)
    assert bits(basis) == before


@changes
def test_a_change_is_smaller_than_a_whole(case: tuple[Held, Held, Mixing | None]):
    assert len(parcel_of(case)) < len(whole(case[1]))


@pytest.mark.parametrize("case", NO_CHANGES.values(), ids=list(NO_CHANGES))
def test_what_cannot_be_told_in_less_is_sent_whole(case: tuple[Held, Held, Mixing | None]):
    assert change(*case) is None


def adapters(schema: AdapterSchema) -> st.SearchStrategy[tuple[AdapterState, Mixing | None]]:
    """What a round may make of ``drawn(1, schema)``, and what the server guesses of it."""
    state = drawn(1, schema)
    steps: list[Callable[[], tuple[AdapterState, Mixing | None]]] = [
        lambda: (state, None),
        lambda: (state.with_part(drawn(2, schema).part("A")), None),
        lambda: (state.with_part(drawn(2, schema).part("B")), orthonormal(state, "A")[1]),
        lambda: (drawn(2, schema), orthonormal(state, "B")[1]),
        lambda: orthonormal(state, "A"),
        lambda: orthonormal(state, "B"),
    ]
    return st.sampled_from(steps).map(lambda step: step())


@given(
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 40),
    rank=st.integers(1, 6),
    held=st.lists(st.integers(0, 2), max_size=2),
    new=st.lists(st.integers(0, 2), max_size=2),
    goes_on=st.booleans(),
    data=st.data(),
)
def test_whatever_changed_the_shorter_form_brings_it(
    inputs: int,
    outputs: int,
    rank: int,
    held: list[int],
    new: list[int],
    goes_on: bool,
    data: st.DataObject,
):
    schema = schema_of(inputs, outputs, rank)
    adapter, mixing = data.draw(adapters(schema))
    own, others = ([product(seed, seed + 1, schema) for seed in seeds] for seeds in (held, new))
    basis = Held(drawn(1, schema), tuple(own))
    target = Held(adapter, (*own, *others) if goes_on else tuple(others))
    parcel = change(basis, target, mixing)
    if parcel is None:
        parcel = whole(target)
    assert len(parcel) <= len(whole(target))
    assert bits(opened(parcel, basis, target.digest)) == bits(target)


def test_an_alternating_gauge_costs_half():
    """B is new, A was multiplied by one small matrix for each module."""
    case = CHANGES["A mixed, B replaced"]
    half = HEADER_BYTES + 4 * SCHEMA.part("B").numel + 8 * 2 * 3 * 3
    parcel = parcel_of(case)
    assert half < len(parcel) < half + 600
    assert len(parcel) < 0.55 * len(whole(case[1]))


def test_a_mixing_longer_than_its_factor_is_not_used():
    """Of narrow modules the matrices in float64 have more bytes than the factor."""
    state = drawn(1, schema_of(1, 400, 4))
    gauge, mixing = orthonormal(state, "B")
    assert change(Held(state), Held(gauge), mixing) is None
    only = mixing.applied(state)
    parcel = change(Held(state), Held(only), mixing)
    assert parcel is not None
    assert parcel == change(Held(state), Held(only), None)


def test_the_sign_of_a_zero_is_a_change():
    values = STATE.values.clone()
    values[7] = 0.0
    negative = values.clone()
    negative[7] = -0.0
    case = (Held(AdapterState(SCHEMA, values)), Held(AdapterState(SCHEMA, negative)), None)
    assert case[0].digest != case[1].digest
    assert bits(opened(parcel_of(case), case[0], case[1].digest)) == bits(case[1])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_arrives_to_the_bit(dtype: str):
    schema = dataclasses.replace(SCHEMA, dtype=dtype)
    kind = {"float16": torch.float16, "bfloat16": torch.bfloat16}[dtype]
    basis = AdapterState(schema, STATE.values.to(kind))
    target = Held(basis.with_part(AdapterState(schema, drawn(2).values.to(kind)).part("A")))
    case = Held(basis), target, None
    assert bits(opened(parcel_of(case), case[0], target.digest)) == bits(target)
    assert bits(opened(whole(target), None, target.digest)) == bits(target)


def test_a_digest_tells_adapters_products_and_their_order_apart():
    helds = [
        Held(STATE),
        Held(NEW_A),
        Held(STATE, (P1,)),
        Held(STATE, (P1, P2)),
        Held(STATE, (P2, P1)),
        Held(AdapterState(dataclasses.replace(SCHEMA, fingerprint="b" * 64), STATE.values)),
    ]
    assert len({held.digest for held in helds}) == len(helds)
