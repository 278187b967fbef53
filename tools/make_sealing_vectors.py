"""Make the test vectors of docs/spec/sealed-update.md.

Seeds, contexts and payloads are always the same; sealed bytes are random, so
every run writes other files that say the same. Forged messages are put together
here from the specification, as :mod:`fedpeft.sealing` makes none.

Run: ``python tools/make_sealing_vectors.py --out tests/vectors``
"""

import argparse
import dataclasses
import hashlib
import json
import struct
import tempfile
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from fedpeft.sealing import (
    SERVER,
    ContentKey,
    Context,
    Identity,
    Protection,
    PublicIdentity,
    clinic_role,
    save_identity,
    seal,
    seal_broadcast,
)

NAMES = ("server", "north", "south")
IDENTITIES = {
    name: Identity(hashlib.shake_256(f"fedpeft test vector {name}".encode()).digest(128))
    for name in NAMES
}
CONTEXT = Context(
    federation="vectors",
    run=2**64 - 2,
    round=3,
    attempt=1,
    sender=SERVER,
    receiver=clinic_role("north"),
    purpose="train",
    schema=hashlib.sha256(b"fedpeft test vector schema").hexdigest(),
)
PAYLOAD = b"the adapter of round three"
# "ü" as two characters, as some systems type it: the secret is its form NFC.
PASSPHRASE = "u\u0308ber alle Berge"  # noqa: S105 - a test vector
KEY_FILE = bytes(range(32))
Case = dict[str, Any]


def identity_vectors() -> Case:
    """Return identities, files that hold them, and damaged ones of both."""
    public = IDENTITIES["north"].public.data
    return {
        "identities": {
            name: {
                "seeds": identity.seeds.hex(),
                "public": identity.public.data.hex(),
                "digest": identity.public.digest.hex(),
                "fingerprint": identity.public.fingerprint,
            }
            for name, identity in IDENTITIES.items()
        },
        "refused": [
            _splice("a byte is missing", len(public) - 1, len(public), b""),
            _splice("a byte too many", len(public), len(public), b"\0"),
            _splice("version 2", 0, 1, b"\2"),
            _splice("Ed25519 key of order 1", 1, 33, b"\1" + bytes(31)),
            _splice("Ed25519 key of order 4", 1, 33, bytes(32)),
            _splice("X25519 key of order 4", 33, 65, bytes(32)),
            _splice("X25519 key of order 1", 33, 65, b"\1" + bytes(31)),
            _splice("ML-KEM coefficient not below q", 65, 67, b"\xff\xff"),
        ],
        "files": [
            _file("not encrypted", Protection.none(), {}),
            _file("passphrase", Protection.passphrase(PASSPHRASE), {"passphrase": PASSPHRASE}),
            _file("key file", _key_file(KEY_FILE), {"key_file": KEY_FILE.hex()}),
        ],
    }


def sealed_vectors() -> Case:
    """Return one sealed message, and what a reader in its place must refuse."""
    sender, reader, other = (IDENTITIES[name] for name in NAMES)
    sealed = seal(PAYLOAD, CONTEXT, sender=sender, receiver=reader.public)
    about = CONTEXT.to_bytes()
    start, end = 12 + len(about), len(sealed)
    named = about.index(b"train")
    refused = [
        _splice("other magic", 0, 1, b"f"),
        _splice("format version 2", 8, 10, struct.pack("<H", 2)),
        _splice("context length one too small", 10, 12, struct.pack("<H", len(about) - 1)),
        _splice("context length beyond the end", 10, 12, b"\xff\xff"),
        _splice("protocol version 1", 12, 14, struct.pack("<H", 1)),
        _splice("control character in the context", 12 + named, 13 + named, b"\x1b"),
        _splice("other byte in the ML-KEM ciphertext", start, start + 1, _other(sealed[start])),
        _splice("X25519 share of small order", start + 1088, start + 1120, bytes(32)),
        _splice("other last byte", end - 1, end, _other(sealed[-1])),
        _splice("last byte is missing", end - 1, end, b""),
        _splice("a byte too many", end, end, b"\0"),
        _splice("header only", start, end, b""),
        _splice("nothing", 0, end, b""),
    ]
    for change in (
        {"federation": "other"},
        {"run": 7},
        {"round": 4},
        {"attempt": 2},
        {"sender": clinic_role("south")},
        {"receiver": clinic_role("south")},
        {"purpose": "train/reply"},
        {"schema": "0" * 64},
    ):
        name = f"sealed for another {next(iter(change))}"
        refused.append({"name": name, "expected": change, "reason": "wrong-context"})
    refused += [
        {"name": "one byte too large", "max_bytes": len(PAYLOAD) - 1, "reason": "too-large"},
        {
            "name": "sealed for another reader's key",
            "sealed": seal(PAYLOAD, CONTEXT, sender=sender, receiver=other.public).hex(),
            "reason": "bad-seal",
        },
        {
            "name": "signed by another sender",
            "sealed": seal(PAYLOAD, CONTEXT, sender=other, receiver=reader.public).hex(),
            "reason": "wrong-signature",
        },
        {
            "name": "forwarded: signed for another reader",
            "sealed": _forwarded(PAYLOAD, sender, other.public, reader.public).hex(),
            "reason": "wrong-signature",
        },
        {
            "name": "other payload than the signed one",
            "sealed": _forwarded(b"another", sender, reader.public, reader.public).hex(),
            "reason": "wrong-signature",
        },
    ]
    return {
        "identities": {name: identity.seeds.hex() for name, identity in IDENTITIES.items()},
        "sender": "server",
        "receiver": "north",
        "context": dataclasses.asdict(CONTEXT),
        "context_bytes": about.hex(),
        "payload": PAYLOAD.hex(),
        "max_bytes": 64,
        "sealed": sealed.hex(),
        "refused": refused,
    }


def broadcast_vectors() -> Case:
    """Return one broadcast, and others that a reader must refuse."""
    data, key = seal_broadcast(PAYLOAD)
    later = data[:7] + b"\2" + data[8:]
    refused = [
        _splice("other last byte", len(data) - 1, len(data), _other(data[-1])),
        _splice("last byte is missing", len(data) - 1, len(data), b""),
        _splice("a byte too many", len(data), len(data), b"\0"),
        _splice("nothing", 0, len(data), b""),
        _opened_with("other digest", ContentKey(key.key, bytes(32))),
        _opened_with("other key", ContentKey(bytes(32), key.digest)),
        {
            **_opened_with("version 2", ContentKey(key.key, hashlib.sha256(later).digest())),
            "splice": [7, 8, "02"],
        },
    ]
    return {
        "content_key": key.to_bytes().hex(),
        "payload": PAYLOAD.hex(),
        "broadcast": data.hex(),
        "refused": refused,
    }


def _splice(name: str, start: int, end: int, data: bytes) -> Case:
    return {"name": name, "splice": [start, end, data.hex()], "reason": "bad-seal"}


def _opened_with(name: str, key: ContentKey) -> Case:
    return {"name": name, "content_key": key.to_bytes().hex(), "reason": "bad-seal"}


def _other(byte: int) -> bytes:
    return bytes([byte ^ 1])


def _file(name: str, protection: Protection, secret: Case) -> Case:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "identity.json")
        save_identity(IDENTITIES["north"], path, protection)
        return {"name": name, **secret, "identity": "north", "file": path.read_text("ascii")}


def _key_file(content: bytes) -> Protection:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "key")
        path.write_bytes(content)
        return Protection.key_file(path)


def _forwarded(
    payload: bytes, sender: Identity, signed_for: PublicIdentity, sealed_for: PublicIdentity
) -> bytes:
    """Return ``payload`` sealed for one reader behind a signature of PAYLOAD for another."""
    about = CONTEXT.to_bytes()
    header = struct.pack("<8sHH", b"FPSEAL", 1, len(about)) + about
    domain = b"fedpeft sealed message, version 1\0"
    digest = hashlib.sha256(PAYLOAD).digest()
    signature = sender.sign(domain + header + signed_for.digest + digest)
    suite = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
    return header + suite.encrypt(signature + payload, sealed_for.sealing_key, info=header)


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(description="Make the test vectors of the sealed formats.")
    parser.add_argument("--out", type=Path, required=True, help="directory of the vectors")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, vectors in (
        ("identity", identity_vectors()),
        ("sealed-message", sealed_vectors()),
        ("broadcast", broadcast_vectors()),
    ):
        text = json.dumps(vectors, indent=1, ensure_ascii=True) + "\n"
        (out / f"{name}.json").write_text(text, "ascii")


if __name__ == "__main__":
    main()
