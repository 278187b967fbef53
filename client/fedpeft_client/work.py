"""What a clinic computes when it is asked: train on its records, or measure an adapter on them.

Plain values in and out; who asked, and how the answer is kept confidential, is
not known here.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedpeft.adapters import AdapterState, from_bytes, save_adapter
from fedpeft.errors import ConfigError, PolicyRefused, WrongContext
from fedpeft.evaluation import Score, score
from fedpeft.models import AdaptedModel, Workbench, fingerprint, require_fingerprint
from fedpeft.protocol import Job
from fedpeft.training import Observer
from fedpeft_client.clinic import Clinic
from fedpeft_client.cost import require_losses_allowed, steps_of
from fedpeft_client.learning import Learner, Trained
from fedpeft_client.protection import Protector
from fedpeft_client.records import RecordStore
from fedpeft_client.settings import LimitSettings


@dataclass(frozen=True, slots=True)
class Assignment:
    """A job with the adapter's bytes; ``schema`` is the hash that the server signed for it."""

    job: Job
    adapter: bytes
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

    def train(self, clinic: Clinic, assignment: Assignment) -> Trained:
        """Train from the assignment's adapter and return the change to it.

        Raises:
            FedpeftError: of the kind that says what stands against it.
        """
        job = assignment.job
        if job.round < 1:
            raise ConfigError(
                "the server asks to train in round 0, which only evaluates; install the same "
                "fedpeft release on both sides"
            )
        model, start = self._prepare(clinic, assignment)
        rows = self._records.train(clinic, model.base, job.training.max_length)
        steps = steps_of(job, rows.examples)
        _require_within("max_steps", steps, clinic.limits.max_steps)
        protection = self._protector.open(clinic, job, assignment.run, rows, start.schema.numel)
        learner = Learner(clinic, job, protection, self._tell)
        trained = learner.learn(model, start, rows.examples, self._observe)
        trained.update.require_finite(source=f"clinic {clinic.name}")
        return trained

    def evaluate(self, clinic: Clinic, assignment: Assignment) -> Measured:
        """Keep the assignment's adapter and return its validation loss here.

        Raises:
            FedpeftError: of the kind that says what stands against it.
        """
        job = assignment.job
        require_losses_allowed(clinic, job)
        model, state = self._prepare(clinic, assignment)
        length = job.training.max_length
        valid = Score()
        if job.privacy is None or job.privacy.exact_losses:
            valid = score(model, self._records.valid(clinic, model.base, length))
        rows = self._records.train(clinic, model.base, length)
        if clinic.adapter_directory is not None and job.round > 0:
            _require_disk(clinic.limits, clinic.adapter_directory.parent)
            base_name = str(clinic.model.resolve())
            save_adapter(state, job.adapter, clinic.adapter_directory, base_name=base_name)
        return Measured(valid.nll, valid.tokens, len(rows.examples))

    def _prepare(self, clinic: Clinic, assignment: Assignment) -> tuple[AdaptedModel, AdapterState]:
        """Check the job against the clinic's limits and model, then load the adapter."""
        job = assignment.job
        _require_allowed(clinic, job)
        require_fingerprint(fingerprint(clinic.model), job.fingerprint, clinic.model)
        model = self._workbench.adapted(
            clinic.model, job.adapter, quantization=job.quantization, dtype=clinic.dtype
        )
        if assignment.schema != model.schema.hash:
            raise WrongContext(
                "the server's message was sealed for another adapter schema than its job gives "
                "here: it is not used; install the same fedpeft release on both sides"
            )
        state = from_bytes(assignment.adapter, model.schema, "adapter", source="the server")
        state.require_finite(source="the server")
        model.load(state)
        return model, state


def _require_allowed(clinic: Clinic, job: Job) -> None:
    """Check what the server asks for against the clinic's own limits.

    Raises:
        ConfigError: the job is of another federation.
        PolicyRefused: it asks for more than a limit allows; names the limit.
    """
    if job.federation != clinic.federation:
        raise ConfigError(
            f"the server runs federation {job.federation!r} and this clinic joined "
            f"{clinic.federation!r}; join again with an invitation of the right one"
        )
    _require_within("max_rank", job.adapter.rank, clinic.limits.max_rank)


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
