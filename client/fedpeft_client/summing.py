"""A clinic's part in secure sums: one session at a time, begun with an update or a score.

Glue between what a clinic computed and the protocol (``fedpeft.secagg``): which
numbers are summed, and when a further sum would tell too much.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedpeft.adapters import AdapterState
from fedpeft.config import LEAST_SUMMANDS
from fedpeft.errors import AlreadyAggregated, OutOfOrder, TooFewClinics, WrongContext
from fedpeft.protocol import EVALUATE, TRAIN, Job, SumTerms
from fedpeft.protocol.sums import (
    VERDICTS,
    counts_alike,
    fixed_point,
    integers_of,
    levels_of,
    model_digest,
    weight_of_level,
)
from fedpeft.sealing import Context
from fedpeft.secagg import (
    STAGES,
    AdmitPeers,
    AgreeToSum,
    ClinicSession,
    Layout,
    Quantiser,
    Session,
    State,
    masked_vector,
)
from fedpeft_client.clinic import Clinic
from fedpeft_client.learning import Trained
from fedpeft_client.work import Assignment, Measured


@dataclass(frozen=True)
class _Contribution:
    """Values float32 (coordinates,), their weight in rows, and integers, to be masked.

    ``names`` are those of the integers in their order.
    """

    values: NDArray[np.float32]
    weight: int
    integers: Mapping[str, int]
    names: tuple[str, ...]
    terms: SumTerms

    def masked(self, clinics: int, add: Sequence[bytes], subtract: Sequence[bytes]) -> bytes:
        layout = Layout(self.values.size, self.names, self.terms.bits, clinics)
        quantiser = Quantiser(self.terms.bits, self.terms.limit)
        masked, _ = masked_vector(
            self.values, self.weight, self.integers, quantiser, layout, add, subtract
        )
        return masked


class SecureSums:
    """The sessions of the clinics in this process, by clinic name."""

    def __init__(self) -> None:
        self._sessions: dict[str, tuple[Context, ClinicSession]] = {}
        self._finished: set[tuple[str, int, str, int]] = set()

    def require_new(self, clinic: Clinic, context: Context, kind: str) -> None:
        """Check, before any work is done, that a sum of this round was not opened already.

        Two sums of one round over different clinics differ by a single update.

        Raises:
            AlreadyAggregated: it was.
        """
        if (clinic.name, context.run, kind, context.round) in self._finished:
            raise AlreadyAggregated(
                f"the server asks again for round {context.round}, whose sum this clinic has "
                "already helped to open: a second sum could show single updates; start the "
                "server's run again if the round was lost there"
            )

    def begin(
        self,
        clinic: Clinic,
        context: Context,
        assignment: Assignment,
        outcome: Trained | Measured,
        admit: AdmitPeers,
    ) -> bytes:
        """Open a session with what the clinic computed, and return its keys for the server."""
        kind = TRAIN if isinstance(outcome, Trained) else EVALUATE
        job = assignment.job
        session = Session(
            federation=clinic.federation,
            run=context.run,
            round=context.round,
            attempt=context.attempt,
            kind=kind,
            model=model_digest(job, assignment.held.to_bytes()),
        )
        self.forget(clinic.name)
        opened = ClinicSession(
            session,
            clinic.name,
            clinic.membership.identity,
            _contribution(outcome, job, clinic.name),
            adversary=clinic.aggregation.adversary,
            least=(job.privacy and job.privacy.honest_clinics) or 0,
            admit=admit,
            agree=_agreement(job, clinic.name, kind),
        )
        self._sessions[clinic.name] = context, opened
        return opened.receive(STAGES[0], b"")

    def go_on(self, clinic: Clinic, context: Context, stage: str, data: bytes) -> bytes:
        """Answer a later request of the session.

        Raises:
            OutOfOrder: this clinic has no session, or another stage is due.
            WrongContext: the request belongs to another session.
            AggregationRefused: it must not be answered; the session is over.
        """
        if clinic.name not in self._sessions:
            raise OutOfOrder(
                "the server goes on with a secure sum that this clinic did not begin, or lost when "
                "it was restarted: nothing is answered"
            )
        begun, session = self._sessions[clinic.name]
        kind, number, attempt = session.session.kind, begun.round, begun.attempt
        same = (number, attempt, begun.run, begun.schema, kind) == (
            context.round,
            context.attempt,
            context.run,
            context.schema,
            context.purpose.split(".")[0],
        )
        if not same:
            raise WrongContext(
                "a message of the server belongs to another secure sum than the present one: it "
                "is not used"
            )
        answer = session.receive(stage, data)
        if session.state is State.UNMASKED:
            self._finished.add((clinic.name, context.run, kind, context.round))
        return answer

    def forget(self, name: str) -> None:
        """End the clinic's session, if there is one, and forget its secrets."""
        if name in self._sessions:
            self._sessions.pop(name)[1].end()


def _agreement(job: Job, name: str, kind: str) -> AgreeToSum:
    """Return the check of who is in a sum where clinics train different ranks.

    At least ``LEAST_SUMMANDS`` must train all the columns that clinic ``name`` does, and,
    if they count by their rows, as many or none at each rank.
    """
    ranks = job.ranks
    if ranks is None or kind != TRAIN:
        return lambda _clinics: None
    own = ranks.rank(name)

    def agree(clinics: Collection[str]) -> None:
        at = Counter(ranks.rank(clinic) for clinic in clinics)
        beside = sum(count for rank, count in at.items() if rank >= own)
        groups = [beside] if ranks.alike else [beside, *at.values()]
        if (fewest := min(groups)) < LEAST_SUMMANDS:
            raise TooFewClinics(
                f"{fewest} of the sum's clinics have a rank that at least {LEAST_SUMMANDS} must "
                "have, as the sum would show what single ones sent: this clinic reveals nothing"
            )

    return agree


def _contribution(outcome: Trained | Measured, job: Job, name: str) -> _Contribution:
    trained = isinstance(outcome, Trained)
    weight = outcome.rows if trained and not counts_alike(job) else 1
    integers = {
        "num-examples": outcome.rows,
        "nll": fixed_point(outcome.nll),
        "tokens": outcome.tokens,
        "within-clip": int(trained and outcome.within_clip),
    }
    if job.asks_verdict:
        verdict = None if isinstance(outcome, Trained) else outcome.accepted
        integers |= dict(zip(VERDICTS, (int(verdict is not None), int(bool(verdict))), strict=True))
    if job.ranks is not None:
        own = job.ranks.rank(name)
        integers |= {
            weight_of_level(level): weight if level <= own else 0 for level in levels_of(job)
        }
    values = _padded(outcome.update, job, name) if trained else np.zeros(0, np.float32)
    return _Contribution(values, weight, integers, integers_of(job), job.aggregation)


def _padded(update: AdapterState, job: Job, name: str) -> NDArray[np.float32]:
    """Return an update's values with zeros in the columns that the clinic did not train."""
    if job.ranks is not None and update.schema.rank == job.ranks.rank(name):
        schema = update.schema.of_rank(job.adapter.rank)
        update = AdapterState(schema, torch.zeros(schema.numel)).with_part(update)
    return update.values.float().numpy()
