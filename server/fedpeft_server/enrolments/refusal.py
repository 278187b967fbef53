"""Why an invitation is not accepted: one word for programs, a sentence for people."""

from typing import ClassVar, Literal

from fedpeft.errors import EnrolmentError

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
