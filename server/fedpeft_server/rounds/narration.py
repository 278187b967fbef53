"""What a run tells the people who watch it, one line at a time."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from fedpeft.counts import counted
from fedpeft.protocol.privacy import ClinicPrivacy
from fedpeft.secagg import STAGES
from fedpeft_server.rounds.privacy_record import latest_losses
from fedpeft_server.runs.directory import RoundRecord

_STEPS: Final[Mapping[str, str]] = {
    "shares": "sharing out keys",
    "masked": "sending masked numbers",
    "check": "signing who is in the sum",
    "unmask": "opening the sum",
}
"""The later steps of a secure sum; in the first clinics do what the sum is for."""


def round_sentence(record: RoundRecord, rounds: int) -> str:
    """Return a finished round in one line."""
    valid = _loss(record.valid_loss)
    if record.round == 0:
        return f"base model: validation loss {valid}, {record.seconds:.1f} s"
    return (
        f"round {record.round}/{rounds}: {counted(len(record.participants), 'clinic')}, training "
        f"loss {_loss(record.train_loss)}, validation loss {valid}, "
        f"{record.bytes_up / 1e6:.2f} MB up, {record.bytes_down / 1e6:.2f} MB down, "
        f"{record.seconds:.1f} s{_verdicts(record)}{_epsilons(record)}"
    )


def _verdicts(record: RoundRecord) -> str:
    """Return how many of the clinics that tell have taken the adapter into use."""
    told = record.verdicts
    return f"; {record.accepted} of {told} clinics that tell use it" if told else ""


def _loss(loss: float | None) -> str:
    return "not reported" if loss is None else f"{loss:.4f}"


def _epsilons(record: RoundRecord) -> str:
    """Return the most that a clinic has spent so far."""
    losses = record.privacy.clinics if record.privacy is not None else {}
    if not losses:
        return ""
    most = max(losses, key=lambda name: _comparable(losses[name].epsilon))
    if losses[most].epsilon is None:
        return f"; privacy loss without bound ({most})"
    return f"; epsilon up to {_shown(losses[most].epsilon)} ({most})"


def privacy_sentences(records: Sequence[RoundRecord]) -> list[str]:
    """Return a line for each clinic's privacy loss at the end of a run, the largest first."""
    losses = latest_losses([record.privacy for record in records])
    ordered = sorted(losses, key=lambda name: (-_comparable(losses[name].epsilon), name))
    return [_privacy_sentence(name, losses[name]) for name in ordered]


def _privacy_sentence(name: str, loss: ClinicPrivacy) -> str:
    views = [f"RDP {_shown(loss.epsilon_rdp)}"]
    if loss.epsilon_outside is not None:
        views.append(f"outside {_shown(loss.epsilon_outside)}")
        views.append(f"own share alone {_shown(loss.epsilon_alone)}")
    return (
        f"privacy of {name}: epsilon {_shown(loss.epsilon)} at delta {loss.delta:g} "
        f"({', '.join(views)}), {loss.steps} steps, noise multiplier "
        f"{loss.noise_multiplier:.3g}, clip {loss.clip:.3g}"
    )


def _comparable(epsilon: float | None) -> float:
    return math.inf if epsilon is None else epsilon


def _shown(epsilon: float | None) -> str:
    """Return an epsilon rounded up, so that it never looks smaller than it is."""
    return "without bound" if epsilon is None else f"{math.ceil(epsilon * 100) / 100:.2f}"


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
        self._awaited: list[str] = []

    def waiting(self, connected: int, enrolled: int, minimum: int) -> None:
        """Say that clinics are still missing."""
        self._say(f"{connected} of {enrolled} enrolled clinics connected, {minimum} are needed")

    def asked(self, number: int, kind: str, clinics: list[str]) -> None:
        """Say what the clinics are doing; of a step of a sum also who fell away before it."""
        whole, _, step = kind.partition(".")
        before, self._awaited = self._awaited, clinics
        head = f"round {number}/{self._rounds}: {doing_of(whole)}"
        if not step:
            self._say(f"{head}: {', '.join(clinics)}")
        elif step in _STEPS:
            place = f"step {STAGES.index(step) + 1} of {len(STAGES)}, {_STEPS[step]}"
            gone = ", ".join(sorted(set(before) - set(clinics)))
            without = f"; without {gone}, as the answer before this did not come" if gone else ""
            self._say(f"{head}: {place}: awaiting {', '.join(clinics)}{without}")

    def warned(self, sentence: str) -> None:
        """Say what should be known before the run goes on."""
        self._say(f"warning: {sentence}")

    def round_repeated(self, number: int, why: str) -> None:
        """Say that a round has to be repeated."""
        self._say(f"round {number} is repeated: {why}")

    def round_finished(self, record: RoundRecord) -> None:
        """Say how a round ended."""
        self._say(round_sentence(record, self._rounds))
        for sentence in failure_sentences(record):
            self._say(sentence)

    def finished(self, records: list[RoundRecord]) -> None:
        """Say what the run has cost."""
        for sentence in privacy_sentences(records):
            self._say(sentence)
