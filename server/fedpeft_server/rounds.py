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
from fedpeft.errors import AdapterError, FederationError
from fedpeft.models import initial_state
from fedpeft.protocol import (
    NUM_EXAMPLES,
    TRAIN_NLL,
    TRAIN_TOKENS,
    VALID_NLL,
    VALID_TOKENS,
    Job,
    array_record,
    config_record,
    mean_loss,
    metric_from,
    state_from,
    state_of,
)
from fedpeft_server.exchange import Check, Outcome, exchange
from fedpeft_server.link import Link
from fedpeft_server.run_directory import FailedClinic, RoundRecord, RunDirectory

_POLL_S = 0.2


class Watcher(Protocol):
    """Somebody who is told how the run goes on."""

    def waiting(self, connected: int, enrolled: int, minimum: int) -> None:
        """Too few clinics are connected yet."""
        ...

    def asked(self, number: int, kind: str, clinics: list[str]) -> None:
        """The clinics are about to work on a message of ``kind`` train or evaluate.

        Round 0 is the evaluation of the base model.
        """
        ...

    def round_repeated(self, number: int, why: str) -> None:
        """Too few usable answers came."""
        ...

    def round_finished(self, record: RoundRecord) -> None:
        """A round is aggregated and durable."""
        ...


class Federation:
    """One run of one federation over any engine."""

    def __init__(
        self,
        settings: FederationSettings,
        schema: AdapterSchema,
        strategy: Strategy,
        directory: RunDirectory,
        watcher: Watcher,
    ) -> None:
        self._settings = settings
        self._schema = schema
        self._strategy = strategy
        self._directory = directory
        self._watcher = watcher

    def run(self, link: Link) -> None:
        """Run the rounds that are not finished yet.

        Raises:
            FederationError: too few clinics connected or answered, after all retries.
            StorageError: a finished round cannot be written, or another run lies there.
        """
        last = self._directory.open(self._schema.fingerprint)
        if last is None:
            state = initial_state(self._schema, self._settings.training.seed)
            last = 0
            self._gather(link, last)
            watch = _Stopwatch(link)
            base = self._insist(link, last, lambda: self._evaluate(link, last, state))
            self._finish(last, watch, _Trained({}, {}, None), base, state)
        else:
            state = self._directory.adapter_of(last, self._schema)
            self._directory.publish(state)
        for number in range(last + 1, self._settings.rounds.count + 1):
            if self._out_of_patience():
                break
            self._gather(link, number)
            watch = _Stopwatch(link)
            trained, state = self._train(link, number, state)
            evaluated = self._evaluate(link, number, state)
            self._finish(number, watch, trained, evaluated, state)

    def _train(
        self, link: Link, number: int, state: AdapterState
    ) -> "tuple[_Trained, AdapterState]":
        """Train and aggregate one round."""

        def ask() -> Outcome:
            messages = self._strategy.configure_train(
                number, array_record(state, "adapter"), config_record(self._job(number)), link.grid
            )
            return self._exchange(link, number, messages, self._check_update)

        return self._aggregate(number, self._insist(link, number, ask))

    def _insist(self, link: Link, number: int, ask: Callable[[], Outcome]) -> Outcome:
        """Ask again while fewer usable answers come than the minimum.

        Raises:
            FederationError: too few came, however often it was asked.
        """
        rounds, why = self._settings.rounds, ""
        for attempt in range(1, rounds.retries + 2):
            self._gather(link, number)
            outcome = ask()
            if len(outcome.answers) >= rounds.minimum_clinics:
                return outcome
            why = self._too_few(outcome)
            if attempt <= rounds.retries:
                self._watcher.round_repeated(number, why)
        raise FederationError(
            f"round {number} failed {rounds.retries + 1} times: {why}; mend what the reasons name, "
            f"then start again: finished rounds are kept in {self._directory.path}"
        )

    def _aggregate(self, number: int, outcome: Outcome) -> "tuple[_Trained, AdapterState]":
        arrays, metrics = self._strategy.aggregate_train(number, outcome.answers.values())
        if arrays is None or metrics is None:
            raise FederationError(f"the strategy made no adapter of round {number}'s updates")
        state = state_of(arrays, self._schema, "adapter", source="the strategy")
        state.require_finite(source=f"the aggregation of round {number}")
        loss = mean_loss(metrics, TRAIN_NLL, TRAIN_TOKENS)
        return _Trained(outcome.answers, outcome.failed, loss), state

    def _evaluate(self, link: Link, number: int, state: AdapterState) -> Outcome:
        """Send ``state`` to everybody, to keep and to evaluate."""
        messages = self._strategy.configure_evaluate(
            number, array_record(state, "adapter"), config_record(self._job(number)), link.grid
        )
        return self._exchange(link, number, messages, self._check_score)

    def _finish(
        self,
        number: int,
        watch: "_Stopwatch",
        trained: "_Trained",
        evaluated: Outcome,
        state: AdapterState,
    ) -> None:
        """Make the round durable and say so."""
        metrics = self._strategy.aggregate_evaluate(number, evaluated.answers.values())
        overall = mean_loss(metrics, VALID_NLL, VALID_TOKENS) if metrics is not None else None
        failed = {**evaluated.failed, **trained.failed}
        up, down, seconds = watch.read()
        record = RoundRecord(
            round=number,
            participants=tuple(trained.answers),
            failed=tuple(FailedClinic(clinic=n, reason=r) for n, r in sorted(failed.items())),
            train_loss=trained.loss,
            valid_loss=overall,
            per_clinic=_losses(evaluated),
            bytes_up=up,
            bytes_down=down,
            seconds=seconds,
        )
        self._directory.save_round(record, state)
        self._watcher.round_finished(record)

    def _exchange(
        self, link: Link, number: int, messages: Iterable[Message], check: Check
    ) -> Outcome:
        outgoing = list(messages)
        names = link.names()
        asked = sorted(names[message.metadata.dst_node_id] for message in outgoing)
        kind = outgoing[0].metadata.message_type if outgoing else ""
        self._watcher.asked(number, kind, asked)
        return exchange(link, outgoing, timeout_s=self._settings.rounds.timeout_s, check=check)

    def _check_update(self, name: str, reply: Message) -> None:
        source = f"clinic {name}"
        state_from(reply.content, self._schema, "update", source=source).require_finite(
            source=source
        )
        metric_from(reply.content, TRAIN_NLL)
        metric_from(reply.content, TRAIN_TOKENS)
        if not metric_from(reply.content, NUM_EXAMPLES):
            raise AdapterError(f"{source} reports an update of no examples; it is not used")

    def _check_score(self, name: str, reply: Message) -> None:
        metric_from(reply.content, VALID_NLL)
        metric_from(reply.content, VALID_TOKENS)

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

    def _too_few(self, outcome: Outcome) -> str:
        failed = ", ".join(f"{name}: {reason}" for name, reason in outcome.failed.items())
        return (
            f"{len(outcome.answers)} usable answers where rounds.minimum_clinics = "
            f"{self._settings.rounds.minimum_clinics} ({failed or 'no other clinic is connected'})"
        )

    def _job(self, number: int) -> Job:
        return Job(
            federation=self._settings.name,
            fingerprint=self._schema.fingerprint,
            quantization=self._settings.model.quantization,
            adapter=self._settings.adapter,
            training=self._settings.training,
            round=number,
            rounds=self._settings.rounds.count,
        )


@dataclass(frozen=True, slots=True)
class _Trained:
    """The training half of a round; ``loss`` is the token-weighted mean."""

    answers: dict[str, Message]
    failed: dict[str, str]
    loss: float | None


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


def _losses(evaluated: Outcome) -> dict[str, float]:
    losses: dict[str, float] = {}
    for name, reply in evaluated.answers.items():
        if tokens := metric_from(reply.content, VALID_TOKENS):
            losses[name] = metric_from(reply.content, VALID_NLL) / tokens
    return losses
