"""Let an adapter out only if its audit stays within the limits that were set.

Knows nothing of models: it judges a report and copies a directory.
"""

import shutil
import tempfile
from pathlib import Path

from fedpeft.audit.report import AuditReport
from fedpeft.config import ReleaseSettings
from fedpeft.errors import ReleaseRefused, StorageError
from fedpeft.storage import explained, sync_directory


def judge(report: AuditReport, settings: ReleaseSettings) -> list[str]:
    """Return why the adapter may not be released, a sentence each; nothing if it may.

    A limit whose figure was not measured is not kept.
    """
    found: list[str] = []
    if settings.max_auc is not None:
        if report.membership is None:
            found.append("max_auc is set and no real records were held out to measure it")
        elif report.membership.auc > settings.max_auc:
            found.append(
                f"the membership AUC is {report.membership.auc:.3f}, above max_auc = "
                f"{settings.max_auc:g}"
            )
    if settings.max_exposure is not None:
        if not any(each.included for each in report.canaries.by_repetition):
            found.append("max_exposure is set and no canary was planted to measure it")
        elif report.canaries.exposure > settings.max_exposure:
            found.append(
                f"a canary has an exposure of {report.canaries.exposure:.1f} bits, above "
                f"max_exposure = {settings.max_exposure:g}"
            )
    return found


def require_release(report: AuditReport, settings: ReleaseSettings, adapter: Path) -> None:
    """Check the report against the limits.

    Raises:
        ReleaseRefused: a limit is passed; names each.
    """
    if reasons := judge(report, settings):
        raise ReleaseRefused(
            f"the adapter in {adapter} is not released: {'; '.join(reasons)}; train with "
            "differential privacy, with a smaller epsilon or for fewer steps"
        )


def release(adapter: Path, to: Path) -> None:
    """Copy an adapter directory to ``to``, which appears whole or not at all.

    Raises:
        StorageError: ``to`` exists, or cannot be written.
    """
    if to.exists():
        raise StorageError(f"{to} exists, and nothing is written over; name a new directory")
    with explained("write", to):
        to.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{to.name}.", dir=to.parent) as staging:
            staged = Path(staging) / to.name
            shutil.copytree(adapter, staged)
            staged.rename(to)
        sync_directory(to.parent)
