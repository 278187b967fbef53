"""Steps with differential privacy: DP-SGD (Abadi et al. 2016, arXiv:1607.00133).

A unit of privacy is a record, or all records of a patient. A step takes a Poisson
sample of the units, sums each unit's gradient over its records *before* it is cut to
the clip, and lets nothing out but the sum with noise. Batch order, length buckets and
``training.clip_norm`` belong to steps without privacy and have no effect here.

The number of units is taken as public, as usual: rate and number of steps follow from it.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from fedpeft.config import TrainingSettings
from fedpeft.data import EncodedExample
from fedpeft.errors import DataError
from fedpeft.models import AdaptedModel
from fedpeft.privacy.clipping import clipped
from fedpeft.privacy.per_unit import UnitGradients
from fedpeft.privacy.sampling import PoissonSampler, SecretDraws
from fedpeft.privacy.skellam import round_to_grid
from fedpeft.training.batches import round_steps
from fedpeft.training.collate import collate
from fedpeft.training.separable import require_separable
from fedpeft.training.steps import StepLoss, add_proximal_term, seeded_dropout, sequence_losses

Item = TypeVar("Item")


class Noise(Protocol):
    """What hides the sum; :class:`fedpeft.privacy.noise.GaussianNoise` outside of tests."""

    def add_to(self, total: torch.Tensor, scale: float) -> None:
        """Add noise of standard deviation ``scale`` to every coordinate, in place."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateAccess:
    """How steps may touch the records.

    ``clip`` bounds the L2 norm of one unit's gradient. Of a patient's records, a step
    uses at most ``records_per_patient``, drawn anew each time. ``charge`` is called
    with the step's number, from 1, before the step samples or reads anything; if it
    raises, the step does not take place.
    """

    unit: Literal["record", "patient"]
    clip: float
    records_per_patient: int
    charge: Callable[[int], None]
    sampler: PoissonSampler


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateRound(PrivateAccess):
    """A round of noisy steps; the noise's standard deviation is ``noise_multiplier * clip``."""

    noise_multiplier: float
    noise: Noise


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateSum(PrivateAccess):
    """One step in whole numbers, of which this clinic adds only a share of the noise.

    ``grid`` is a power of two in the gradient's unit; ``share`` returns the noise, int64,
    (trained.numel,), in units of the grid.
    """

    grid: float
    share: Callable[[], NDArray[np.int64]]


def units_of(
    examples: Sequence[EncodedExample], unit: Literal["record", "patient"]
) -> list[list[int]]:
    """Return the indices of the examples of each unit, units in order of first appearance.

    Raises:
        DataError: patients are asked for and an example names none; gives its row.
    """
    if unit == "record":
        return [[index] for index in range(len(examples))]
    by_patient: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        if example.patient_id is None:
            raise DataError(
                f"row {example.row} names no patient, and without one its patient cannot be "
                'protected as a whole; add the patient to every record, or agree on unit = "record"'
            )
        by_patient.setdefault(example.patient_id, []).append(index)
    return list(by_patient.values())


def private_steps(units: int, settings: TrainingSettings) -> tuple[int, float]:
    """Return the steps of a private round over ``units`` units, and their sampling rate.

    ``training.batch_size`` is the expected number of units in a step's sample.
    """
    return round_steps(units, settings), min(1.0, settings.batch_size / units)


class PrivateSteps:
    """The noisy steps of a round; ``start`` holds the weights at its beginning.

    Formal guarantee: of the records, the adapter after the round depends only on the
    noisy sums of its steps. A step's sum changes by at most ``clip`` when a unit is
    added or removed, whatever the unit holds, so the step is the Gaussian mechanism
    with ``noise_multiplier`` on a Poisson sample; ``charge`` has then been called. What
    is done with the sum, the division by the *expected* batch included, depends on no
    record. Dropout is drawn from a secret seed: under a known one, a row more would
    deterministically change the others' gradients by more than the clip. Losses and
    counts that are returned are not protected.

    Raises:
        NotSeparable: a unit's gradient cannot be told apart from the others'.
        DataError: patients are to be protected and a record names none.
    """

    def __init__(
        self,
        model: AdaptedModel,
        examples: Sequence[EncodedExample],
        settings: TrainingSettings,
        private: PrivateRound,
        start: torch.Tensor,
    ) -> None:
        self._model, self._private, self._start = model, private, start
        self._proximal_mu = settings.proximal_mu
        self._units = _SampledUnits(model, examples, settings, private)
        self._total = torch.zeros(model.trained.numel, dtype=torch.float64, device=model.device)
        self.dropout_seed = _secret_seed(private.sampler)

    @property
    def count(self) -> int:
        """Steps of the round; samples that come out empty are steps too."""
        return self._units.steps

    def compute(self, step: int) -> StepLoss:
        """Leave the noisy gradient of ``step`` in ``model.gradient``, per expected unit."""
        # In float64, so that a unit's effect on the sum is its clipped gradient and no
        # rounding of the others'.
        self._total.zero_()
        read = self._units.visit(step, self._total.add_)
        self._private.noise.add_to(self._total, self._private.noise_multiplier * self._private.clip)
        self._model.gradient.copy_(self._total.div_(self._units.expected))
        add_proximal_term(self._model, self._start, self._proximal_mu)
        return read

    def renew(self) -> dict[str, bytes]:
        """Draw samples and noise from new keys from now on, and return these; **secret**."""
        return {name: draws.renew() for name, draws in self._draws().items()}

    def go_on(self, keys: Mapping[str, bytes]) -> None:
        """Draw the samples and the noise that followed when :meth:`renew` returned ``keys``."""
        for name, draws in self._draws().items():
            draws.go_on(keys[name])

    def _draws(self) -> dict[str, SecretDraws]:
        named = {"sampler": self._private.sampler, "noise": self._private.noise}
        return {name: each for name, each in named.items() if isinstance(each, SecretDraws)}


def private_sum(
    model: AdaptedModel,
    examples: Sequence[EncodedExample],
    settings: TrainingSettings,
    private: PrivateSum,
) -> tuple[NDArray[np.int64], StepLoss]:
    """Return one step's sum over the sampled units, int64, (trained.numel,), with its noise.

    In units of ``grid``, and not divided by anything: sums of clinics add up exactly.
    The adapter is not changed. The StepLoss must stay on this machine.

    Formal guarantee: before the noise, a unit that is added or removed changes the
    result by its clipped gradient, rounded coordinate by coordinate to the grid, and
    nothing else; :func:`fedpeft.privacy.skellam.sensitivities` bounds that.

    Raises:
        NotSeparable: a unit's gradient cannot be told apart from the others'.
        DataError: patients are to be protected and a record names none.
    """
    units = _SampledUnits(model, examples, settings, private)
    total = np.zeros(model.trained.numel, np.int64)

    def add(gradient: torch.Tensor) -> None:
        np.add(total, round_to_grid(gradient.cpu().numpy(), private.grid), out=total)

    model.train_mode(gradient_checkpointing=settings.gradient_checkpointing)
    with seeded_dropout(model, _secret_seed(private.sampler)):
        read = units.visit(1, add)
    return total + private.share(), read


class _SampledUnits:
    """The units of a clinic, and the clipped gradients of those that a step samples."""

    def __init__(
        self,
        model: AdaptedModel,
        examples: Sequence[EncodedExample],
        settings: TrainingSettings,
        access: PrivateAccess,
    ) -> None:
        require_separable(model)
        self._model, self._examples, self._access = model, examples, access
        self._units = units_of(examples, access.unit)
        self.steps, self._rate = private_steps(len(self._units), settings)
        self.expected = self._rate * len(self._units)
        self._at_once = settings.micro_batch_size or settings.batch_size
        self._gradients = UnitGradients(model, min(self._at_once, len(self._units)))

    def visit(self, step: int, add: Callable[[torch.Tensor], object]) -> StepLoss:
        """Charge for ``step``, sample, and call ``add`` with each unit's clipped gradient.

        That is float64, (trained.numel,), of norm at most the clip. A unit whose gradient
        is not finite is left out (see :func:`fedpeft.privacy.clipping.clipped`). As many
        units and as many rows are in memory as the micro-batch has rows; what is added
        does not depend on that.
        """
        self._access.charge(step)
        sampled = self._access.sampler.sample(len(self._units), self._rate)
        losses, rows_read, unusable = list[float](), list[EncodedExample](), 0
        for part in _evenly(sampled.tolist(), len(self._gradients.slots)):
            rows = [(slot, row) for slot, unit in enumerate(part) for row in self._rows(unit)]
            rows_read += [row for _, row in rows]
            losses += self._compute(rows)
            for slot in self._gradients.slots[: len(part)]:
                gradient = clipped(slot, self._access.clip)
                if gradient is None:
                    unusable += 1
                else:
                    add(gradient)
        usable = [loss for loss in losses if math.isfinite(loss)]
        return StepLoss(
            loss=sum(usable) / max(1, len(usable)),
            terms=len(usable),
            target_tokens=sum(int(row.targets[1:].sum()) for row in rows_read),
            tokens=sum(len(row) for row in rows_read),
            unusable=unusable,
        )

    def _rows(self, unit: int) -> list[EncodedExample]:
        rows, most = self._units[unit], self._access.records_per_patient
        return [self._examples[rows[at]] for at in self._access.sampler.choose(len(rows), most)]

    def _compute(self, rows: Sequence[tuple[int, EncodedExample]]) -> list[float]:
        """Fill the slots with their units' gradients, and return the losses of the rows."""
        self._gradients.slots.zero_()
        losses: list[float] = []
        for part in _evenly(rows, self._at_once):
            batch = collate([row for _, row in part], self._model.device)
            owners = [slot for slot, _ in part]
            with self._gradients.listening(owners, batch.input_ids.shape[1]):
                loss = sequence_losses(self._model, batch)
                loss.sum().backward()  # pyright: ignore[reportUnknownMemberType]
            losses += loss.detach().tolist()
        return losses


def _evenly(items: Sequence[Item], most: int) -> list[Sequence[Item]]:
    """Cut into the fewest parts of at most ``most`` items, none much smaller than the others.

    Poisson samples are often one or two units larger than expected.
    """
    parts = math.ceil(len(items) / most)
    bounds = [len(items) * part // max(1, parts) for part in range(parts + 1)]
    return [items[begin:end] for begin, end in itertools.pairwise(bounds)]


def _secret_seed(sampler: PoissonSampler) -> int:
    """Return a seed for torch's generators from the sampler's stream: 63 fair bits."""
    return sum(1 << int(bit) for bit in sampler.sample(63, 0.5))
