"""Turn one message of the server into one reply, and keep failures at home.

The server learns a reason from a short fixed list, never the text of an
exception: that could hold what a patient's record says.
"""

import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Final

from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode

from fedpeft.errors import FedpeftError

log: Final = logging.getLogger(__name__)

Application = Callable[[Message, Context], Message]
"""What a Flower ``ClientApp`` is when called."""


def answer(app: Application, message: Message, context: Context) -> tuple[Message, str]:
    """Call the clinic's app.

    Returns:
        Its reply and ``""``; or, if it raised or replied with an error, the
        error reply and the reason that it carries.
    """
    try:
        reply = app(message, context)
        if not isinstance(reply, Message):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError("the app returned no message")
    except Exception as error:
        log.error("%s", describe(error))
        reason = error.reason if isinstance(error, FedpeftError) else FedpeftError.reason
        return refusal(message, reason), reason
    return reply, (reply.error.reason or "") if reply.has_error() else ""


def refusal(message: Message, reason: str) -> Message:
    """Return the error reply to ``message``; ``reason`` is all that it tells."""
    error = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason)
    return Message(error, reply_to=message)


def describe(error: Exception) -> str:
    """Say what happened without saying anything that the failing code had in hand.

    fedpeft's own errors are written to be shown; of any other only the class
    and the places in the code are told, as its text may quote a record.
    """
    if isinstance(error, FedpeftError):
        return f"a message could not be answered: {error}"
    places = " > ".join(
        f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__, limit=-8)
    )
    return f"a message could not be answered: {type(error).__name__} at {places}"
