"""How well the base model and adapters do on this box: losses on own rows and general language.

A loss that was measured before, of the same weights on the same rows in the same way, is
remembered in a file, so that a round costs one measurement and not three. The file holds
digests and sums, no record. Knows no policy and no store.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Final, TypeAlias, cast

from fedpeft.data import EncodedExample, encode, read_records
from fedpeft.evaluation import Score, score
from fedpeft.models import AdaptedModel, BaseModel, context_length
from fedpeft.storage import write_atomically
from fedpeft_client.versions.acceptance import Losses

SCHEMA: Final = 1
_REMEMBERED: Final = 256
"""Scores in the file; the oldest are forgotten first."""
_GENERAL: Final = ("questions.jsonl", "prose.jsonl")
_GENERAL_LENGTH: Final = 512
"""Tokens of the longest general row that is read whole."""
_Sums: TypeAlias = tuple[float, int]
"""Summed loss (nats) over so many target tokens."""


class Examiner:
    """Measures models on general language and on rows that it is given."""

    def __init__(self) -> None:
        self._general: tuple[str, list[EncodedExample]] | None = None

    def general(self, base: BaseModel) -> list[EncodedExample]:
        """Return the general rows in the tokens of ``base``.

        Raises:
            DataError, ModelError: its tokenizer or chat template cannot write them.
        """
        if self._general is None or self._general[0] != base.fingerprint:
            context = context_length(base.directory) or _GENERAL_LENGTH
            length = min(context, _GENERAL_LENGTH)
            rows: list[EncodedExample] = []
            folder = resources.files("fedpeft_client.general")
            for name in _GENERAL:
                with resources.as_file(folder / name) as path:
                    found = encode(read_records(path), base.tokenizer, max_length=length)
                rows.extend(found.examples)
            self._general = base.fingerprint, rows
        return self._general[1]


class Examination:
    """Measurements with one base model in one number format, remembered in ``path``.

    ``own`` are the clinic's validation rows, maybe none, ``general`` the general ones.
    """

    def __init__(
        self,
        path: Path,
        way: str,
        own: Sequence[EncodedExample],
        general: Sequence[EncodedExample],
    ) -> None:
        self._path = path
        self._way = way
        self._own, self._general = _digest(own), _digest(general)
        self._rows = {self._own: own, self._general: general}
        self._scores = _read(path)
        self._arrived: dict[str, _Sums] = {}

    def arrived(self, model: AdaptedModel, valid: Score) -> Losses:
        """Return the losses of an adapter that has just come; ``valid`` is on the own rows."""
        of_general = score(model, self._rows[self._general])
        self._arrived = {
            self._own: (valid.nll, valid.tokens),
            self._general: (of_general.nll, of_general.tokens),
        }
        return _losses(self._arrived[self._own], self._arrived[self._general])

    def losses(self, weights: str, load: Callable[[], AdaptedModel]) -> Losses:
        """Return the losses of the weights of digest ``weights`` (or ``base``).

        ``load`` is called only if they are not remembered.

        Raises:
            FedpeftError: it cannot be loaded.
        """
        keys = {rows: self._key(weights, rows) for rows in self._rows}
        missing = [rows for rows, key in keys.items() if key not in self._scores]
        if missing:
            model = load()
            for rows in missing:
                found = score(model, self._rows[rows])
                self._scores[keys[rows]] = (found.nll, found.tokens)
        return _losses(self._scores[keys[self._own]], self._scores[keys[self._general]])

    def remember(self, arrived: str) -> None:
        """Write down what was measured; ``arrived`` is the digest of what has just come.

        Raises:
            StorageError: the file cannot be written.
        """
        new = {self._key(arrived, rows): sums for rows, sums in self._arrived.items()}
        scores = list((self._scores | new).items())[-_REMEMBERED:]
        content = {"schema": SCHEMA, "scores": dict(scores)}
        write_atomically(self._path, (json.dumps(content) + "\n").encode(), mode=0o600)

    def _key(self, weights: str, rows: str) -> str:
        return hashlib.sha256(f"{self._way}\n{weights}\n{rows}".encode()).hexdigest()


def _losses(own: _Sums, general: _Sums) -> Losses:
    """Return losses per token; one over no tokens of general language is no number."""
    return Losses(
        own=own[0] / own[1] if own[1] else None,
        general=general[0] / general[1] if general[1] else math.inf,
    )


def _digest(rows: Sequence[EncodedExample]) -> str:
    """Return the SHA-256 of all tokens and of which of them are targets."""
    whole = hashlib.sha256()
    for row in rows:
        whole.update(len(row).to_bytes(8))
        whole.update(row.input_ids.tobytes())
        whole.update(row.targets.tobytes())
    return whole.hexdigest()


def _read(path: Path) -> dict[str, _Sums]:
    """Return what was measured before; nothing if the file is gone or damaged."""
    try:
        content = cast("dict[str, Any]", json.loads(path.read_bytes()))
        if content["schema"] != SCHEMA:
            return {}
        scores = cast("Mapping[str, _Sums]", content["scores"])
        return {key: (float(nll), int(tokens)) for key, (nll, tokens) in scores.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
