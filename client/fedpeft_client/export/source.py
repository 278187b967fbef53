"""What is exported: an adapter that was checked against the base model that it belongs to.

Knows no format, and loads no base model.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fedpeft.adapters import AdapterState, load_adapter, load_settings_of
from fedpeft.adapters.peft_directory import WEIGHTS_FILE
from fedpeft.config import AdapterSettings
from fedpeft.errors import AdapterError, StorageError
from fedpeft.models import adapter_schema
from fedpeft_client.versions.version import LINEAGE_FILE


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """An adapter, and where its base model lies.

    ``adapter`` is a stock PEFT directory; ``base`` a model directory or a ``.gguf`` file;
    ``digest`` the SHA-256 (hex) of the adapter's weights file; ``lineage`` the file that
    says what made it, as it is, None if it has none.
    """

    name: str
    adapter: Path
    base: Path
    settings: AdapterSettings
    state: AdapterState
    digest: str
    lineage: str | None

    @property
    def fingerprint(self) -> str:
        """The base model's."""
        return self.state.schema.fingerprint

    @property
    def scale(self) -> float:
        """What the product BA counts in the adapted weights: alpha/rank."""
        return self.settings.alpha / self.settings.rank


def open_source(adapter: Path, base: Path, *, name: str) -> Source:
    """Read the adapter in the stock PEFT directory ``adapter``.

    ``name`` is what the export's record calls it.

    Raises:
        AdapterError: it is damaged, or no plain LoRA adapter; or its lineage cannot be read.
        SchemaMismatch: it belongs to another base model.
        NotFinite: it holds NaN or infinity.
        ModelError: the base model cannot be used.
    """
    settings = load_settings_of(adapter)
    state = load_adapter(adapter, adapter_schema(base, settings))
    state.require_finite(source=str(adapter))
    return Source(
        name=name,
        adapter=adapter,
        base=base,
        settings=settings,
        state=state,
        digest=_sha256(adapter / WEIGHTS_FILE),
        lineage=_lineage(adapter / LINEAGE_FILE),
    )


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StorageError(
            f"{path} cannot be read: {error.strerror}; check its permissions"
        ) from None


def _lineage(path: Path) -> str | None:
    if not path.exists():
        return None
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterError(
            f"{path} cannot be read ({type(error).__name__}), and no adapter is exported without "
            "its lineage; restore the file, or ask the central site for a new copy"
        ) from None
