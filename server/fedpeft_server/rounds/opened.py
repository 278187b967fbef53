"""``sealed``: every answer is encrypted for this server, which opens each by itself.

For strategies that need single updates. A clinic takes part only if its people
allowed that (``require_secagg = false``).
"""

from collections.abc import Collection
from dataclasses import dataclass, field

from fedpeft.adapters import AdapterSchema, from_bytes
from fedpeft.errors import AdapterError
from fedpeft.protocol import (
    NUM_EXAMPLES,
    TRAIN,
    TRAIN_NLL,
    TRAIN_TOKENS,
    VALID_NLL,
    VALID_TOKENS,
    VERDICT,
    Job,
    Payload,
)
from fedpeft.protocol.privacy import ClinicPrivacy
from fedpeft_server.rounds.collection import (
    Collected,
    ConfidentialityRecord,
    Kind,
    Sink,
    Sums,
    max_rank_of,
    privacy_of,
)
from fedpeft_server.rounds.delivery import Delivery, Order

_TOO_MUCH = 2.0**53
"""Beyond it float64 does not hold each count; no honest figure comes near."""


class OpenedCollector:
    """Collects single answers; see :class:`fedpeft_server.rounds.collection.Collector`."""

    def __init__(self, delivery: Delivery, schema: AdapterSchema, timeout_s: float) -> None:
        self._delivery = delivery
        self._schema = schema
        self._timeout_s = timeout_s

    def collect(
        self,
        kind: Kind,
        number: int,
        attempt: int,
        order: Order,
        nodes: Collection[int],
        sink: Sink,
    ) -> Collected:
        """Ask everybody once, and check each answer as it comes."""
        found = _Found()
        job = order.job

        def accept(name: str, payload: Payload) -> None:
            if kind == TRAIN:
                told = privacy_of(name, payload, job)
                sums = self._trained(name, payload, job, sink)
                found.privacy.update(told)
            else:
                sums = _measured(name, payload, job)
                found.max_ranks.update(max_rank_of(name, payload))
            found.sums[name] = sums

        failed = self._delivery.ask(
            kind, number, attempt, order, nodes, timeout_s=self._timeout_s, accept=accept
        )
        sums = dict(sorted(found.sums.items()))
        together = Sums()
        for one in sums.values():
            together = together.plus(one)
        losses = {name: one.loss for name, one in sums.items()} if kind != TRAIN else {}
        return Collected(
            participants=tuple(sums),
            failed=failed,
            sums=together,
            losses={name: loss for name, loss in losses.items() if loss is not None},
            confidentiality=ConfidentialityRecord(
                mode="sealed",
                threshold=None,
                survivors=len(sums),
                bits=None,
                wire_bytes_per_coordinate=self._schema.itemsize if kind == TRAIN else None,
            ),
            privacy=found.privacy,
            max_ranks=found.max_ranks,
        )

    def _trained(self, name: str, payload: Payload, job: Job, sink: Sink) -> Sums:
        """Hand over a clinic's update, and return what it reports.

        Raises:
            FedpeftError: it cannot be used.
        """
        source = f"clinic {name}"
        sums = Sums(
            rows=int(_number(payload, NUM_EXAMPLES, source)),
            nll=_number(payload, TRAIN_NLL, source),
            tokens=int(_number(payload, TRAIN_TOKENS, source)),
        )
        if not sums.rows:
            raise AdapterError(f"{source} reports an update of no examples; it is not used")
        rank = job.ranks.rank(name) if job.ranks else None
        part = self._schema.part(job.sends, rank)
        update = from_bytes(payload.blob, part, "update", source=source)
        update.require_finite(source=source)
        sink(update, sums.rows)
        return sums


@dataclass(frozen=True, slots=True)
class _Found:
    """What came so far, by clinic."""

    sums: dict[str, Sums] = field(default_factory=dict[str, Sums])
    privacy: dict[str, ClinicPrivacy] = field(default_factory=dict[str, ClinicPrivacy])
    max_ranks: dict[str, int] = field(default_factory=dict[str, int])


def _measured(name: str, payload: Payload, job: Job) -> Sums:
    source = f"clinic {name}"
    told = VERDICT in payload.fields
    verdict = _number(payload, VERDICT, source) if told else 0
    if verdict not in (0, 1) or (told and not job.asks_verdict):
        raise AdapterError(f"{source} reports no usable {VERDICT}; its answer is not used")
    return Sums(
        nll=_number(payload, VALID_NLL, source),
        tokens=int(_number(payload, VALID_TOKENS, source)),
        verdicts=int(told),
        accepted=int(verdict),
    )


def _number(payload: Payload, metric: str, source: str) -> float:
    """Read one reported number.

    Raises:
        AdapterError: it is missing, negative, not finite, or beyond what any clinic has.
    """
    value = payload.fields.get(metric)
    if not isinstance(value, int | float) or not 0 <= value < _TOO_MUCH:
        raise AdapterError(f"{source} reports no usable {metric}; its answer is not used")
    return value
