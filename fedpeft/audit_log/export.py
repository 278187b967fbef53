"""A whole audit log in one file, for an auditor: a heading, then the lines as they stand.

The heading is a JSON object in the first line: ``schema`` 1, the keeper's ``name`` and
``identity`` (as text), and ``seq`` and ``hash`` of the last entry. What proves the lines is
in them; who the keeper is, the reader compares by telephone.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedpeft.audit_log.segments import Line, all_lines, lines_of
from fedpeft.audit_log.verification import Verdict, check_lines, verify
from fedpeft.errors import AuditLogDamaged, SealingError
from fedpeft.privacy.ledger_chain import Anchor
from fedpeft.sealing.identity import PublicIdentity
from fedpeft.storage import write_atomically

SCHEMA: Final = 1


@dataclass(frozen=True, slots=True)
class Exported:
    """An export that was read: whose it says it is, and its end."""

    path: Path
    name: str
    identity: PublicIdentity
    end: Anchor

    def lines(self) -> Iterator[Line]:
        """Yield the lines of the log."""
        return itertools.islice(lines_of(self.path), 1, None)

    def verify(self, kept: Anchor | None = None) -> Verdict:
        """Check the lines; ``kept`` is an end that was kept elsewhere.

        Raises:
            StorageError: the file cannot be read.
        """
        ends = [("the heading", self.end)]
        ends += [("an end that was kept elsewhere", kept)] if kept else []
        return check_lines(self.lines(), ends, identity=self.identity)


def export(directory: Path, path: Path, *, name: str, identity: PublicIdentity) -> Verdict:
    """Write the log in ``directory`` to ``path`` as it is, and return whether it is whole.

    A line that a power cut tore is left out.

    Raises:
        StorageError: a file cannot be read or written.
    """
    verdict = verify(directory, identity=identity)
    heading = {
        "schema": SCHEMA,
        "name": name,
        "identity": identity.to_text(),
        "seq": verdict.end.seq,
        "hash": verdict.end.hash,
    }
    lines = [line.data for line in all_lines(directory) if not line.is_torn]
    write_atomically(path, b"".join([json.dumps(heading).encode() + b"\n", *lines]), mode=0o600)
    return verdict


def read_export(path: Path) -> Exported:
    """Read the heading of an export.

    Raises:
        AuditLogDamaged: it is no export.
        StorageError: it cannot be read.
    """
    first = next(lines_of(path), None)
    try:
        match json.loads(first.data if first else b""):
            case {
                "schema": 1,
                "name": str(name),
                "identity": str(identity),
                "seq": int(seq),
                "hash": str(digest),
            }:
                return Exported(path, name, PublicIdentity.from_text(identity), Anchor(seq, digest))
            case _:
                raise ValueError
    except (ValueError, RecursionError, SealingError):
        raise AuditLogDamaged(
            f"{path} is no exported audit log, or its heading was changed: ask for it anew "
            "(audit-log export)"
        ) from None
