"""The ClientApp: opens the server's messages, does the clinic's work, seals the answers.

Installed on the box; never fetched from a server. Under secure aggregation an
update leaves it only masked; where the clinic allows ``sealed`` jobs it leaves
encrypted for the server. Of an error only its reason leaves.
"""

import logging
from collections.abc import Callable, Mapping

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from fedpeft.adapters import to_bytes
from fedpeft.errors import AdapterNotHeld, ConfigError, FedpeftError, PolicyRefused
from fedpeft.protocol import (
    EVALUATE,
    JOB,
    MAX_RANK,
    NUM_EXAMPLES,
    TRAIN,
    TRAIN_NLL,
    TRAIN_TOKENS,
    VALID_NLL,
    VALID_TOKENS,
    VERDICT,
    Job,
    Payload,
    Value,
)
from fedpeft.protocol.lineage import LINEAGE
from fedpeft.protocol.lineage_check import arrived
from fedpeft.protocol.privacy import PRIVACY
from fedpeft.protocol.successions import Links, successions_of
from fedpeft.protocol.sums import model_digest
from fedpeft.sealing import clinic_role
from fedpeft.sealing.succession import newest_key
from fedpeft.secagg import STAGES
from fedpeft_client.keys.peers import PeerBook
from fedpeft_client.limits.memory import bounded_memory, require_memory
from fedpeft_client.limits.policy import Now, require_allowed
from fedpeft_client.limits.working_hours import local_now
from fedpeft_client.rounds.clinic import Clinic
from fedpeft_client.rounds.learning import Trained
from fedpeft_client.rounds.mailbox import Mailbox, Request
from fedpeft_client.rounds.shelf import Shelf
from fedpeft_client.rounds.work import Assignment, ClinicWork, Measured
from fedpeft_client.sums.summing import SecureSums
from fedpeft_client.trail import Trail

_LOG = logging.getLogger(__name__)
ERROR_CODE = 2
"""Flower's code of an exception in a client app, here with a reason of our own."""
Handler = Callable[[Message, Context], Message]
Seen = Callable[[Clinic, Job], None]
"""Told of every job that a clinic accepts, before it is done."""


Refused = Callable[[PolicyRefused], None]
"""Told of every order that a rule of the clinic forbade."""


def _unseen(_clinic: Clinic, _job: Job) -> None:
    return


def _unheard(_error: PolicyRefused) -> None:
    return


class ClinicDesk:
    """Answers messages for the clinic that ``find_clinic`` names for a Flower context.

    That is always the same one on a box, and one of many in a simulation.
    """

    def __init__(
        self,
        find_clinic: Callable[[Context], Clinic],
        work: ClinicWork,
        *,
        seen: Seen = _unseen,
        refused: Refused = _unheard,
        tell: Callable[[str], None] | None = None,
        now: Now = local_now,
        trail: Trail = Trail(),  # noqa: B008  (it keeps nothing)
        mailbox: Mailbox | None = None,
        shelf: Shelf | None = None,
    ) -> None:
        """Answer; ``mailbox`` and ``shelf`` are those that outlive the process, if any do."""
        self._find_clinic = find_clinic
        self._work = work
        self._seen = seen
        self._refused = refused
        self._now = now
        self._trail = trail
        self._tell = tell
        self._mailbox = mailbox or Mailbox()
        self._shelf = shelf or Shelf()
        self._sums = SecureSums(self._admit)
        self._peers: dict[str, PeerBook] = {}
        self._links: dict[str, Links] = {}
        self._paid: dict[str, tuple[tuple[int, bytes], Trained]] = {}

    def sealed(self, kind: str) -> Handler:
        """Return the handler of ``train`` or ``evaluate``: the server opens the answer."""

        def answer(clinic: Clinic, request: Request) -> Payload:
            assignment = self._assignment(kind, clinic, request, "sealed")
            return _reported(clinic, self._do(kind, clinic, request, assignment))

        return self._handler(answer)

    def summed(self, kind: str, stage: str) -> Handler:
        """Return the handler of one stage of a secure sum, such as ``train.masked``."""

        def begin(clinic: Clinic, request: Request) -> Payload:
            assignment = self._assignment(kind, clinic, request, "secagg")
            self._sums.require_new(clinic, request.context, kind)
            # What is left of an attempt before is void, and need not stay in memory.
            self._sums.forget(clinic)
            outcome = self._do(kind, clinic, request, assignment)
            keys = self._sums.begin(clinic, request.context, assignment, outcome)
            return Payload(_told(clinic, outcome), keys)

        def go_on(clinic: Clinic, request: Request) -> Payload:
            data = request.payload.blob
            self._links[clinic.name] = successions_of(request.payload, source="the server")
            answer = self._sums.go_on(clinic, request.context, stage, data)
            if (kind, stage) == (TRAIN, STAGES[-1]):
                # Two sums with the same noise, over other clinics, would show single updates.
                self._work.forget(clinic)
            return Payload(blob=answer)

        return self._handler(begin if stage == STAGES[0] else go_on)

    def _handler(self, answer: Callable[[Clinic, Request], Payload]) -> Handler:
        def handle(message: Message, context: Context) -> Message:
            clinic = self._find_clinic(context)
            try:
                request = self._mailbox.open(clinic, message)
                clinic = request.clinic
                return self._mailbox.answer(request, answer(clinic, request))
            except AdapterNotHeld as error:
                _LOG.info("%s: %s", clinic.name, error)  # as after every start
                self._trail.refused(message, error)
                return Message(Error(ERROR_CODE, error.reason), reply_to=message)
            except FedpeftError as error:
                _LOG.error("%s: %s", clinic.name, error)
                self._trail.refused(message, error)
                if isinstance(error, PolicyRefused):
                    self._refused(error)
                return Message(Error(ERROR_CODE, error.reason), reply_to=message)

        return handle

    def _assignment(
        self, kind: str, clinic: Clinic, request: Request, confidentiality: str
    ) -> Assignment:
        """Read the job, and refuse one that this clinic's policy does not allow."""
        context = request.context
        job = Job.from_json(request.payload.text(JOB, source="the server"))
        require_allowed(clinic, job, kind, self._now())
        if (job.aggregation.confidentiality, job.round) != (confidentiality, context.round):
            raise ConfigError(
                "the server's job is not what its message was sealed as: nothing was trained; "
                "install the same fedpeft release on both sides"
            )
        self._trail.accepted(request.message, context)
        self._seen(clinic, job)
        held = self._shelf.take(clinic, request)
        lineage = request.payload.fields.get(LINEAGE)
        signed = arrived(str(lineage), clinic.membership.server, job) if lineage else None
        return Assignment(job, held, context.schema, context.run, signed)

    def _do(
        self, kind: str, clinic: Clinic, request: Request, assignment: Assignment
    ) -> Trained | Measured:
        """Train or measure; what noise has paid for is kept for when a round is repeated.

        The same noisy update sent once more tells nothing new, a new one would.
        """
        if kind != TRAIN:
            self._paid.pop(clinic.name, None)
            self._work.forget(clinic)
            require_memory(clinic, assignment.job, kind)
            with bounded_memory(clinic.limits.max_memory_mb):
                return self._work.evaluate(clinic, assignment)
        asked = (request.context.run, model_digest(assignment.job, assignment.held.to_bytes()))
        paid, trained = self._paid.get(clinic.name, (None, None))
        if trained is None or paid != asked:
            require_memory(clinic, assignment.job, kind)
            with bounded_memory(clinic.limits.max_memory_mb):
                trained = self._work.train(clinic, assignment)
            if not trained.again:
                self._trail.charged(request.context, assignment.job, trained)
            if trained.privacy is not None:
                self._paid[clinic.name] = asked, trained
        return trained

    def _admit(self, clinic: Clinic, peers: Mapping[str, bytes]) -> None:
        """Let the clinic compare the other clinics' keys with those it has seen before."""
        if clinic.name not in self._peers:
            accept_new = clinic.aggregation.new_peers == "accept"
            self._peers[clinic.name] = PeerBook(clinic.membership.peers, accept_new=accept_new)
        links = self._links.get(clinic.name, {})

        def follow(name: str, pinned: bytes) -> bytes:
            holder, shown = clinic_role(name), links.get(name, ())
            return newest_key(shown, pinned, federation=clinic.federation, holder=holder)

        met = self._peers[clinic.name].admit(peers, follow)
        if met.new and self._tell is not None:
            self._tell(
                f"{clinic.name}: first sum together with {', '.join(met.new)}; their keys are "
                "remembered (fedpeft-client peers)"
            )
        if met.renewed and self._tell is not None:
            self._tell(
                f"{clinic.name}: {', '.join(met.renewed)} renewed the identity, as the old one has "
                "signed; the new key is remembered (fedpeft-client peers)"
            )


def _reported(clinic: Clinic, outcome: Trained | Measured) -> Payload:
    """Return what the server may read by itself under ``sealed``."""
    told = _told(clinic, outcome)
    if isinstance(outcome, Trained):
        fields: dict[str, Value] = {
            NUM_EXAMPLES: outcome.rows,
            TRAIN_NLL: outcome.nll,
            TRAIN_TOKENS: outcome.tokens,
        }
        return Payload({**fields, **told}, to_bytes(outcome.update, "update"))
    if outcome.accepted is not None:
        told[VERDICT] = int(outcome.accepted)
    return Payload({VALID_NLL: outcome.nll, VALID_TOKENS: outcome.tokens, **told})


def _told(clinic: Clinic, outcome: Trained | Measured) -> dict[str, Value]:
    """Return what the server is told in any case, none of which depends on a record.

    The largest rank of this box, and the privacy that a round of noise cost.
    """
    if isinstance(outcome, Measured):
        return {MAX_RANK: clinic.limits.max_rank}
    if outcome.privacy is None:
        return {}
    return {PRIVACY: outcome.privacy.model_dump_json()}


def build_client_app(desk: ClinicDesk) -> ClientApp:
    """Return Flower's app around the handlers of ``desk``."""
    app = ClientApp()
    app.train()(desk.sealed(TRAIN))
    app.evaluate()(desk.sealed(EVALUATE))
    for stage in STAGES:
        app.train(stage)(desk.summed(TRAIN, stage))
        app.evaluate(stage)(desk.summed(EVALUATE, stage))
    return app
