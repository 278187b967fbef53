"""What a machine did, in a log that shows when it was changed: docs/spec/audit-log.md."""

from fedpeft.audit_log.display import (
    Choice,
    day_of,
    end_of,
    entries_in,
    entry_json,
    entry_text,
    verdict_lines,
)
from fedpeft.audit_log.entry import FIELDS, Entry, Kind, Value, Written, word
from fedpeft.audit_log.export import Exported, export, read_export
from fedpeft.audit_log.log import AuditLog, note_handover
from fedpeft.audit_log.segments import Line, all_lines, lines_of
from fedpeft.audit_log.verification import CANNOT_FIND, Verdict, verify

__all__ = [
    "CANNOT_FIND",
    "FIELDS",
    "AuditLog",
    "Choice",
    "Entry",
    "Exported",
    "Kind",
    "Line",
    "Value",
    "Verdict",
    "Written",
    "all_lines",
    "day_of",
    "end_of",
    "entries_in",
    "entry_json",
    "entry_text",
    "export",
    "lines_of",
    "note_handover",
    "read_export",
    "verdict_lines",
    "verify",
    "word",
]
