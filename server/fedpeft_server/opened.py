"""``sealed``: every answer is encrypted for this server, which opens each by itself.

For strategies that need single updates. A clinic takes part only if its people
allowed that (``require_secagg = false``).
"""

from collections.abc import Iterable, Mapping

from flwr.app import Message, RecordDict

from fedpeft.adapters import AdapterSchema, from_bytes
from fedpeft.errors import AdapterError
from fedpeft.protocol import (
    ARRAYS,
    METRICS,
    NUM_EXAMPLES,
    TRAIN,
    TRAIN_NLL,
    TRAIN_TOKENS,
    VALID_NLL,
    VALID_TOKENS,
    Payload,
    array_record,
    metric_from,
    metric_record,
)
from fedpeft.protocol.privacy import ClinicPrivacy
from fedpeft.protocol.records import Metric
from fedpeft_server.channel import Channel
from fedpeft_server.collection import (
    Collected,
    ConfidentialityRecord,
    Kind,
    Printer,
    orders_of,
    privacy_of,
)

_METRICS: Mapping[Kind, tuple[Metric, ...]] = {
    "train": (NUM_EXAMPLES, TRAIN_NLL, TRAIN_TOKENS),
    "evaluate": (VALID_NLL, VALID_TOKENS),
}


class OpenedCollector:
    """Collects single answers; see :class:`fedpeft_server.collection.Collector`."""

    def __init__(self, channel: Channel, schema: AdapterSchema) -> None:
        self._channel = channel
        self._schema = schema

    def collect(
        self, kind: Kind, number: int, attempt: int, messages: Iterable[Message], timeout_s: float
    ) -> Collected:
        """Ask everybody once, and check each answer as it comes."""
        orders, printer = orders_of(messages), Printer()
        letters = {order.node: printer.letter(order) for order in orders}
        nodes = {name: node for node, name in self._channel.names().items()}
        replies: dict[str, Message] = {}
        privacy: dict[str, ClinicPrivacy] = {}

        def accept(name: str, payload: Payload) -> None:
            content = self._content(kind, name, payload)
            if kind == TRAIN:
                privacy.update(privacy_of(name, payload, orders[0].job))
            replies[name] = Message(content, nodes[name], kind)

        failed = self._channel.ask(
            kind, number, attempt, letters, timeout_s=timeout_s, accept=accept
        )
        ordered = dict(sorted(replies.items()))
        width = self._schema.itemsize if kind == TRAIN else None
        return Collected(
            participants=tuple(ordered),
            failed=failed,
            replies=tuple(ordered.values()),
            losses=_losses(ordered) if kind != TRAIN else {},
            confidentiality=ConfidentialityRecord(
                mode="sealed",
                threshold=None,
                survivors=len(ordered),
                bits=None,
                wire_bytes_per_coordinate=width,
            ),
            privacy=privacy,
        )

    def _content(self, kind: Kind, name: str, payload: Payload) -> RecordDict:
        """Return what a clinic sent as the strategy reads it.

        Raises:
            AdapterError, NotFinite: it cannot be used.
        """
        metrics = metric_record(
            {metric: _number(payload, metric, name) for metric in _METRICS[kind]}
        )
        content = RecordDict({METRICS: metrics})
        for metric in _METRICS[kind]:
            metric_from(content, metric)
        if kind == TRAIN:
            source = f"clinic {name}"
            update = from_bytes(payload.blob, self._schema, "update", source=source)
            update.require_finite(source=source)
            if not metric_from(content, NUM_EXAMPLES):
                raise AdapterError(f"{source} reports an update of no examples; it is not used")
            content[ARRAYS] = array_record(update, "update")
        return content


def _number(payload: Payload, metric: Metric, name: str) -> int | float:
    value = payload.fields.get(metric)
    if not isinstance(value, int | float):
        raise AdapterError(f"clinic {name} reports no usable {metric}; its answer is not used")
    return value


def _losses(replies: Mapping[str, Message]) -> dict[str, float]:
    losses: dict[str, float] = {}
    for name, reply in replies.items():
        if tokens := metric_from(reply.content, VALID_TOKENS):
            losses[name] = metric_from(reply.content, VALID_NLL) / tokens
    return losses
