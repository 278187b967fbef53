"""The round loop: every round is asked for, checked, aggregated, evaluated and made durable.

Flower's own ``Strategy.start`` can neither begin at round N, stop early, fold updates as
they arrive nor go on after a crash, so the loop is ours.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property

from fedpeft.adapters import AdapterSchema, AdapterState, Mixing, to_bytes
from fedpeft.config import FederationSettings
from fedpeft.errors import FederationError, TooFewClinics
from fedpeft.models import initial_state
from fedpeft.protocol import EVALUATE, TRAIN, Job, RankTerms
from fedpeft.protocol.lineage import SignedLineage
from fedpeft.protocol.parcel import Held, Increment
from fedpeft.sealing import Identity
from fedpeft_server.link.link import Link
from fedpeft_server.rounds.asking import Asking
from fedpeft_server.rounds.channel import Channel
from fedpeft_server.rounds.collection import Collected, Collector, Kind, Sink
from fedpeft_server.rounds.delivery import Delivery, Order
from fedpeft_server.rounds.intake import Intake
from fedpeft_server.rounds.lineage import Made, Scribe
from fedpeft_server.rounds.opened import OpenedCollector
from fedpeft_server.rounds.outcome import Outcome
from fedpeft_server.rounds.privacy_record import PrivacyRecord, beyond_goal
from fedpeft_server.rounds.quantisation_range import Ranges
from fedpeft_server.rounds.quorum import Quorum
from fedpeft_server.rounds.ranks import RankPlan
from fedpeft_server.rounds.shield import shield_of
from fedpeft_server.rounds.stopwatch import Stopwatch
from fedpeft_server.rounds.summed import SummedCollector
from fedpeft_server.rounds.watcher import Watcher
from fedpeft_server.runs.directory import FailedClinic, RoundRecord, RunDirectory
from fedpeft_server.trail import Trail
from fedpeft_strategies.strategy import Fold, Strategy


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
        trail: Trail | None = None,
        asking: Asking | None = None,
    ) -> None:
        self._settings = settings
        self._schema = schema
        self._strategy = strategy
        self._directory = directory
        self._watcher = watcher
        self._identity = identity
        self._asking = asking
        self._quorum = Quorum(settings, watcher)
        self._ranges = Ranges(settings)
        self._shield = shield_of(settings, schema.part(strategy.sends(1)).numel)
        hidden = settings.aggregation.confidentiality == "secagg"
        self._ranks = RankPlan(strategy.ranks, settings.adapter.rank, hidden=hidden)
        self._cautioned = ""
        self._scribe = Scribe(settings, identity, directory, trail)

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
            start = initial_state(self._schema, self._settings.training.seed)
            standing, last = _Standing(self._strategy.start(start)), 0
            watch = Stopwatch(link)
            outcome = self._outcome(standing)
            standing = self._told(Made(round=0), standing, outcome)
            base = self._insist(link, collector, last, EVALUATE, standing)[0]
            self._finish(last, watch, None, base, standing, outcome)
        else:
            standing = self._go_on(last)
        if released := self._directory.released():
            self._shield.follow(released)
        for number in range(last + 1, self._settings.rounds.count + 1):
            if self._out_of_patience():
                break
            watch = Stopwatch(link)
            trained, fold = self._insist(link, collector, number, TRAIN, standing)
            half, standing = self._aggregate(number, trained, fold, standing)
            made = Made(round=number, participants=trained.participants, privacy=half.privacy)
            outcome = self._outcome(standing)
            standing = self._told(made, standing, outcome)
            evaluated = self._collect(link, collector, number, 1, EVALUATE, standing, _nowhere)
            self._finish(number, watch, half, evaluated, standing, outcome)
        records = self._directory.records()
        if passed := beyond_goal(self._settings, [record.privacy for record in records]):
            self._watcher.warned(passed)
        if self._strategy.declaration.personal:
            self._watcher.warned(
                "each clinic keeps a factor of its own, so that the adapter here does nothing by "
                "itself; the results are the adapters that lie at the clinics"
            )
        self._watcher.finished(records)

    def _told(self, made: Made, standing: "_Standing", outcome: Outcome) -> "_Standing":
        """Return ``standing`` with the signed lineage of its adapter."""
        return replace(standing, lineage=self._scribe.signed(made, outcome))

    def _outcome(self, standing: "_Standing") -> Outcome:
        return Outcome(
            adapter=standing.adapter,
            memory=self._strategy.memory(),
            increments=standing.increments,
        )

    def _go_on(self, last: int) -> "_Standing":
        """Take over where the last finished round ended."""
        found = self._directory.outcome_of(last, self._schema)
        self._strategy.recall(found.memory)
        self._directory.publish(found)
        for record in self._directory.records():
            self._follow(record)
        return _Standing(found.adapter, found.increments)

    def _collector(self, link: Link) -> Collector:
        """Return the way in which answers are collected under the federation's settings."""
        settings = self._settings
        channel = Channel(
            link,
            self._identity,
            federation=settings.name,
            schema=self._schema.hash,
            values=self._schema.numel,
            asking=self._asking,
        )
        delivery, timeout_s = Delivery(channel), settings.rounds.timeout_s
        if settings.aggregation.confidentiality == "sealed":
            return OpenedCollector(delivery, self._schema, timeout_s)
        return SummedCollector(
            channel,
            delivery,
            self._schema,
            settings.aggregation,
            minimum=settings.rounds.minimum_clinics,
            least=self._shield.least,
            timeout_s=timeout_s,
            watcher=self._watcher,
        )

    def _insist(
        self, link: Link, collector: Collector, number: int, kind: Kind, standing: "_Standing"
    ) -> tuple[Collected, "_Folding | None"]:
        """Ask again while fewer usable answers come than the minimum.

        Returns:
            What came, and of a training round the way that the updates took.

        Raises:
            FederationError: too few came, however often it was asked.
        """
        rounds, why, failed = self._settings.rounds, "", list[str]()
        for attempt in range(1, rounds.retries + 2):
            self._quorum.gather(link, number)
            folding = self._folding(number, standing) if kind == TRAIN else None
            sink = folding.intake.add if folding is not None else _nowhere
            collected = self._collect(
                link, collector, number, attempt, kind, standing, sink, failed
            )
            # Who refused for want of others is not what was wanting.
            reasons = collected.failed.items()
            failed = [name for name, reason in reasons if reason != TooFewClinics.reason]
            if self._quorum.is_reached(collected):
                return collected, folding
            why = self._quorum.missing(collected)
            if self._quorum.is_hopeless(link, collected):
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

    def _folding(self, number: int, standing: "_Standing") -> "_Folding":
        fold = self._strategy.fold(number, standing.adapter)
        part = self._schema.part(self._strategy.sends(number))
        return _Folding(fold, self._shield.intake(fold, part))

    def _collect(
        self,
        link: Link,
        collector: Collector,
        number: int,
        attempt: int,
        kind: Kind,
        standing: "_Standing",
        sink: Sink,
        failed: Collection[str] = (),
    ) -> Collected:
        """Send the adapter to everybody, to train from or to keep and evaluate.

        On the clinics that ``failed`` in the attempt before, no rank is built.
        """
        nodes = sorted(link.grid.get_node_ids())
        if not nodes:
            return Collected()
        names = link.names()
        self._scribe.meet(link)
        asked = sorted(names[node] for node in nodes)
        job = self._job(
            number, self._terms([name for name in asked if name not in failed] or asked), standing
        )
        self._watcher.asked(number, kind, asked)
        kept = standing.lineage if kind == EVALUATE else None
        order = Order(job, standing.held, standing.mixing, kept)
        collected = collector.collect(kind, number, attempt, order, nodes, sink)
        self._ranks.heard(collected.max_ranks)
        return replace(collected, ranks=job.ranks)

    def _terms(self, clinics: list[str]) -> RankTerms | None:
        """Return at which ranks ``clinics`` take part, and say what that leaves out."""
        terms = self._ranks.terms(clinics)
        caution = self._ranks.caution(terms)
        if caution and caution != self._cautioned:
            self._watcher.warned(caution)
        self._cautioned = caution
        return terms

    def _aggregate(
        self, number: int, trained: Collected, folding: "_Folding | None", standing: "_Standing"
    ) -> tuple["_Half", "_Standing"]:
        """Return what the round's updates became."""
        if folding is None:
            raise FederationError("a round must be trained before it is aggregated")
        privacy = folding.intake.close(trained)
        if privacy is not None and privacy.next_clip is not None:
            # The clinics' ledgers remember what they spent; of this server's noise nobody does.
            self._directory.note_release(privacy)
        found = folding.fold.result()
        found.adapter.require_finite(source=f"the aggregation of round {number}")
        increments = standing.increments
        if found.increment is not None:
            found.increment.require_finite(source=f"the aggregation of round {number}")
            increments = (*increments, found.increment)
        new = len(increments) - len(standing.increments)
        half = _Half(trained, privacy, found.product_error, new)
        return half, _Standing(found.adapter, increments, found.mixing)

    def _finish(
        self,
        number: int,
        watch: Stopwatch,
        half: "_Half | None",
        evaluated: Collected,
        standing: "_Standing",
        outcome: Outcome,
    ) -> None:
        """Make the round durable and say so; ``half`` is None in round 0."""
        trained = half.trained if half else Collected()
        failed = {**evaluated.failed, **trained.failed}
        up, down, seconds = watch.read()
        record = RoundRecord(
            round=number,
            participants=trained.participants,
            failed=tuple(FailedClinic(clinic=n, reason=r) for n, r in sorted(failed.items())),
            train_loss=trained.sums.loss,
            valid_loss=evaluated.sums.loss,
            per_clinic=evaluated.losses,
            bytes_up=up,
            bytes_down=down,
            seconds=seconds,
            confidentiality=(trained if half else evaluated).confidentiality,
            privacy=half.privacy if half else None,
            sent=self._strategy.sends(number) if half else None,
            product_error=half.product_error if half else None,
            ranks=trained.ranks,
            max_ranks=evaluated.max_ranks,
            verdicts=evaluated.sums.verdicts,
            accepted=evaluated.sums.accepted,
        )
        self._directory.save_round(
            record,
            outcome,
            new=half.new_increments if half else 0,
            lineage=standing.lineage,
        )
        self._follow(record)
        self._watcher.round_finished(record)

    def _follow(self, record: RoundRecord) -> None:
        """Quantise and clip the next round as the last one suggests."""
        if record.privacy is not None:
            self._shield.follow(record.privacy)
        self._ranks.heard(record.max_ranks)
        found = record.confidentiality.next_limit if record.confidentiality else None
        if found is not None:
            self._ranges.follow(found, record.sent, record.ranks)

    def _out_of_patience(self) -> bool:
        """Say whether the validation loss has not improved for ``rounds.patience`` rounds."""
        patience = self._settings.rounds.patience
        if patience is None:
            return False
        records = self._directory.records()
        losses = [record.valid_loss for record in records if record.valid_loss is not None]
        return len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])

    def _job(self, number: int, ranks: RankTerms | None, standing: "_Standing") -> Job:
        trains, sends = ("AB", "AB")
        if number:
            trains, sends = self._strategy.trains(number), self._strategy.sends(number)
        return Job(
            federation=self._settings.name,
            run=self._directory.id,
            fingerprint=self._schema.fingerprint,
            quantization=self._settings.model.quantization,
            adapter=self._settings.adapter,
            training=self._settings.training,
            aggregation=self._shield.terms(self._ranges.limit(sends, ranks)),
            privacy=self._shield.asked(),
            trains=trains,
            sends=sends,
            ranks=ranks,
            base_change=tuple(one.digest for one in standing.held.increments),
            asks_verdict=self._settings.rounds.ask_verdicts,
            round=number,
            rounds=self._settings.rounds.count,
        )


def _nowhere(_update: AdapterState, _weight: float) -> None:
    """Take an update where none is asked for."""


@dataclass(frozen=True)
class _Standing:
    """What all clinics work on, and how it followed from what they held before."""

    adapter: AdapterState
    increments: tuple[AdapterState, ...] = ()
    mixing: Mixing | None = None
    lineage: SignedLineage | None = None

    @cached_property
    def held(self) -> Held:
        """The same as a clinic holds it."""
        products = [Increment(one.schema.rank, to_bytes(one, "update")) for one in self.increments]
        return Held(self.adapter, tuple(products))


@dataclass(frozen=True, slots=True)
class _Folding:
    """One attempt at a training round: the strategy's fold, and the way of updates to it."""

    fold: Fold
    intake: Intake


@dataclass(frozen=True, slots=True)
class _Half:
    """The first half of a round: what was trained, what it cost, and what became of it."""

    trained: Collected
    privacy: PrivacyRecord | None
    product_error: float | None
    new_increments: int
