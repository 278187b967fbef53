"""Turn the bytes of tokens into text that can be shown at once: whole characters, no stop text.

Must not know tokens or models.
"""

import codecs
from collections.abc import Sequence


class TextStream:
    """The text of one answer as it grows.

    What might become a stop text is held back until it is certain; the stop text itself
    and what follows it are never given out. ``stopped`` says that one was found.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False

    def feed(self, data: bytes) -> str:
        """Take the bytes of a token, and return the text that is certain by now."""
        return self._certain(self._decoder.decode(data))

    def finish(self) -> str:
        """Return what was held back, when the answer is over."""
        text = self._certain(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _certain(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            certain, self._held = self._held[: min(found)], ""
            return certain
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        end = len(self._held) - keep
        certain, self._held = self._held[:end], self._held[end:]
        return certain

    def _overlap(self, stop: str) -> int:
        """Return how many characters at the end could begin ``stop``."""
        most = min(len(stop) - 1, len(self._held))
        return next((n for n in range(most, 0, -1) if self._held.endswith(stop[:n])), 0)
