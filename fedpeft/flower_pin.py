"""Hold the installed Flower to the version that fedpeft was built on.

Parts of Flower that fedpeft uses are internal modules: another version may
rename them, or keep the name and change the meaning. Both ends of the network
link therefore call :func:`require_pinned_flower` before anything else, and
``tests/core/test_flower_contract.py`` checks each internal import.
"""

import logging
import re
from importlib import metadata
from typing import Final

from fedpeft.errors import FlowerPinError

PINNED_FLOWER: Final = "1.41.0"
"""The only Flower version that this fedpeft runs on."""
FAB_ID: Final = "fedpeft/fedpeft"
"""The app name of a run. Clinics answer to no other; no app is ever packed or sent under it."""

# Flower puts the text of an unexpected database error, and with it bound
# parameters, into its log line. They can be parts of a payload.
_UNEXPECTED: Final = re.compile(r"^(.*\[UnexpectedError:\w+\]).*$", re.DOTALL)


def require_pinned_flower() -> None:
    """Check the version of the installed Flower.

    Raises:
        FlowerPinError: it is missing, or another version is installed.
    """
    try:
        installed = metadata.version("flwr")
    except metadata.PackageNotFoundError:
        installed = "none"
    if installed != PINNED_FLOWER:
        raise FlowerPinError(
            f"fedpeft needs Flower {PINNED_FLOWER} exactly, as it uses internal parts of it, "
            f"but {installed} is installed here: run `pip install flwr=={PINNED_FLOWER}`"
        )


# A call that Flower refused: the caller is told, and the log would fill with
# what a restarted clinic does every other second.
_REFUSED_CALL: Final = re.compile(r"\[/v1/fleet/[\w-]+\]\[ApiError:\d+\]")


class _Selection(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if _REFUSED_CALL.match(message):
            return False
        found = _UNEXPECTED.match(message)
        if found:
            record.msg, record.args = found.group(1), None
        return True


def quiet_flower_log() -> None:
    """Send warnings of Flower and of the HTTP libraries to ``logging``, and no more.

    Importing Flower installs its own coloured handler at level INFO; it is
    removed. Lines about refused calls of clinics are left out, and parameters
    of database errors, which can be parts of a payload, are cut off. Safe to
    call any number of times.
    """
    flower = logging.getLogger("flwr")
    for handler in list(flower.handlers):
        flower.removeHandler(handler)
    flower.setLevel(logging.WARNING)
    flower.propagate = True
    if not any(isinstance(known, _Selection) for known in flower.filters):
        flower.addFilter(_Selection())
    for name in ("httpx", "httpcore", "uvicorn", "uvicorn.error", "uvicorn.access", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
