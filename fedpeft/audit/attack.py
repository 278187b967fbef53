"""Attack an adapter with the audit keys of the clinics, and say what it gives away.

Every record is scored twice: under the adapter, and under a reference (the base
model, or an adapter that did not see the records). Given the keys, all figures are
functions of the two models' losses.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedpeft.audit.exposure import exposure
from fedpeft.audit.keyfile import AuditKey, read_key
from fedpeft.audit.material import Held, Target, gather
from fedpeft.audit.membership import measure
from fedpeft.audit.one_run import audit_coins
from fedpeft.audit.report import AuditReport, Canaries, Members, Repetition, UnitBound
from fedpeft.config import ModelSettings
from fedpeft.data import EncodedExample
from fedpeft.errors import AdapterError, ConfigError, DataError
from fedpeft.evaluation import Score, score_rows
from fedpeft.evaluation.report import adapted_from
from fedpeft.models import AdaptedModel, Workbench

SAMPLES = 256
DELTA = 1e-5
Progress = Callable[[int, int], None]
"""Told how many rows of how many are scored."""


@dataclass(frozen=True, kw_only=True)
class Attack:
    """What is attacked, and how hard.

    ``reference`` None: the base model. ``samples`` random secrets stand beside
    each canary. ``delta`` is that of the guarantee that is audited.
    """

    model: ModelSettings
    adapter: Path
    keys: tuple[Path, ...]
    reference: Path | None = None
    samples: int = SAMPLES
    delta: float = DELTA
    max_length: int | None = None

    def __post_init__(self) -> None:
        if not self.keys:
            raise ConfigError("an audit needs an audit key; name the file with --key")
        if self.samples < 1:
            raise ConfigError(f"{self.samples} samples give no rank; take 1 or more")
        if not 0 <= self.delta < 1:
            raise ConfigError(f"delta is {self.delta}; take 0 or more, and less than 1")


def run_audit(
    attack: Attack, say: Callable[[str], None], progress: Progress | None = None
) -> AuditReport:
    """Score the adapter and the reference, and return what an attacker learns.

    Raises:
        FedpeftError: a key, its data file, the model or an adapter cannot be used.
    """
    keys = {path: read_key(path) for path in attack.keys}
    _require_distinct(list(keys.values()), attack.keys)
    _require_adapter(attack.adapter)
    workbench = Workbench()
    model = adapted_from(workbench, attack.model, attack.adapter, relative_to=Path())
    material = gather(keys, model, samples=attack.samples, max_length=attack.max_length)
    say(
        f"{len(material.targets)} canaries, each among {attack.samples} other secrets, and "
        f"{len(material.held)} real records"
    )
    own = [target.examples[0] for target in material.targets]
    real = [each.example for each in material.held]
    others = [row for target in material.targets for row in target.examples[1:]]
    counted = _Counted(2 * len(own + real) + len(others), progress)
    scores = counted.score(model, own + real + others)
    reference = adapted_from(workbench, attack.model, attack.reference, relative_to=Path())
    calibration = counted.score(reference, own + real)
    canaries, records = len(own), len(real)
    return AuditReport(
        adapter=str(attack.adapter),
        reference="base model" if attack.reference is None else str(attack.reference),
        membership=_membership(
            material.held,
            scores[canaries : canaries + records],
            calibration[canaries:],
            "patient" if any(key.unit == "patient" for key in keys.values()) else "record",
        ),
        canaries=_canaries(material.targets, scores[:canaries], scores[canaries + records :]),
        epsilon=_bounds(material.targets, scores[:canaries], calibration[:canaries], attack.delta),
    )


def _require_distinct(keys: Sequence[AuditKey], named: Sequence[Path]) -> None:
    if len({key.seed for key in keys}) < len(named):
        raise DataError("one audit key was named twice; name each once")


def _require_adapter(path: Path) -> None:
    if not path.is_dir():
        raise AdapterError(f"there is no adapter directory {path}; name one that exists")


class _Counted:
    """Scores rows and tells how far it is through all passes."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total = total
        self._before = 0
        self._progress = progress

    def score(self, model: AdaptedModel, examples: Sequence[EncodedExample]) -> list[Score]:
        """Return the scores of ``examples``."""

        def tell(done: int) -> None:
            if self._progress is not None:
                self._progress(self._before + done, self._total)

        scores = score_rows(model, examples, tell)
        self._before += len(examples)
        return scores


def _membership(
    held: Sequence[Held], scores: Sequence[Score], calibration: Sequence[Score], unit: str
) -> Members | None:
    """Return the two attacks; None where members or non-members are missing."""
    member = np.array([each.member for each in held], dtype=np.bool_)
    if not member.any() or member.all():
        return None
    units = np.array([each.unit for each in held], dtype=np.int64)
    loss = np.array([one.nll / one.tokens for one in scores])
    expected = np.array([one.nll / one.tokens for one in calibration])
    return Members(
        unit=unit,
        members=int(member.sum()),
        nonmembers=int((~member).sum()),
        member_loss=float(loss[member].mean()),
        nonmember_loss=float(loss[~member].mean()),
        loss=measure(-loss, member, units),
        calibrated=measure(expected - loss, member, units),
    )


def _canaries(targets: Sequence[Target], own: Sequence[Score], others: Sequence[Score]) -> Canaries:
    if not targets:
        return Canaries(0.0, 0, ())
    bits = [len(target.canary.secret) * math.log2(10) for target in targets]
    samples = len(targets[0].examples) - 1
    exposures: list[float] = []
    for at, score in enumerate(own):
        rivals = others[at * samples : (at + 1) * samples]
        found = exposure(score.nll, np.array([one.nll for one in rivals]), bits=bits[at])
        # What greedy decoding writes is an attacker's first guess.
        exposures.append(bits[at] if score.exact else found)
    rows = list(zip((target.canary for target in targets), exposures, own, strict=True))
    return Canaries(
        bits=max(bits),
        samples=samples,
        by_repetition=tuple(
            Repetition(
                repetitions=number,
                included=tuple(
                    sorted(e for c, e, _ in rows if c.repetitions == number and c.included)
                ),
                left_out=tuple(
                    sorted(e for c, e, _ in rows if c.repetitions == number and not c.included)
                ),
                extracted=sum(
                    s.exact for c, _, s in rows if c.repetitions == number and c.included
                ),
            )
            for number in sorted({target.canary.repetitions for target in targets})
        ),
    )


def _bounds(
    targets: Sequence[Target],
    own: Sequence[Score],
    calibration: Sequence[Score],
    delta: float,
) -> tuple[UnitBound, ...]:
    """Return the bound for a patient from all canaries, and for a record from those without copies.

    The copies of a canary are one patient's, so one patient's privacy covers all
    of them; one record's does not.
    """
    gained = np.array([before.nll - now.nll for now, before in zip(own, calibration, strict=True)])
    groups = np.array([target.canary.repetitions for target in targets], dtype=np.int64)
    coins = np.array([target.canary.included for target in targets], dtype=np.bool_)
    bounds: list[UnitBound] = []
    for unit, counts in (
        ("patient", np.ones(len(targets), dtype=np.bool_)),
        ("record", groups == 1),
    ):
        if counts.any():
            bound = audit_coins(gained[counts], groups[counts].tolist(), coins[counts], delta)
            bounds.append(UnitBound(unit, bound))
    return tuple(bounds)
