"""Tell whatever watches this process that it is alive: systemd, or a container's health check.

systemd is told over its notification socket (sd_notify(3)); a container's health
check looks at the age of a file. Alive means that the main thread came round its loop
(:func:`came_round`) or computed since the last look: a thread that only says "alive"
would say so for ever. Knows nothing of what the process does.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedpeft.errors import ConfigError

HEARTBEAT: Final = "FEDPEFT_HEARTBEAT"
"""Environment variable: a file that is touched for as long as the process is alive."""
HEARTBEAT_S: Final = 30.0
"""Seconds between two touches of that file."""
_PATIENCE_S: Final = 5.0
"""How long a watcher is waited for that is there, but has no room for another message."""
_LOOKS: Final = 3
"""So often the process is looked at within the time that systemd waits: two may fail."""
_LEAST_SHARE: Final = 0.01
"""Of one core: a main thread that uses more is computing, one that waits uses less."""

# A process has one main loop and one watcher, so these are the module's, as in logging.
_turns = 0
_at_first_turn: Callable[[], None] | None = None


def came_round() -> None:
    """Note that the main loop went on; called wherever it waits for others."""
    global _turns, _at_first_turn  # noqa: PLW0603
    _turns += 1
    if _at_first_turn is not None:
        tell, _at_first_turn = _at_first_turn, None
        tell()


class Life:
    """Says whether a thread went on since it was last asked."""

    def __init__(self, cpu_s: Callable[[], float], clock: Callable[[], float]) -> None:
        """Watch a thread whose processor time is ``cpu_s()``; ``clock`` gives seconds."""
        self._cpu_s, self._clock = cpu_s, clock
        self._seen = (_turns, cpu_s(), clock())

    def went_on(self) -> bool:
        """Return whether the loop came round, or the thread computed, since the last call."""
        turns, cpu_s, now = self._seen
        self._seen = (_turns, self._cpu_s(), self._clock())
        if self._seen[0] != turns:
            return True
        return self._seen[1] - cpu_s >= _LEAST_SHARE * (self._seen[2] - now) > 0


@dataclass(frozen=True, kw_only=True)
class Watchers:
    """Who wants to be told, as the environment says."""

    socket: str | None
    """systemd's notification socket; ``@`` stands for the abstract name space."""
    every_s: float | None
    """Seconds between two signs of life for systemd; None: it wants none."""
    heartbeat: Path | None

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Watchers":
        """Read ``NOTIFY_SOCKET``, ``WATCHDOG_USEC``, ``WATCHDOG_PID`` and :data:`HEARTBEAT`.

        Raises:
            ConfigError: ``WATCHDOG_USEC`` is no positive number.
        """
        told = environment.get("WATCHDOG_USEC")
        period: float | None = None
        if told is not None:
            if not told.isascii() or not told.isdigit() or int(told) == 0:
                raise ConfigError(
                    f"the environment variable WATCHDOG_USEC = {told!r} is no number of "
                    "microseconds: it is systemd's, so start this as a service, or unset it"
                )
            period = int(told) / 1e6 / _LOOKS
        if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
            period = None
        file = environment.get(HEARTBEAT)
        return cls(
            socket=environment.get("NOTIFY_SOCKET") or None,
            every_s=period,
            heartbeat=Path(file) if file else None,
        )

    def notify(self, state: str) -> None:
        """Send systemd one line such as ``READY=1``; nothing where it does not listen."""
        if self.socket is None:
            return
        address = "\0" + self.socket[1:] if self.socket.startswith("@") else self.socket
        # A watcher that is gone or hangs must not stop the work: it restarts what is silent.
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel,
        ):
            channel.settimeout(_PATIENCE_S)
            channel.sendto(state.encode(), address)

    def touch(self) -> None:
        """Renew the heartbeat file."""
        if self.heartbeat is not None:
            with contextlib.suppress(OSError):
                self.heartbeat.touch(mode=0o644)


@contextlib.contextmanager
def supervised() -> Generator[None]:
    """Tell the watchers that the process is up, alive while the body runs, and going down.

    It is up when the loop comes round for the first time: a server then listens. The body
    runs in the main thread. Where nobody watches, nothing is done.

    Raises:
        ConfigError: the environment of the watchdog cannot be read.
    """
    global _at_first_turn  # noqa: PLW0603
    watchers = Watchers.of(os.environ)
    ended = threading.Event()
    main = time.pthread_getcpuclockid(threading.main_thread().ident or 0)
    threads = [
        threading.Thread(
            target=_watch, args=(ended, main, period, tell), name="fedpeft-watchdog", daemon=True
        )
        for period, tell in (
            (watchers.every_s, lambda: watchers.notify("WATCHDOG=1")),
            (HEARTBEAT_S if watchers.heartbeat else None, watchers.touch),
        )
        if period is not None
    ]
    _at_first_turn = lambda: watchers.notify("READY=1")  # noqa: E731
    watchers.touch()
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        _at_first_turn = None
        watchers.notify("STOPPING=1")
        ended.set()
        for thread in threads:
            thread.join()


def _watch(ended: threading.Event, main: int, period_s: float, tell: Callable[[], None]) -> None:
    life = Life(lambda: time.clock_gettime(main), time.monotonic)
    while not ended.wait(period_s):
        if life.went_on():
            tell()
