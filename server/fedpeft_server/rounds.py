"""The round loop: every round is asked for, checked, aggregated, evaluated and made durable.

Flower's own ``Strategy.start`` can neither begin at round N, stop early nor go
on after a crash, so the loop is ours and calls the strategy's hooks.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from flwr.app import Message
from flwr.serverapp.strategy import Strategy

from fedpeft.adapters import AdapterSchema, AdapterState
from fedpeft.config import FederationSettings
from fedpeft.errors import LASTING_REASONS, FederationError
from fedpeft.models import initial_state
from fedpeft.protocol import (
    EVALUATE,
    TRAIN,
    TRAIN_NLL,
    TRAIN_TOKENS,
    VALID_NLL,
    VALID_TOKENS,
    Job,
    array_record,
    config_record,
    mean_loss,
    state_of,
)
from fedpeft.sealing import Identity
from fedpeft.secagg.threshold import floor_of
from fedpeft_server.channel import Channel
from fedpeft_server.collection import Collected, Collector, Kind
from fedpeft_server.link import Link
from fedpeft_server.opened import OpenedCollector
from fedpeft_server.privacy_record import PrivacyRecord, beyond_goal
from fedpeft_server.quantisation_range import first_limit
from fedpeft_server.run_directory import FailedClinic, RoundRecord, RunDirectory
from fedpeft_server.shield import shield_of
from fedpeft_server.summed import SummedCollector

_POLL_S = 0.2


class Watcher(Protocol):
    """Somebody who is told how the run goes on."""

    def waiting(self, connected: int, enrolled: int, minimum: int) -> None:
        """Too few clinics are connected yet."""
        ...

    def asked(self, number: int, kind: str, clinics: list[str]) -> None:
        """The clinics are about to get a message of ``kind`` (train, evaluate, train.keys ...).

        Round 0 is the evaluation of the base model.
        """
        ...

    def warned(self, sentence: str) -> None:
        """Something about the run should be known before it goes on."""
        ...

    def round_repeated(self, number: int, why: str) -> None:
        """Too few usable answers came."""
        ...

    def round_finished(self, record: RoundRecord) -> None:
        """A round is aggregated and durable."""
        ...

    def finished(self, records: list[RoundRecord]) -> None:
        """The run has come to its end; ``records`` are all of its rounds."""
        ...


class Federation:
    """One run of one federation over any engine; ``identity`` signs what clinics are asked."""

    def __init__(
        self,
        settings: FederationSettings,
        schema: AdapterSchema,
        strategy: Strategy,
        directory: RunDirectory,
        watcher: Watcher,
        identity: Identity,
    ) -> None:
        self._settings = settings
        self._schema = schema
        self._strategy = strategy
        self._directory = directory
        self._watcher = watcher
        self._identity = identity
        self._limit = settings.aggregation.limit or first_limit(settings.training)
        self._shield = shield_of(settings, schema)

    def run(self, link: Link) -> None:
        """Run the rounds that are not finished yet.

        Raises:
            FederationError: too few clinics connected or answered, after all retries.
            StorageError: a finished round cannot be written, or another run lies there.
        """
        last = self._directory.open(self._schema.fingerprint)
        if self._settings.privacy is not None and self._settings.privacy.test_seed is not None:
            self._watcher.warned("privacy.test_seed is set, so this run protects nobody")
        if caution := self._shield.caution(len(link.names())):
            self._watcher.warned(caution)
        collector = self._collector(link)
        if last is None:
            state = initial_state(self._schema, self._settings.training.seed)
            last = 0
            watch = _Stopwatch(link)
            base = self._insist(link, collector, last, EVALUATE, state)
            self._finish(last, watch, None, base, state)
        else:
            state = self._directory.adapter_of(last, self._schema)
            self._directory.publish(state)
            for record in self._directory.records():
                self._follow(record)
        if released := self._directory.released():
            self._shield.follow(released)
        for number in range(last + 1, self._settings.rounds.count + 1):
            if self._out_of_patience():
                break
            watch = _Stopwatch(link)
            trained, privacy = self._shield.release(
                self._insist(link, collector, number, TRAIN, state)
            )
            if privacy is not None and privacy.next_clip is not None:
                # The clinics' ledgers remember what they spent; of this server's noise nobody does.
                self._directory.note_release(privacy)
            state, loss = self._aggregate(number, trained)
            evaluated = self._collect(link, collector, number, 1, EVALUATE, state)
            self._finish(number, watch, _Half(trained, loss, privacy), evaluated, state)
        records = self._directory.records()
        if passed := beyond_goal(self._settings, [record.privacy for record in records]):
            self._watcher.warned(passed)
        self._watcher.finished(records)

    def _collector(self, link: Link) -> Collector:
        """Return the way in which answers are collected under the federation's settings."""
        channel = Channel(
            link,
            self._identity,
            federation=self._settings.name,
            schema=self._schema.hash,
            values=self._schema.numel,
        )
        aggregation = self._settings.aggregation
        if aggregation.confidentiality == "sealed":
            return OpenedCollector(channel, self._schema)
        return SummedCollector(
            channel,
            self._schema,
            aggregation,
            minimum=self._settings.rounds.minimum_clinics,
            least=self._shield.least,
            told=self._watcher.asked,
        )

    def _insist(
        self, link: Link, collector: Collector, number: int, kind: Kind, state: AdapterState
    ) -> Collected:
        """Ask again while fewer usable answers come than the minimum.

        Raises:
            FederationError: too few came, however often it was asked.
        """
        rounds, why = self._settings.rounds, ""
        for attempt in range(1, rounds.retries + 2):
            self._gather(link, number)
            collected = self._collect(link, collector, number, attempt, kind, state)
            if len(collected.participants) >= rounds.minimum_clinics:
                return collected
            why = self._too_few(collected)
            if self._is_hopeless(link, collected):
                raise FederationError(
                    f"round {number} failed and is not repeated, as a repetition costs the other "
                    f"clinics and these reasons stay: {why}; mend what the reasons name, then "
                    f"start again: finished rounds are kept in {self._directory.path}"
                )
            if attempt <= rounds.retries:
                self._watcher.round_repeated(number, why)
        raise FederationError(
            f"round {number} failed {rounds.retries + 1} times: {why}; mend what the reasons name, "
            f"then start again: finished rounds are kept in {self._directory.path}"
        )

    def _is_hopeless(self, link: Link, collected: Collected) -> bool:
        """Say whether too few clinics are left that could answer if they were asked again."""
        refusing = sum(reason in LASTING_REASONS for reason in collected.failed.values())
        aggregation, clinics = self._settings.aggregation, len(list(link.grid.get_node_ids()))
        needed = self._settings.rounds.minimum_clinics
        if aggregation.confidentiality == "secagg":
            needed = max(needed, floor_of(clinics, aggregation.adversary))
        return clinics - refusing < needed

    def _collect(
        self,
        link: Link,
        collector: Collector,
        number: int,
        attempt: int,
        kind: Kind,
        state: AdapterState,
    ) -> Collected:
        """Send ``state`` to everybody, to train from or to keep and evaluate."""
        configure: Callable[..., Iterable[Message]] = (
            self._strategy.configure_train if kind == TRAIN else self._strategy.configure_evaluate
        )
        job = config_record(self._job(number))
        messages = list(configure(number, array_record(state, "adapter"), job, link.grid))
        if not messages:
            return Collected()
        names = link.names()
        asked = sorted(names[message.metadata.dst_node_id] for message in messages)
        self._watcher.asked(number, kind, asked)
        timeout_s = self._settings.rounds.timeout_s
        return collector.collect(kind, number, attempt, messages, timeout_s)

    def _aggregate(self, number: int, collected: Collected) -> tuple[AdapterState, float | None]:
        """Return the next adapter and the token-weighted mean of the training loss."""
        arrays, metrics = self._strategy.aggregate_train(number, collected.replies)
        if arrays is None or metrics is None:
            raise FederationError(f"the strategy made no adapter of round {number}'s updates")
        state = state_of(arrays, self._schema, "adapter", source="the strategy")
        state.require_finite(source=f"the aggregation of round {number}")
        return state, mean_loss(metrics, TRAIN_NLL, TRAIN_TOKENS)

    def _finish(
        self,
        number: int,
        watch: "_Stopwatch",
        half: "_Half | None",
        evaluated: Collected,
        state: AdapterState,
    ) -> None:
        """Make the round durable and say so; ``half`` is None in round 0."""
        metrics = self._strategy.aggregate_evaluate(number, evaluated.replies)
        overall = mean_loss(metrics, VALID_NLL, VALID_TOKENS) if metrics is not None else None
        trained = half.trained if half else Collected()
        failed = {**evaluated.failed, **trained.failed}
        up, down, seconds = watch.read()
        record = RoundRecord(
            round=number,
            participants=trained.participants,
            failed=tuple(FailedClinic(clinic=n, reason=r) for n, r in sorted(failed.items())),
            train_loss=half.loss if half else None,
            valid_loss=overall,
            per_clinic=evaluated.losses,
            bytes_up=up,
            bytes_down=down,
            seconds=seconds,
            confidentiality=(trained if half else evaluated).confidentiality,
            privacy=half.privacy if half else None,
        )
        self._directory.save_round(record, state)
        self._follow(record)
        self._watcher.round_finished(record)

    def _follow(self, record: RoundRecord) -> None:
        """Quantise and clip the next round as the last one suggests."""
        if record.privacy is not None:
            self._shield.follow(record.privacy)
        found = record.confidentiality.next_limit if record.confidentiality else None
        if self._settings.aggregation.limit is None and found is not None:
            self._limit = found

    def _gather(self, link: Link, number: int) -> None:
        """Wait for the minimum of clinics, and for a while for the other enrolled ones.

        Raises:
            FederationError: the minimum did not come in ``rounds.wait_s`` seconds.
        """
        rounds, began, told = self._settings.rounds, time.monotonic(), -1
        while True:
            enrolled, connected = len(link.names()), len(list(link.grid.get_node_ids()))
            waited = time.monotonic() - began
            enough = connected >= rounds.minimum_clinics
            if enough and (connected >= enrolled or waited >= rounds.gather_s):
                return
            if not enough and waited >= rounds.wait_s:
                raise FederationError(
                    f"round {number} cannot start: {connected} of {enrolled} enrolled clinics are "
                    f"connected after {waited:.0f} s where rounds.minimum_clinics = "
                    f"{rounds.minimum_clinics}; start the missing clinics, then start again"
                )
            if connected != told:
                self._watcher.waiting(connected, enrolled, rounds.minimum_clinics)
                told = connected
            time.sleep(_POLL_S)

    def _out_of_patience(self) -> bool:
        """Say whether the validation loss has not improved for ``rounds.patience`` rounds."""
        patience = self._settings.rounds.patience
        if patience is None:
            return False
        records = self._directory.records()
        losses = [record.valid_loss for record in records if record.valid_loss is not None]
        return len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])

    def _too_few(self, collected: Collected) -> str:
        failed = ", ".join(f"{name}: {reason}" for name, reason in collected.failed.items())
        if collected.trouble:
            return f"{collected.trouble} ({failed or 'no clinic gave a reason'})"
        return (
            f"{len(collected.participants)} usable answers where rounds.minimum_clinics = "
            f"{self._settings.rounds.minimum_clinics} ({failed or 'no other clinic is connected'})"
        )

    def _job(self, number: int) -> Job:
        return Job(
            federation=self._settings.name,
            fingerprint=self._schema.fingerprint,
            quantization=self._settings.model.quantization,
            adapter=self._settings.adapter,
            training=self._settings.training,
            aggregation=self._shield.terms(self._limit),
            privacy=self._shield.asked(),
            round=number,
            rounds=self._settings.rounds.count,
        )


@dataclass(frozen=True, slots=True)
class _Half:
    """The first half of a round: what was trained, its mean loss, and what it cost."""

    trained: Collected
    loss: float | None
    privacy: PrivacyRecord | None


class _Stopwatch:
    """Seconds and bytes on the wire since it was made."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._began = time.monotonic()
        self._before = (link.meter.bytes_up, link.meter.bytes_down)

    def read(self) -> tuple[int, int, float]:
        """Return (bytes up, bytes down, seconds)."""
        meter, (up, down) = self._link.meter, self._before
        seconds = round(time.monotonic() - self._began, 3)
        return meter.bytes_up - up, meter.bytes_down - down, seconds
