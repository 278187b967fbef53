"""docs/spec/secure-aggregation.md against the code, and its test vectors without the code."""

import hashlib
import hmac
import re
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

import fedpeft.errors
from fedpeft.secagg import STAGES, Session, messages, session, shamir, threshold
from fedpeft.secagg.masking import apply_masks, reduce_width
from fedpeft.secagg.messages import Advert, Entry, Roster
from fedpeft.secagg.packing import packed_bytes
from fedpeft.secagg.pairwise import EphemeralKey, commitment, lock, mask_seed
from fedpeft.secagg.quantise import headroom_width

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/spec/secure-aggregation.md").read_text("utf-8")


def section(heading: str) -> str:
    """Return what stands under a heading, down to the next of the same or a higher level."""
    level = re.search(rf"^(#+) {re.escape(heading)}$", PAGE, re.MULTILINE)
    assert level is not None, heading
    rest = PAGE[level.end() :]
    end = re.search(rf"^#{{1,{len(level[1])}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


def rows(text: str) -> list[list[str]]:
    """Return the cells of all table rows but headings and rules."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    heads = {at - 1 for at, line in enumerate(lines) if line.startswith("| ---")}
    kept = [it for at, it in enumerate(lines) if at not in heads and not it.startswith("| ---")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in kept]


def sized(parts: list[bytes]) -> bytes:
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def hkdf(secret: bytes, info: bytes) -> bytes:
    """RFC 5869 with SHA-256, no salt and 32 bytes of output."""
    extracted = hmac.digest(bytes(32), secret, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")


def public(private: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def exchange(private: bytes, other: bytes) -> bytes:
    peer = X25519PublicKey.from_public_bytes(other)
    return X25519PrivateKey.from_private_bytes(private).exchange(peer)


# sizes and strings


def test_the_stages_are_those_of_the_code():
    table = rows(section("Messages"))[:5]
    assert tuple(row[0] for row in table) == STAGES
    assert [row[1] for row in table] == [f"train.{stage}" for stage in STAGES]


@pytest.mark.parametrize(("column", "clinics"), [(1, 3), (2, 10), (3, 100)])
def test_the_documented_sizes_are_those_of_an_honest_run(make_world, column: int, clinics: int):
    world = make_world(clinics)
    sizes: dict[str, int] = {}
    requests = {"shares": "roster", "masked": "inbox", "check": "survivors", "unmask": "unmasking"}
    answers = {"keys": "keys", "shares": "shares", "check": "signature", "unmask": "opened shares"}
    for stage in STAGES:
        asked = len(world.server.requests()["c001"])
        world.step()
        if stage in requests:
            sizes[requests[stage]] = asked
        if stage in answers:
            sizes[answers[stage]] = len(world.answers[stage]["c001"])

    documented = {row[0]: int(row[column]) for row in rows(section("Messages"))[5:13]}

    assert documented == sizes
    assert sum(sizes.values()) < 64 * 1024


def test_the_documented_keys_are_the_struct_of_the_code():
    table = rows(section("Keys"))
    sizes = [int(row[1]) for row in table]
    assert [f"{size}s" for size in sizes] == re.findall(r"\d+s", messages._ADVERT.format)
    assert [int(row[0]) for row in table] == [sum(sizes[:at]) for at in range(len(sizes))]
    assert f"{messages._ADVERT.size} bytes." in section("Keys")


def test_the_documented_constants_are_those_of_the_code():
    assert f"one box of {messages.BOX_BYTES} bytes" in section("Shares")
    assert f"of {2 * shamir.SHARE_BYTES} bytes" in section("Shares")
    assert f"first {session.HINT_BYTES} bytes of the digest" in section("Session")
    assert f"n is at most {threshold.MOST_CLINICS}." in section("Roster")
    assert f"`{messages._NAME.pattern}`" in PAGE
    assert "2^256 + 297" in section("Secret sharing")
    assert shamir.PRIME == 2**256 + 297


@pytest.mark.parametrize(("clinics", "figure"), [(10, "2.5 bytes"), (100, "2.875")])
def test_the_documented_bytes_a_coordinate_are_those_of_the_code(clinics: int, figure: str):
    width = headroom_width(16, clinics)
    assert packed_bytes(3200, width) / 3200 == float(figure.split()[0])
    assert figure in section("Vector")


def test_every_string_that_is_hashed_or_signed_is_documented():
    names = ("session", "messages", "pairwise")
    sources = [(ROOT / f"fedpeft/secagg/{name}.py").read_text("utf-8") for name in names]
    strings = re.findall(r'b"(fedpeft[^"]*)\\x00"', "".join(sources))
    assert len(strings) == 5
    assert [text for text in strings if rf'"{text}\0"' not in PAGE] == []


def test_every_documented_error_exists_and_every_aggregation_error_is_documented():
    found = set(re.findall(r"`([A-Z][a-z]+[A-Z]\w+)`", PAGE)) - {"InvalidTag"}
    assert [name for name in found if not hasattr(fedpeft.errors, name)] == []
    refusals = {it.__name__ for it in fedpeft.errors.AggregationRefused.__subclasses__()}
    by_reason = {"OutOfOrder", "AlreadyAggregated", "Interrupted"}
    assert refusals - found == by_reason
    assert "`out-of-order`" in PAGE
    assert "`interrupted`" in PAGE
    assert "`already-aggregated`" in PAGE


def test_the_documented_thresholds_are_those_of_the_code():
    for row in rows(section("Thresholds")):
        clinics, active, may_drop, colluding, curious, may_drop_curious = map(int, row)
        assert active == threshold.floor_of(clinics, "active")
        assert curious == threshold.floor_of(clinics, "curious")
        assert may_drop == clinics - active
        assert may_drop_curious == clinics - curious
        assert colluding == clinics // 3 < 2 * active - clinics


# test vectors: computed by the page, then by the code

VECTORS = {row[0]: row[1] for row in rows(section("Test vectors"))}
SESSION = Session(
    federation="north", run=7, round=3, attempt=1, kind="train", model=bytes(range(32))
)
SHARE_KEYS = {name: bytes([0x11 * at]) * 32 for at, name in enumerate("abc", 1)}
MASK_KEYS = {name: bytes([at]) * 32 for at, name in enumerate("abc", 1)}
SEED = bytes(range(32))
BOUND = bytes.fromhex(VECTORS["bound"])


def roster() -> Roster:
    entries: list[Entry] = []
    for at, name in enumerate("abc", 1):
        keys = public(SHARE_KEYS[name]), public(MASK_KEYS[name])
        advert = Advert(SESSION.hint, *keys, bytes([0xAF + at]) * 64)
        entries.append(Entry(name, bytes([0x9F + at]) * 32, advert))
    return Roster(3, tuple(entries))


def test_session_digest():
    fields = [b"north", bytes(7) + b"\x07", b"\0\0\0\x03", b"\0\0\0\x01", b"train", SEED]
    by_page = hashlib.sha256(b"fedpeft secure aggregation, version 1\0" + sized(fields))
    assert by_page.hexdigest() == SESSION.digest.hex() == VECTORS["session digest"]


def test_roster_digest_and_bound():
    data = b"\x03\0\x03\0"
    for at, name in enumerate(b"abc", 1):
        own = chr(name)
        data += bytes([1, name]) + bytes([0x9F + at]) * 32 + SESSION.digest[:8]
        data += public(SHARE_KEYS[own]) + public(MASK_KEYS[own]) + bytes([0xAF + at]) * 64
    digest = hashlib.sha256(data).digest()
    bound = hashlib.sha256(b"fedpeft roster\0" + SESSION.digest + digest).digest()
    assert digest.hex() == roster().digest.hex() == VECTORS["roster digest"]
    assert bound == messages.bound_to(SESSION, roster()) == BOUND


@pytest.mark.parametrize(("one", "other"), ["ab", "bc"])
def test_mask_seeds(one: str, other: str):
    info = sized([b"mask", BOUND, one.encode(), other.encode()])
    by_page = hkdf(exchange(MASK_KEYS[one], public(MASK_KEYS[other])), info)
    peer = public(MASK_KEYS[one])
    by_code = mask_seed(EphemeralKey(MASK_KEYS[other]), peer, BOUND, (other, one))
    documented = VECTORS[f"mask seed of `{one}` and `{other}"]
    assert by_page.hex() == by_code.hex() == documented


def test_a_box():
    info = sized([b"share", BOUND, b"a", b"b"])
    key = hkdf(exchange(SHARE_KEYS["a"], public(SHARE_KEYS["b"])), info)
    by_code = lock(
        EphemeralKey(SHARE_KEYS["a"]), public(SHARE_KEYS["b"]), BOUND, "a", "b", bytes(66)
    )
    documented = re.findall(r"^    ([0-9a-f]+)$", section("Test vectors"), re.MULTILINE)
    assert key.hex() == VECTORS["key of the box from `a` to `b"]
    assert AESGCM(key).encrypt(bytes(12), bytes(66), None) == by_code
    assert by_code.hex() == "".join(documented)


def test_a_commitment():
    by_page = hashlib.sha256(b"fedpeft self mask\0" + BOUND + SEED).digest()
    assert by_page.hex() == commitment(SEED, BOUND).hex() == VECTORS["commitment of `b"]


def test_masked_words(mask_of):
    below = bytes.fromhex(VECTORS["mask seed of `a` and `b"])
    above = bytes.fromhex(VECTORS["mask seed of `b` and `c"])
    words = np.array([int(it) for it in VECTORS["words of `b"].split(",")], np.uint32)
    by_page = (words + mask_of(SEED, 3) + mask_of(above, 3) - mask_of(below, 3)) % 2**18
    apply_masks(words, [SEED, above], [below])
    reduce_width(words, headroom_width(16, 3))
    documented = [int(it) for it in VECTORS["masked words of `b"].split(",")]
    assert by_page.tolist() == words.tolist() == documented


def test_what_is_signed():
    keys = public(SHARE_KEYS["b"]), public(MASK_KEYS["b"])
    about_keys = b"fedpeft keys\0" + SESSION.digest + keys[0] + keys[1] + b"b"
    listed = SESSION.digest + roster().digest + b"\x05"
    assert messages.advert_statement(SESSION, "b", *keys) == about_keys
    assert messages.survivors_statement(SESSION, roster(), {0, 2}) == (
        b"fedpeft survivors\0" + listed
    )


def test_the_version_of_the_page_is_in_the_digest():
    assert f"Version {session._DOMAIN.decode().strip(chr(0)).split()[-1]}." in PAGE
