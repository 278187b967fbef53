"""What a clinic computes when it is asked: train on its records, or measure an adapter on them.

Plain values in and out; who asked, and how the answer is kept confidential, is
not known here.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from fedpeft.adapters import (
    AdapterSchema,
    AdapterState,
    Factors,
    at_rank,
    combined,
    from_bytes,
    save_adapter,
)
from fedpeft.errors import ConfigError, PolicyRefused, RankLimit, StepsLimit, WrongContext
from fedpeft.evaluation import Score, score
from fedpeft.models import (
    AdaptedModel,
    Workbench,
    adapter_schema,
    fingerprint,
    require_fingerprint,
)
from fedpeft.protocol import Job
from fedpeft.protocol.lineage import SignedLineage
from fedpeft.protocol.lineage_check import to_keep
from fedpeft.protocol.parcel import Held
from fedpeft.training import Observer
from fedpeft_client.limits.memory import within_memory
from fedpeft_client.limits.policy import Now, require_disk, within_hours
from fedpeft_client.limits.working_hours import local_now
from fedpeft_client.rounds.checkpoints import CheckpointFolder, KeptRound
from fedpeft_client.rounds.clinic import Clinic
from fedpeft_client.rounds.cost import require_losses_allowed, require_noise_fits, steps_of
from fedpeft_client.rounds.learning import Learner, Trained
from fedpeft_client.rounds.personal import PersonalStore
from fedpeft_client.rounds.protection import Protector
from fedpeft_client.rounds.records import ClinicRows, RecordStore
from fedpeft_client.rounds.undertaking import undertaking_of
from fedpeft_client.versions.admission import Admission
from fedpeft_client.versions.store import AdapterStore
from fedpeft_client.versions.version import Arrival


@dataclass(frozen=True, slots=True)
class Assignment:
    """A job with what the server sent; ``schema`` is the adapter's hash that it signed for it.

    ``lineage`` is what made the adapter, already checked, if that came too.
    """

    job: Job
    held: Held
    schema: str
    run: int
    lineage: SignedLineage | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """Validation loss (nats) over target tokens, and how many rows this clinic trains on.

    The first two are 0 under a job with noise that does not ask for exact losses.
    ``accepted`` says whether the adapter is in use here; None unless both sides want it told.
    """

    nll: float
    tokens: int
    rows: int
    accepted: bool | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Ready:
    """A model that holds ``adapter``; ``products`` were added to its base, by their digests."""

    model: AdaptedModel
    adapter: AdapterState
    products: list[tuple[str, AdapterState]]


class ClinicWork:
    """The two things a clinic can be asked, with the base model kept loaded between them.

    ``observe`` is told of training steps, ``tell`` in a sentence what was read from
    which file and how much was cut; ``now`` returns the local time.
    """

    def __init__(
        self,
        observe: Observer | None = None,
        tell: Callable[[str], None] | None = None,
        now: Now = local_now,
    ) -> None:
        self._observe = observe
        self._now = now
        self._tell = tell
        self._workbench = Workbench()
        self._records = RecordStore(tell)
        self._protector = Protector(tell)
        self._admission = Admission(self._workbench, self._records, tell)
        self._personal: dict[str, PersonalStore] = {}

    def train(self, clinic: Clinic, assignment: Assignment) -> Trained:
        """Train from the assignment's adapter and return the change to what is to be sent.

        A round that was stopped goes on, and one that was finished is answered as before.

        Raises:
            FedpeftError: of the kind that says what stands against it.
        """
        job = assignment.job
        if job.round < 1:
            raise ConfigError(
                "the server asks to train in round 0, which only evaluates; install the same "
                "fedpeft release on both sides"
            )
        require_noise_fits(job)
        own = _own_rank(clinic, job)
        _require_within(RankLimit, "max_rank", own, clinic.limits.max_rank)
        nested = job.ranks is not None and job.ranks.rule == "nested"
        rest = job.adapter.rank - own if nested else 0
        ready = self._prepare(clinic, assignment, own, rest, until=job.round - 1)
        model = ready.model
        model.focus(job.trains)
        rows = self._records.train(clinic, model.base, job.training.max_length)
        steps = steps_of(job, rows.examples)
        _require_within(StepsLimit, "max_steps", steps, clinic.limits.max_steps)
        sent = model.trained.part(job.sends)
        stopped = self._stopped(clinic, job, ready, rows)
        if stopped is not None and (before := stopped.answered(sent)) is not None:
            return replace(before, again=True)
        attempt = stopped.attempt if stopped is not None else ""
        protection = self._protector.open(clinic, job, assignment.run, rows, sent.numel, attempt)
        learner = Learner(clinic, job, protection, self._tell)
        watch = within_memory(self._observe, clinic.limits.max_memory_mb)
        watch = within_hours(watch, clinic, self._now)
        trained = learner.learn(model, ready.adapter, rows.examples, watch, stopped)
        trained.update.require_finite(source=f"clinic {clinic.name}")
        if kept := _kept_factors(job):
            self._keep(clinic, assignment, model.read().part(kept, own))
        if stopped is not None:
            stopped.finish(trained, job)
        return trained

    def forget(self, clinic: Clinic) -> None:
        """Remove what is kept of the last round of training: its update is in a sum that opens.

        Raises:
            StorageError: the disk is read-only.
        """
        if (folder := self._folder(clinic)) is not None:
            folder.clear()

    def _stopped(
        self, clinic: Clinic, job: Job, ready: _Ready, rows: ClinicRows
    ) -> KeptRound | None:
        """Return what is kept of the round; None: this clinic keeps nothing."""
        if (folder := self._folder(clinic)) is None:
            return None
        return folder.open(undertaking_of(clinic, job, ready.adapter, rows, ready.model))

    def _folder(self, clinic: Clinic) -> CheckpointFolder | None:
        if clinic.checkpoint_directory is None or not clinic.checkpoints.max_mb:
            return None
        return CheckpointFolder(clinic, self._tell)

    def evaluate(self, clinic: Clinic, assignment: Assignment) -> Measured:
        """Keep the assignment's adapter and return its validation loss here.

        Raises:
            FedpeftError: of the kind that says what stands against it.
        """
        job = assignment.job
        require_losses_allowed(clinic, job)
        own = _own_rank(clinic, job)
        truncated = job.ranks is not None and job.ranks.rule == "truncated"
        rank = own if truncated else job.adapter.rank
        ready = self._prepare(clinic, assignment, rank, 0, until=job.round)
        model, length = ready.model, job.training.max_length
        valid, told = Score(), job.privacy is None or job.privacy.exact_losses
        if told or (clinic.store_directory is not None and job.round > 0):
            valid = score(model, self._records.valid(clinic, model.base, length))
        rows = self._records.train(clinic, model.base, length)
        accepted = self._receive(clinic, assignment, ready, valid)
        if not told:
            # What the box measured for itself is not for the server.
            return Measured(0.0, 0, len(rows.examples))
        if not (job.asks_verdict and clinic.acceptance.report_verdict):
            accepted = None
        return Measured(valid.nll, valid.tokens, len(rows.examples), accepted)

    def _receive(
        self, clinic: Clinic, assignment: Assignment, ready: _Ready, valid: Score
    ) -> bool | None:
        """Keep a round's adapter; say whether it was taken into use, None where none is judged.

        The model of ``ready`` is gone afterwards.
        """
        job = assignment.job
        if job.round < 1 or not (clinic.store_directory or clinic.adapter_directory):
            return None
        require_disk(clinic)
        # For the base model as its files are, which is the one that others load.
        whole = combined(ready.adapter, [product for _, product in ready.products])
        settings = at_rank(job.adapter, whole.schema.rank)
        base_name = str(clinic.model.resolve())
        if clinic.adapter_directory is not None:
            save_adapter(whole, settings, clinic.adapter_directory, base_name=base_name)
        if clinic.store_directory is None:
            return None
        arrival = Arrival(
            state=whole,
            settings=settings,
            base_name=base_name,
            federation=job.federation,
            run=job.run,
            round=job.round,
            lineage=to_keep(assignment.lineage, whole),
        )
        store = AdapterStore(clinic.store_directory, clinic.adapters)
        kept = self._admission.admit(clinic, store, arrival, ready.model, valid, job)
        return kept.verdict.accepted

    def _prepare(
        self, clinic: Clinic, assignment: Assignment, rank: int, rest_rank: int, *, until: int
    ) -> _Ready:
        """Check the job against the clinic's limits and model, then load the adapter.

        The model gets its first ``rank + rest_rank`` columns, with the clinic's own factors
        as they were after round ``until``.
        """
        job = assignment.job
        _require_own_federation(clinic, job)
        require_fingerprint(fingerprint(clinic.model), job.fingerprint, clinic.model)
        products = _products(clinic, assignment)
        model = self._workbench.adapted(
            clinic.model,
            at_rank(job.adapter, rank),
            quantization=job.quantization,
            dtype=clinic.dtype,
            rest_rank=rest_rank,
            base_change=products,
        )
        schema = model.schema.of_rank(job.adapter.rank)
        if assignment.schema != schema.hash:
            raise WrongContext(
                "the server's message was sealed for another adapter schema than its job gives "
                "here: it is not used; install the same fedpeft release on both sides"
            )
        state = assignment.held.adapter
        schema.require(state.schema.hash, source="the server")
        state.require_finite(source="the server")
        own = self._kept(clinic, assignment, schema, until)
        state = (state if own is None else state.with_part(own)).part("AB", rank + rest_rank)
        model.load(state)
        return _Ready(model, state, products)

    def _kept(
        self, clinic: Clinic, assignment: Assignment, schema: AdapterSchema, until: int
    ) -> AdapterState | None:
        """Return the factors that the clinic did not send until round ``until``, if any."""
        job = assignment.job
        factors = _kept_factors(job)
        if factors is None:
            return None
        part = schema.part(factors, _own_rank(clinic, job))
        store = self._store(clinic)
        own = store.newest(part, federation=job.federation, run=job.run, until=until)
        if own is None and until and self._tell is not None:
            self._tell(
                f"{clinic.name}: no factor of its own is kept of this run's rounds up to {until}, "
                "so it begins with the server's"
            )
        return own

    def _keep(self, clinic: Clinic, assignment: Assignment, part: AdapterState) -> None:
        job = assignment.job
        part.require_finite(source=f"clinic {clinic.name}")
        store = self._store(clinic)
        store.keep(part, federation=job.federation, run=job.run, round=job.round)

    def _store(self, clinic: Clinic) -> PersonalStore:
        return self._personal.setdefault(clinic.name, PersonalStore(clinic.personal_directory))


def _own_rank(clinic: Clinic, job: Job) -> int:
    """Return the rank at which ``clinic`` takes part."""
    return job.ranks.rank(clinic.name) if job.ranks else job.adapter.rank


def _kept_factors(job: Job) -> Factors | None:
    """Return the factor that is trained and not sent; None: all that is trained is sent."""
    if job.sends == job.trains:
        return None
    return "B" if job.sends == "A" else "A"


def _products(clinic: Clinic, assignment: Assignment) -> list[tuple[str, AdapterState]]:
    """Read the products that the job adds to the base model, with their digests.

    Raises:
        ConfigError: they are not those that the job names.
        SchemaMismatch, NotFinite: one cannot be used.
    """
    job, increments = assignment.job, assignment.held.increments
    if tuple(increment.digest for increment in increments) != job.base_change:
        raise ConfigError(
            f"the server's job adds {len(job.base_change)} products to the base model, and those "
            f"that came with it ({len(increments)}) are others: nothing was computed; install the "
            "same fedpeft release on both sides"
        )
    if not increments:
        return []
    schema = adapter_schema(clinic.model, job.adapter)
    products: list[tuple[str, AdapterState]] = []
    for increment in increments:
        own = schema.of_rank(increment.rank)
        product = from_bytes(increment.data, own, "update", source="the server")
        product.require_finite(source="the server")
        products.append((increment.digest, product))
    return products


def _require_own_federation(clinic: Clinic, job: Job) -> None:
    """Check that the job is of the federation that the clinic joined.

    Raises:
        ConfigError: it is of another one.
    """
    if job.federation != clinic.federation:
        raise ConfigError(
            f"the server runs federation {job.federation!r} and this clinic joined "
            f"{clinic.federation!r}; join again with an invitation of the right one"
        )


def _require_within(rule: type[PolicyRefused], limit: str, asked: int, allowed: int) -> None:
    if asked > allowed:
        raise rule(
            f"the server asks for {asked} where limits.{limit} = {allowed} in client.toml; "
            "raise the limit if you agree, or ask the central site for less"
        )
