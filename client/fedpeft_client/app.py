"""The ClientApp: what a clinic does when the server asks it to train or to evaluate.

Installed on the box; never fetched from a server. Only the adapter's change and
a few sums leave through it, and of an error only its reason.
"""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedpeft.adapters import AdapterState, save_adapter
from fedpeft.errors import ConfigError, FedpeftError, PolicyRefused
from fedpeft.evaluation import score
from fedpeft.models import AdaptedModel, Workbench, fingerprint, require_fingerprint
from fedpeft.protocol import (
    ARRAYS,
    METRICS,
    NUM_EXAMPLES,
    TRAIN_NLL,
    TRAIN_TOKENS,
    VALID_NLL,
    VALID_TOKENS,
    Job,
    array_record,
    job_from,
    metric_record,
    state_from,
)
from fedpeft.training import Observer, Place, round_steps, train
from fedpeft_client.clinic import Clinic
from fedpeft_client.records import RecordStore
from fedpeft_client.settings import LimitSettings

_LOG = logging.getLogger(__name__)
_ERROR_CODE = 2


class ClinicWork:
    """Handlers for the server's messages, with the base model kept loaded between them.

    ``find_clinic`` says which clinic a Flower context belongs to: always the same
    one on a box, one of many in a simulation. ``observe`` is told of training
    steps, ``tell`` in a sentence what was read from which file and how much was cut.
    """

    def __init__(
        self,
        find_clinic: Callable[[Context], Clinic],
        observe: Observer | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self._find_clinic = find_clinic
        self._observe = observe
        self._workbench = Workbench()
        self._records = RecordStore(tell)

    def train(self, message: Message, context: Context) -> Message:
        """Train from the server's adapter and answer with the change to it."""
        return self._answered(message, context, self._train)

    def evaluate(self, message: Message, context: Context) -> Message:
        """Keep the server's adapter and answer with its validation loss here."""
        return self._answered(message, context, self._evaluate)

    def _answered(
        self,
        message: Message,
        context: Context,
        work: Callable[[Clinic, Job, RecordDict], RecordDict],
    ) -> Message:
        clinic = self._find_clinic(context)
        try:
            content = work(clinic, job_from(message.content), message.content)
        except FedpeftError as error:
            _LOG.error("%s: %s", clinic.name, error)
            return Message(Error(_ERROR_CODE, error.reason), reply_to=message)
        return Message(content, reply_to=message)

    def _train(self, clinic: Clinic, job: Job, content: RecordDict) -> RecordDict:
        if job.round < 1:
            raise ConfigError(
                "the server asks to train in round 0, which only evaluates; install the same "
                "fedpeft release on both sides"
            )
        model, start = self._prepare(clinic, job, content)
        rows = self._records.train(clinic, model.base, job.training.max_length)
        steps = round_steps(len(rows.examples), job.training)
        _require_within("max_steps", steps, clinic.limits.max_steps)
        place = Place(clinic.name, job.round, job.rounds)
        result = train(model, rows.examples, job.training, place, self._observe)
        update = model.read().minus(start)
        update.require_finite(source=f"clinic {clinic.name}")
        metrics = metric_record(
            {
                NUM_EXAMPLES: len(rows.examples),
                TRAIN_NLL: result.loss * result.target_tokens,
                TRAIN_TOKENS: result.target_tokens,
            }
        )
        return RecordDict({ARRAYS: array_record(update, "update"), METRICS: metrics})

    def _evaluate(self, clinic: Clinic, job: Job, content: RecordDict) -> RecordDict:
        model, state = self._prepare(clinic, job, content)
        valid = score(model, self._records.valid(clinic, model.base, job.training.max_length))
        if clinic.adapter_directory is not None and job.round > 0:
            _require_disk(clinic.limits, clinic.adapter_directory.parent)
            base_name = str(clinic.model.resolve())
            save_adapter(state, job.adapter, clinic.adapter_directory, base_name=base_name)
        metrics = metric_record({VALID_NLL: valid.nll, VALID_TOKENS: valid.tokens})
        return RecordDict({METRICS: metrics})

    def _prepare(
        self, clinic: Clinic, job: Job, content: RecordDict
    ) -> tuple[AdaptedModel, AdapterState]:
        """Check the job against the clinic's limits and model, then load the adapter."""
        _require_allowed(clinic, job)
        require_fingerprint(fingerprint(clinic.model), job.fingerprint, clinic.model)
        model = self._workbench.adapted(
            clinic.model, job.adapter, quantization=job.quantization, dtype=clinic.dtype
        )
        state = state_from(content, model.schema, "adapter", source="the server")
        state.require_finite(source="the server")
        model.load(state)
        return model, state


def build_client_app(work: ClinicWork) -> ClientApp:
    """Return Flower's app around the handlers of ``work``."""
    app = ClientApp()
    app.train()(work.train)
    app.evaluate()(work.evaluate)
    return app


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
