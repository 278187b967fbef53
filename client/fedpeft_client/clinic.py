"""A clinic as the client app sees it: its name, files and limits.

Built from ``client.toml`` on a box, and from a ``[[clinic]]`` table in a simulation.
"""

from dataclasses import dataclass, field
from pathlib import Path

from fedpeft.config import ComputeDtype
from fedpeft.sealing import Identity, PublicIdentity
from fedpeft_client.settings import (
    BudgetSettings,
    ClientSettings,
    ConfidentialitySettings,
    DataSettings,
    LimitSettings,
)

CONFIG_FILE = "client.toml"


@dataclass(frozen=True, slots=True)
class Membership:
    """A clinic's identity in its federation, and the server's that was pinned at enrolment.

    ``peers`` is where the identities of other clinics are kept; None: in memory.
    """

    identity: Identity
    server: PublicIdentity
    peers: Path | None = None


@dataclass(frozen=True, slots=True)
class Clinic:
    """One clinic; ``adapter_directory`` is where received adapters are kept.

    ``personal_directory`` is for what it trains and never sends; None: kept in memory.
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
    aggregation: ConfidentialitySettings = field(default_factory=ConfidentialitySettings)
    privacy: BudgetSettings = field(default_factory=BudgetSettings)
    adapter_directory: Path | None = None
    personal_directory: Path | None = None
    test_seed: int | None = None


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
        aggregation=settings.aggregation,
        privacy=settings.privacy,
        ledger=(directory / settings.privacy.ledger).resolve(),
        adapter_directory=directory / "adapter",
        personal_directory=directory / "personal",
    )
