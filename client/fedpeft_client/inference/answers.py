"""The pieces of an answer on their way from the thread that computes to the one that reads."""

import queue
import threading
from collections.abc import Generator
from typing import Self

from fedpeft.errors import FedpeftError, InferenceError
from fedpeft_client.inference.engine import Piece


class QueuedAnswer:
    """An answer that one thread gives piece by piece and another takes.

    What was given before a failure or :meth:`close` is still read; then the failure, or
    the end.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._pieces: queue.SimpleQueue[Piece | FedpeftError | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._complete = threading.Event()
        self._ended = False

    @property
    def model(self) -> str:
        """What answers."""
        return self._model

    @property
    def closed(self) -> bool:
        """Whether nobody waits for the rest any more."""
        return self._closed.is_set()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        """Wait for the next piece.

        Raises:
            FedpeftError: what the answer failed with.
        """
        if self._ended:
            raise StopIteration
        got = self._pieces.get()
        if isinstance(got, Piece):
            self._ended = got.finished is not None
            return got
        self._ended = True
        if got is None:
            raise StopIteration
        raise got

    def gathered(self, pause_s: float) -> Generator[Piece]:
        """Yield the first piece at once, then what has come, ``pause_s`` seconds apart.

        Whoever writes each piece to a network works less so, on processors that compute.

        Raises:
            FedpeftError: what the answer failed with.
        """
        for piece in self:
            yield self._with_following(piece)
            self._complete.wait(pause_s)

    def _with_following(self, piece: Piece) -> Piece:
        texts = [piece.text]
        while not self._ended and not self._pieces.empty():
            got = self._pieces.get()
            if not isinstance(got, Piece):
                self._pieces.put(got)  # it is the last, so it still comes after everything
                break
            texts.append(got.text)
            piece, self._ended = got, got.finished is not None
        return Piece("".join(texts), piece.finished, piece.usage)

    def give(self, piece: Piece) -> None:
        """Add a piece; one that is finished is the last."""
        self._pieces.put(piece)
        if piece.finished is not None:
            self._complete.set()

    def fail(self, error: FedpeftError | None = None) -> None:
        """End the answer with an error."""
        self._pieces.put(error or InferenceError("the engine was stopped: start it, and ask again"))
        self._complete.set()

    def close(self) -> None:
        """Say that nobody waits any more; whoever reads sees the end."""
        self._closed.set()
        self._pieces.put(None)
        self._complete.set()
