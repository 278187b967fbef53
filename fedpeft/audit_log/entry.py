"""One line of an audit log: what it may hold, how it is written, and its hash.

The format is specified in docs/spec/audit-log.md. A value is a number or a word without
spaces, so that no sentence, and with it no record, fits into a line. Must not know files.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, cast, get_args

from fedpeft.privacy.ledger_chain import Anchor

VERSION: Final = 1
_DOMAIN: Final = b"fedpeft-audit-1\n"
_WORD: Final = re.compile(r"[!-~]{0,256}")
_HASH: Final = re.compile(r"[0-9a-f]{64}")
_TIME: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00")
_UNFIT: Final = re.compile(r"[^!-~]")
_LONGEST_WORD: Final = 64

Value = str | int | float | None
Kind = Literal[
    "start",
    "stop",
    "connection",
    "message-in",
    "message-out",
    "decision",
    "charge",
    "key",
    "adapter",
    "checkpoint",
    "repair",
]

_MESSAGE: Final = "with type run round attempt mode bytes sha256 reason"
FIELDS: Final[Mapping[Kind, frozenset[str]]] = {
    kind: frozenset(names.split())
    for kind, names in cast(
        "dict[Kind, str]",
        {
            "start": "program version federation name identity",
            "stop": "reason",
            "connection": "event",
            "message-in": _MESSAGE,
            "message-out": _MESSAGE,
            "decision": "with type run round verdict rule",
            "charge": "run round unit mechanism steps epsilon delta",
            "key": "event name identity before key_before",
            "adapter": "run round lineage weights",
            "checkpoint": "signer key signature",
            "repair": "bytes",
        },
    ).items()
}
"""What an entry of each kind may say; see docs/spec/audit-log.md."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An entry in its place; ``time`` informs people, and nothing depends on it."""

    seq: int
    time: str
    kind: Kind
    about: Mapping[str, Value]
    previous: str

    @property
    def hash(self) -> str:
        """SHA-256 of everything in the entry, with what came before by its hash."""
        return hashlib.sha256(_DOMAIN + _canonical(self._content())).hexdigest()

    @property
    def place(self) -> Anchor:
        """Number and hash."""
        return Anchor(self.seq, self.hash)

    def to_line(self) -> bytes:
        """Return the one way to write the entry, with a line feed."""
        return _canonical({**self._content(), "hash": self.hash}) + b"\n"

    def _content(self) -> dict[str, Any]:
        return {
            "about": dict(self.about),
            "kind": self.kind,
            "previous": self.previous,
            "seq": self.seq,
            "time": self.time,
            "v": VERSION,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A line as it stands in a file: the entry, and the hash that is written beside it."""

    entry: Entry
    hash: str

    @property
    def is_unchanged(self) -> bool:
        """Whether the hash is that of the entry."""
        return self.entry.hash == self.hash


def checked(kind: Kind, about: Mapping[str, Value]) -> dict[str, Value]:
    """Return ``about`` if an entry of this kind may say it.

    Raises:
        ValueError: a field is not one of the kind, or a value is not a plain one.
    """
    for name, value in about.items():
        if name not in FIELDS[kind]:
            raise ValueError(f"an audit entry {kind!r} has no field {name!r}")
        if not _is_plain(value):
            raise ValueError(f"the field {name!r} of an audit entry is not a number or a word")
    return dict(about)


def word(text: str) -> str:
    """Return what another machine says, fit for a line: it might hold anything."""
    return _UNFIT.sub("?", text)[:_LONGEST_WORD]


def read_line(line: bytes) -> Written:
    """Read what :meth:`Entry.to_line` wrote; the hash is not compared.

    Raises:
        ValueError: it is not a line of this version, in its one way of writing.
    """
    content = json.loads(line)
    fields = cast("dict[str, Any]", content if isinstance(content, dict) else {})
    if fields.get("v") != VERSION or fields.keys() != _KEYS:
        raise ValueError("another version")
    _require_types(fields)
    entry = Entry(
        seq=fields["seq"],
        time=fields["time"],
        kind=fields["kind"],
        about=checked(fields["kind"], fields["about"]),
        previous=fields["previous"],
    )
    written = Written(entry=entry, hash=fields["hash"])
    if _canonical(fields) + b"\n" != line:
        raise ValueError("written in another way")
    return written


_KEYS: Final = {"about", "hash", "kind", "previous", "seq", "time", "v"}


def _require_types(fields: Mapping[str, Any]) -> None:
    """Check what a file may get wrong.

    Raises:
        ValueError: something is.
    """
    texts = (("time", _TIME), ("previous", _HASH), ("hash", _HASH))
    fit = (
        type(fields["seq"]) is int
        and fields["seq"] > 0
        and fields["kind"] in get_args(Kind)
        and isinstance(fields["about"], dict)
        and all(
            isinstance(text := fields[name], str) and form.fullmatch(text) for name, form in texts
        )
    )
    if not fit:
        raise ValueError("not an entry")


def _is_plain(value: object) -> bool:
    if isinstance(value, str):
        return _WORD.fullmatch(value) is not None
    if isinstance(value, float):
        return value - value == 0
    return value is None or type(value) is int


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
