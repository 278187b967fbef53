"""Faults that Flower's SecAgg+ had (or invites), each as a property that holds here."""

import secrets

import numpy as np
import pytest

from fedpeft.keystream import Keystream
from fedpeft.secagg.packing import packed_bytes
from fedpeft.secagg.pairwise import EphemeralKey, mask_seed

CLAMPED = {0, 1, 2, 254, 255}
"""The bits of an X25519 private key that RFC 7748 fixes."""


def flipped(secret: bytes, bit: int) -> bytes:
    at, within = divmod(bit, 8)
    return secret[:at] + bytes([secret[at] ^ 1 << within]) + secret[at + 1 :]


def first_words(seed: bytes) -> bytes:
    words = np.empty(8, "<u4")
    Keystream(seed).fill(words)
    return words.tobytes()


# mask seeds were folded to 32 bits


@pytest.fixture(scope="module")
def seeds(make_world) -> list[bytes]:
    """All mask seeds of one clinic: its own, and one for each of four others."""
    world = make_world(5)
    world.until("check")
    update = world.updates["c002"]
    return [*update.add, *update.subtract]


def test_each_mask_has_a_seed_of_256_bits(seeds: list[bytes]):
    assert [len(seed) for seed in seeds] == [32] * 5
    assert len(set(seeds)) == 5


def test_flipping_any_bit_of_any_mask_seed_changes_the_mask(seeds: list[bytes]):
    for seed in seeds:
        streams = {first_words(flipped(seed, bit)) for bit in range(256)}
        assert len(streams | {first_words(seed)}) == 257


def test_seeds_that_agree_when_folded_to_32_bits_make_different_masks(seeds: list[bytes]):
    seed = seeds[0]
    same_low = secrets.token_bytes(28) + seed[28:]
    same_high = seed[:4] + secrets.token_bytes(28)
    same_parity = bytes([seed[0] ^ 1, *seed[1:4], seed[4] ^ 1, *seed[5:]])
    same_words = seed[4:] + seed[:4]
    found = {first_words(it) for it in (seed, same_low, same_high, same_parity, same_words)}
    assert len(found) == 5


def test_no_32_bits_of_the_seeds_are_constant(seeds: list[bytes]):
    parts = [seed[at : at + 4] for seed in seeds for at in range(0, 32, 4)]
    assert len(set(parts)) == len(parts)


def test_every_secret_bit_of_a_mask_key_is_in_the_seed():
    own, peer = EphemeralKey.generate(), EphemeralKey.generate()
    names = ("a", "b")
    found = {
        mask_seed(EphemeralKey(flipped(own.private, bit)), peer.public, bytes(32), names)
        for bit in set(range(256)) - CLAMPED
    }
    assert len(found | {mask_seed(own, peer.public, bytes(32), names)}) == 252


@pytest.mark.parametrize(
    ("bound_to", "names"),
    [(bytes(31) + b"\x01", ("a", "b")), (bytes(32), ("a", "c")), (bytes(32), ("ab", "b"))],
)
def test_the_same_keys_make_another_mask_in_another_session_or_pair(bound_to: bytes, names):
    own, peer = EphemeralKey.generate(), EphemeralKey.generate().public
    assert mask_seed(own, peer, bound_to, names) != mask_seed(own, peer, bytes(32), ("a", "b"))


def test_both_ends_make_the_same_mask():
    a, b = EphemeralKey.generate(), EphemeralKey.generate()
    one = mask_seed(a, b.public, bytes(32), ("a", "b"))
    assert one == mask_seed(b, a.public, bytes(32), ("b", "a"))


# a clinic lost before it shared its keys broke the unmasking


@pytest.mark.parametrize("lost", ["c000", "c003", "c006"])
@pytest.mark.parametrize("stage", ["keys", "shares"])
def test_a_clinic_lost_before_it_shared_does_not_break_the_unmasking(
    make_world, stage: str, lost: str
):
    world = make_world(7)
    world.until(stage)
    while world.server.stage != "done":
        world.step(absent={lost})
    weights = {name: update.integers["weight"] for name, update in world.updates.items()}
    assert world.server.result.integers["weight"] == sum(weights.values()) - weights[lost]


# metrics were sent in the clear


def test_no_integer_of_a_clinic_is_readable_in_what_it_sends(make_world):
    world = make_world(4)
    losses = [secrets.randbits(62) // 4 for _ in world.names]
    for name, loss in zip(world.names, losses, strict=True):
        world.updates[name].integers["loss"] = loss
    assert world.run().integers["loss"] == sum(losses)

    wire = b"\xff".join(data for stage in world.answers.values() for data in stage.values())
    for loss in losses:
        assert loss.to_bytes(8, "little") not in wire
        assert loss.to_bytes(8, "big") not in wire
        assert str(loss).encode() not in wire


def test_a_clinic_sends_keys_boxes_a_vector_a_signature_and_shares_and_nothing_else(make_world):
    world = make_world(6, coordinates=77)
    world.run()
    layout = world.updates["c000"].layout
    sent = {stage: len(answers["c000"]) for stage, answers in world.answers.items()}
    assert sent == {
        "keys": 8 + 32 + 32 + 64,
        "shares": 32 + 5 * (2 * 33 + 16),
        "masked": packed_bytes(layout.words, layout.width),
        "check": 64,
        "unmask": 6 * 33,
    }
    assert layout.words == 77 + 3 * 4


def test_the_words_of_the_integers_are_masked_as_the_coordinates_are(make_world):
    world = make_world(4, coordinates=5)
    world.until("check")
    for update in world.updates.values():
        assert (update.masked_words() != update.words()).mean() > 0.9
        assert (update.masked_words()[5:] != update.words()[5:]).sum() >= 10


# coordinates took 8 bytes on the wire


def test_a_coordinate_of_ten_clinics_takes_20_bits(make_world):
    world = make_world(10, coordinates=32 * 1000)
    world.until("check")
    assert len(world.updates["c000"].packed) / 32_000 == pytest.approx(2.5, rel=1e-3)
