"""Wait for an answer in an event loop, although engines answer in threads.

Must not know HTTP.
"""

import asyncio
import threading
from typing import Final, Self

from fedpeft.errors import FedpeftError
from fedpeft_client.inference.engine import Answer, Piece

_PAUSE_S: Final = 0.03
"""Between two pieces of a streamed answer: a reader sees it flow, and the cores that compute
tokens are left to that."""


class AsyncAnswer:
    """The pieces of an answer for ``async for``; leaving the ``async with`` stops it."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[Piece | FedpeftError | None] = asyncio.Queue()
        threading.Thread(target=self._pump, name="answer", daemon=True).start()

    @property
    def model(self) -> str:
        """What answers."""
        return self._answer.model

    def _pump(self) -> None:
        end: FedpeftError | None = None
        try:
            for piece in self._answer.gathered(_PAUSE_S):
                self._post(piece)
        except FedpeftError as error:
            end = error
        self._post(end)

    def _post(self, got: Piece | FedpeftError | None) -> None:
        # The loop is closed when the server was stopped at once; then nobody waits any more.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, got)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._answer.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        """Wait for the next piece.

        Raises:
            FedpeftError: what the answer failed with.
        """
        got = await self._pieces.get()
        if isinstance(got, Piece):
            return got
        if got is None:
            raise StopAsyncIteration
        raise got
