"""What a clinic computes when it is asked: train on its records, or measure an adapter on them.

Plain values in and out; who asked, and how the answer is kept confidential, is
not known here.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedpeft.adapters import (
    AdapterSchema,
    AdapterState,
    Factors,
    at_rank,
    combined,
    from_bytes,
    save_adapter,
)
from fedpeft.errors import ConfigError, PolicyRefused, WrongContext
from fedpeft.evaluation import Score, score
from fedpeft.models import (
    AdaptedModel,
    Workbench,
    adapter_schema,
    fingerprint,
    require_fingerprint,
)
from fedpeft.protocol import Job
from fedpeft.protocol.parcel import Held
from fedpeft.training import Observer
from fedpeft_client.clinic import Clinic
from fedpeft_client.cost import require_losses_allowed, require_noise_fits, steps_of
from fedpeft_client.learning import Learner, Trained
from fedpeft_client.personal import PersonalStore
from fedpeft_client.protection import Protector
from fedpeft_client.records import RecordStore
from fedpeft_client.settings import LimitSettings


@dataclass(frozen=True, slots=True)
class Assignment:
    """A job with what the server sent; ``schema`` is the adapter's hash that it signed for it."""

    job: Job
    held: Held
    schema: str
    run: int


@dataclass(frozen=True, slots=True)
class Measured:
    """Validation loss (nats) over target tokens, and how many rows this clinic trains on.

    Both are 0 under a job with noise that does not ask for exact losses.
    """

    nll: float
    tokens: int
    rows: int


@dataclass(frozen=True, slots=True, eq=False)
class _Ready:
    """A model that holds ``adapter``; ``products`` were added to its base, by their digests."""

    model: AdaptedModel
    adapter: AdapterState
    products: list[tuple[str, AdapterState]]


class ClinicWork:
    """The two things a clinic can be asked, with the base model kept loaded between them.

    ``observe`` is told of training steps, ``tell`` in a sentence what was read from
    which file and how much was cut.
    """

    def __init__(
        self, observe: Observer | None = None, tell: Callable[[str], None] | None = None
    ) -> None:
        self._observe = observe
        self._tell = tell
        self._workbench = Workbench()
        self._records = RecordStore(tell)
        self._protector = Protector(tell)
        self._personal: dict[str, PersonalStore] = {}

    def train(self, clinic: Clinic, assignment: Assignment) -> Trained:
        """Train from the assignment's adapter and return the change to what is to be sent.

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
        _require_within("max_rank", own, clinic.limits.max_rank)
        nested = job.ranks is not None and job.ranks.rule == "nested"
        rest = job.adapter.rank - own if nested else 0
        ready = self._prepare(clinic, assignment, own, rest, until=job.round - 1)
        model = ready.model
        model.focus(job.trains)
        rows = self._records.train(clinic, model.base, job.training.max_length)
        _require_within("max_steps", steps_of(job, rows.examples), clinic.limits.max_steps)
        sent = model.trained.part(job.sends)
        protection = self._protector.open(clinic, job, assignment.run, rows, sent.numel)
        learner = Learner(clinic, job, protection, self._tell)
        trained = learner.learn(model, ready.adapter, rows.examples, self._observe)
        trained.update.require_finite(source=f"clinic {clinic.name}")
        if kept := _kept_factors(job):
            self._keep(clinic, assignment, model.read().part(kept, own))
        return trained

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
        valid = Score()
        if job.privacy is None or job.privacy.exact_losses:
            valid = score(model, self._records.valid(clinic, model.base, length))
        rows = self._records.train(clinic, model.base, length)
        if clinic.adapter_directory is not None and job.round > 0:
            _require_disk(clinic.limits, clinic.adapter_directory.parent)
            # For the base model as its files are, which is the one that others load.
            whole = combined(ready.adapter, [product for _, product in ready.products])
            settings = at_rank(job.adapter, whole.schema.rank)
            base_name = str(clinic.model.resolve())
            save_adapter(whole, settings, clinic.adapter_directory, base_name=base_name)
        return Measured(valid.nll, valid.tokens, len(rows.examples))

    def _prepare(
        self, clinic: Clinic, assignment: Assignment, rank: int, rest_rank: int, *, until: int
    ) -> _Ready:
        """Check the job against the clinic's limits and model, then load the adapter.

        The model gets its first ``rank + rest_rank`` columns, with the clinic's own factors
        as they were after round ``until``.
        """
        job = assignment.job
        _require_allowed(clinic, job)
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


def _require_allowed(clinic: Clinic, job: Job) -> None:
    """Check what the server asks for against the clinic's own limits.

    Raises:
        ConfigError: the job is of another federation.
    """
    if job.federation != clinic.federation:
        raise ConfigError(
            f"the server runs federation {job.federation!r} and this clinic joined "
            f"{clinic.federation!r}; join again with an invitation of the right one"
        )


def _require_disk(limits: LimitSettings, directory: Path) -> None:
    free = shutil.disk_usage(directory).free >> 20
    if free < limits.min_free_disk_mb:
        raise PolicyRefused(
            f"{free} MiB are free in {directory} where limits.min_free_disk_mb = "
            f"{limits.min_free_disk_mb} in client.toml; free some space or lower that limit"
        )


def _require_within(limit: str, asked: int, allowed: int) -> None:
    if asked > allowed:
        raise PolicyRefused(
            f"the server asks for {asked} where limits.{limit} = {allowed} in client.toml; "
            "raise the limit if you agree, or ask the central site for less"
        )
