"""The GGUF files that a box runs: its base model and its adapters, converted once and kept.

DIR/inference/base-<fingerprint>-<quantisation>.gguf
DIR/inference/adapters/<version>-<digest>.gguf
and beside each a .sha256 of it, by which damage is noticed

A base model that is a GGUF file already is used as it is. Must not know engines.
Converting needs torch, which takes more memory than a small model; so nothing here
imports it before a file is really to be written.
"""

import contextlib
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fedpeft.errors import FedpeftError, FingerprintMismatch, ModelError, StorageError
from fedpeft.storage import explained, write_atomically
from fedpeft_client.inference.catalogue import Catalogue

if TYPE_CHECKING:
    from fedpeft.gguf_format import Quantisation

Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What an engine of llama.cpp loads; ``broken`` says why an adapter is not among them."""

    base: Path
    default: str | None = None
    adapters: Mapping[str, Path] = field(default_factory=dict[str, Path])
    broken: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """Writes the files into ``directory`` (DIR/inference) as far as they are not there."""

    directory: Path
    base: Path
    quantisation: "Quantisation"
    expected: str | None
    """The fingerprint that the base model must have; None: any."""
    tell: Tell

    def prepare(self, catalogue: Catalogue) -> Prepared:
        """Return the files for ``catalogue``, and remove those that nothing needs any more.

        Raises:
            NotConvertible: llama.cpp cannot run the base model.
            FingerprintMismatch: it is not the one that the box agreed to.
            ModelError: the base model is damaged.
            StorageError: a file cannot be written.
        """
        base = self._base()
        adapters: dict[str, Path] = {}
        broken: dict[str, str] = {}
        for name, path in catalogue.adapters.items():
            try:
                adapters[name] = self._adapter(name, path, base)
            except StorageError:
                raise
            except FedpeftError as error:
                broken[name] = str(error)
                self.tell(f"the adapter {name} cannot be used: {error}")
        self._clean({base, *adapters.values()})
        return Prepared(base=base, default=catalogue.default, adapters=adapters, broken=broken)

    def _base(self) -> Path:
        from fedpeft.gguf_format import read_header, write_base
        from fedpeft.weight_files import fingerprint, is_gguf

        owner = fingerprint(self.base)
        if self.expected not in (None, owner):
            raise FingerprintMismatch(
                f"the base model in {self.base} has fingerprint {owner[:12]}, and this box agreed "
                f"to {str(self.expected)[:12]} (model.fingerprint in client.toml): copy the "
                "federation's base model here"
            )
        if is_gguf(self.base):
            if read_header(self.base).is_adapter:
                raise ModelError(f"{self.base} is an adapter: name a base model instead")
            return self.base
        path = self.directory / f"base-{owner[:8]}-{self.quantisation}.gguf"
        if not (path.exists() and self._is_sound(path, owner)):
            self.tell(f"converting the base model to {self.quantisation} once, into {path}")
            write_base(self.base, path, self.quantisation, observe=Percent(self.tell))
            _note_digest(path)
        return path

    def _adapter(self, name: str, source: Path, base: Path) -> Path:
        """Return a version's file for the converted ``base``, whose header says all that it needs.

        (A model's directory would need transformers to be imported, which takes seconds.)
        """
        from fedpeft.gguf_format import write_adapter

        path = self.directory / "adapters" / f"{name}-{_digest(source)}.gguf"
        if not (path.exists() and self._is_sound(path, None)):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_adapter(source, base, path)
            _note_digest(path)
        return path

    def _is_sound(self, path: Path, owner: str | None) -> bool:
        """Say whether an earlier file can be used; if not, it is written anew."""
        from fedpeft.gguf_format import read_header

        try:
            header = read_header(path) if _has_digest(path) else None
        except ModelError:
            header = None
        if header is None:
            self.tell(f"{path} is damaged and is made anew")
            return False
        return owner is None or header.fingerprint == owner

    def _clean(self, kept: set[Path]) -> None:
        """Remove versions that are gone, and the base model in another encoding or another one.

        A server that still answers from such a file keeps it mapped.
        """
        with contextlib.suppress(OSError):  # only room on the disk is at stake
            for path in (
                *self.directory.glob("base-*.gguf"),
                *self.directory.glob("adapters/*.gguf"),
            ):
                if path not in kept:
                    path.unlink()
                    _digest_file(path).unlink(missing_ok=True)


def _digest_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _note_digest(path: Path) -> None:
    """Keep the digest of a file beside it: llama.cpp computes with damaged weights, too."""
    from fedpeft.weight_files import fingerprint

    write_atomically(_digest_file(path), f"{fingerprint(path)}\n".encode())


def _has_digest(path: Path) -> bool:
    """Say whether a file is as it was written; one of a release before this is noted now."""
    from fedpeft.weight_files import fingerprint

    kept = _digest_file(path)
    if not kept.exists():
        _note_digest(path)
    with explained("read", kept):
        return kept.read_text("ascii").strip() == fingerprint(path)


class Percent:
    """Tells how far the conversion of a large model is, ten times at most."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._told = 0

    def __call__(self, done: int, total: int) -> None:
        """Take how many bytes are written, and of how many."""
        tenths = 10 * done // max(total, 1)
        if total > 1 << 28 and tenths > self._told:
            self._told = tenths
            self._tell(f"converted {10 * tenths} % of {total >> 20} MiB")


def _digest(source: Path) -> str:
    """Return what tells a version from another of the same name."""
    whole = hashlib.sha256()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        with explained("read", source / name):
            whole.update((source / name).read_bytes())
    return whole.hexdigest()[:12]
