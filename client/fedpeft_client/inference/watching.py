"""Notice within a second that the adapters of the box have changed, and tell the engine.

Must not know what an adapter is: it compares names and times of files.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fedpeft.errors import FedpeftError

_EVERY_S: Final = 0.5

Stamp = tuple[tuple[str, int, int], ...]


def stamp(directory: Path) -> Stamp:
    """Return what changes whenever a file or folder directly in ``directory`` does."""
    found: list[tuple[str, int, int]] = []
    try:
        for path in sorted(directory.iterdir()):
            status = path.lstat()
            found.append((path.name, status.st_mtime_ns, status.st_ino))
    except OSError:
        return tuple(found)  # gone, or changing at this moment: looked at again soon
    return tuple(found)


class Watch:
    """A thread that calls ``refresh`` after each change in ``directory`` until it is closed."""

    def __init__(
        self, directory: Path, refresh: Callable[[], None], tell: Callable[[str], None]
    ) -> None:
        self._directory, self._refresh, self._tell = directory, refresh, tell
        self._seen = stamp(directory)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="adapters", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(_EVERY_S):
            now = stamp(self._directory)
            if now == self._seen:
                continue
            # Noted before it is read, so that a change meanwhile is seen the next time.
            self._seen = now
            try:
                self._refresh()
            except FedpeftError as error:
                if not self._stop.is_set():
                    self._tell(f"the adapters stay as they were: {error}")

    def close(self) -> None:
        """Stop looking; a refresh that runs is waited for."""
        self._stop.set()
        self._thread.join()
