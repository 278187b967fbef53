"""What a round took: time, and bytes on the wire."""

import time

from fedpeft_server.link.link import Link


class Stopwatch:
    """Seconds and bytes on the wire since it was made."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._began = time.monotonic()
        self._before = (link.meter.bytes_up, link.meter.bytes_down)

    def read(self) -> tuple[int, int, float]:
        """Return (bytes up, bytes down, seconds)."""
        meter, (up, down) = self._link.meter, self._before
        seconds = round(time.monotonic() - self._began, 3)
        return meter.bytes_up - up, meter.bytes_down - down, seconds
