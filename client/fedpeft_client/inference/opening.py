"""Choose the engine for this machine and base model, and say which and why.

llama.cpp on a CPU: bitsandbytes NF4 is 14 to 30 times slower there. Transformers with NF4
on CUDA, and on a CPU for what llama.cpp cannot run.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, TypeAlias

import psutil

from fedpeft.config import load_settings
from fedpeft.errors import ConfigError, EnrolmentError, NotConvertible
from fedpeft.weight_files import is_gguf
from fedpeft_client.inference.catalogue import Catalogue, Look
from fedpeft_client.inference.llama_engine import LlamaEngine, LlamaLimits
from fedpeft_client.inference.prepared import Prepared, Tell, Workshop
from fedpeft_client.inference.watching import Watch
from fedpeft_client.settings import CONFIG_FILE, ClientSettings

if TYPE_CHECKING:
    from fedpeft_client.box import Box
    from fedpeft_client.inference.engine import Engine

Kind: TypeAlias = Literal["llama.cpp", "transformers"]
ADAPTERS = "adapters"
"""The folder of a box in which its adapters are kept, and which is watched."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which engine, and why: one sentence for people."""

    kind: Kind
    why: str


@dataclass(frozen=True, kw_only=True)
class Place:
    """A box as far as an engine needs it: its folder and its settings."""

    directory: Path
    settings: ClientSettings

    @classmethod
    def at(cls, directory: Path) -> Self:
        """Read ``client.toml``. (:class:`fedpeft_client.box.Box` needs torch to be imported.)

        Raises:
            EnrolmentError: this directory has not joined a federation.
            ConfigError: ``client.toml`` cannot be used.
        """
        if not (directory / CONFIG_FILE).is_file():
            raise EnrolmentError(
                f"{directory} has no {CONFIG_FILE}; join a federation first: "
                "fedpeft-client join INVITATION --dir DIRECTORY"
            )
        settings = load_settings(ClientSettings, directory / CONFIG_FILE)
        return cls(directory=directory, settings=settings)

    @property
    def base(self) -> Path:
        """The base model: a directory or a GGUF file."""
        return self.directory / self.settings.model.directory

    @property
    def limits(self) -> LlamaLimits:
        """What an engine may use."""
        chosen = self.settings.inference
        return LlamaLimits(
            context=chosen.context,
            parallel=chosen.parallel,
            threads=self.settings.limits.threads or _cores(),
        )

    def look(self) -> Catalogue:
        """Return the adapters of the box."""
        # Imported here: it needs torch.
        from fedpeft_client.versions.store import AdapterStore

        return AdapterStore(self.directory / ADAPTERS, self.settings.adapters).catalogue()

    def workshop(self, tell: Tell) -> Workshop:
        """Return what writes the files of this box."""
        return Workshop(
            directory=self.directory / "inference",
            base=self.base,
            quantisation=self.settings.inference.quantisation,
            expected=self.settings.model.fingerprint,
            tell=tell,
        )


def open_engine(box: "Box", look: Look, tell: Tell) -> "Engine":
    """Return an engine with the base model and the adapters that ``look`` names.

    It reads the catalogue anew within a second of each change in the box's adapters.
    ``tell`` is told which engine was chosen and why, and how long files take to convert.

    Raises:
        ModelError: the base model is damaged.
        StorageError: a file cannot be written.
        ConfigError: ``inference.engine`` asks for what cannot run the base model.
        InferenceError: there is not enough memory.
    """
    place = Place(directory=box.directory, settings=box.settings)
    prepare = preparing(place, look, tell)
    choice = choose(place, prepare, cuda=has_cuda())
    tell(choice.why)
    return opened(place, choice, prepare, look, tell)


def preparing(place: Place, look: Look, tell: Tell) -> Callable[[], Prepared]:
    """Return what converts the files of the present catalogue in this process."""
    workshop = place.workshop(tell)
    return lambda: workshop.prepare(look())


def opened(
    place: Place, choice: Choice, prepare: Callable[[], Prepared], look: Look, tell: Tell
) -> "Engine":
    """Return the chosen engine, which from then on watches the adapters of the box."""
    if choice.kind == "llama.cpp":
        engine = LlamaEngine(prepare, place.limits, description=choice.why)
    else:
        # Imported here: torch and transformers take more memory than a small model.
        from fedpeft_client.inference.transformers_engine import TransformersEngine

        engine = TransformersEngine(
            place.base,
            look,
            context=place.limits.context,
            dtype=place.settings.model.dtype,
            description=choice.why,
        )
    return _Watched(engine, Watch(place.directory / ADAPTERS, engine.refresh, tell))


def choose(place: Place, prepare: Callable[[], object], *, cuda: bool) -> Choice:
    """Choose by ``inference.engine``, the machine, and whether the base can be converted.

    Raises:
        ConfigError: llama.cpp is asked for and cannot run the base model.
    """
    wanted = place.settings.inference.engine
    if wanted == "transformers" or (wanted == "auto" and cuda):
        why = "inference.engine asks for it" if wanted != "auto" else "this machine has CUDA"
        return Choice(kind="transformers", why=f"transformers answers, as {why}")
    try:
        prepare()
    except NotConvertible as error:
        if wanted == "llama.cpp":
            raise ConfigError(
                f'inference.engine = "llama.cpp" in client.toml, but {error}: set it to "auto"'
            ) from error
        return Choice(
            kind="transformers", why=f"transformers answers, several times slower, as {error}"
        )
    why = "inference.engine asks for it" if wanted != "auto" else "this machine has no CUDA"
    chosen = place.settings.inference.quantisation
    form = "the GGUF file as it is" if is_gguf(place.base) else chosen
    return Choice(kind="llama.cpp", why=f"llama.cpp answers ({form}), as {why}")


class _Watched:
    """An engine that looks after its adapters by itself."""

    def __init__(self, engine: "Engine", watch: Watch) -> None:
        self._engine, self._watch = engine, watch
        self.chat, self.complete = engine.chat, engine.complete
        self.models, self.refresh = engine.models, engine.refresh

    @property
    def description(self) -> str:
        return self._engine.description

    @property
    def context(self) -> int:
        return self._engine.context

    @property
    def default(self) -> str:
        return self._engine.default

    def close(self) -> None:
        self._watch.close()
        self._engine.close()


def _cores() -> int:
    """Return the cores that this process may use: hyper-threads would only get in the way."""
    allowed = len(os.sched_getaffinity(0))
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def has_cuda() -> bool:
    """Say whether torch finds a CUDA device."""
    import torch

    return torch.cuda.is_available()
