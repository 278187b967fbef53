"""Offer a clinic again what it was offered and never took in.

Flower hands a message out once. If that answer is lost on its way, as on a line that breaks,
the clinic never hears of the message, and the server waits for it until the round's time is
over. A clinic does one thing at a time: if it asks for the next message and has neither
confirmed the last one nor answered it, it does not have it. Flower has no call for this.
"""

from typing import Final

from flwr.app import Message
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.utils import uint64_to_int64
from sqlalchemy import text

from fedpeft_server.link.message_store import message_engine

_UNANSWERED: Final = text(
    "SELECT message_id FROM message_ins WHERE dst_node_id = :node AND delivered_at != '' "
    "AND NOT EXISTS (SELECT 1 FROM message_res WHERE reply_to_message_id = message_ins.message_id)"
)
_OFFER: Final = text("UPDATE message_ins SET delivered_at = '' WHERE message_id = :message")


def offer_again(state: LinkState) -> None:
    """Let ``state`` look for unconfirmed messages whenever a clinic asks for one.

    The clinic's signature was checked before it is asked.
    """
    ask, engine = state.get_message_ins, message_engine(state)

    def get_message_ins(
        node_id: int, limit: int | None, *, run_id: int | None = None
    ) -> list[Message]:
        with engine.begin() as connection:
            asked = {"node": uint64_to_int64(node_id)}
            for (message_id,) in connection.execute(_UNANSWERED, asked).all():
                if _is_unconfirmed(state, message_id):
                    connection.execute(_OFFER, {"message": message_id})
        return ask(node_id, limit, run_id=run_id)

    state.get_message_ins = get_message_ins


def _is_unconfirmed(state: LinkState, message_id: str) -> bool:
    """Say whether the content is still there: a clinic's confirmation deletes it."""
    try:
        state.object_store.get_object_tree(message_id)
    except NoObjectInStoreError:
        return False
    return True
