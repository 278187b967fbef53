"""How many bytes this box sends and receives on one day, counted over restarts.

Counted are whole HTTP requests and answers, headers included, above TLS, which with TCP
adds a few per cent. The file runs ahead of what was counted, so that a crash can make the
count too high, by at most ``_AHEAD`` bytes, and never too low. Must not know messages.
"""

import datetime
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedpeft.errors import StorageError, TrafficLimit
from fedpeft.storage import write_atomically

SCHEMA: Final = 1
_AHEAD: Final = 1 << 20
_MIB: Final = 1 << 20


def today() -> datetime.date:
    """Return the present day by this machine's clock and time zone."""
    return datetime.datetime.now().astimezone().date()


@dataclass(frozen=True, slots=True, kw_only=True)
class Day:
    """The bytes of one day, as far as the file knows: what was counted, or a little more."""

    day: datetime.date
    bytes: int


class TrafficMeter:
    """Counts bytes against a daily limit; may be used by several threads of one process."""

    def __init__(
        self,
        path: Path,
        limit_bytes: int | None,
        today: Callable[[], datetime.date] = today,
    ) -> None:
        """Go on with the count in ``path``, a small file that is made with the first byte.

        Raises:
            StorageError: the file is damaged.
        """
        self._path = path
        self._limit = limit_bytes
        self._today = today
        self._lock = threading.Lock()
        known = read_day(path)
        self._day, self._counted = (known.day, known.bytes) if known else (today(), 0)
        self._written = self._counted

    def count(self, size: int) -> None:
        """Add ``size`` bytes that were sent or received.

        Raises:
            StorageError: the count cannot be written.
        """
        with self._lock:
            self._turn_the_day()
            self._counted += size
            if self._counted > self._written:
                self._write(self._counted + _AHEAD)

    def left(self) -> int | None:
        """Return how many bytes may still pass today; None: any number."""
        with self._lock:
            self._turn_the_day()
            return None if self._limit is None else max(0, self._limit - self._counted)

    def require(self, size: int) -> None:
        """Check that ``size`` more bytes may pass today.

        Raises:
            TrafficLimit: they may not.
        """
        left = self.left()
        if left is not None and (left == 0 or size > left):
            raise self.refusal()

    def refusal(self) -> TrafficLimit:
        """Return the error that says that today's bytes are used up."""
        allowed = (self._limit or 0) // _MIB
        return TrafficLimit(
            f"limits.max_mb_per_day = {allowed} in client.toml is used up for {self._day}, or "
            f"would be by this message ({self._counted / _MIB:.1f} MiB passed until now): nothing "
            "more is done until midnight; raise the limit if you agree"
        )

    def close(self) -> None:
        """Write the exact count.

        Raises:
            StorageError: it cannot be written.
        """
        with self._lock:
            if self._written != self._counted:
                self._write(self._counted)

    def _turn_the_day(self) -> None:
        day = self._today()
        if day > self._day:
            self._day, self._counted, self._written = day, 0, 0
        elif day < self._day - datetime.timedelta(days=1):
            # The clock was wrong for a while. It gives no byte a second time, and a day
            # far ahead does not hold the count up until then.
            self._day = day

    def _write(self, size: int) -> None:
        content = {"schema": SCHEMA, "day": self._day.isoformat(), "bytes": size}
        write_atomically(self._path, (json.dumps(content) + "\n").encode(), mode=0o600)
        self._written = size


def read_day(path: Path) -> Day | None:
    """Return what was counted last; None if nothing was.

    Raises:
        StorageError: the file is damaged, or of another release.
    """
    try:
        content: Any = json.loads(path.read_bytes())
        if content["schema"] != SCHEMA or type(content["bytes"]) is not int:
            raise ValueError
        return Day(day=datetime.date.fromisoformat(content["day"]), bytes=content["bytes"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        raise StorageError(
            f"the count of today's traffic {path} cannot be read: remove it, and the day is "
            "counted from now on"
        ) from None
