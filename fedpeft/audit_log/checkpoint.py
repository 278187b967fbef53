"""Signed checkpoints: who keeps an audit log says where it stood, so that nobody else can
write it anew.

A checkpoint is an entry that signs the number and hash of the entry before it, and with
that everything before. Must not know files.
"""

from collections.abc import Mapping
from typing import Final

from fedpeft.audit_log.entry import Entry, Value
from fedpeft.errors import WrongSignature
from fedpeft.privacy.ledger_chain import Anchor
from fedpeft.sealing.identity import KEY_BYTES, SIGNATURE_BYTES, Identity, verify

_DOMAIN: Final = b"fedpeft audit checkpoint, version 1\x00"


def signed(place: Anchor, signer: Identity) -> dict[str, Value]:
    """Return what a checkpoint entry says of the entry at ``place``, the one before it."""
    public = signer.public
    return {
        "signer": public.digest.hex(),
        "key": public.signing_bytes.hex(),
        "signature": signer.sign(_statement(place)).hex(),
    }


def signing_key(entry: Entry) -> str | None:
    """Return the Ed25519 key (hex) that a checkpoint was signed with; None: it is forged."""
    key, signature = _bytes(entry.about, "key"), _bytes(entry.about, "signature")
    if len(key) != KEY_BYTES or len(signature) != SIGNATURE_BYTES:
        return None
    try:
        verify(key, signature, _statement(Anchor(entry.seq - 1, entry.previous)), source="")
    except WrongSignature:
        return None
    return key.hex()


def _statement(place: Anchor) -> bytes:
    return _DOMAIN + place.seq.to_bytes(8, "little") + bytes.fromhex(place.hash)


def _bytes(about: Mapping[str, Value], name: str) -> bytes:
    try:
        return bytes.fromhex(str(about.get(name)))
    except ValueError:
        return b""
