"""``secagg``: the server learns the sum over the clinics, and of no clinic anything else.

Drives ``fedpeft.secagg`` over sealed messages, five requests to a sum. The
strategy is handed one update that stands for all clinics, their mean, with their rows
together. That is all a linear strategy needs.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from fedpeft.adapters import DTYPES, AdapterSchema, AdapterState
from fedpeft.config import AggregationSettings
from fedpeft.errors import AggregationRefused, WrongSignature
from fedpeft.protocol import TRAIN, Job, Payload, Value
from fedpeft.protocol.privacy import ClinicPrivacy
from fedpeft.protocol.successions import successions_field
from fedpeft.protocol.sums import (
    VERDICTS,
    counts_alike,
    from_fixed_point,
    integers_of,
    levels_of,
    model_digest,
    on_grid,
    value_of_unit,
    weight_of_level,
    wrapped,
)
from fedpeft.secagg import STAGES, Aggregation, Quantiser, SecureSum, Session, Terms
from fedpeft.secagg.packing import packed_bytes
from fedpeft_server.rounds.channel import Channel, Letter
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
from fedpeft_server.rounds.quantisation_range import next_limit
from fedpeft_server.rounds.watcher import Watcher


class SummedCollector:
    """Collects one secure sum; see :class:`fedpeft_server.rounds.collection.Collector`."""

    def __init__(
        self,
        channel: Channel,
        delivery: Delivery,
        schema: AdapterSchema,
        settings: AggregationSettings,
        *,
        minimum: int,
        least: int,
        timeout_s: float,
        watcher: Watcher,
    ) -> None:
        """Collect sums of at least ``minimum`` clinics, and open none of fewer than ``least``."""
        self._channel = channel
        self._delivery = delivery
        self._schema = schema
        self._settings = settings
        self._minimum = minimum
        self._least = least
        self._timeout_s = timeout_s
        self._watcher = watcher

    def collect(
        self,
        kind: Kind,
        number: int,
        attempt: int,
        order: Order,
        nodes: Collection[int],
        sink: Sink,
    ) -> Collected:
        """Run the five stages; clinics that fall away are named, the others are summed."""
        job = order.job
        keys = self._keys(nodes)
        aggregation = Aggregation(
            self._session(kind, number, attempt, order), self._terms(kind, job, keys)
        )
        failed: dict[str, str] = {}
        privacy: dict[str, ClinicPrivacy] = {}
        max_ranks: dict[str, int] = {}

        def begun(name: str, payload: Payload) -> None:
            if kind == TRAIN:
                privacy.update(privacy_of(name, payload, job))
            else:
                max_ranks.update(max_rank_of(name, payload))
            # It may have renewed its identity between these two: then it signs with the new.
            keys[name] = self._channel.key_asked(name)
            aggregation.receive(name, payload.blob)

        for stage in STAGES:
            purpose = f"{kind}.{stage}"
            self._watcher.asked(number, purpose, sorted(aggregation.requests()))
            if stage == STAGES[0]:
                failed |= self._delivery.ask(
                    purpose,
                    number,
                    attempt,
                    order,
                    nodes,
                    timeout_s=self._timeout_s,
                    accept=begun,
                )
            else:
                failed |= self._channel.ask(
                    purpose,
                    number,
                    attempt,
                    self._letters(aggregation, stage, keys),
                    timeout_s=self._settings.stage_timeout_s,
                    accept=lambda name, payload: aggregation.receive(name, payload.blob),
                )
            try:
                aggregation.close()
            except (AggregationRefused, WrongSignature) as error:
                return Collected(failed=failed, trouble=str(error))
        return self._collected(
            kind,
            job,
            aggregation.result,
            sink,
            Collected(failed=failed, privacy=privacy, max_ranks=max_ranks),
        )

    def _session(self, kind: Kind, number: int, attempt: int, order: Order) -> Session:
        return Session(
            federation=order.job.federation,
            run=self._channel.run_id,
            round=number,
            attempt=attempt,
            kind=kind,
            model=model_digest(order.job, order.held.to_bytes()),
        )

    def _keys(self, nodes: Collection[int]) -> dict[str, bytes]:
        """Return the signing keys of those that are to be asked, by name."""
        names, keys = self._channel.names(), self._channel.signing_keys()
        return {names[node]: keys[names[node]] for node in nodes}

    def _terms(self, kind: Kind, job: Job, keys: Mapping[str, bytes]) -> Terms:
        terms = job.aggregation
        return Terms(
            identities=keys,
            adversary=self._settings.adversary,
            threshold=max(self._settings.threshold or 0, self._least) or None,
            minimum=self._minimum,
            coordinates=self._schema.part(job.sends).numel if kind == TRAIN else 0,
            integers=integers_of(job),
            quantiser=Quantiser(terms.bits, terms.limit),
        )

    def _letters(
        self, aggregation: Aggregation, stage: str, keys: Mapping[str, bytes]
    ) -> dict[int, Letter]:
        """Return what each clinic is sent after the first stage, by node.

        With the list of clinics goes how they came to their keys, for those who know older.
        """
        nodes = {name: node for node, name in self._channel.names().items()}
        requests = aggregation.requests()
        fields: dict[str, Value] = {}
        if stage == STAGES[1]:
            listed = {name: keys[name] for name in requests}
            fields = successions_field(self._channel.successions(), listed)
        return {nodes[name]: Letter(Payload(fields, data)) for name, data in requests.items()}

    def _collected(
        self, kind: Kind, job: Job, total: SecureSum, sink: Sink, begun: Collected
    ) -> Collected:
        """Hand over the mean, and return ``begun`` with what the sum says."""
        sums = Sums(
            rows=total.integers["num-examples"],
            nll=from_fixed_point(total.integers["nll"]),
            tokens=total.integers["tokens"],
        )
        verdicts = verdicts_of(total)
        if verdicts is None:
            self._watcher.warned(
                "the clinics' verdicts on the adapter do not add up, so they are not written down"
            )
        else:
            sums = replace(sums, verdicts=verdicts[0], accepted=verdicts[1])
        if kind == TRAIN:
            if sums.rows < len(total.survivors):
                why = "the clinics together report fewer rows than clinics"
                return Collected(failed=begun.failed, trouble=why)
            sink(mean_of(total, job, self._schema.part(job.sends)), sums.rows)
        return replace(
            begun,
            participants=total.survivors,
            # Who fell away after its masked vector had come is in the sum all the same.
            failed={name: why for name, why in begun.failed.items() if name not in total.survivors},
            sums=sums,
            confidentiality=self._record(kind, job, total, sums.rows),
            within_clip=total.integers["within-clip"],
        )

    def _record(self, kind: Kind, job: Job, total: SecureSum, rows: int) -> ConfidentialityRecord:
        terms, size = job.aggregation, total.coordinates.size
        words = packed_bytes(size, total.width)
        return ConfidentialityRecord(
            mode="secagg",
            threshold=total.threshold,
            survivors=len(total.survivors),
            bits=terms.bits,
            wire_bytes_per_coordinate=round(words / size, 4) if kind == TRAIN else None,
            limit=terms.limit,
            clipped=total.integers["clipped"],
            next_limit=next_limit(kind, job, total, rows),
        )


def verdicts_of(total: SecureSum) -> tuple[int, int] | None:
    """Return how many clinics told their verdict on the adapter, and how many took it.

    None if that cannot be, as a clinic counted for more than one; it spoils nothing else.
    """
    told, accepted = (total.integers.get(name, 0) for name in VERDICTS)
    return (told, accepted) if accepted <= told <= len(total.survivors) else None


def mean_of(total: SecureSum, job: Job, schema: AdapterSchema) -> AdapterState:
    """Return the mean update that a sum stands for; ``schema`` is that of what is sent.

    Where ranks differ, a column (of B; a row of A) is divided by the weight of those who
    trained it, and one that nobody trained stays as it is.
    """
    coordinates = total.coordinates
    if on_grid(job.privacy):
        coordinates = wrapped(coordinates.astype(np.int64)).astype(np.float64)
    if job.ranks is not None:
        weights = _column_weights(total, job, schema)
        mean = np.divide(coordinates, weights, out=np.zeros_like(coordinates), where=weights > 0)
    else:
        alike = counts_alike(job)
        mean = coordinates / (len(total.survivors) if alike else total.integers["num-examples"])
    mean *= value_of_unit(job, schema.numel)
    return AdapterState(schema, torch.from_numpy(mean).to(DTYPES[schema.dtype]))


def _column_weights(total: SecureSum, job: Job, schema: AdapterSchema) -> NDArray[np.float64]:
    """Return for each coordinate the weights of the clinics that trained it."""
    columns = np.zeros(schema.rank)
    # The higher a level, the fewer clinics: each one below is for the columns up to it.
    for level in reversed(levels_of(job)):
        columns[:level] = total.integers[weight_of_level(level)]
    shapes = [spec.shape for spec in schema.tensors]
    return np.concatenate(
        [
            np.broadcast_to(columns[:, None] if spec.factor == "A" else columns, shape).ravel()
            for spec, shape in zip(schema.tensors, shapes, strict=True)
        ]
    )
