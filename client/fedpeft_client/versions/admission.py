"""What happens to an adapter when it arrives at a box: measured, judged, kept.

The one place where measurements, the clinic's rule and the store of versions meet. What
the server is told of it is decided elsewhere.
"""

from collections.abc import Callable

import torch

from fedpeft.adapters import AdapterState, load_adapter, load_settings_of
from fedpeft.config import AdapterSettings, Quantization
from fedpeft.errors import AdapterError, UnknownAdapter
from fedpeft.evaluation import Score
from fedpeft.models import AdaptedModel, Workbench
from fedpeft.protocol import Job
from fedpeft_client.inference.catalogue import BASE
from fedpeft_client.rounds.clinic import Clinic
from fedpeft_client.rounds.records import RecordStore
from fedpeft_client.versions.acceptance import Losses, judge
from fedpeft_client.versions.examination import Examination, Examiner
from fedpeft_client.versions.store import AdapterStore
from fedpeft_client.versions.version import Arrival, Version

_MEASURED = "measured.json"


class Admission:
    """Judges arriving adapters with the base model that ``workbench`` holds."""

    def __init__(
        self, workbench: Workbench, records: RecordStore, tell: Callable[[str], None] | None
    ) -> None:
        self._workbench = workbench
        self._records = records
        self._tell = tell
        self._examiner = Examiner()

    def admit(
        self,
        clinic: Clinic,
        store: AdapterStore,
        arrival: Arrival,
        model: AdaptedModel,
        valid: Score,
        job: Job,
    ) -> Version:
        """Judge ``arrival``, which ``model`` holds with the loss ``valid``, and keep it.

        It is measured in the number format and up to the length of ``job``.

        ``model`` must not be used afterwards: another adapter, or base model, is loaded.

        Raises:
            FedpeftError: the adapters cannot be measured, or not be written.
        """
        base = model.base
        own = self._records.valid(clinic, base, job.training.max_length)
        number, device = base.network.dtype, base.network.device.type
        way = f"{base.fingerprint} {job.quantization} {number} {device}"
        general = self._examiner.general(base)
        vocabulary = base.network.get_input_embeddings().get_parameter("weight").shape[0]
        exam = Examination(store.directory / _MEASURED, way, own, general)
        bench = _Bench(self._workbench, clinic, model.settings, job.quantization)
        # First the new one, as it is loaded already.
        new = exam.arrived(model, valid)
        bare = exam.losses(BASE, bench.base)
        rival, in_use = self._rival(store, exam, bench, bare)
        verdict = judge(
            clinic.acceptance,
            new=new,
            in_use=in_use,
            base=bare,
            rival=rival,
            vocabulary=vocabulary,
        )
        # What cannot be loaded is replaced like any other.
        verdict = verdict.model_copy(update={"rival": store.in_use_name()})
        version = store.keep(arrival, verdict)
        exam.remember(version.digest)
        self._say(clinic, version)
        return version

    def _rival(
        self, store: AdapterStore, exam: Examination, bench: "_Bench", bare: Losses
    ) -> tuple[str, Losses]:
        """Return what to compare with: the one in use, the base model if that cannot be loaded."""
        try:
            version = store.in_use()
            if version is None:
                return BASE, bare
            version.require_intact()
            return version.name, exam.losses(version.digest, lambda: bench.version(version))
        except (AdapterError, UnknownAdapter) as error:
            if self._tell is not None:
                self._tell(f"{error} (until then the base model is what new ones must match)")
            return BASE, bare

    def _say(self, clinic: Clinic, version: Version) -> None:
        verdict = version.verdict
        if self._tell is None:
            return
        if verdict.accepted:
            self._tell(f"{clinic.name}: the adapter {version.name} is in use: {verdict.reason}")
        else:
            self._tell(
                f"{clinic.name}: the adapter {version.name} was not taken into use, "
                f"{verdict.rival} stays: {verdict.reason}"
            )


class _Bench:
    """Loads the base model and stored versions as an arriving adapter was loaded."""

    def __init__(
        self,
        workbench: Workbench,
        clinic: Clinic,
        settings: AdapterSettings,
        quantization: Quantization,
    ) -> None:
        self._workbench = workbench
        self._clinic = clinic
        self._settings = settings
        self._quantization: Quantization = quantization

    def base(self) -> AdaptedModel:
        """Return the base model as its files are: with an adapter whose product is zero."""
        model = self._adapted(self._settings)
        model.load(AdapterState(model.schema, torch.zeros(model.schema.numel)))
        return model

    def version(self, version: Version) -> AdaptedModel:
        """Return the base model with a stored version.

        Raises:
            AdapterError: it cannot be read, or belongs to another base model.
        """
        model = self._adapted(load_settings_of(version.path))
        model.load(load_adapter(version.path, model.schema))
        return model

    def _adapted(self, settings: AdapterSettings) -> AdaptedModel:
        clinic = self._clinic
        return self._workbench.adapted(
            clinic.model, settings, quantization=self._quantization, dtype=clinic.dtype
        )
