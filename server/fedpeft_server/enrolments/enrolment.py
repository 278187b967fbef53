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
from collections.abc import Callable
from pathlib import Path

from fedpeft.config import NAME_PATTERN
from fedpeft.errors import EnrolmentError
from fedpeft.sealing.identity import PublicIdentity
from fedpeft.sealing.join_file import JoinRequest
from fedpeft.sealing.possession import check_possession
from fedpeft.sealing.succession import Succession
from fedpeft_server.enrolments.clinic import Carrier, Clinic, enrolled_clinics, moment_of
from fedpeft_server.enrolments.file import EnrolmentFile
from fedpeft_server.enrolments.invitation import Invitation
from fedpeft_server.enrolments.refusal import InvitationRefused
from fedpeft_server.enrolments.retired_keys import require_fresh, retire, taken_keys_explained
from fedpeft_server.enrolments.shown_keys import canonical_public_key, shown_identity
from fedpeft_server.enrolments.successions import all_links, change_identity

_TOKEN_BYTES = 32
_NAME = re.compile(NAME_PATTERN)


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
        self._federation = federation
        self._server = server
        self._ca_pem = ca_pem
        self._identity = identity
        self._file = EnrolmentFile(path)

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
        with self._file.transaction() as database:
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
            expires=moment_of(expires_at),
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
        key, identity = canonical_public_key(public_key_pem), shown_identity(identity_text)
        check_possession(
            proof, identity, federation=self._federation, token=token, public_key_pem=key
        )
        token_id, _, secret = token.partition(".")

        def knows(known: bytes) -> bool:
            return hmac.compare_digest(_sha256(secret), known)

        return self._take_up(token_id, knows, (key, identity.to_text()), moment)

    def admit(self, request: JoinRequest, now: float | None = None) -> str:
        """Enrol a clinic without a network by the request that came on a stick.

        Checks what :meth:`redeem` checks, and that the name in the request, by which people
        know it, is the invitation's; notes that the clinic is reached by stick.

        Returns:
            The clinic's name.

        Raises:
            InvitationRefused: see :meth:`redeem`.
            EnrolmentError: see :meth:`redeem`; or the request is in another clinic's name.
        """
        moment = time.time() if now is None else now
        key, identity = canonical_public_key(request.public_key), shown_identity(request.identity)
        check_possession(
            request.possession,
            identity,
            federation=self._federation,
            token=request.token_id,
            public_key_pem=key,
        )
        shown = (key, identity.to_text())
        return self._take_up(
            request.token_id, request.knows, shown, moment, "stick", claimed=request.clinic
        )

    def _take_up(
        self,
        token_id: str,
        knows: Callable[[bytes], bool],
        shown: tuple[str, str],
        moment: float,
        carrier: Carrier = "network",
        claimed: str | None = None,
    ) -> str:
        """Enrol who ``knows`` the token by its SHA-256, with the key and identity ``shown``.

        ``claimed`` is the name that it goes by; None: it gave none.
        """
        key, identity = shown
        with self._file.transaction() as database:
            row = database.execute(
                "SELECT token_sha256, name, expires_at, used_key FROM invitations WHERE id = ?",
                (token_id,),
            ).fetchone()
            # The id only finds the row. Whoever lacks the secret half learns
            # nothing, not even that the row exists.
            if not knows(row[0] if row else bytes(32)) or not row:
                raise InvitationRefused("unknown")
            _, name, _expires_at, used_key = row
            if claimed not in (None, name):
                # The box that asked would refuse a ticket in another name than its own.
                raise EnrolmentError(
                    f"the request is in the name of clinic {claimed!r}, and the invitation that it "
                    f"was made with is that of {name!r}: somebody changed the file, so nothing "
                    f"was enrolled; ask {name!r} by telephone for the file that its box wrote"
                )
            won = database.execute(
                "UPDATE invitations SET used_at = ?, used_key = ? "
                "WHERE id = ? AND used_at IS NULL AND expires_at > ?",
                (moment, key, token_id, moment),
            ).rowcount
            if won:
                self._add_clinic(database, name, key, identity, moment)
                self._set_carrier(database, name, carrier)
            elif used_key is None:
                raise InvitationRefused("expired")
            elif self._enrolled_with(database, name) != shown:
                raise InvitationRefused("used")
        return name

    def carry(self, name: str, carrier: Carrier) -> None:
        """Reach a clinic by another way from the next question on.

        Raises:
            EnrolmentError: no clinic has that name.
        """
        with self._file.transaction() as database:
            if not self._set_carrier(database, name, carrier):
                raise EnrolmentError(
                    f"no clinic named {name!r} is enrolled: fedpeft-server clinics lists the names"
                )

    @staticmethod
    def _set_carrier(database: sqlite3.Connection, name: str, carrier: Carrier) -> int:
        statement = "UPDATE clinics SET carrier = ? WHERE name = ?"
        return database.execute(statement, (carrier, name)).rowcount

    def remove(self, name: str) -> None:
        """Expel a clinic: its key is refused from now on, and its name is free again.

        Raises:
            EnrolmentError: no clinic has that name.
        """
        with self._file.transaction() as database:
            removed = database.execute("DELETE FROM clinics WHERE name = ?", (name,)).rowcount
            database.execute("DELETE FROM invitations WHERE name = ?", (name,))
            if not removed:
                raise EnrolmentError(
                    f"no clinic named {name!r} is enrolled: fedpeft-server clinics lists the names"
                )

    def revoke(self, name: str) -> None:
        """Take back an open invitation, or expel a clinic whose keys shall never come back.

        The clinic's next call is refused. Its name is free for a new invitation.

        Raises:
            EnrolmentError: no clinic and no open invitation has that name.
        """
        with self._file.transaction() as database:
            retired = retire(database, name, "revoked", time.time())
            database.execute("DELETE FROM clinics WHERE name = ?", (name,))
            taken_back = database.execute(
                "DELETE FROM invitations WHERE name = ?", (name,)
            ).rowcount
            if not retired and not taken_back:
                raise EnrolmentError(
                    f"no clinic and no invitation is named {name!r}: "
                    "fedpeft-server clinics lists the names"
                )

    def renew(self, name: str, shown: tuple[str, str], now: float | None = None) -> str:
        """Exchange a clinic's connection key for a new one (canonical PEM).

        ``shown`` is that key and the identity (text), which stays. That the clinic asked for
        it was proved before. The old key never comes back.

        Returns:
            The old connection key; empty if the clinic has the new one already.

        Raises:
            EnrolmentError: no clinic has that name and identity, or the key belongs or
                belonged to another.
        """
        moment = time.time() if now is None else now
        key, identity = shown
        with self._file.transaction() as database:
            old = self._enrolled_with(database, name)
            if old is None or old[1] != identity:
                raise EnrolmentError(
                    f"no clinic named {name!r} is enrolled with this identity: it must join anew"
                )
            if old == shown:
                return ""  # the answer was lost on the way, and the clinic asks again
            require_fresh(database, key, identity)
            retire(database, name, "renewed", moment, kept_identity=identity)
            with taken_keys_explained():
                database.execute(
                    "UPDATE clinics SET public_key = ?, keys_at = ? WHERE name = ?",
                    (key, moment, name),
                )
        return old[0]

    def succeed(self, name: str, key: str, statement: Succession, now: float | None = None) -> bool:
        """Put a clinic's new identity in the old one's place; say whether anything changed.

        See :func:`fedpeft_server.enrolments.successions.change_identity`.
        """
        moment = time.time() if now is None else now
        with self._file.transaction() as database:
            return change_identity(database, name, key, statement, moment)

    def successions(self) -> dict[str, tuple[bytes, ...]]:
        """Return by name how clinics came to their identities, the oldest link first."""
        with self._file.transaction("DEFERRED") as database:
            return all_links(database)

    def saw(self, public_key: str, now: float | None = None) -> None:
        """Note that the holder of a connection key (PEM) was here."""
        moment = time.time() if now is None else now
        with self._file.transaction() as database:
            database.execute(
                "UPDATE clinics SET seen_at = ? WHERE public_key = ?", (moment, public_key)
            )

    def stamp(self) -> tuple[int, ...]:
        """Return numbers that change when the clinics do."""
        return self._file.stamp()

    def members(self) -> list[Clinic]:
        """Return the clinics that may take part, by name: those with an identity and good keys."""
        now = datetime.datetime.now(datetime.UTC)
        return [clinic for clinic in self.clinics() if clinic.is_member(now)]

    def clinics(self) -> list[Clinic]:
        """Return all enrolled clinics, by name."""
        with self._file.transaction("DEFERRED") as database:
            return enrolled_clinics(database)

    def invitations(self) -> list[tuple[str, datetime.datetime]]:
        """Return name and expiry of the invitations that nobody has taken up, by name."""
        with self._file.transaction("DEFERRED") as database:
            rows = database.execute(
                "SELECT name, expires_at FROM invitations WHERE used_at IS NULL ORDER BY name"
            ).fetchall()
        return [(name, moment_of(expires_at)) for name, expires_at in rows]

    def revoked(self) -> list[tuple[str, datetime.datetime]]:
        """Return the names of the clinics that were revoked, and when, the first of them first."""
        with self._file.transaction("DEFERRED") as database:
            rows = database.execute(
                "SELECT name, retired_at FROM retired WHERE why = 'revoked' ORDER BY retired_at"
            ).fetchall()
        return [(name, moment_of(retired_at)) for name, retired_at in rows]

    def set_node_id(self, name: str, node_id: int) -> None:
        """Note the id by which the server's message store knows a clinic."""
        with self._file.transaction() as database:
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
        require_fresh(database, key, identity)
        with taken_keys_explained():
            database.execute(
                "INSERT INTO clinics "
                "(name, public_key, identity, enrolled_at, keys_at, identity_at) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (name, key, identity, moment, moment, moment),
            )


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
