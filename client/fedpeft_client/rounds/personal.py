"""What a clinic trained and did not send: the factors of the adapter that are its own.

Kept by round, so that a box that restarts, or a round that is repeated, goes on from
what the round before left, and never from its own unfinished try. Knows nothing of
training, jobs or messages.
"""

import hashlib
import json
from pathlib import Path
from typing import Final, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedpeft.adapters import AdapterSchema, AdapterState
from fedpeft.errors import AdapterError, StorageError
from fedpeft.storage import explained, write_atomically

SCHEMA: Final = "1"
"""Version of the files' form: named factors as safetensors, with one entry of metadata."""
_ABOUT: Final = "about"
"""That entry: JSON, and one alone, as safetensors puts several in any order."""
_SUFFIX: Final = ".safetensors"
_PRIVATE: Final = 0o600


class PersonalStore:
    """A clinic's own factors in ``directory``, or in memory where there is none.

    Of each run the last round that was kept is there and the one before it, in files
    ``<federation>/<run>/<round>.safetensors`` that only the owner may read.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._memory: dict[tuple[str, str], dict[int, AdapterState]] = {}

    def keep(self, part: AdapterState, *, federation: str, run: str, round: int) -> None:
        """Keep ``part`` as what ``round`` left. Only the newest round before it stays beside it.

        A later round is removed: when one is repeated, what came after it is void.

        Raises:
            StorageError: the directory cannot be written.
        """
        known = self._rounds(federation, run)
        before = [number for number in known if number < round][-1:]
        stale = [number for number in known if number not in (*before, round)]
        if self._directory is None:
            kept = self._memory.setdefault((federation, run), {})
            kept[round] = part
            for number in stale:
                del kept[number]
            return
        tensors = {name: tensor.contiguous() for name, tensor in part.tensors().items()}
        about = _about(part.schema, federation, run, round) | {"sha256": _digest(part)}
        path = self._path(self._directory, federation, run, round)
        metadata = {_ABOUT: json.dumps(about, sort_keys=True)}
        with explained("write", path):
            for folder in (self._directory, path.parents[1], path.parent):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(path, save(tensors, metadata), mode=_PRIVATE)
        for number in stale:
            old = self._path(self._directory, federation, run, number)
            with explained("remove", old):
                old.unlink(missing_ok=True)

    def newest(
        self, schema: AdapterSchema, *, federation: str, run: str, until: int
    ) -> AdapterState | None:
        """Return what the newest round up to ``until`` left; None: there was none in this run.

        Raises:
            StorageError: the file is damaged, or holds something else than ``schema``.
        """
        rounds = [number for number in self._rounds(federation, run) if number <= until]
        if not rounds:
            return None
        if self._directory is None:
            return self._memory[federation, run][rounds[-1]]
        path = self._path(self._directory, federation, run, rounds[-1])
        about = _about(schema, federation, run, rounds[-1])
        with explained("read", path):
            return _read(path, schema, about)

    def _rounds(self, federation: str, run: str) -> list[int]:
        """Return the rounds that are kept, in order."""
        if self._directory is None:
            return sorted(self._memory.get((federation, run), {}))
        folder = self._directory / federation / run
        found = [path.stem for path in folder.glob(f"*{_SUFFIX}")]
        return sorted(int(name) for name in found if name.isdecimal())

    @staticmethod
    def _path(directory: Path, federation: str, run: str, number: int) -> Path:
        return directory / federation / run / f"{number}{_SUFFIX}"


def _about(schema: AdapterSchema, federation: str, run: str, number: int) -> dict[str, str]:
    return {
        "schema": SCHEMA,
        "federation": federation,
        "run": run,
        "round": str(number),
        "adapter": schema.hash,
    }


def _digest(part: AdapterState) -> str:
    raw = part.values.contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(raw.tobytes()).hexdigest()


def _read(path: Path, schema: AdapterSchema, about: dict[str, str]) -> AdapterState:
    try:
        with safe_open(path, framework="pt") as file:
            found = _parsed((file.metadata() or {}).get(_ABOUT, ""))
            tensors: dict[str, torch.Tensor] = {
                name: file.get_tensor(name)
                for name in file.keys()  # noqa: SIM118  (no mapping)
            }
        part = AdapterState.from_tensors(tensors, schema)
    except (SafetensorError, AdapterError) as error:
        raise _unusable(path, f"it cannot be read ({type(error).__name__})") from None
    digest = found.pop("sha256", "")
    if found != about:
        names = ", ".join(name for name in about if found.get(name) != about[name])
        raise _unusable(path, f"it is of another {names or 'form'}")
    if digest != _digest(part):
        raise _unusable(path, "its values were changed")
    return part


def _parsed(text: str) -> dict[str, str]:
    """Return what a file says of itself; nothing if that cannot be read."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return cast("dict[str, str]", found) if isinstance(found, dict) else {}


def _unusable(path: Path, why: str) -> StorageError:
    return StorageError(
        f"the personal factors of this clinic in {path} cannot be used: {why}; restore the file "
        "from a backup, or remove it to go on from the round before"
    )
