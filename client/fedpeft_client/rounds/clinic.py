"""A clinic as the client app sees it: its name, files and limits.

Built from ``client.toml`` on a box, and from a ``[[clinic]]`` table in a simulation.
"""

from dataclasses import dataclass, field
from pathlib import Path

from fedpeft.config import ComputeDtype
from fedpeft.sealing import Identity, PublicIdentity
from fedpeft_client.settings import (
    AcceptanceSettings,
    BudgetSettings,
    CheckpointSettings,
    ClientSettings,
    ConfidentialitySettings,
    DataSettings,
    LimitSettings,
    PolicySettings,
    StoreSettings,
)


@dataclass(frozen=True, slots=True)
class Membership:
    """A clinic's identity in its federation, and the server's that was pinned at enrolment.

    ``peers`` is where the identities of other clinics are kept; None: in memory. While the
    identity is renewed, ``others`` are those that messages may be sealed for as well: the one
    that is to come, or the one that was there before.
    """

    identity: Identity
    server: PublicIdentity
    peers: Path | None = None
    others: tuple[Identity, ...] = ()


@dataclass(frozen=True, slots=True)
class Clinic:
    """One clinic; a box judges received adapters and keeps them in ``store_directory``.

    ``adapter_directory`` is where a simulation writes the last one, whatever it is like.
    ``personal_directory`` is for what it trains and never sends; None: kept in memory.
    ``checkpoint_directory`` is for rounds that were stopped; None: they begin anew.
    ``sums_directory`` is for what a secure sum must not forget; None: kept in memory.
    ``ledger`` is the file in which every use of the records is charged. ``test_seed``
    makes samples and noise of a simulation repeat; a box never has one.
    """

    name: str
    federation: str
    membership: Membership
    model: Path
    data: DataSettings
    ledger: Path
    dtype: ComputeDtype = "auto"
    limits: LimitSettings = field(default_factory=LimitSettings)
    policy: PolicySettings = field(default_factory=PolicySettings)
    aggregation: ConfidentialitySettings = field(default_factory=ConfidentialitySettings)
    privacy: BudgetSettings = field(default_factory=BudgetSettings)
    acceptance: AcceptanceSettings = field(default_factory=AcceptanceSettings)
    adapters: StoreSettings = field(default_factory=StoreSettings)
    store_directory: Path | None = None
    adapter_directory: Path | None = None
    personal_directory: Path | None = None
    checkpoint_directory: Path | None = None
    checkpoints: CheckpointSettings = field(default_factory=CheckpointSettings)
    sums_directory: Path | None = None
    test_seed: int | None = None


def allowed_bases(settings: ClientSettings) -> tuple[str, ...] | None:
    """Return the fingerprints of the base models that a box may train on; None: any."""
    own = settings.model.fingerprint
    return settings.policy.base_models or (None if own is None else (own,))


def clinic_of(settings: ClientSettings, directory: Path, membership: Membership) -> Clinic:
    """Return the clinic of a box whose files lie in ``directory``."""
    data = settings.data.model_copy(
        update={
            "train": directory / settings.data.train,
            "valid": settings.data.valid and directory / settings.data.valid,
        }
    )
    return Clinic(
        name=settings.clinic,
        federation=settings.server.federation,
        membership=membership,
        model=directory / settings.model.directory,
        data=data,
        dtype=settings.model.dtype,
        limits=settings.limits,
        policy=settings.policy.model_copy(update={"base_models": allowed_bases(settings)}),
        aggregation=settings.aggregation,
        privacy=settings.privacy,
        ledger=(directory / settings.privacy.ledger).resolve(),
        acceptance=settings.acceptance,
        adapters=settings.adapters,
        store_directory=directory / "adapters",
        personal_directory=directory / "personal",
        checkpoint_directory=directory / "checkpoints",
        checkpoints=settings.checkpoints,
        sums_directory=directory / "sums",
    )
