"""A clinic's part in secure sums: one session at a time, begun with an update or a score.

Glue between what a clinic computed and the protocol (``fedpeft.secagg``): which
numbers are summed, and when a further sum would tell too much.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
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
    AgreeToSum,
    ClinicSession,
    Layout,
    Quantiser,
    Session,
    State,
    masked_vector,
)
from fedpeft.secagg.kept_session import KeptSession
from fedpeft_client.rounds.clinic import Clinic
from fedpeft_client.rounds.learning import Trained
from fedpeft_client.rounds.work import Assignment, Measured
from fedpeft_client.sums.kept_sum import Answered, KeptSum, SumFolder, Summand
from fedpeft_client.sums.opened_sums import OpenedSums

Admit = Callable[[Clinic, Mapping[str, bytes]], object]
"""Told a clinic, and name and Ed25519 key of the others in its sum; raises to refuse one."""


@dataclass(frozen=True)
class _Contribution:
    """What is added, to be masked; ``names`` are those of the integers in their order."""

    summand: Summand
    names: tuple[str, ...]
    terms: SumTerms

    def masked(self, clinics: int, add: Sequence[bytes], subtract: Sequence[bytes]) -> bytes:
        values, terms = self.summand.values, self.terms
        layout = Layout(values.size, self.names, terms.bits, clinics)
        masked, _ = masked_vector(
            values,
            self.summand.weight,
            self.summand.integers,
            Quantiser(terms.bits, terms.limit),
            layout,
            add,
            subtract,
        )
        return masked


@dataclass
class _Sum:
    """The sum that a clinic is in; ``summand`` is None once it was masked."""

    context: Context
    job: Job
    session: ClinicSession
    summand: Summand | None
    answered: Answered | None = None

    def kept(self) -> KeptSum:
        return KeptSum(
            context=self.context,
            session=self.session.session,
            job=self.job,
            steps=self.session.kept(),
            summand=self.summand,
            answered=self.answered,
        )


class SecureSums:
    """The sums of the clinics in this process, by clinic name.

    Where a clinic has a folder for it, each step is on the disk before its answer leaves.
    """

    def __init__(self, admit: Admit) -> None:
        self._admit = admit
        self._sums: dict[str, _Sum] = {}
        self._opened: dict[str, OpenedSums] = {}

    def require_new(self, clinic: Clinic, context: Context, kind: str) -> None:
        """Check, before any work is done, that a sum of this round was not opened already.

        Two sums of one round over different clinics differ by a single update.

        Raises:
            AlreadyAggregated: it was, in this process or one before.
            StorageError: that cannot be known.
        """
        if self._opened_of(clinic).has(context.run, kind, context.round):
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
    ) -> bytes:
        """Open a session with what the clinic computed, and return its keys for the server.

        Raises:
            StorageError: it cannot be kept; nothing may leave.
        """
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
        self.forget(clinic)
        summand = _summand(outcome, job, clinic.name)
        opened = self._session(clinic, session, job, summand, None)
        begun = _Sum(context, job, opened, summand)
        keys = opened.receive(STAGES[0], b"")
        if clinic.sums_directory is not None:
            SumFolder(clinic).begin(begun.kept())
        self._sums[clinic.name] = begun
        return keys

    def go_on(self, clinic: Clinic, context: Context, stage: str, data: bytes) -> bytes:
        """Answer a later request of the session; the very same request gets the same answer.

        Raises:
            OutOfOrder: this clinic has no session, or another stage is due.
            WrongContext: the request belongs to another session.
            AggregationRefused: it must not be answered; the session is over.
            StorageError: how far it came cannot be written; nothing may leave.
        """
        if (again := self._answer_before(clinic)) is not None and again.fits(context, data):
            return again.answer
        begun = self._begun(clinic)
        session, about = begun.session, begun.context
        same = (about.round, about.attempt, about.run, about.schema, session.session.kind) == (
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
        try:
            answer = session.receive(stage, data)
            begun.answered = Answered.to(context, data, answer)
        finally:
            self._keep(clinic, begun)
        return answer

    def forget(self, clinic: Clinic) -> None:
        """End the clinic's session, if there is one, and forget its secrets.

        Raises:
            StorageError: the disk is read-only.
        """
        if (begun := self._sums.pop(clinic.name, None)) is not None:
            begun.session.end()
        if clinic.sums_directory is not None:
            SumFolder(clinic).clear()

    def _keep(self, clinic: Clinic, begun: _Sum) -> None:
        """Write down how far a sum has come; a sum that is over is forgotten."""
        state, session = begun.session.state, begun.session.session
        if state is State.UNMASKED:
            self._opened_of(clinic).note(session.run, session.kind, session.round)
        if state is State.MASKED:
            begun.summand = None
        if clinic.sums_directory is None:
            return
        folder = SumFolder(clinic)
        if state is State.ENDED:
            folder.clear()
            return
        if state is State.UNMASKED:
            folder.over(begun.answered)
        else:
            folder.go_on(begun.kept())

    def _answer_before(self, clinic: Clinic) -> Answered | None:
        """Return the last answer of the clinic's sum, by this process or one before."""
        begun = self._sums.get(clinic.name)
        if begun is not None or clinic.sums_directory is None:
            return begun and begun.answered
        return SumFolder(clinic).last_answer()

    def _begun(self, clinic: Clinic) -> _Sum:
        """Return the clinic's sum, of this process or one before.

        Raises:
            OutOfOrder: there is none.
        """
        begun = self._sums.get(clinic.name)
        if begun is None and clinic.sums_directory is not None:
            begun = self._restored(clinic, SumFolder(clinic).read())
        if begun is None:
            raise OutOfOrder(
                "the server goes on with a secure sum that this clinic did not begin, or has left: "
                "nothing is answered"
            )
        self._sums[clinic.name] = begun
        return begun

    def _restored(self, clinic: Clinic, kept: KeptSum | None) -> _Sum | None:
        if kept is None:
            return None
        session = self._session(clinic, kept.session, kept.job, kept.summand, kept.steps)
        return _Sum(kept.context, kept.job, session, kept.summand, kept.answered)

    def _session(
        self,
        clinic: Clinic,
        session: Session,
        job: Job,
        summand: Summand | None,
        steps: KeptSession | None,
    ) -> ClinicSession:
        contribution = summand and _Contribution(summand, integers_of(job), job.aggregation)
        return ClinicSession(
            session,
            clinic.name,
            clinic.membership.identity,
            contribution,
            adversary=clinic.aggregation.adversary,
            least=(job.privacy and job.privacy.honest_clinics) or 0,
            admit=lambda peers: self._admit(clinic, peers),
            agree=_agreement(job, clinic.name, session.kind),
            kept=steps,
        )

    def _opened_of(self, clinic: Clinic) -> OpenedSums:
        if clinic.name not in self._opened:
            folder = clinic.sums_directory
            self._opened[clinic.name] = OpenedSums(folder and folder / "opened.json")
        return self._opened[clinic.name]


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


def _summand(outcome: Trained | Measured, job: Job, name: str) -> Summand:
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
    return Summand(values, weight, integers)


def _padded(update: AdapterState, job: Job, name: str) -> NDArray[np.float32]:
    """Return an update's values with zeros in the columns that the clinic did not train."""
    if job.ranks is not None and update.schema.rank == job.ranks.rank(name):
        schema = update.schema.of_rank(job.adapter.rank)
        update = AdapterState(schema, torch.zeros(schema.numel)).with_part(update)
    return update.values.float().numpy()
