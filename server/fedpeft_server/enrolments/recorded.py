"""Enrolments whose every change stands in the site's audit log."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from fedpeft.audit_log import AuditLog
from fedpeft.sealing import PublicIdentity
from fedpeft.sealing.join_file import JoinRequest
from fedpeft.sealing.succession import Succession
from fedpeft_server.enrolments.clinic import Carrier
from fedpeft_server.enrolments.enrolment import Enrolments
from fedpeft_server.enrolments.invitation import Invitation
from fedpeft_server.enrolments.refusal import InvitationRefused


class RecordedEnrolments(Enrolments):
    """See :class:`Enrolments`; what is refused for an unknown token is not noted.

    Anybody on the network could fill the disk with it.
    """

    def __init__(
        self,
        path: Path,
        log: Callable[[], AuditLog],
        *,
        federation: str,
        server: str,
        ca_pem: str,
        identity: PublicIdentity,
    ) -> None:
        """Open the file ``path``; ``log`` opens the log when there is something to note."""
        super().__init__(
            path, federation=federation, server=server, ca_pem=ca_pem, identity=identity
        )
        self._log = log

    def create_invitation(self, name: str, expires_in_s: float, *, fingerprint: str) -> Invitation:
        """Invite one clinic.

        Raises:
            EnrolmentError: the name is unfit or taken, or the period is not positive.
            StorageError: the audit log cannot be written; the invitation is not handed out.
        """
        invitation = super().create_invitation(name, expires_in_s, fingerprint=fingerprint)
        self._note("invited", name)
        return invitation

    def redeem(
        self,
        token: str,
        public_key_pem: str,
        identity_text: str,
        proof: str,
        now: float | None = None,
    ) -> str:
        """Enrol the holder of a token.

        Raises:
            InvitationRefused, EnrolmentError: see :meth:`Enrolments.redeem`.
            StorageError: the audit log cannot be written; the clinic tries again.
        """
        with self._refusals_noted():
            name = super().redeem(token, public_key_pem, identity_text, proof, now)
        self._note("enrolled", name, PublicIdentity.from_text(identity_text).fingerprint)
        return name

    def admit(self, request: JoinRequest, now: float | None = None) -> str:
        """Enrol a clinic by a request that came on a stick.

        Raises:
            InvitationRefused, EnrolmentError: see :meth:`Enrolments.admit`.
            StorageError: the audit log cannot be written; it is admitted again.
        """
        with self._refusals_noted():
            name = super().admit(request, now)
        self._note("admitted", name, PublicIdentity.from_text(request.identity).fingerprint)
        return name

    @contextmanager
    def _refusals_noted(self) -> Generator[None]:
        try:
            yield
        except InvitationRefused as refused:
            if refused.refusal != "unknown":
                self._note(f"invitation-{refused.refusal}", "")
            raise

    def remove(self, name: str) -> None:
        """Expel a clinic.

        Raises:
            EnrolmentError: no clinic has that name.
            StorageError: the audit log cannot be written; the clinic is out all the same.
        """
        super().remove(name)
        self._note("removed", name)

    def revoke(self, name: str) -> None:
        """Take back an invitation, or expel a clinic for good.

        Raises:
            EnrolmentError: no clinic and no open invitation has that name.
            StorageError: the audit log cannot be written; the clinic is out all the same.
        """
        super().revoke(name)
        self._note("revoked", name)

    def renew(self, name: str, shown: tuple[str, str], now: float | None = None) -> str:
        """Exchange a clinic's connection key for a new one.

        Raises:
            EnrolmentError: see :meth:`Enrolments.renew`.
            StorageError: the audit log cannot be written; the clinic asks again.
        """
        old_key = super().renew(name, shown, now)
        self._note("renewed", name, PublicIdentity.from_text(shown[1]).fingerprint)
        return old_key

    def succeed(self, name: str, key: str, statement: Succession, now: float | None = None) -> bool:
        """Put a clinic's new identity in the old one's place.

        Raises:
            EnrolmentError: see :meth:`Enrolments.succeed`.
            StorageError: the audit log cannot be written; the clinic asks again.
        """
        changed = super().succeed(name, key, statement, now)
        self._note("renewed", name, statement.new.fingerprint, statement.old.fingerprint)
        return changed

    def carry(self, name: str, carrier: Carrier) -> None:
        """Reach a clinic by another way.

        Raises:
            EnrolmentError: no clinic has that name.
            StorageError: the audit log cannot be written; the way is another all the same.
        """
        super().carry(name, carrier)
        self._note(f"carrier-{carrier}", name)

    def _note(self, event: str, name: str, identity: str = "", before: str = "") -> None:
        about = {"event": event, "name": name, "identity": identity, "before": before}
        self._log().append("key", {key: text for key, text in about.items() if text})
