"""What a run tells the people who watch it, one line at a time."""

from collections.abc import Callable

from fedpeft_server.run_directory import RoundRecord


def round_sentence(record: RoundRecord, rounds: int) -> str:
    """Return a finished round in one line."""
    valid = "unknown" if record.valid_loss is None else f"{record.valid_loss:.4f}"
    if record.round == 0:
        return f"base model: validation loss {valid}, {record.seconds:.1f} s"
    train = "unknown" if record.train_loss is None else f"{record.train_loss:.4f}"
    return (
        f"round {record.round}/{rounds}: {len(record.participants)} clinics, "
        f"training loss {train}, validation loss {valid}, {record.bytes_up / 1e6:.2f} MB up, "
        f"{record.bytes_down / 1e6:.2f} MB down, {record.seconds:.1f} s"
    )


def doing_of(message_type: str) -> str:
    """Return what clinics do when they get such a message; "" for steps not worth a line."""
    return {
        "train": "training",
        "evaluate": "evaluating",
        "train.masked": "sending masked updates",
        "train.unmask": "opening the sum",
    }.get(message_type, "")


def failure_sentences(record: RoundRecord) -> list[str]:
    """Return a line for each clinic whose answer was not used."""
    return [
        f"round {record.round}: clinic {failure.clinic} failed: {failure.reason}"
        for failure in record.failed
    ]


class Narration:
    """A watcher that says everything in lines."""

    def __init__(self, say: Callable[[str], None], rounds: int) -> None:
        self._say = say
        self._rounds = rounds

    def waiting(self, connected: int, enrolled: int, minimum: int) -> None:
        """Say that clinics are still missing."""
        self._say(f"{connected} of {enrolled} enrolled clinics connected, {minimum} are needed")

    def asked(self, number: int, kind: str, clinics: list[str]) -> None:
        """Say what the clinics are doing."""
        if doing := doing_of(kind):
            self._say(f"round {number}/{self._rounds}: {doing}: {', '.join(clinics)}")

    def round_repeated(self, number: int, why: str) -> None:
        """Say that a round has to be repeated."""
        self._say(f"round {number} is repeated: {why}")

    def round_finished(self, record: RoundRecord) -> None:
        """Say how a round ended."""
        self._say(round_sentence(record, self._rounds))
        for sentence in failure_sentences(record):
            self._say(sentence)
