"""What a round of a job would cost a clinic's data in privacy, before anything is done.

A pure function of the job, the clinic's settings and the number of units. It counts
only on noise that this clinic has reason to trust.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedpeft.config import PrivacySettings, PrivacyUnit
from fedpeft.data import EncodedExample
from fedpeft.errors import BudgetSpent, LossesNotAllowed, PrivacyError, UnitNotAllowed
from fedpeft.privacy.accounting import epsilon_of
from fedpeft.privacy.calibration import (
    calibrated,
    default_delta,
    remaining_multiplier,
    require_delta,
)
from fedpeft.privacy.charge import Charge
from fedpeft.privacy.skellam import grid_for, sensitivities
from fedpeft.protocol import Job
from fedpeft.training import round_steps
from fedpeft.training.private import private_steps, units_of
from fedpeft_client.rounds.clinic import Clinic


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """``steps`` times ``step`` for each ``unit``, at ``delta``.

    ``noise_multiplier`` is of the noise as it is meant, which may be more than
    ``step`` counts on.
    """

    unit: PrivacyUnit
    step: Charge
    steps: int
    delta: float
    noise_multiplier: float


def steps_of(job: Job, examples: Sequence[EncodedExample]) -> int:
    """Return how many optimiser steps a clinic with these rows makes in a round.

    Raises:
        DataError: the job protects patients and the records name none.
    """
    if job.privacy is None or job.privacy.unit == "clinic":
        return round_steps(len(examples), job.training)
    return round_steps(len(units_of(examples, job.privacy.unit)), job.training)


def cost_of(clinic: Clinic, job: Job, examples: Sequence[EncodedExample], coordinates: int) -> Cost:
    """Return what the next round of ``job`` costs; ``coordinates`` is the size of what is sent.

    Raises:
        UnitNotAllowed, LossesNotAllowed, BudgetSpent: the job asks for what this clinic does not
            allow.
        PrivacyError: no noise gives what the job promises.
        DataError: the job protects patients and the records name none.
    """
    privacy = job.privacy
    if privacy is None:
        delta = clinic.privacy.delta or default_delta(len(examples))
        step = Charge(noise="none")
        return Cost(unit="record", step=step, steps=1, delta=delta, noise_multiplier=0.0)
    require_losses_allowed(clinic, job)
    _require_unit(clinic, privacy)
    units = 1 if privacy.unit == "clinic" else len(units_of(examples, privacy.unit))
    delta = clinic.privacy.delta or privacy.delta or default_delta(units)
    require_delta(delta, units)
    steps, rate = private_steps(units, job.training)
    if privacy.mechanism == "central":
        cost = _central(clinic, privacy, delta)
    elif privacy.mechanism == "distributed":
        cost = _distributed(clinic, privacy, rate, delta, coordinates)
    else:
        cost = _local(clinic, job, privacy, steps, rate, delta)
    _require_promise(job, privacy, cost)
    return cost


def _require_unit(clinic: Clinic, privacy: PrivacySettings) -> None:
    if clinic.privacy.unit == "patient" and privacy.unit == "record":
        raise UnitNotAllowed(
            'the job protects single records, and privacy.unit = "patient" in client.toml demands '
            "all records of a patient: nothing was computed; ask the central site for "
            'unit = "patient"'
        )


def require_noise_fits(job: Job) -> None:
    """Check that the noise of ``job`` hides the part of the adapter that it asks for.

    Shared noise is for one sum over the coordinates that are trained, the same for all
    clinics; the server's own is for updates that all have the same coordinates.

    Raises:
        PrivacyError: it does not.
    """
    mechanism = job.privacy and job.privacy.mechanism
    if mechanism in ("distributed", "central") and job.ranks is not None:
        what = "clinics of different ranks"
    elif mechanism == "distributed" and job.sends != job.trains:
        what = "factors that stay on the box"
    else:
        return
    raise PrivacyError(
        f"the server asks for {mechanism} noise and for {what}, which that noise is not made for: "
        'nothing was trained; the central site must use mechanism = "local" or another strategy'
    )


def require_losses_allowed(clinic: Clinic, job: Job) -> None:
    """Check that ``job`` has no exact losses reported that this clinic wants protected.

    Raises:
        LossesNotAllowed: it asks for them beside noise, and the clinic does not allow it.
        BudgetSpent: it has no noise at all, and the clinic bounds its privacy loss.
    """
    own, privacy = clinic.privacy, job.privacy
    if own.exact_losses:
        return
    if privacy is not None and privacy.exact_losses:
        raise LossesNotAllowed(
            "the server asks for exact losses, which no noise protects, and privacy.exact_losses "
            "= false in client.toml forbids it: nothing was computed; set it to true if this "
            "clinic agrees, or ask the central site to leave them out"
        )
    if privacy is None and own.max_epsilon is not None:
        raise BudgetSpent(
            "the server's job has no noise, so that its losses would be exact, and this clinic's "
            f"max_epsilon is {own.max_epsilon:g}: nothing was computed; ask the central site for "
            "a job with a [privacy] table"
        )


def _local(
    clinic: Clinic, job: Job, privacy: PrivacySettings, steps: int, rate: float, delta: float
) -> Cost:
    multiplier = privacy.noise_multiplier
    if multiplier == "auto":
        multiplier = calibrated(privacy.epsilon or math.inf, delta, rate, steps * job.rounds)
    step = Charge(noise="gaussian", sampling_rate=rate, noise_multiplier=multiplier)
    return _cost(clinic, privacy.unit, step, steps, delta, multiplier)


def _distributed(
    clinic: Clinic, privacy: PrivacySettings, rate: float, delta: float, coordinates: int
) -> Cost:
    """Count on the noise of the honest clinics that do not work with the server."""
    honest, multiplier = privacy.honest_clinics, privacy.noise_multiplier
    if honest is None or multiplier == "auto":
        raise PrivacyError(
            "the server's job with distributed noise does not say how many clinics share it and "
            "how much it is; nothing was trained; install the same fedpeft release on both sides"
        )
    colluding = clinic.privacy.colluding_clinics
    l2, l1 = sensitivities(privacy.clip, coordinates, grid_for(privacy.clip, coordinates))
    step = Charge(
        noise="skellam",
        sampling_rate=rate,
        noise_multiplier=remaining_multiplier(multiplier, honest, colluding),
        l2=l2,
        l1=l1,
    )
    return _cost(clinic, privacy.unit, step, 1, delta, multiplier)


def _central(clinic: Clinic, privacy: PrivacySettings, delta: float) -> Cost:
    """Count on the server's noise only where the clinic's people said so."""
    multiplier = privacy.noise_multiplier
    if multiplier == "auto":
        raise PrivacyError(
            "the server's job with central noise does not say how much it is; nothing was "
            "trained; install the same fedpeft release on both sides"
        )
    trusted, bound = clinic.privacy.trust_central_noise, clinic.privacy.max_epsilon
    if not trusted and bound is not None:
        raise BudgetSpent(
            "the noise of this job is only promised by the server, and privacy.trust_central_noise "
            f"= false in client.toml counts it as none, so max_epsilon = {bound:g} cannot be kept: "
            "nothing was computed; ask the central site for noise of the clinics' own"
        )
    step = (
        Charge(noise="gaussian", noise_multiplier=multiplier) if trusted else Charge(noise="none")
    )
    return _cost(clinic, "clinic", step, 1, delta, multiplier)


def _cost(
    clinic: Clinic, unit: PrivacyUnit, step: Charge, steps: int, delta: float, multiplier: float
) -> Cost:
    if clinic.test_seed is not None:
        step = Charge(noise="none")  # known noise is none
    return Cost(unit=unit, step=step, steps=steps, delta=delta, noise_multiplier=multiplier)


def _require_promise(job: Job, privacy: PrivacySettings, cost: Cost) -> None:
    """Check that a run with the noise that the server names keeps the epsilon that it names."""
    if privacy.epsilon is None or cost.step.noise == "none":
        return
    found = epsilon_of({cost.step: cost.steps * job.rounds}, cost.delta).epsilon
    if found > privacy.epsilon:
        raise PrivacyError(
            f"the run would cost this clinic's data epsilon {found:.3f} where the server promises "
            f"{privacy.epsilon:g} (noise multiplier {cost.step.noise_multiplier:.3g} in "
            f"{cost.steps * job.rounds} steps): nothing was trained; the central site must raise "
            "privacy.noise_multiplier or lower the rounds"
        )
