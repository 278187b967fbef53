"""``secagg``: the server learns the sum over the clinics, and of no clinic anything else.

Drives ``fedpeft.secagg`` over sealed messages, five requests to a sum. The
strategy is handed one reply that stands for all clinics: their mean update, their
rows together, their summed losses. That is all a linear strategy needs.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, RecordDict

from fedpeft.adapters import DTYPES, AdapterSchema, AdapterState
from fedpeft.config import AggregationSettings
from fedpeft.errors import AggregationRefused, FederationError, WrongSignature
from fedpeft.protocol import (
    ARRAYS,
    METRICS,
    NUM_EXAMPLES,
    TRAIN,
    TRAIN_NLL,
    TRAIN_TOKENS,
    VALID_NLL,
    VALID_TOKENS,
    Job,
    Payload,
    array_record,
    metric_record,
)
from fedpeft.protocol.privacy import ClinicPrivacy
from fedpeft.protocol.sums import (
    INTEGERS,
    counts_alike,
    from_fixed_point,
    model_digest,
    on_grid,
    value_of_unit,
    wrapped,
)
from fedpeft.secagg import STAGES, Aggregation, Quantiser, SecureSum, Session, Terms
from fedpeft.secagg.packing import packed_bytes
from fedpeft_server.channel import Channel, Letter
from fedpeft_server.collection import (
    Collected,
    ConfidentialityRecord,
    Kind,
    Order,
    Printer,
    orders_of,
    privacy_of,
)
from fedpeft_server.quantisation_range import next_limit

Told = Callable[[int, str, list[str]], None]
"""Told of a round, a message type and the clinics that are asked."""


class SummedCollector:
    """Collects one secure sum; see :class:`fedpeft_server.collection.Collector`."""

    def __init__(
        self,
        channel: Channel,
        schema: AdapterSchema,
        settings: AggregationSettings,
        *,
        minimum: int,
        least: int,
        told: Told,
    ) -> None:
        """Collect sums of at least ``minimum`` clinics, and open none of fewer than ``least``."""
        self._channel = channel
        self._schema = schema
        self._settings = settings
        self._minimum = minimum
        self._least = least
        self._told = told

    def collect(
        self, kind: Kind, number: int, attempt: int, messages: Iterable[Message], timeout_s: float
    ) -> Collected:
        """Run the five stages; clinics that fall away are named, the others are summed."""
        orders = orders_of(messages)
        if len({(order.adapter, order.job) for order in orders}) != 1:
            raise FederationError(
                "the strategy sends the clinics different adapters or jobs, which cannot be summed "
                'securely; set aggregation.confidentiality = "sealed", or use another strategy'
            )
        aggregation = Aggregation(
            self._session(kind, number, attempt, orders[0]), self._terms(kind, orders)
        )
        failed: dict[str, str] = {}
        privacy: dict[str, ClinicPrivacy] = {}
        for stage in STAGES:
            letters = self._letters(aggregation, orders)
            self._told(number, f"{kind}.{stage}", sorted(aggregation.requests()))
            wait = timeout_s if stage == STAGES[0] else self._settings.stage_timeout_s

            def accept(name: str, payload: Payload, stage: str = stage) -> None:
                if kind == TRAIN and stage == STAGES[0]:
                    privacy.update(privacy_of(name, payload, orders[0].job))
                aggregation.receive(name, payload.blob)

            failed |= self._channel.ask(
                f"{kind}.{stage}", number, attempt, letters, timeout_s=wait, accept=accept
            )
            try:
                aggregation.close()
            except (AggregationRefused, WrongSignature) as error:
                return Collected(failed=failed, trouble=str(error))
        return self._collected(kind, orders[0], aggregation.result, failed, privacy)

    def _session(self, kind: Kind, number: int, attempt: int, order: Order) -> Session:
        return Session(
            federation=order.job.federation,
            run=self._channel.run_id,
            round=number,
            attempt=attempt,
            kind=kind,
            model=model_digest(order.job, order.adapter),
        )

    def _terms(self, kind: Kind, orders: list[Order]) -> Terms:
        names, keys = self._channel.names(), self._channel.signing_keys()
        asked = [names[order.node] for order in orders]
        terms = orders[0].job.aggregation
        return Terms(
            identities={name: keys[name] for name in asked},
            adversary=self._settings.adversary,
            threshold=max(self._settings.threshold or 0, self._least) or None,
            minimum=self._minimum,
            coordinates=self._schema.numel if kind == TRAIN else 0,
            integers=INTEGERS,
            quantiser=Quantiser(terms.bits, terms.limit),
        )

    def _letters(self, aggregation: Aggregation, orders: list[Order]) -> dict[int, Letter]:
        """Return what each clinic is sent in this stage; the first brings job and adapter."""
        requests, names = aggregation.requests(), self._channel.names()
        if aggregation.stage == STAGES[0]:
            printer = Printer()
            return {order.node: printer.letter(order) for order in orders}
        nodes = {name: node for node, name in names.items()}
        return {nodes[name]: Letter(Payload(blob=data)) for name, data in requests.items()}

    def _collected(
        self,
        kind: Kind,
        order: Order,
        total: SecureSum,
        failed: dict[str, str],
        privacy: dict[str, ClinicPrivacy],
    ) -> Collected:
        rows, tokens = total.integers["num-examples"], total.integers["tokens"]
        nll = from_fixed_point(total.integers["nll"])
        if kind == TRAIN:
            if rows < len(total.survivors):
                return Collected(
                    failed=failed, trouble="the clinics together report fewer rows than clinics"
                )
            metrics = metric_record({NUM_EXAMPLES: rows, TRAIN_NLL: nll, TRAIN_TOKENS: tokens})
            content = RecordDict({METRICS: metrics, ARRAYS: self._mean(order.job, total)})
        else:
            metrics = metric_record({NUM_EXAMPLES: rows, VALID_NLL: nll, VALID_TOKENS: tokens})
            content = RecordDict({METRICS: metrics})
        return Collected(
            participants=total.survivors,
            # Who fell away after its masked vector had come is in the sum all the same.
            failed={name: why for name, why in failed.items() if name not in total.survivors},
            replies=(Message(content, order.node, kind),),
            confidentiality=self._record(kind, order, total, rows),
            # All of them: a clinic that fell away spent its privacy nevertheless.
            privacy=privacy,
            within_clip=total.integers["within-clip"],
        )

    def _mean(self, job: Job, total: SecureSum) -> ArrayRecord:
        alike = counts_alike(job.privacy)
        weight = len(total.survivors) if alike else total.integers["num-examples"]
        coordinates = total.coordinates
        if on_grid(job.privacy):
            coordinates = wrapped(coordinates.astype(np.int64)).astype(np.float64)
        mean = coordinates * (value_of_unit(job, self._schema.numel) / weight)
        values = torch.from_numpy(mean).to(DTYPES[self._schema.dtype])
        return array_record(AdapterState(self._schema, values), "update")

    def _record(
        self, kind: Kind, order: Order, total: SecureSum, rows: int
    ) -> ConfidentialityRecord:
        terms, size = order.job.aggregation, self._schema.numel
        words = packed_bytes(size, total.width)
        return ConfidentialityRecord(
            mode="secagg",
            threshold=total.threshold,
            survivors=len(total.survivors),
            bits=terms.bits,
            wire_bytes_per_coordinate=round(words / size, 4) if kind == TRAIN else None,
            limit=terms.limit,
            clipped=total.integers["clipped"],
            next_limit=next_limit(kind, order.job, total, rows),
        )
