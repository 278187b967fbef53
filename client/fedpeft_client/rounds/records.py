"""A clinic's encoded records, read once and kept in memory while its files stay the same."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedpeft.data import EncodedExample, EncodedSet, encode, read_records, unit_keys
from fedpeft.errors import ConfigError
from fedpeft.models import BaseModel, context_length
from fedpeft_client.rounds.clinic import Clinic

_Key = tuple[Path, int, int, str | None, bool, str, int]


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class ClinicRows:
    """The rows of a file, and the keys of the people in them (see ``unit_keys``)."""

    encoded: EncodedSet
    keys: tuple[str, ...]

    @property
    def examples(self) -> tuple[EncodedExample, ...]:
        """The rows, in file order."""
        return self.encoded.examples


class RecordStore:
    """Encoded records by file, layout, tokenizer and length."""

    def __init__(self, tell: Callable[[str], None] | None = None) -> None:
        self._sets: dict[_Key, ClinicRows] = {}
        self._tell = tell

    def train(self, clinic: Clinic, base: BaseModel, max_length: int) -> ClinicRows:
        """Return the training rows.

        Raises:
            DataError: the file cannot be used.
            ConfigError: ``max_length`` is beyond the base model's context.
        """
        return self._encoded(clinic, clinic.data.train, base, max_length)

    def valid(self, clinic: Clinic, base: BaseModel, max_length: int) -> list[EncodedExample]:
        """Return the validation rows; none where the clinic has no validation file."""
        if clinic.data.valid is None:
            return []
        return list(self._encoded(clinic, clinic.data.valid, base, max_length).examples)

    def _encoded(self, clinic: Clinic, path: Path, base: BaseModel, max_length: int) -> ClinicRows:
        require_context(base.directory, max_length)
        layout, skip = clinic.data.format, clinic.data.skip_bad_rows
        changed, size = _stamp(path)
        key = (path, changed, size, layout, skip, base.fingerprint, max_length)
        if key not in self._sets:
            for stale in [known for known in self._sets if known[0] == path]:
                del self._sets[stale]
            records = read_records(path, format=layout, skip_bad_rows=skip)
            encoded = encode(records, base.tokenizer, max_length=max_length)
            self._sets[key] = ClinicRows(encoded, unit_keys(records))
            if self._tell is not None:
                self._tell(f"{clinic.name}: {records.describe()}; {encoded.describe()}")
        return self._sets[key]


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return 0, 0  # read_records says what is wrong with the file
    return status.st_mtime_ns, status.st_size


def require_context(directory: Path, max_length: int) -> None:
    """Check that the base model can read rows of ``max_length`` tokens.

    Raises:
        ConfigError: they are longer than its context.
    """
    context = context_length(directory)
    if context is not None and max_length > context:
        raise ConfigError(
            f"training.max_length = {max_length} is more than the {context} tokens that the base "
            f"model in {directory} can read; set it to {context} or less"
        )
