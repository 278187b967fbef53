"""Who is told how a run goes on."""

from typing import Protocol

from fedpeft_server.runs.directory import RoundRecord


class Watcher(Protocol):
    """Somebody who is told how the run goes on."""

    def waiting(self, connected: int, enrolled: int, minimum: int) -> None:
        """Too few clinics are connected yet."""
        ...

    def asked(self, number: int, kind: str, clinics: list[str]) -> None:
        """The clinics are about to get a message of ``kind`` (train, evaluate, train.keys ...).

        Round 0 is the evaluation of the base model.
        """
        ...

    def warned(self, sentence: str) -> None:
        """Something about the run should be known before it goes on."""
        ...

    def round_repeated(self, number: int, why: str) -> None:
        """Too few usable answers came."""
        ...

    def round_finished(self, record: RoundRecord) -> None:
        """A round is aggregated and durable."""
        ...

    def finished(self, records: list[RoundRecord]) -> None:
        """The run has come to its end; ``records`` are all of its rounds."""
        ...
