"""A round of training under the protection that its job asks for.

The one place where a mechanism of differential privacy meets a clinic's rows. What it
returns is all that may leave the box.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch

from fedpeft.adapters import AdapterState
from fedpeft.config import PrivacySettings
from fedpeft.data import EncodedExample
from fedpeft.models import AdaptedModel
from fedpeft.privacy.clipping import clipped
from fedpeft.privacy.noise import GaussianNoise
from fedpeft.privacy.sampling import PoissonSampler, SecretDraws
from fedpeft.privacy.skellam import SkellamNoise, grid_for, sensitivities
from fedpeft.protocol import Job
from fedpeft.protocol.privacy import ClinicPrivacy
from fedpeft.protocol.sums import wrapped
from fedpeft.training import Observer, Place, train
from fedpeft.training.private import PrivateRound, PrivateSum, private_sum
from fedpeft_client.clinic import Clinic
from fedpeft_client.protection import Protection


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a round of training may leave behind.

    ``update`` is the change of the factors that the job has sent; under distributed noise
    the noisy sum of their gradients, in units of the grid. ``rows`` are the training rows,
    ``nll`` their loss (nats) over ``tokens`` target tokens, both 0 where noise would have
    to protect them. ``within_clip`` says whether clinic-level privacy left the update uncut.
    """

    update: AdapterState
    rows: int
    nll: float = 0.0
    tokens: int = 0
    within_clip: bool = False
    privacy: ClinicPrivacy | None = None


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
    ) -> Trained:
        """Train the adapter in ``model``, which holds ``start``, and return what may leave.

        ``model`` is focused on the factors that the job has trained.

        Raises:
            FedpeftError: see ``fedpeft.training.train``, and ``Protection.charge``.
        """
        privacy = self._job.privacy
        if privacy is None:
            self._protection.charge(1)
            return self._train(model, start, examples, observe, None)
        if privacy.mechanism == "central":
            self._protection.charge(1)
            trained = self._train(model, start, examples, observe, None)
            return _cut(trained, privacy.clip)
        if privacy.mechanism == "distributed":
            return self._sum(model, examples, privacy)
        return self._train(model, start, examples, observe, privacy)

    def _train(
        self,
        model: AdaptedModel,
        start: AdapterState,
        examples: Sequence[EncodedExample],
        observe: Observer | None,
        noisy: PrivacySettings | None,
    ) -> Trained:
        job = self._job
        place = Place(self._clinic.name, job.round, job.rounds)
        private = noisy and self._private_round(noisy)
        result = train(model, examples, job.training, place, observe, private)
        self._mention(result.unusable_units)
        shown = job.privacy is None or job.privacy.exact_losses
        return Trained(
            update=_sent(model.read(), job, model).minus(_sent(start, job, model)),
            rows=len(examples),
            nll=result.loss * result.target_tokens if shown else 0.0,
            tokens=result.target_tokens if shown else 0,
            privacy=noisy and self._report(noisy),
        )

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
    ) -> Trained:
        """Return the noisy sum of one step's clipped gradients, in whole units of the grid."""
        coordinates = model.trained.numel
        grid = grid_for(privacy.clip, coordinates)
        l2, _ = sensitivities(privacy.clip, coordinates, grid)
        total = self._protection.cost.noise_multiplier * l2
        variance = total**2 / (privacy.honest_clinics or 1)
        noise = self._draws(SkellamNoise)
        private = PrivateSum(
            unit=_person(privacy),
            clip=privacy.clip,
            records_per_patient=privacy.records_per_patient,
            charge=self._protection.charge,
            sampler=self._draws(PoissonSampler),
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
