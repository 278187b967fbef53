"""What every export carries beside its model: ``export.json``, and the adapter's lineage.

The record names no path of this machine and no time, so the same adapter gives the same bytes.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from fedpeft.storage import write_atomically
from fedpeft_client.export.formats import Format
from fedpeft_client.export.source import Source
from fedpeft_client.versions.version import LINEAGE_FILE

RECORD_FILE = "export.json"
SCHEMA = 1
"""Version of ``export.json``; see docs/export.md."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """What was found when an export was read again.

    ``largest_difference`` is over the logits of ``tokens`` tokens, whose size is at most
    ``largest_logit``; all are None where no logits were compared.
    """

    what: str
    tokens: int | None = None
    largest_difference: float | None = None
    largest_logit: float | None = None


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a format's module has to tell of its export: what was checked, and its own figures."""

    checks: Sequence[Check]
    details: Mapping[str, str | int]


def write_record(source: Source, form: Format, written: Written, folder: Path) -> None:
    """Write ``export.json``, and the adapter's ``lineage.json`` if it has one.

    Raises:
        StorageError: the folder cannot be written.
    """
    content = {
        "schema": SCHEMA,
        "format": form.value,
        "fedpeft": metadata.version("fedpeft"),
        "base": {"fingerprint": source.fingerprint, "name": source.base.name},
        "adapter": {"name": source.name, "sha256": source.digest},
        **written.details,
        "checks": [_present(check) for check in written.checks],
    }
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    write_atomically(folder / RECORD_FILE, text.encode())
    if source.lineage is not None:
        write_atomically(folder / LINEAGE_FILE, source.lineage.encode())


def _present(check: Check) -> dict[str, object]:
    return {key: value for key, value in asdict(check).items() if value is not None}
