"""What an audit found, and the same as JSON. It holds no record text, name or secret."""

from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from fedpeft.audit.exposure import METHOD
from fedpeft.audit.membership import FALSE_POSITIVE_RATE, Membership
from fedpeft.audit.one_run import EpsilonBound

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Members:
    """Membership inference on real records that were trained on or held out by coin.

    ``member_loss`` and ``nonmember_loss`` are means over records of the nats per
    target token under the adapter. The ``unit`` on which a coin decided is a
    patient or a record.
    """

    unit: str
    members: int
    nonmembers: int
    member_loss: float
    nonmember_loss: float
    loss: Membership
    calibrated: Membership

    @property
    def auc(self) -> float:
        """The better attack's area under the curve."""
        return max(self.loss.auc, self.calibrated.auc)


@dataclass(frozen=True, slots=True)
class Repetition:
    """Exposure in bits of the canaries that were drawn for one number of copies, ascending.

    ``left_out`` were never trained on and show what chance does: about 1.4 bits in
    the mean. ``extracted`` counts canaries whose secret greedy decoding writes.
    """

    repetitions: int
    included: tuple[float, ...]
    left_out: tuple[float, ...]
    extracted: int


@dataclass(frozen=True, slots=True)
class Canaries:
    """All canaries; a secret has ``bits`` bits, and ``samples`` others stand beside each."""

    bits: float
    samples: int
    by_repetition: tuple[Repetition, ...]

    @property
    def exposure(self) -> float:
        """The largest exposure of a planted canary, in bits; 0 if none was planted."""
        return max((max(each.included, default=0.0) for each in self.by_repetition), default=0.0)

    @property
    def extracted(self) -> int:
        """Planted canaries whose secret greedy decoding writes."""
        return sum(each.extracted for each in self.by_repetition)


@dataclass(frozen=True, slots=True)
class UnitBound:
    """A lower bound on the epsilon that holds for a unit: ``patient`` or ``record``."""

    unit: str
    bound: EpsilonBound


@dataclass(frozen=True, slots=True)
class AuditReport:
    """The figures of one audit; ``membership`` is None if nobody was held out, or all were."""

    adapter: str
    reference: str
    membership: Members | None
    canaries: Canaries
    epsilon: tuple[UnitBound, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the report as a JSON object (schema 1)."""
        return {
            "schema": SCHEMA,
            "adapter": self.adapter,
            "reference": self.reference,
            "membership": None if self.membership is None else _members(self.membership),
            "canaries": {
                "bits": self.canaries.bits,
                "samples": self.canaries.samples,
                "method": METHOD,
                "extracted": self.canaries.extracted,
                "max_exposure": self.canaries.exposure,
                "by_repetition": [_repetition(each) for each in self.canaries.by_repetition],
            },
            "epsilon": [
                {
                    "unit": each.unit,
                    **asdict(each.bound),
                    "interval": [each.bound.lower, None],
                }
                for each in self.epsilon
            ],
        }

    def sentences(self) -> list[str]:
        """Say what was found, in lines for people."""
        lines = [_membership_line(self.membership)]
        for each in self.canaries.by_repetition:
            if each.included:
                lines.append(
                    f"canaries of {each.repetitions} copies: exposure {median(each.included):.1f} "
                    f"bits in the median and {each.included[-1]:.1f} at most (of "
                    f"{self.canaries.bits:.1f}), {each.extracted} of {len(each.included)} extracted"
                )
        for found in self.epsilon:
            bound = found.bound
            lines.append(
                f"epsilon of a {found.unit} is at least {bound.lower:.2f} with "
                f"{bound.confidence:.0%} confidence (delta {bound.delta:g}; {bound.correct} of "
                f"{bound.guesses} guesses about {bound.canaries} canaries were right)"
            )
        return lines


def _members(found: Members) -> dict[str, Any]:
    return {
        **{key: value for key, value in asdict(found).items() if key not in ("loss", "calibrated")},
        "false_positive_rate": FALSE_POSITIVE_RATE,
        "max_auc": found.auc,
        "attacks": {"loss": asdict(found.loss), "calibrated": asdict(found.calibrated)},
    }


def _repetition(each: Repetition) -> dict[str, Any]:
    return {
        "repetitions": each.repetitions,
        "planted": len(each.included),
        "extracted": each.extracted,
        "median_exposure": median(each.included) if each.included else None,
        "max_exposure": each.included[-1] if each.included else None,
        "median_left_out": median(each.left_out) if each.left_out else None,
        "exposure": list(each.included),
        "exposure_left_out": list(each.left_out),
    }


def _membership_line(found: Members | None) -> str:
    if found is None:
        return "membership inference: not measured, as no real record was held out, or all were"
    parts = [
        f"{name} AUC {attack.auc:.3f} ({attack.interval[0]:.3f} to {attack.interval[1]:.3f}), "
        f"{attack.tpr:.1%} of members found at {FALSE_POSITIVE_RATE:.0%} false alarms"
        for name, attack in (("loss", found.loss), ("calibrated", found.calibrated))
    ]
    return (
        f"membership of {found.members} members and {found.nonmembers} others: {'; '.join(parts)}"
    )
