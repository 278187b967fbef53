"""A round of training under the protection that its job asks for.

The one place where a mechanism of differential privacy meets a clinic's rows. What it
returns is all that may leave the box.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from fedpeft.adapters import AdapterSchema, AdapterState
from fedpeft.config import PrivacySettings
from fedpeft.data import EncodedExample
from fedpeft.errors import AdapterError, StorageError
from fedpeft.models import AdaptedModel
from fedpeft.privacy.clipping import clipped
from fedpeft.privacy.noise import GaussianNoise
from fedpeft.privacy.sampling import PoissonSampler, SecretDraws
from fedpeft.privacy.skellam import SkellamNoise, grid_for, sensitivities
from fedpeft.protocol import Job
from fedpeft.protocol.privacy import ClinicPrivacy
from fedpeft.protocol.sums import wrapped
from fedpeft.training import Checkpoints, Observer, Place, train
from fedpeft.training.checkpoint import begin
from fedpeft.training.private import PrivateRound, PrivateSum, private_sum
from fedpeft_client.rounds.clinic import Clinic
from fedpeft_client.rounds.protection import Protection

_ANSWER_SCHEMA: Final = 1
_UPDATE: Final = "update"
_LENGTH_BYTES: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a round of training may leave behind.

    ``update`` is the change of the factors that the job has sent; under distributed noise
    the noisy sum of their gradients, in units of the grid. ``rows`` are the training rows,
    ``nll`` their loss (nats) over ``tokens`` target tokens, both 0 where noise would have
    to protect them. ``within_clip`` says whether clinic-level privacy left the update uncut,
    and ``again`` that this is what the round was answered with before, and paid for then.
    """

    update: AdapterState
    rows: int
    nll: float = 0.0
    tokens: int = 0
    within_clip: bool = False
    privacy: ClinicPrivacy | None = None
    again: bool = field(default=False, compare=False)

    def to_bytes(self) -> bytes:
        """Return it to be kept on this box, as docs/spec/checkpoint.md says."""
        said = {
            "schema": _ANSWER_SCHEMA,
            "adapter": self.update.schema.hash,
            "rows": self.rows,
            "nll": self.nll,
            "tokens": self.tokens,
            "within_clip": self.within_clip,
            "privacy": self.privacy and self.privacy.model_dump(),
        }
        text = json.dumps(said, sort_keys=True).encode()
        values = save({_UPDATE: self.update.values.contiguous()})
        return len(text).to_bytes(_LENGTH_BYTES) + text + values

    @classmethod
    def from_bytes(cls, data: bytes, schema: AdapterSchema) -> "Trained":
        """Read what :meth:`to_bytes` wrote of an update under ``schema``.

        Raises:
            StorageError: it is of another version or schema, or nothing of the kind.
        """
        try:
            length = int.from_bytes(data[:_LENGTH_BYTES])
            said = json.loads(data[_LENGTH_BYTES : _LENGTH_BYTES + length])
            if (said.pop("schema"), said.pop("adapter")) != (_ANSWER_SCHEMA, schema.hash):
                raise StorageError("the kept answer is of another format or adapter")
            values = load(data[_LENGTH_BYTES + length :])[_UPDATE]
            privacy = said.pop("privacy")
            return cls(
                update=AdapterState(schema, values),
                privacy=privacy and ClinicPrivacy.model_validate(privacy),
                **said,
            )
        except (AdapterError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise StorageError(f"the kept answer cannot be read ({type(error).__name__})") from None


_Draws = TypeVar("_Draws", bound=SecretDraws)


class Learner:
    """Trains for one clinic in one round; ``tell`` hears what its people should know."""

    def __init__(
        self,
        clinic: Clinic,
        job: Job,
        protection: Protection,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self._clinic = clinic
        self._job = job
        self._protection = protection
        self._tell = tell

    def learn(
        self,
        model: AdaptedModel,
        start: AdapterState,
        examples: Sequence[EncodedExample],
        observe: Observer | None,
        checkpoints: Checkpoints | None = None,
    ) -> Trained:
        """Train the adapter in ``model``, which holds ``start``, and return what may leave.

        ``model`` is focused on the factors that the job has trained. With ``checkpoints``
        it goes on where the round was stopped.

        Raises:
            FedpeftError: see ``fedpeft.training.train``, and ``Protection.charge``.
        """
        privacy = self._job.privacy
        if privacy is None:
            self._charge_round(checkpoints)
            return self._train(model, start, examples, observe, None, checkpoints)
        if privacy.mechanism == "central":
            self._charge_round(checkpoints)
            trained = self._train(model, start, examples, observe, None, checkpoints)
            return _cut(trained, privacy.clip)
        if privacy.mechanism == "distributed":
            return self._sum(model, examples, privacy, checkpoints)
        return self._train(model, start, examples, observe, privacy, checkpoints)

    def _train(
        self,
        model: AdaptedModel,
        start: AdapterState,
        examples: Sequence[EncodedExample],
        observe: Observer | None,
        noisy: PrivacySettings | None,
        checkpoints: Checkpoints | None,
    ) -> Trained:
        job = self._job
        place = Place(self._clinic.name, job.round, job.rounds)
        private = noisy and self._private_round(noisy)
        result = train(model, examples, job.training, place, observe, private, checkpoints)
        self._mention(result.unusable_units)
        shown = job.privacy is None or job.privacy.exact_losses
        return Trained(
            update=_sent(model.read(), job, model).minus(_sent(start, job, model)),
            rows=len(examples),
            nll=result.loss * result.target_tokens if shown else 0.0,
            tokens=result.target_tokens if shown else 0,
            privacy=noisy and self._report(noisy),
        )

    def _charge_round(self, checkpoints: Checkpoints | None) -> None:
        """Charge the round as one step, after the attempt that it is charged for is kept."""
        if checkpoints is not None:
            begin(checkpoints, {})
        self._protection.charge(1)

    def _private_round(self, privacy: PrivacySettings) -> PrivateRound:
        return PrivateRound(
            unit=_person(privacy),
            clip=privacy.clip,
            records_per_patient=privacy.records_per_patient,
            charge=self._protection.charge,
            sampler=self._draws(PoissonSampler),
            noise_multiplier=self._protection.cost.noise_multiplier,
            noise=self._draws(GaussianNoise),
        )

    def _sum(
        self,
        model: AdaptedModel,
        examples: Sequence[EncodedExample],
        privacy: PrivacySettings,
        checkpoints: Checkpoints | None,
    ) -> Trained:
        """Return the noisy sum of one step's clipped gradients, in whole units of the grid."""
        coordinates = model.trained.numel
        grid = grid_for(privacy.clip, coordinates)
        l2, _ = sensitivities(privacy.clip, coordinates, grid)
        total = self._protection.cost.noise_multiplier * l2
        variance = total**2 / (privacy.honest_clinics or 1)
        sampler, noise = self._draws(PoissonSampler), self._draws(SkellamNoise)
        if checkpoints is not None:
            begin(checkpoints, {"sampler": sampler, "noise": noise})
        private = PrivateSum(
            unit=_person(privacy),
            clip=privacy.clip,
            records_per_patient=privacy.records_per_patient,
            charge=self._protection.charge,
            sampler=sampler,
            grid=grid,
            share=lambda: noise.draw(coordinates, variance),
        )
        found, read = private_sum(model, examples, self._job.training, private)
        self._mention(read.unusable)
        # Within the range of the wrapped numbers float32 is exact.
        values = torch.from_numpy(wrapped(found)).float()
        return Trained(
            update=AdapterState(model.trained, values),
            rows=len(examples),
            privacy=self._report(privacy),
        )

    def _mention(self, unusable: int) -> None:
        """Say, on this box alone, that some units taught nothing."""
        if unusable and self._tell is not None:
            self._tell(
                f"{self._clinic.name}: {unusable} gradients of single units were not finite and "
                "counted as zero; a lower training.learning_rate may help"
            )

    def _report(self, privacy: PrivacySettings) -> ClinicPrivacy:
        return self._protection.report(privacy, self._clinic.privacy.colluding_clinics)

    def _draws(self, kind: type[_Draws]) -> _Draws:
        """Return a new stream of randomness: secret, unless a simulation gave a seed."""
        return kind.made(self._clinic.test_seed, self._clinic.name, self._job.round)


def _sent(state: AdapterState, job: Job, model: AdaptedModel) -> AdapterState:
    """Return what of ``state`` is to be sent: some factors, at the rank that was trained."""
    return state.part(job.sends, model.settings.rank)


def _person(privacy: PrivacySettings) -> Literal["record", "patient"]:
    return "patient" if privacy.unit == "patient" else "record"


def _cut(trained: Trained, clip: float) -> Trained:
    """Return ``trained`` with its update cut to the norm ``clip``."""
    values = trained.update.values
    norm = float(torch.linalg.vector_norm(values.double()))
    cut = clipped(values, clip)
    if cut is None:
        return trained  # not finite, which the caller refuses
    update = AdapterState(trained.update.schema, cut.to(values.dtype))
    return replace(trained, update=update, within_clip=norm <= clip)
