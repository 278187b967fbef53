"""Signs what made each round's adapter: see ``fedpeft.protocol.lineage``."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from fedpeft.adapters import at_rank
from fedpeft.adapters.peft_directory import weights_bytes
from fedpeft.config import FederationSettings
from fedpeft.protocol.lineage import (
    Base,
    Contributor,
    Lineage,
    LogEnd,
    Parent,
    Protection,
    SignedLineage,
    Spent,
    Weights,
    sign,
    with_round,
)
from fedpeft.protocol.privacy import ClinicPrivacy
from fedpeft.sealing import Identity
from fedpeft_server.link.link import Link
from fedpeft_server.rounds.outcome import Outcome
from fedpeft_server.rounds.privacy_record import PrivacyRecord, latest_losses
from fedpeft_server.runs.directory import FREE_TO_CHANGE, RoundRecord, RunDirectory
from fedpeft_server.trail import Trail


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """How a round's adapter was made: whose updates are in it, and what it has cost them."""

    round: int
    participants: tuple[str, ...] = ()
    privacy: PrivacyRecord | None = None


class Scribe:
    """Writes the lineages of one run; ``trail`` is None where no audit log is kept."""

    def __init__(
        self,
        settings: FederationSettings,
        identity: Identity,
        directory: RunDirectory,
        trail: Trail | None,
    ) -> None:
        self._settings = settings
        self._identity = identity
        self._directory = directory
        self._trail = trail
        self._met: dict[str, str] = {}

    def meet(self, link: Link) -> None:
        """Remember the identities of the clinics that are enrolled now, before one is removed."""
        names = link.names()
        self._met |= {names[node]: each.fingerprint for node, each in link.identities().items()}

    def signed(self, made: Made, outcome: Outcome) -> SignedLineage:
        """Return the lineage of an adapter that no clinic has been sent yet.

        Raises:
            StorageError: the round before cannot be read, or the audit log not be written.
            LineageRefused: the lineage of the round before was changed.
        """
        whole, settings = outcome.whole, self._settings
        kept = at_rank(settings.adapter, whole.schema.rank)
        digest = hashlib.sha256(weights_bytes(whole)).hexdigest()
        end = self._trail.end if self._trail is not None else None
        records = self._directory.records()[: made.round]
        before = self._directory.lineage_of(made.round - 1) if made.round else None
        lineage = Lineage(
            federation=settings.name,
            run=self._directory.id,
            round=made.round,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            base=Base(
                fingerprint=whole.schema.fingerprint, quantization=settings.model.quantization
            ),
            weights=Weights(sha256=digest, rank=kept.rank, alpha=kept.alpha),
            parent=self._parent(made.round, before),
            clinics=self._clinics(made, before, records),
            strategy=settings.strategy.name,
            mode=settings.aggregation.confidentiality,
            privacy=self._protection(made, records),
            settings=_digest_of(settings),
            log=None if end is None else LogEnd(seq=end.seq, hash=end.hash),
        )
        signed = sign(lineage, self._identity)
        if self._trail is not None:
            self._trail.adapter(lineage.run, made.round, lineage=signed.digest, weights=digest)
        return signed

    def _parent(self, number: int, before: SignedLineage | None) -> Parent | None:
        if not number:
            return None
        return Parent(
            round=number - 1,
            lineage=before and before.digest,
            weights=self._directory.weights_digest(number - 1),
        )

    def _clinics(
        self, made: Made, before: SignedLineage | None, records: list[RoundRecord]
    ) -> dict[str, Contributor]:
        """Return the clinics of all rounds up to this one.

        Of rounds that a release before lineages made, those that their records name.
        """
        known: Mapping[str, Contributor] = before.lineage.clinics if before else {}
        rounds = {name: one.rounds for name, one in known.items()}
        earlier = [] if before else [(one.round, one.participants) for one in records]
        for number, names in [*earlier, (made.round, made.participants)]:
            for name in names:
                rounds[name] = with_round(rounds.get(name, ""), number)
        prints = {name: one.fingerprint for name, one in known.items()} | self._met
        return {
            name: Contributor(fingerprint=prints.get(name), rounds=of)
            for name, of in sorted(rounds.items())
        }

    def _protection(self, made: Made, records: list[RoundRecord]) -> Protection | None:
        terms = self._settings.privacy
        if terms is None:
            return None
        losses = latest_losses([*(record.privacy for record in records), made.privacy])
        return Protection.of(terms, _largest(list(losses.values())))


def _largest(losses: list[ClinicPrivacy]) -> Spent | None:
    if not losses:
        return None
    bounds = [loss.epsilon for loss in losses if loss.epsilon is not None]
    epsilon = max(bounds) if len(bounds) == len(losses) else None
    return Spent(epsilon=epsilon, delta=max(loss.delta for loss in losses))


def _digest_of(settings: FederationSettings) -> str:
    content = settings.model_dump(mode="json", exclude=FREE_TO_CHANGE)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
