"""Who may take part: invitations handed out, and the clinics that took them up.

One small SQLite file is the truth about membership; Flower's own database only
follows it. Must not know Flower, HTTP or sockets.
"""

import datetime
import hashlib
import hmac
import json
import re
import secrets
import sqlite3
import time
from collections.abc import Generator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedpeft.config import NAME_PATTERN
from fedpeft.errors import EnrolmentError, StorageError
from fedpeft.storage import write_once

SCHEMA_VERSION = 1
_TOKEN_BYTES = 32
_NAME = re.compile(NAME_PATTERN)
_TABLES = """
CREATE TABLE invitations (
    id TEXT PRIMARY KEY,
    token_sha256 BLOB NOT NULL,
    name TEXT NOT NULL UNIQUE,
    expires_at REAL NOT NULL,
    used_at REAL,
    used_key TEXT
) STRICT;
CREATE TABLE clinics (
    name TEXT PRIMARY KEY,
    public_key TEXT NOT NULL UNIQUE,
    node_id TEXT,
    enrolled_at REAL NOT NULL
) STRICT;
"""

Refusal = Literal["unknown", "expired", "used"]


class InvitationRefused(EnrolmentError):
    """A token was not accepted; ``refusal`` says why in one word."""

    _SENTENCES: ClassVar[dict[Refusal, str]] = {
        "unknown": (
            "this server does not know the invitation, or a newer one has replaced it: "
            "ask the central site for a new invitation"
        ),
        "expired": "the invitation has expired: ask the central site for a new one",
        "used": (
            "the invitation was already used by another machine: if that was not you, "
            "tell the central site at once, and ask for a new invitation"
        ),
    }

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(self._SENTENCES[refusal])
        self.refusal: Refusal = refusal


@dataclass(frozen=True, kw_only=True)
class Invitation:
    """What one clinic needs to join; the file form is secret until it is used."""

    server: str
    ca_pem: str
    federation: str
    clinic: str
    fingerprint: str
    token: str
    expires: datetime.datetime

    def __repr__(self) -> str:
        # The token would otherwise end up in a traceback or a log.
        return f"Invitation(clinic={self.clinic!r}, expires={self.expires.isoformat()})"

    def to_json(self) -> str:
        """Return the text of the invitation file."""
        return json.dumps(
            {
                "schema": 1,
                "server": self.server,
                "federation": self.federation,
                "clinic": self.clinic,
                "base_model": self.fingerprint,
                "expires": self.expires.isoformat(timespec="seconds"),
                "token": self.token,
                "ca": self.ca_pem,
            },
            indent=2,
            ensure_ascii=False,
        )

    def write(self, path: Path) -> None:
        """Write the invitation to a new file, mode 600.

        Raises:
            StorageError: the file exists or cannot be written.
        """
        try:
            write_once(path, self.to_json().encode(), mode=0o600)
        except OSError as error:
            raise StorageError(
                f"the invitation cannot be written to {path} ({error.strerror}): "
                "choose another file name"
            ) from error


@dataclass(frozen=True, kw_only=True)
class Clinic:
    """A clinic that has enrolled; ``node_id`` is None until the server has seen it."""

    name: str
    public_key: str
    node_id: int | None
    enrolled: datetime.datetime


class Enrolments:
    """The invitations and clinics in one SQLite file.

    Every call opens the file afresh, so any thread and any process (the running
    server and an ``invite`` beside it) may use it at once.
    """

    def __init__(self, path: Path, *, federation: str, server: str, ca_pem: str) -> None:
        """Open the file, or make it with mode 600.

        Raises:
            StorageError: it cannot be opened, or a newer fedpeft wrote it.
        """
        self._path = path
        self._federation = federation
        self._server = server
        self._ca_pem = ca_pem
        try:
            path.touch(mode=0o600)
            with self._transaction() as database:
                version = database.execute("PRAGMA user_version").fetchone()[0]
                if version == 0:
                    for statement in _TABLES.split(";"):
                        database.execute(statement)
                    database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                    version = SCHEMA_VERSION
        except (OSError, sqlite3.Error) as error:
            raise StorageError(
                f"the enrolment file {path} cannot be used ({error}): "
                "check its rights, or restore it from the backup"
            ) from error
        if version != SCHEMA_VERSION:
            raise StorageError(
                f"the enrolment file {path} has schema {version}, but this fedpeft knows "
                f"{SCHEMA_VERSION} only: use the fedpeft version that wrote it"
            )

    @property
    def federation(self) -> str:
        """The federation's name, as clinics are told it."""
        return self._federation

    def create_invitation(self, name: str, expires_in_s: float, *, fingerprint: str) -> Invitation:
        """Invite one clinic; an older invitation of the same name, not yet used, lapses.

        Args:
            name: 1 to 64 ASCII letters, digits, dots, dashes or underscores.
            expires_in_s: seconds from now for which the token is good.
            fingerprint: of the base model that the clinic has to bring.

        Raises:
            EnrolmentError: the name is unfit or taken, or the period is not positive.
        """
        if not _NAME.fullmatch(name):
            raise EnrolmentError(
                f"{name!r} cannot be a clinic's name: use 1 to 64 letters (a to z), digits, "
                "dots, dashes or underscores, with a letter or digit first"
            )
        if not expires_in_s > 0:
            raise EnrolmentError(
                f"an invitation cannot expire in {expires_in_s} seconds: give a positive period"
            )
        identity, secret = secrets.token_hex(8), secrets.token_urlsafe(_TOKEN_BYTES)
        expires_at = time.time() + expires_in_s
        with self._transaction() as database:
            taken = database.execute("SELECT 1 FROM clinics WHERE name = ?", (name,)).fetchone()
            if taken:
                raise EnrolmentError(
                    f"a clinic named {name!r} is already enrolled: choose another name, "
                    "or remove that clinic first (fedpeft-server remove)"
                )
            database.execute("DELETE FROM invitations WHERE name = ?", (name,))
            database.execute(
                "INSERT INTO invitations (id, token_sha256, name, expires_at) VALUES (?, ?, ?, ?)",
                (identity, _sha256(secret), name, expires_at),
            )
        return Invitation(
            server=self._server,
            ca_pem=self._ca_pem,
            federation=self._federation,
            clinic=name,
            fingerprint=fingerprint,
            token=f"{identity}.{secret}",
            expires=datetime.datetime.fromtimestamp(expires_at, datetime.UTC),
        )

    def redeem(self, token: str, public_key_pem: str, now: float | None = None) -> str:
        """Enrol the holder of a token with its public key; a token works once.

        The same token with the same key is accepted again, so that a clinic
        whose connection broke before the answer arrived can simply retry.

        Args:
            token: the invitation's token.
            public_key_pem: an EC P-384 public key, PEM.
            now: seconds since the epoch; the present by default.

        Returns:
            The clinic's name.

        Raises:
            InvitationRefused: the token is unknown, expired or used by another key.
            EnrolmentError: the public key is not a P-384 key, or belongs to another clinic.
        """
        moment = time.time() if now is None else now
        key = canonical_public_key(public_key_pem)
        identity, _, secret = token.partition(".")
        with self._transaction() as database:
            row = database.execute(
                "SELECT token_sha256, name, expires_at, used_key FROM invitations WHERE id = ?",
                (identity,),
            ).fetchone()
            # The id only finds the row. Whoever lacks the secret half learns
            # nothing, not even that the row exists.
            if not hmac.compare_digest(_sha256(secret), row[0] if row else bytes(32)) or not row:
                raise InvitationRefused("unknown")
            _, name, _expires_at, used_key = row
            won = database.execute(
                "UPDATE invitations SET used_at = ?, used_key = ? "
                "WHERE id = ? AND used_at IS NULL AND expires_at > ?",
                (moment, key, identity, moment),
            ).rowcount
            if won:
                self._add_clinic(database, name, key, moment)
            elif used_key is None:
                raise InvitationRefused("expired")
            elif used_key != key:
                raise InvitationRefused("used")
        return name

    def remove(self, name: str) -> None:
        """Expel a clinic: its key is refused from now on, and its name is free again.

        Raises:
            EnrolmentError: no clinic has that name.
        """
        with self._transaction() as database:
            removed = database.execute("DELETE FROM clinics WHERE name = ?", (name,)).rowcount
            database.execute("DELETE FROM invitations WHERE name = ?", (name,))
            if not removed:
                raise EnrolmentError(
                    f"no clinic named {name!r} is enrolled: fedpeft-server clinics lists the names"
                )

    def clinics(self) -> list[Clinic]:
        """Return all enrolled clinics, by name."""
        with self._transaction("DEFERRED") as database:
            rows = database.execute(
                "SELECT name, public_key, node_id, enrolled_at FROM clinics ORDER BY name"
            ).fetchall()
        return [
            Clinic(
                name=name,
                public_key=public_key,
                node_id=None if node_id is None else int(node_id),
                enrolled=datetime.datetime.fromtimestamp(enrolled_at, datetime.UTC),
            )
            for name, public_key, node_id, enrolled_at in rows
        ]

    def set_node_id(self, name: str, node_id: int) -> None:
        """Note the id by which the server's message store knows a clinic."""
        with self._transaction() as database:
            # As text: node ids are unsigned 64-bit, SQLite's integers are signed.
            database.execute("UPDATE clinics SET node_id = ? WHERE name = ?", (str(node_id), name))

    @staticmethod
    def _add_clinic(database: sqlite3.Connection, name: str, key: str, moment: float) -> None:
        try:
            database.execute(
                "INSERT INTO clinics (name, public_key, enrolled_at) VALUES (?, ?, ?)",
                (name, key, moment),
            )
        except sqlite3.IntegrityError as error:
            raise EnrolmentError(
                "this machine's key already belongs to an enrolled clinic: "
                "join with an empty directory, so that a new key is made"
            ) from error

    @contextmanager
    def _transaction(self, mode: str = "IMMEDIATE") -> Generator[sqlite3.Connection]:
        with closing(sqlite3.connect(self._path, timeout=10, isolation_level=None)) as database:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute(f"BEGIN {mode}")
            try:
                yield database
            except BaseException:
                database.execute("ROLLBACK")
                raise
            database.execute("COMMIT")


def canonical_public_key(pem: str) -> str:
    """Return a P-384 public key in the one PEM form by which keys are compared.

    Raises:
        EnrolmentError: it is not an EC P-384 public key in PEM.
    """
    try:
        key = serialization.load_pem_public_key(pem.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise EnrolmentError(
            "what was sent is not a public key in PEM form: join again with this fedpeft version"
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise EnrolmentError(
            "the public key is not on the curve P-384: join again with this fedpeft version"
        )
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    ).decode("ascii")


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
