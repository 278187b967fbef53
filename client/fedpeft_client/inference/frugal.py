"""HTTP/1.1 as h11 reads it, up to the work that one request is worth.

h11 takes some 10 µs for each part of a body, however small, and for each header. Whoever
sends megabytes a byte at a time would so keep a processor busy with nothing. Knows no
connection and no application.
"""

from typing import Final, TypeAlias

import h11

LARGEST_HEAD_BYTES: Final = 8 << 10
"""The head of a request, and the line before each part of its body."""
_FREE_PARTS: Final = 256
"""Parts of a body, however small."""
_PART_BYTES: Final = 256
"""For so many bytes of a body there may be another part."""

Refusal: TypeAlias = tuple[int, str]
"""An HTTP status, and a sentence for people."""

_SENTENCES: Final[dict[int, str]] = {
    431: f"the head of the request has more than {LARGEST_HEAD_BYTES} bytes: send fewer or "
    "shorter headers",
}
_UNREADABLE: Final = "this is no HTTP/1.1 request: ask with a client of OpenAI, or as its API says"
_TOO_MANY_PARTS: Final = (
    "the request comes in too many small parts: send it as a whole, with a Content-Length, or in "
    f"parts of {_PART_BYTES} bytes or more"
)


class FrugalConnection(h11.Connection):
    """A server's side of a connection; ``refusal`` says what was wrong after an error."""

    def __init__(self) -> None:
        """Begin with the first request."""
        super().__init__(h11.SERVER, LARGEST_HEAD_BYTES)
        self.refusal: Refusal = (400, _UNREADABLE)
        self._parts = self._bytes = 0

    def next_event(self) -> "h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]":
        """Return what came next.

        Raises:
            h11.RemoteProtocolError: it is no HTTP, or too much work.
        """
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            status = error.error_status_hint
            self.refusal = (status, _SENTENCES.get(status, _UNREADABLE))
            raise
        if isinstance(event, h11.Request):
            self._parts = self._bytes = 0
            # h11 measures only a head that has no end yet.
            size = len(event.target) + sum(len(name) + len(value) for name, value in event.headers)
            if size > LARGEST_HEAD_BYTES:
                self.refusal = (431, _SENTENCES[431])
                raise h11.RemoteProtocolError(_SENTENCES[431])
        elif isinstance(event, h11.Data):
            self._parts += 1
            self._bytes += len(event.data)
            if self._parts > _FREE_PARTS + self._bytes // _PART_BYTES:
                self.refusal = (400, _TOO_MANY_PARTS)
                raise h11.RemoteProtocolError(_TOO_MANY_PARTS)
        return event
