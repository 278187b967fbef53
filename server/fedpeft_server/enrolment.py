"""Who may take part: invitations handed out, and the clinics that took them up.

One small SQLite file is the truth about membership; Flower's own database only
follows it. Must not know Flower, HTTP or sockets.
"""

import datetime
import hashlib
import hmac
import re
import secrets
import sqlite3
import time
from collections.abc import Generator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, Literal

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedpeft.config import NAME_PATTERN
from fedpeft.errors import EnrolmentError, SealingError, StorageError
from fedpeft.sealing.identity import PublicIdentity
from fedpeft.sealing.possession import check_possession
from fedpeft_server.invitation import Invitation

SCHEMA_VERSION = 2
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
# Schema 2. A clinic of schema 1 keeps NULL: nothing can be sealed to it until it enrols
# again. The first 44 characters are version and signing key (33 bytes), the part that its
# owner proves to hold and that other clinics know it by, so no two clinics may share it.
_IDENTITIES = """
ALTER TABLE clinics ADD COLUMN identity TEXT;
CREATE UNIQUE INDEX clinics_signing_key ON clinics (substr(identity, 1, 44));
"""
_UPGRADES: Final = {0: _TABLES + _IDENTITIES, 1: _IDENTITIES}

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
class Clinic:
    """A clinic that has enrolled; ``node_id`` is None until the server has seen it.

    ``identity`` is None for a clinic that enrolled with a release before sealing:
    it must enrol again.
    """

    name: str
    public_key: str
    identity: PublicIdentity | None
    node_id: int | None
    enrolled: datetime.datetime


class Enrolments:
    """The invitations and clinics in one SQLite file.

    Every call opens the file afresh, so any thread and any process (the running
    server and an ``invite`` beside it) may use it at once.
    """

    def __init__(
        self,
        path: Path,
        *,
        federation: str,
        server: str,
        ca_pem: str,
        identity: PublicIdentity,
    ) -> None:
        """Open the file, or make it with mode 600; a file of an older release is brought up.

        Args:
            path: of the SQLite file.
            federation: its name.
            server: ``host:port`` for invitations.
            ca_pem: the authority's certificate, for invitations.
            identity: the server's, for invitations.

        Raises:
            StorageError: it cannot be opened, or a newer fedpeft wrote it.
        """
        self._path = path
        self._federation = federation
        self._server = server
        self._ca_pem = ca_pem
        self._identity = identity
        try:
            path.touch(mode=0o600)
            with self._transaction() as database:
                version = database.execute("PRAGMA user_version").fetchone()[0]
                if version in _UPGRADES:
                    for statement in _UPGRADES[version].split(";"):
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
        token_id, secret = secrets.token_hex(8), secrets.token_urlsafe(_TOKEN_BYTES)
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
                (token_id, _sha256(secret), name, expires_at),
            )
        return Invitation(
            server=self._server,
            ca_pem=self._ca_pem,
            federation=self._federation,
            clinic=name,
            fingerprint=fingerprint,
            identity=self._identity,
            token=f"{token_id}.{secret}",
            expires=datetime.datetime.fromtimestamp(expires_at, datetime.UTC),
        )

    def redeem(
        self,
        token: str,
        public_key_pem: str,
        identity_text: str,
        proof: str,
        now: float | None = None,
    ) -> str:
        """Enrol the holder of a token with its public key and identity; a token works once.

        The same token with the same key and identity is accepted again, so that a
        clinic whose connection broke before the answer arrived can simply retry.

        Args:
            token: the invitation's token.
            public_key_pem: an EC P-384 public key, PEM.
            identity_text: the clinic's public identity, as text.
            proof: what ``prove_possession`` made of all these.
            now: seconds since the epoch; the present by default.

        Returns:
            The clinic's name.

        Raises:
            InvitationRefused: the token is unknown, expired or used by another key or identity.
            EnrolmentError: key, identity or proof is none, or key or identity belongs
                to another clinic.
        """
        moment = time.time() if now is None else now
        key, identity = canonical_public_key(public_key_pem), _identity(identity_text)
        check_possession(
            proof, identity, federation=self._federation, token=token, public_key_pem=key
        )
        shown = (key, identity.to_text())
        token_id, _, secret = token.partition(".")
        with self._transaction() as database:
            row = database.execute(
                "SELECT token_sha256, name, expires_at, used_key FROM invitations WHERE id = ?",
                (token_id,),
            ).fetchone()
            # The id only finds the row. Whoever lacks the secret half learns
            # nothing, not even that the row exists.
            if not hmac.compare_digest(_sha256(secret), row[0] if row else bytes(32)) or not row:
                raise InvitationRefused("unknown")
            _, name, _expires_at, used_key = row
            won = database.execute(
                "UPDATE invitations SET used_at = ?, used_key = ? "
                "WHERE id = ? AND used_at IS NULL AND expires_at > ?",
                (moment, key, token_id, moment),
            ).rowcount
            if won:
                self._add_clinic(database, name, *shown, moment)
            elif used_key is None:
                raise InvitationRefused("expired")
            elif self._enrolled_with(database, name) != shown:
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

    def members(self) -> list[Clinic]:
        """Return the clinics that may take part, by name: those with an identity."""
        return [clinic for clinic in self.clinics() if clinic.identity is not None]

    def clinics(self) -> list[Clinic]:
        """Return all enrolled clinics, by name."""
        with self._transaction("DEFERRED") as database:
            rows = database.execute(
                "SELECT name, public_key, identity, node_id, enrolled_at FROM clinics ORDER BY name"
            ).fetchall()
        return [
            Clinic(
                name=name,
                public_key=public_key,
                identity=None if identity is None else PublicIdentity.from_text(identity),
                node_id=None if node_id is None else int(node_id),
                enrolled=datetime.datetime.fromtimestamp(enrolled_at, datetime.UTC),
            )
            for name, public_key, identity, node_id, enrolled_at in rows
        ]

    def set_node_id(self, name: str, node_id: int) -> None:
        """Note the id by which the server's message store knows a clinic."""
        with self._transaction() as database:
            # As text: node ids are unsigned 64-bit, SQLite's integers are signed.
            database.execute("UPDATE clinics SET node_id = ? WHERE name = ?", (str(node_id), name))

    @staticmethod
    def _enrolled_with(database: sqlite3.Connection, name: str) -> tuple[str, str | None] | None:
        query = "SELECT public_key, identity FROM clinics WHERE name = ?"
        return database.execute(query, (name,)).fetchone()

    @staticmethod
    def _add_clinic(
        database: sqlite3.Connection, name: str, key: str, identity: str, moment: float
    ) -> None:
        try:
            database.execute(
                "INSERT INTO clinics (name, public_key, identity, enrolled_at) VALUES (?, ?, ?, ?)",
                (name, key, identity, moment),
            )
        except sqlite3.IntegrityError as error:
            raise EnrolmentError(
                "this machine's keys already belong to an enrolled clinic: "
                "join with an empty directory, so that new keys are made"
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


def _identity(text: str) -> PublicIdentity:
    try:
        return PublicIdentity.from_text(text)
    except SealingError as error:
        raise EnrolmentError(
            "what was sent is not a public identity: join again with this fedpeft version"
        ) from error


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
