"""When this box may train: windows of local time, by weekday.

Knows what a person writes in ``policy.hours`` and nothing of jobs. A window such as
``mon-fri 19:00-06:00`` goes on past midnight and belongs to the days on which it begins.
"""

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fedpeft.errors import ConfigError

_DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DAY_MINUTES: Final = 24 * 60
_FORM: Final = re.compile(
    r"(?:(?P<days>[a-z,-]+) )?(?P<begin>[0-2]\d:[0-5]\d)-(?P<end>[0-2]\d:[0-5]\d)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A time of day on some weekdays (Monday is 0); minutes count from midnight.

    ``end`` is at most ``begin`` where the window goes on into the next day.
    """

    days: frozenset[int]
    begin: int
    end: int

    def holds(self, moment: datetime.datetime) -> bool:
        """Say whether ``moment``, a local time, is in the window; its end is not."""
        minute, today = moment.hour * 60 + moment.minute, moment.weekday()
        if self.begin < self.end:
            return today in self.days and self.begin <= minute < self.end
        yesterday = (today - 1) % len(_DAYS)
        return (today in self.days and minute >= self.begin) or (
            yesterday in self.days and minute < self.end
        )

    def next_begin(self, moment: datetime.datetime) -> datetime.datetime:
        """Return when the window begins after ``moment``, at the latest in a week."""
        midnight = moment.replace(hour=0, minute=0, second=0, microsecond=0)
        begins = (
            midnight + datetime.timedelta(days=ahead, minutes=self.begin)
            for ahead in range(len(_DAYS) + 1)
            if (midnight.weekday() + ahead) % len(_DAYS) in self.days
        )
        return min(begin for begin in begins if begin > moment)


def parse_window(text: str) -> Window:
    """Read ``[DAYS ]HH:MM-HH:MM``; DAYS is ``mon-fri``, ``sat,sun`` or left out for all.

    Raises:
        ConfigError: it is none, or it is empty.
    """
    match = _FORM.fullmatch(text.strip().lower())
    days = _days(match["days"]) if match else None
    begin = _minutes(match["begin"]) if match else None
    end = _minutes(match["end"]) if match else None
    if not days or begin is None or end is None or begin in (end, _DAY_MINUTES):
        raise ConfigError(
            f'{text!r} is no window of time; write it as "19:00-06:00", "mon-fri 19:00-06:00" or '
            '"sat,sun 00:00-24:00"'
        )
    return Window(days=days, begin=begin, end=end)


def checked_window(text: str) -> str:
    """Return ``text`` if it is a window, for a settings model.

    Raises:
        ValueError: it is none.
    """
    try:
        parse_window(text)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return text


def is_open(windows: Sequence[str] | None, moment: datetime.datetime) -> bool:
    """Say whether ``moment`` is in one of the windows; None is always open."""
    return windows is None or any(parse_window(window).holds(moment) for window in windows)


def next_opening(windows: Sequence[str], moment: datetime.datetime) -> datetime.datetime:
    """Return when the first of the windows begins after ``moment``."""
    return min(parse_window(window).next_begin(moment) for window in windows)


def local_now() -> datetime.datetime:
    """Return the present time by this machine's clock and time zone."""
    return datetime.datetime.now().astimezone()


def _days(text: str | None) -> frozenset[int] | None:
    if text is None:
        return frozenset(range(len(_DAYS)))
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first not in _DAYS or (last or first) not in _DAYS or part.endswith("-"):
            return None
        start, end = _DAYS.index(first), _DAYS.index(last or first)
        found |= {(start + step) % len(_DAYS) for step in range((end - start) % len(_DAYS) + 1)}
    return frozenset(found)


def _minutes(text: str) -> int | None:
    hours, minutes = map(int, text.split(":"))
    total = hours * 60 + minutes
    return total if total <= _DAY_MINUTES else None
