"""Identities, and messages that only their reader can open; specified in docs/spec/."""

from fedpeft.sealing.broadcast import ContentKey, open_broadcast, seal_broadcast
from fedpeft.sealing.context import SERVER, Context, clinic_role
from fedpeft.sealing.envelope import HEADER_LIMIT, open_sealed, read_context, seal
from fedpeft.sealing.identity import Identity, PublicIdentity
from fedpeft.sealing.keyfile import Protection, load_identity, protection_from, save_identity

__all__ = [
    "HEADER_LIMIT",
    "SERVER",
    "ContentKey",
    "Context",
    "Identity",
    "Protection",
    "PublicIdentity",
    "clinic_role",
    "load_identity",
    "open_broadcast",
    "open_sealed",
    "protection_from",
    "read_context",
    "save_identity",
    "seal",
    "seal_broadcast",
]
