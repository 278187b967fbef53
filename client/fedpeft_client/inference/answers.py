"""The pieces of an answer on their way from the thread that computes to the one that reads."""

import queue
import threading
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

    def give(self, piece: Piece) -> None:
        """Add a piece; one that is finished is the last."""
        self._pieces.put(piece)

    def fail(self, error: FedpeftError | None = None) -> None:
        """End the answer with an error."""
        self._pieces.put(error or InferenceError("the engine was stopped: start it, and ask again"))

    def close(self) -> None:
        """Say that nobody waits any more; whoever reads sees the end."""
        self._closed.set()
        self._pieces.put(None)
