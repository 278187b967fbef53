"""What a box last took part in, for the people who look after it.

The running client writes it, and ``fedpeft-client status`` reads it; no record and
no secret is in it.
"""

import datetime
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fedpeft.errors import StorageError
from fedpeft.protocol import Job
from fedpeft.storage import write_atomically
from fedpeft_client.keys.key_life import expiry_warnings, keys_expire
from fedpeft_client.limits.refusals import Refusal
from fedpeft_client.rounds.clinic import Clinic, allowed_bases
from fedpeft_client.settings import BudgetSettings, ClientSettings, ConfidentialitySettings
from fedpeft_client.versions.status_line import adapter_line

if TYPE_CHECKING:
    from fedpeft_client.box import Box

SCHEMA: Final = 1
MODES: Final = {
    "secagg": "secure aggregation: the server learns sums over clinics only",
    "sealed": "sealed: encrypted on the way, and the server opens each clinic's update",
}


class StatusFile:
    """One small JSON file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def saw(self, _clinic: Clinic, job: Job) -> None:
        """Note a job that the clinic accepted.

        Raises:
            StorageError: the file cannot be written.
        """
        content = {
            "schema": SCHEMA,
            "federation": job.federation,
            "round": job.round,
            "rounds": job.rounds,
            "confidentiality": job.aggregation.confidentiality,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        write_atomically(self._path, (json.dumps(content, indent=2) + "\n").encode(), mode=0o600)

    def read(self) -> dict[str, Any] | None:
        """Return what was noted last; None if nothing was.

        Raises:
            StorageError: the file is damaged.
        """
        try:
            return json.loads(self._path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            raise StorageError(
                f"{self._path} cannot be read: remove it, the next round writes it anew"
            ) from None


def status_lines(box: "Box") -> list[str]:
    """Return a line for each thing that there is to say about a box.

    Raises:
        StorageError, SealingError: a file of the box is damaged.
    """
    settings, last = box.settings, box.status.read()
    return [
        f"clinic\t{settings.clinic} in federation {settings.server.federation}, server "
        f"{settings.server.address}",
        f"demands\t{_demands(settings.aggregation)}",
        f"privacy\t{_budget(settings.privacy)} (fedpeft-client ledger)",
        f"policy\t{_rules(settings)}",
        f"last job\t{_last(last)}",
        adapter_line(box),
        f"refused\t{_refused(box.refusals.read())}",
        f"server\tfingerprint {box.server_identity.fingerprint}",
        f"words\t{box.words()}",
        f"keys\t{_keys(box)}",
        f"peers\t{len(box.peers.known())} other clinics seen (fedpeft-client peers)",
    ]


def _demands(demanded: ConfidentialitySettings) -> str:
    if not demanded.require_secagg:
        return f"none (require_secagg = false), so also {MODES['sealed']}"
    server = "lies to clinics" if demanded.adversary == "active" else "keeps to the protocol"
    return f"{MODES['secagg']}, even if it {server}"


def _budget(allowed: BudgetSettings) -> str:
    if allowed.max_epsilon is None:
        return "no bound (max_epsilon is not set), jobs without noise are accepted"
    return f"no round beyond epsilon {allowed.max_epsilon:g} in all, none without noise"


def _keys(box: "Box") -> str:
    expires = keys_expire(box.directory)
    until = "of an older release" if expires is None else f"good until {expires:%Y-%m-%d}"
    warnings = expiry_warnings(box.directory, box.ca)
    return "; ".join([until, *(f"WARNING: {warning}" for warning in warnings)])


def _rules(settings: ClientSettings) -> str:
    """Say who may order what and when, and how much it may take."""
    policy, limits = settings.policy, settings.limits
    bases = allowed_bases(settings)
    rules = (
        "" if policy.signers is None else f"orders of {len(policy.signers)} server identities",
        f"base models {', '.join(base[:12] for base in bases)}" if bases else "any base model here",
        f"methods {', '.join(policy.methods)}" if policy.methods else "",
        f"training {', '.join(policy.hours)}" if policy.hours else "training at any time",
        f"at most {limits.threads} processors" if limits.threads else "",
        f"{limits.max_memory_mb} MiB of memory" if limits.max_memory_mb else "",
        f"{limits.max_mb_per_day} MiB a day" if limits.max_mb_per_day else "",
        f"{limits.min_free_disk_mb} MiB of disk kept free",
    )
    return "; ".join(rule for rule in rules if rule)


def _refused(refusal: Refusal | None) -> str:
    if refusal is None:
        return "nothing yet"
    return f"{refusal.time}, the server was told {refusal.rule!r}: {refusal.sentence}"


def _last(last: dict[str, Any] | None) -> str:
    if last is None:
        return "none yet"
    mode = MODES.get(str(last.get("confidentiality")), "unknown")
    return f"round {last.get('round')} of {last.get('rounds')}, {last.get('time')}, {mode}"
