"""The clinics of a simulation, from the ``[[clinic]]`` tables of a federation."""

from collections.abc import Sequence
from pathlib import Path

from fedpeft.config import FederationSettings
from fedpeft.errors import ConfigError
from fedpeft.sealing import Identity, PublicIdentity
from fedpeft_client.rounds.clinic import Clinic, Membership
from fedpeft_client.settings import (
    BudgetSettings,
    ConfidentialitySettings,
    DataSettings,
    LimitSettings,
)
from fedpeft_strategies import STRATEGIES


def simulated_clinics(
    settings: FederationSettings,
    model: Path,
    server: PublicIdentity,
    *,
    relative_to: Path,
    ledgers: Path,
    personal: Path,
) -> Sequence[Clinic]:
    """Return the clinics in the order of the file; data paths count from ``relative_to``,
    and privacy ledgers and personal factors of this run alone lie in ``ledgers`` and
    ``personal``.

    Each gets an identity of its own, and demands of the server ``server`` what the
    federation offers: one file speaks for both sides.

    Raises:
        ConfigError: there are fewer clinics than ``rounds.minimum_clinics``.
    """
    minimum = settings.rounds.minimum_clinics
    if len(settings.clinic) < minimum:
        raise ConfigError(
            f"the federation has {len(settings.clinic)} [[clinic]] entries where "
            f"rounds.minimum_clinics = {minimum}; add clinics or lower the minimum"
        )
    demands = ConfidentialitySettings(
        require_secagg=settings.aggregation.confidentiality == "secagg",
        adversary=settings.aggregation.adversary,
    )
    privacy = settings.privacy
    allowed = BudgetSettings(
        trust_central_noise=True,
        exact_losses=privacy is not None and privacy.exact_losses,
    )
    ledgers.mkdir(parents=True, exist_ok=True)
    is_personal = STRATEGIES[settings.strategy.name].declaration.personal
    return [
        Clinic(
            name=entry.name,
            federation=settings.name,
            membership=Membership(Identity.generate(), server),
            model=model,
            data=DataSettings(
                train=relative_to / entry.train,
                valid=entry.valid and relative_to / entry.valid,
                format=entry.format,
                skip_bad_rows=entry.skip_bad_rows,
            ),
            dtype=settings.model.dtype,
            limits=LimitSettings(
                max_rank=entry.max_rank or settings.adapter.rank, min_free_disk_mb=0
            ),
            aggregation=demands,
            ledger=ledgers / f"{entry.name}.sqlite",
            adapter_directory=personal / entry.name / "adapter" if is_personal else None,
            personal_directory=personal / entry.name,
            privacy=allowed,
            test_seed=privacy and privacy.test_seed,
        )
        for entry in settings.clinic
    ]
