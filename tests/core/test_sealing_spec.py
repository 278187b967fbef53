"""docs/spec/sealed-update.md and its test vectors against the code."""

import base64
import dataclasses
import hashlib
import hmac
import json
import re
import struct
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedpeft.errors import SealingError
from fedpeft.sealing import (
    ContentKey,
    Context,
    Identity,
    Protection,
    PublicIdentity,
    broadcast,
    context,
    envelope,
    identity,
    keyfile,
    load_identity,
    open_broadcast,
    open_sealed,
    read_context,
)

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/spec/sealed-update.md").read_text("utf-8")
IDENTITIES, SEALED, BROADCAST = (
    json.loads((ROOT / "tests/vectors" / f"{name}.json").read_text("ascii"))
    for name in ("identity", "sealed-message", "broadcast")
)
CONTEXT = Context(**SEALED["context"])


def section(heading: str) -> str:
    """Return what stands under a heading, up to the next heading of any level."""
    parts = re.split(r"^#+ ", PAGE, flags=re.MULTILINE)
    return next(part for part in parts if part.startswith(f"{heading}\n"))


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the table rows of a section, without heading and rule."""
    lines = [line for line in section(heading).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def sizes(heading: str) -> list[int]:
    """Return the bytes of each field; the offsets must be their sums."""
    table = [row for row in rows(heading) if row[0].isdigit()]
    assert all(int(row[0]) == sum(int(it[1]) for it in table[:at]) for at, row in enumerate(table))
    return [int(row[1]) for row in table if row[1].isdigit()]


def each(cases: list[dict[str, Any]]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case["name"])


def spliced(valid: str, case: dict[str, Any]) -> bytes:
    start, end, data = case["splice"]
    whole = bytes.fromhex(valid)
    return whole[:start] + bytes.fromhex(data) + whole[end:]


# the tables


def test_documented_identity_layout_is_that_of_the_code():
    assert sizes("Private identity") == [
        identity._ED25519,
        identity._X25519,
        identity._MLKEM_SEED,
    ]
    assert sum(sizes("Public identity")) == identity.PUBLIC_BYTES
    assert f"{identity.PUBLIC_BYTES} bytes." in section("Public identity")
    assert rows("Public identity")[0][3] == str(identity._VERSION[0])


def test_documented_weak_keys_are_those_of_the_code():
    listed = re.findall(r"^    ([0-9a-f]{64})$", section("Public identity"), re.MULTILINE)
    assert {int.from_bytes(bytes.fromhex(it), "little") for it in listed} == identity._WEAK


@pytest.mark.parametrize(
    ("heading", "packed"), [("Sealed message", envelope._LEAD), ("Context", context._FIXED)]
)
def test_documented_layout_is_the_struct_of_the_code(heading: str, packed: struct.Struct):
    table = [row for row in rows(heading) if row[0].isdigit() and row[1].isdigit()]
    formats = [row[2].strip("`") for row in table]
    lengths = [int(row[1]) for row in table]

    assert "<" + "".join(formats) == packed.format
    assert lengths == [struct.calcsize("<" + each) for each in formats]
    assert [int(row[0]) for row in table] == [sum(lengths[:at]) for at in range(len(lengths))]
    assert f"{packed.size} bytes" in section(heading)


def test_every_field_of_the_context_is_documented_in_its_order():
    named = [cell for row in rows("Context") for cell in row if re.fullmatch(r"`[a-z]+`", cell)]
    assert [name.strip("`") for name in named if name != "`server`"] == [
        "run",
        "round",
        "attempt",
        "schema",
        *context._TEXTS,
    ]
    assert {field.name for field in dataclasses.fields(Context)} == {
        name.strip("`") for name in named
    }


def test_documented_numbers_are_those_of_the_code():
    assert (
        f"format version {envelope.VERSION}, protocol version {context.PROTOCOL_VERSION}." in PAGE
    )
    assert rows("Context")[0][4] == str(context.PROTOCOL_VERSION)
    assert rows("Sealed message")[1][4] == str(envelope.VERSION)
    assert f"longest context has {context.CONTEXT_LIMIT} bytes" in PAGE
    assert f"longest header {envelope.HEADER_LIMIT}." in PAGE
    assert f"by the header and {envelope._SEAL + identity.SIGNATURE_BYTES} bytes" in PAGE
    assert f"sealed at once is {envelope.PAYLOAD_LIMIT} bytes" in PAGE
    assert f"at most {keyfile.FILE_LIMIT} bytes" in PAGE
    assert f"at least {keyfile.LEAST_PASSPHRASE} characters" in PAGE
    assert f"{keyfile.KEY_FILE_BYTES[0]} to {keyfile.KEY_FILE_BYTES[-1]} bytes" in PAGE


def test_documented_broadcast_layout_is_that_of_the_code():
    offsets = [int(row[0]) for row in rows("Broadcast") if row[0].isdigit()]
    magic, nonce = len(broadcast.MAGIC), broadcast._NONCE
    assert offsets[:3] == [0, magic, magic + nonce]
    assert [int(row[1]) for row in rows("Broadcast")[-2:]] == [broadcast._KEY, broadcast._DIGEST]
    assert broadcast.MAGIC == b"FPCAST\0\1"


def test_documented_identity_file_has_the_fields_of_the_code():
    table = [[cell.strip("`") for cell in row] for row in rows("Identity file")]
    for encryption, fields in keyfile._FIELDS.items():
        assert {row[0] for row in table if row[1] in ("always", encryption)} == set(fields)
    cost = next(row[2] for row in table if row[0] == "n")
    assert [int(it) for it in re.findall(r"\d{4,}", cost)] == [
        keyfile.COST,
        keyfile.COSTS[0],
        keyfile.COSTS[-1],
    ]


def test_documented_signature_covers_what_the_code_signs():
    domain = rows("Signature")[0]
    text = re.search(r"`\"(.+)\"`", domain[2])
    assert text is not None
    assert text[1].encode() + b"\0" == envelope._DOMAIN
    assert int(domain[1]) == len(envelope._DOMAIN)


# a reader that knows the page and none of the code


def opened_by_the_page(data: bytes, seeds: bytes, sender: PublicIdentity) -> bytes:
    (length,) = struct.unpack_from("<H", data, 10)
    header, sealed = data[: 12 + length], data[12 + length :]
    x25519 = X25519PrivateKey.from_private_bytes(seeds[32:64])
    mlkem = MLKEM768PrivateKey.from_seed_bytes(seeds[64:])
    share, own = sealed[1088:1120], x25519.public_key().public_bytes_raw()
    label = re.search(r"pk_X \|\| ([0-9a-f]{12})\)", PAGE)
    ids = [int(row[1], 16) for row in rows("Encryption")]
    assert label is not None
    secret = hashlib.sha3_256(
        mlkem.decapsulate(sealed[:1088])
        + x25519.exchange(X25519PublicKey.from_public_bytes(share))
        + share
        + own
        + bytes.fromhex(label[1])
    ).digest()
    key, nonce = key_and_nonce(b"HPKE" + struct.pack(">3H", *ids), secret, header)
    plain = AESGCM(key).decrypt(nonce, sealed[1120:], b"")
    reader = hashlib.sha256(Identity(seeds).public.data).digest()
    signed = b"fedpeft sealed message, version 1\0" + header + reader
    sender.verify(plain[:64], signed + hashlib.sha256(plain[64:]).digest(), source="the vector")
    return plain[64:]


def key_and_nonce(suite: bytes, secret: bytes, info: bytes) -> tuple[bytes, bytes]:
    """The key schedule of RFC 9180, section 5.1, base mode, for HKDF-SHA256."""

    def extract(salt: bytes, label: bytes, data: bytes) -> bytes:
        return hmac.digest(salt, b"HPKE-v1" + suite + label + data, "sha256")

    def expand(label: bytes, length: int) -> bytes:
        lead = struct.pack(">H", length) + b"HPKE-v1" + suite + label
        return hmac.digest(derived, lead + about + b"\1", "sha256")[:length]

    about = b"\0" + extract(b"", b"psk_id_hash", b"") + extract(b"", b"info_hash", info)
    derived = extract(secret, b"secret", b"")
    return expand(b"key", 32), expand(b"base_nonce", 12)


def test_the_page_alone_is_enough_to_open_a_message():
    seeds = bytes.fromhex(SEALED["identities"][SEALED["receiver"]])
    sender = Identity(bytes.fromhex(SEALED["identities"][SEALED["sender"]])).public
    payload = opened_by_the_page(bytes.fromhex(SEALED["sealed"]), seeds, sender)
    assert payload.hex() == SEALED["payload"]


@each([case for case in IDENTITIES["files"] if "passphrase" in case or "key_file" in case])
def test_the_page_alone_is_enough_to_read_an_encrypted_identity(case: dict[str, Any]):
    content: dict[str, Any] = json.loads(case["file"])
    if "passphrase" in case:
        secret = unicodedata.normalize("NFC", case["passphrase"]).encode()
    else:
        secret = bytes.fromhex(case["key_file"])
    salt, nonce, sealed = (decoded(content[name]) for name in ("salt", "nonce", "sealed"))
    key = hashlib.scrypt(secret, salt=salt, n=content["n"], r=8, p=1, dklen=32, maxmem=2**28)
    del content["sealed"]
    about = json.dumps(content, sort_keys=True, separators=(",", ":")) + "\n"
    seeds = AESGCM(key).decrypt(nonce, sealed, about.encode())
    assert seeds.hex() == IDENTITIES["identities"][case["identity"]]["seeds"]


def decoded(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


# the vectors


@pytest.mark.parametrize("name", IDENTITIES["identities"])
def test_seeds_give_the_public_identity(name: str):
    vector = IDENTITIES["identities"][name]
    public = Identity(bytes.fromhex(vector["seeds"])).public
    assert public.data.hex() == vector["public"]
    assert public.digest.hex() == vector["digest"]
    assert public.fingerprint == vector["fingerprint"]
    assert len(public.to_text()) == 1668


@each(IDENTITIES["refused"])
def test_a_bad_public_identity_is_refused(case: dict[str, Any]):
    data = spliced(IDENTITIES["identities"]["north"]["public"], case)
    with pytest.raises(SealingError) as caught:
        PublicIdentity(data)
    assert caught.value.reason == case["reason"]


@each(IDENTITIES["files"])
def test_an_identity_file_is_read(case: dict[str, Any], tmp_path: Path):
    path, key = tmp_path / "identity.json", tmp_path / "key"
    path.write_text(case["file"], "ascii")
    path.chmod(0o600)
    protection = Protection.none()
    if "passphrase" in case:
        protection = Protection.passphrase(case["passphrase"])
    if "key_file" in case:
        key.write_bytes(bytes.fromhex(case["key_file"]))
        protection = Protection.key_file(key)
    seeds = load_identity(path, protection).seeds
    assert seeds.hex() == IDENTITIES["identities"][case["identity"]]["seeds"]


def test_a_context_has_the_bytes_of_the_vector():
    assert CONTEXT.to_bytes().hex() == SEALED["context_bytes"]
    assert read_context(bytes.fromhex(SEALED["sealed"])) == CONTEXT


def opened(case: dict[str, Any], data: bytes) -> bytes:
    keys = {name: Identity(bytes.fromhex(it)) for name, it in SEALED["identities"].items()}
    return open_sealed(
        data,
        dataclasses.replace(CONTEXT, **case.get("expected", {})),
        sender=keys[SEALED["sender"]].public,
        receiver=keys[SEALED["receiver"]],
        max_bytes=case.get("max_bytes", SEALED["max_bytes"]),
    )


def test_the_sealed_message_opens():
    assert opened({}, bytes.fromhex(SEALED["sealed"])).hex() == SEALED["payload"]


@each(SEALED["refused"])
def test_a_bad_sealed_message_is_refused_for_its_reason(case: dict[str, Any]):
    data = bytes.fromhex(case.get("sealed", SEALED["sealed"]))
    if "splice" in case:
        data = spliced(SEALED["sealed"], case)
    with pytest.raises(SealingError) as caught:
        opened(case, data)
    assert caught.value.reason == case["reason"]


def test_every_reason_of_a_reader_has_a_vector():
    documented = {row[2].strip("`") for row in rows("Reading")}
    assert {case["reason"] for case in SEALED["refused"]} == documented


def test_the_broadcast_opens():
    key = ContentKey.from_bytes(bytes.fromhex(BROADCAST["content_key"]))
    assert open_broadcast(bytes.fromhex(BROADCAST["broadcast"]), key).hex() == BROADCAST["payload"]


@each(BROADCAST["refused"])
def test_a_bad_broadcast_is_refused(case: dict[str, Any]):
    data = bytes.fromhex(BROADCAST["broadcast"])
    if "splice" in case:
        data = spliced(BROADCAST["broadcast"], case)
    key = ContentKey.from_bytes(bytes.fromhex(case.get("content_key", BROADCAST["content_key"])))
    with pytest.raises(SealingError) as caught:
        open_broadcast(data, key)
    assert caught.value.reason == case["reason"]


def test_the_vectors_stay_small():
    files = list((ROOT / "tests/vectors").glob("*.json"))
    named = [row[0].strip("`") for row in rows("Test vectors")]
    assert set(named) <= {file.name for file in files}
    assert sum(file.stat().st_size for file in files if file.name in named) < 60_000


def test_the_tool_makes_vectors_of_the_same_cases(tmp_path: Path):
    tool = ROOT / "tools/make_sealing_vectors.py"
    subprocess.run([sys.executable, tool, "--out", tmp_path], check=True, cwd=ROOT)
    for name, kept in (
        ("identity", IDENTITIES),
        ("sealed-message", SEALED),
        ("broadcast", BROADCAST),
    ):
        made = json.loads((tmp_path / f"{name}.json").read_text("ascii"))
        assert list(made) == list(kept)
        assert cases_of(made) == cases_of(kept)


def cases_of(vectors: dict[str, Any]) -> list[tuple[str, str]]:
    return [(case["name"], case["reason"]) for case in vectors["refused"]]
