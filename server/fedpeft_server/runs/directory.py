"""A run on disk: every finished round, the last adapter and the summary.

    run.json                what the run is, to recognise it when it goes on
    rounds/N/adapter/       the adapter after round N (stock PEFT; N = 0: the start)
    rounds/N/adapter/lineage.json   what made it, signed by the server
    rounds/N/trained/       only if the base model was changed: the adapter on the changed base
    rounds/N/round.json     what happened in round N
    rounds/N/strategy.safetensors   what the strategy must not forget, if anything
    rounds/N/product.safetensors    what round N added to the base model, if anything
    adapter/                the adapter after the last finished round
    released.json           what was spent before the last mean left, where the server adds noise
    summary.json            everything above in one file

A round appears by one rename, so it is there whole or not at all.
"""

import hashlib
import json
import resource
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, ValidationError

from fedpeft.adapters import (
    AdapterSchema,
    AdapterState,
    Factors,
    at_rank,
    load_adapter,
    save_adapter,
)
from fedpeft.adapters.peft_directory import WEIGHTS_FILE
from fedpeft.config import FederationSettings
from fedpeft.errors import StorageError
from fedpeft.protocol import RankTerms
from fedpeft.protocol.lineage import LINEAGE_FILE, SignedLineage, read_lineage
from fedpeft.storage import explained, sync_directory, write_atomically
from fedpeft_server.rounds.collection import ConfidentialityRecord
from fedpeft_server.rounds.outcome import Outcome, load_memory, load_product, save_outcome
from fedpeft_server.rounds.privacy_record import PrivacyRecord, summary_of

SCHEMA = 1
_BESIDE = {"data", "logs", "compared", "ledgers", "personal"}
"""What simulations put beside a run."""
_RELEASED = "released.json"
FREE_TO_CHANGE = {"rounds", "release"}
"""Settings that may differ when a run goes on: they do not change what a round computes."""


class FailedClinic(BaseModel):
    """A clinic whose answer was not used, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    clinic: str
    reason: str


class RoundRecord(BaseModel):
    """What happened in one round; losses in nats per target token, None if unknown."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    round: int
    participants: tuple[str, ...]
    failed: tuple[FailedClinic, ...]
    train_loss: float | None
    valid_loss: float | None
    per_clinic: dict[str, float]
    bytes_up: int
    bytes_down: int
    seconds: float
    confidentiality: ConfidentialityRecord | None = None
    """None in rounds of release 0.1."""
    privacy: PrivacyRecord | None = None
    """None in rounds without noise."""
    sent: Factors | None = None
    """The factors that clinics sent; None in round 0, and of releases before 0.3."""
    product_error: float | None = None
    """How far the product BA is from the mean of the clinics', in parts of it; None: not known."""
    ranks: RankTerms | None = None
    """At which rank each clinic trained; None: all at the adapter's."""
    has_memory: bool = False
    has_product: bool = False
    """Whether strategy.safetensors and product.safetensors lie beside the record."""
    max_ranks: dict[str, int] = {}
    """The largest rank that each clinic trains, as it reported after the round."""
    verdicts: int = 0
    """Clinics that told whether they use the round's adapter; 0 where that is not asked."""
    accepted: int = 0
    """How many of those have taken it into use."""


class RunDirectory:
    """The files of one run of one federation."""

    def __init__(self, path: Path, settings: FederationSettings, *, engine: str) -> None:
        self.path = path
        self._settings = settings
        self._engine = engine

    def open(self, fingerprint: str) -> int | None:
        """Create the run, or find it again; return the last finished round, None if there is none.

        Raises:
            StorageError: the directory holds something else, or another run.
        """
        identity = self._identity(fingerprint)
        known = self.path / "run.json"
        rounds = self._finished()
        if known.is_file() and rounds:
            found = _read_json(known)
            if {**found, "settings": _completed(found), "id": ""} != {**identity, "id": ""}:
                raise StorageError(
                    f"{self.path} holds a run with other settings, data files or base model; name "
                    "another directory with --out, or remove that one to start over"
                )
        elif not known.is_file() and self._present() - _BESIDE:
            raise StorageError(
                f"{self.path} is not empty and holds no run of fedpeft; name another directory "
                "with --out"
            )
        elif not self._is_begun(known, identity):
            write_atomically(known, _json_bytes({**identity, "id": secrets.token_hex(16)}))
        return rounds[-1] if rounds else None

    @staticmethod
    def _is_begun(known: Path, identity: dict[str, Any]) -> bool:
        """Say whether this very run was begun, though none of its rounds is finished.

        It keeps its id: a clinic on the stick may bring an answer to it weeks later.
        """
        try:
            found = _read_json(known) if known.is_file() else {}
        except StorageError:
            return False
        return isinstance(found.get("id"), str) and {**found, "id": ""} == {**identity, "id": ""}

    @property
    def id(self) -> str:
        """What tells this run from all others, also when the server starts it again: 32 hex digits.

        Raises:
            StorageError: the run was not opened, or its file is damaged.
        """
        known = self.path / "run.json"
        found = _read_json(known).get("id")
        # Of releases that wrote none the file itself is as good.
        return (
            found if isinstance(found, str) else hashlib.sha256(known.read_bytes()).hexdigest()[:32]
        )

    def _present(self) -> set[str]:
        with explained("read", self.path):
            names = {item.name for item in self.path.iterdir()} if self.path.exists() else set()
        # What a kill during the very first write leaves behind is ours.
        return {name for name in names if not name.startswith(".run.json.")}

    def _identity(self, fingerprint: str) -> dict[str, Any]:
        settings = self._settings.model_dump(mode="json", exclude=FREE_TO_CHANGE)
        count = self._settings.rounds.count
        return {
            "schema": SCHEMA,
            "engine": self._engine,
            "fingerprint": fingerprint,
            "rounds": count,
            "settings": settings,
        }

    def _finished(self) -> list[int]:
        """Return the finished rounds 0, 1, ... up to the first gap."""
        rounds: list[int] = []
        while (self._round_path(len(rounds)) / "round.json").is_file():
            rounds.append(len(rounds))
        return rounds

    def _round_path(self, number: int) -> Path:
        return self.path / "rounds" / str(number)

    def outcome_of(self, number: int, schema: AdapterSchema) -> Outcome:
        """Return what round ``number`` left, with all that was added to the base up to it.

        Raises:
            AdapterError: files are damaged.
        """
        records, path = self.records()[: number + 1], self._round_path(number)
        changed = [record.round for record in records if record.has_product]
        return Outcome(
            adapter=load_adapter(path / ("trained" if changed else "adapter"), schema),
            memory=load_memory(path) if records[number].has_memory else {},
            increments=tuple(load_product(self._round_path(one), schema) for one in changed),
        )

    def records(self) -> list[RoundRecord]:
        """Return what happened in all finished rounds, from round 0 on.

        Raises:
            StorageError: a record is damaged.
        """
        records: list[RoundRecord] = []
        for number in self._finished():
            path = self._round_path(number) / "round.json"
            try:
                records.append(RoundRecord.model_validate_json(path.read_bytes()))
            except (OSError, ValidationError):
                raise StorageError(
                    f"{path} is damaged; remove the directory of that round and of those after "
                    "it, and the run goes on from the one before"
                ) from None
        return records

    def lineage_of(self, number: int) -> SignedLineage | None:
        """Return the lineage of a finished round; None if a release before lineages made it.

        Raises:
            LineageRefused: it was changed.
            StorageError: it cannot be read.
        """
        path = self._round_path(number) / "adapter" / LINEAGE_FILE
        with explained("read", path):
            data = path.read_bytes() if path.exists() else None
        return None if data is None else read_lineage(data, source=str(path))

    def weights_digest(self, number: int) -> str:
        """Return the SHA-256 of a finished round's adapter weights, hex.

        Raises:
            StorageError: they cannot be read.
        """
        path = self._round_path(number) / "adapter" / WEIGHTS_FILE
        with explained("read", path), path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def save_round(
        self,
        record: RoundRecord,
        outcome: Outcome,
        *,
        new: int = 0,
        lineage: SignedLineage | None = None,
    ) -> None:
        """Make a finished round durable, then the last adapter and the summary.

        Of the outcome's increments the last ``new`` are this round's.

        Raises:
            StorageError: the disk is full or read-only; the rounds before stay as they are.
        """
        final = self._round_path(record.round)
        temporary = final.with_name(f".{record.round}.tmp")
        with explained("write", temporary):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        if outcome.increments:
            self._save_adapter(outcome.adapter, temporary / "trained")
        self._save_adapter(outcome.whole, temporary / "adapter")
        if lineage is not None:
            write_atomically(temporary / "adapter" / LINEAGE_FILE, lineage.to_bytes())
        save_outcome(outcome, temporary, new=new)
        marks = {"has_memory": bool(outcome.memory), "has_product": bool(new)}
        text = record.model_copy(update=marks).model_dump_json(indent=2)
        write_atomically(temporary / "round.json", text.encode())
        with explained("write", final):
            temporary.rename(final)
            sync_directory(final.parent)
        self.publish(outcome)

    def note_release(self, record: PrivacyRecord) -> None:
        """Write down what a mean with noise has cost, before anybody sees it.

        A run that is stopped between this and :meth:`save_round` makes the round again,
        and has spent for both.

        Raises:
            StorageError: the disk is full or read-only.
        """
        write_atomically(self.path / _RELEASED, record.model_dump_json(indent=2).encode())

    def released(self) -> PrivacyRecord | None:
        """Return what was noted last; None if nothing was.

        Raises:
            StorageError: the file is damaged.
        """
        path = self.path / _RELEASED
        try:
            return PrivacyRecord.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError):
            raise StorageError(
                f"{path} is damaged, so what the last round has cost is unknown; restore it from "
                "a backup, or start over in another directory"
            ) from None

    def publish(self, outcome: Outcome) -> None:
        """Make the outcome the run's adapter, on the unchanged base, and write the summary.

        A crash can come between a round's rename and this, so it is done again
        when a run goes on.

        Raises:
            StorageError: the disk is full or read-only.
        """
        self._save_adapter(outcome.whole, self.path / "adapter")
        self._publish_lineage()
        self.write_summary(outcome.adapter.schema.fingerprint)

    def _publish_lineage(self) -> None:
        """Copy the last round's lineage beside the run's adapter, or remove an older one."""
        finished, path = self._finished(), self.path / "adapter" / LINEAGE_FILE
        lineage = self.lineage_of(finished[-1]) if finished else None
        if lineage is not None:
            write_atomically(path, lineage.to_bytes())
            return
        with explained("remove", path):
            path.unlink(missing_ok=True)

    def _save_adapter(self, state: AdapterState, directory: Path) -> None:
        settings = at_rank(self._settings.adapter, state.schema.rank)
        save_adapter(state, settings, directory, base_name=self._settings.model.base)

    def write_summary(self, fingerprint: str) -> dict[str, Any]:
        """Write ``summary.json`` from the finished rounds and return it."""
        records = self.records()
        base = records[0] if records else None
        evaluated = [record for record in records if record.valid_loss is not None]
        final = evaluated[-1] if evaluated else None
        names = sorted({name for record in evaluated for name in record.per_clinic})
        summary: dict[str, Any] = {
            "schema": SCHEMA,
            "federation": self._settings.name,
            "engine": self._engine,
            "strategy": self._settings.strategy.name,
            "model": {
                "base": self._settings.model.base,
                "fingerprint": fingerprint,
                "quantization": self._settings.model.quantization,
            },
            "rounds": [
                record.model_dump(mode="json", exclude={"per_clinic"}) for record in records[1:]
            ],
            "valid_loss": {
                "base": base.valid_loss if base else None,
                "final": final.valid_loss if final else None,
                "per_clinic": {
                    name: {
                        "base": base.per_clinic.get(name) if base else None,
                        "final": _latest(evaluated, name),
                    }
                    for name in names
                },
            },
            "confidentiality": _confidentiality(records),
            "exact_match": None,
            "privacy": summary_of(self._settings, [record.privacy for record in records]),
            "peak_rss_mb": peak_rss_mb(),
        }
        write_atomically(self.path / "summary.json", _json_bytes(summary))
        return summary


def peak_rss_mb() -> float:
    """Return the most memory that this process has held, in MB (10^6 bytes)."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1)


def _confidentiality(records: list[RoundRecord]) -> dict[str, Any] | None:
    """Return what the server could see in the last round."""
    last = records[-1].confidentiality if records else None
    if last is None:
        return None
    shown = {"mode", "threshold", "survivors", "bits", "wire_bytes_per_coordinate"}
    return last.model_dump(mode="json", include=shown)


def _latest(records: list[RoundRecord], name: str) -> float | None:
    losses = [record.per_clinic[name] for record in records if name in record.per_clinic]
    return losses[-1] if losses else None


def _json_bytes(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _completed(found: Mapping[str, Any]) -> Any:
    """Return the settings of a run with what releases after it have added, at its default."""
    try:
        settings = FederationSettings.model_validate(found.get("settings"))
    except ValidationError:
        return None
    return settings.model_dump(mode="json", exclude=FREE_TO_CHANGE)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return cast("dict[str, Any]", json.loads(path.read_text("utf-8")))
    except (OSError, ValueError):
        raise StorageError(f"{path} cannot be read; choose another --out") from None
