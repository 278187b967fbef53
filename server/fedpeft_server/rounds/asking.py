"""How a question to a clinic finds its place among those that were asked before."""

from fedpeft.protocol import Payload
from fedpeft.sealing import Context


class Asking:
    """Every question is a new one, as on a network, where asking again costs seconds."""

    def place(self, clinic: str, fresh: Context, payload: Payload) -> Context:
        """Return the place at which ``clinic`` is asked: ``fresh``, or that of a question that
        it was asked in the same words and may still answer.
        """
        return fresh

    def unusable(self, clinic: str, place: Context) -> None:
        """Hear that the answer to the question at ``place`` was no good."""
