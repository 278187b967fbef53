"""Private records: reading them from a clinic's files and encoding them as tokens.

Must not know models, training, or any other machine.
"""

from fedpeft.data.chat import FALLBACK_TEMPLATE
from fedpeft.data.encoding import EncodedExample, EncodedSet, encode
from fedpeft.data.files import FILE_TYPES
from fedpeft.data.formats import FORMAT_NAMES
from fedpeft.data.identity import unit_keys
from fedpeft.data.reading import read_records
from fedpeft.data.records import Record, RecordSet, Role, Turn

__all__ = [
    "FALLBACK_TEMPLATE",
    "FILE_TYPES",
    "FORMAT_NAMES",
    "EncodedExample",
    "EncodedSet",
    "Record",
    "RecordSet",
    "Role",
    "Turn",
    "encode",
    "read_records",
    "unit_keys",
]
