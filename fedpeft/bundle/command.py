"""What the command line needs for a bundle beside the bundle itself: keys, folders, a bar."""

import contextlib
import tempfile
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from fedpeft.bundle.archive import Observe
from fedpeft.bundle.making import Bundle, Ingredients, make_bundle, require_outside
from fedpeft.bundle.signing import bundle_key
from fedpeft.bundle.wheels import WheelFolder, gather_wheels, require_complete
from fedpeft.config import KeySettings, parse_settings
from fedpeft.console import ask_passphrase, people
from fedpeft.errors import ConfigError
from fedpeft.sealing.identity import Identity
from fedpeft.sealing.keyfile import protection_from

BUNDLE_KEY = "fedpeft-bundle.key"
"""Name of the key that is made beside the bundle where none is named."""
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What was asked for at the command line."""

    model: Path
    out: Path
    wheels: Path | None
    config: tuple[Path, ...]
    sign_key: Path | None
    passphrase: bool
    key_file: Path | None


def build(wish: Wish, say: Say) -> tuple[Bundle, Identity]:
    """Make the bundle that was asked for, and return it and who signed it.

    Raises:
        ConfigError, KeyLocked, ModelError, SealingError, StorageError: as the message says;
            no bundle was written.
    """
    from fedpeft.models import fingerprint, resolve_base

    model = resolve_base(str(wish.model), relative_to=Path())
    require_outside(wish.out, model, *([wish.wheels] if wish.wheels else []))
    for path in wish.config:
        if not path.is_file():
            raise ConfigError(f"the configuration file {path} does not exist; name one that does")
    if wish.wheels is not None and not wish.wheels.is_dir():
        raise ConfigError(f"the folder of wheels {wish.wheels} does not exist; name one that does")
    signer = _signer(wish, say)
    with _wheel_folder(wish.wheels, say) as wheels, _progress() as begin:
        ingredients = Ingredients(
            wheels=wheels,
            model=model,
            fingerprint=fingerprint(model),
            config=wish.config,
            signer=signer,
        )
        return make_bundle(ingredients, wish.out, begin), signer


def _signer(wish: Wish, say: Say) -> Identity:
    chosen = {"passphrase": wish.passphrase, "key_file": wish.key_file and wish.key_file.absolute()}
    keys = parse_settings(KeySettings, chosen, [], where="the command line")
    path = wish.sign_key or wish.out.parent / BUNDLE_KEY
    if wish.sign_key is not None and not path.exists():
        raise ConfigError(
            f"there is no key {path} to sign with: name keys/identity.key of the site, or leave "
            "--sign-key out and a key for bundles is made"
        )
    ask = partial(ask_passphrase, confirm=not path.exists())
    identity, made = bundle_key(path, protection_from(keys, Path(), ask))
    if made:
        say(f"made the key {path}, which signs bundles; keep it here, and for the next release")
    return identity


@contextlib.contextmanager
def _wheel_folder(directory: Path | None, say: Say) -> Generator[WheelFolder]:
    """Yield the wheels of ``directory``, or gather them into a folder that goes away again."""
    with contextlib.ExitStack() as stack:
        if directory is None:
            place = stack.enter_context(tempfile.TemporaryDirectory(prefix="fedpeft-wheels-"))
            directory = Path(place)
            gather_wheels(directory, say)
        folder = WheelFolder.of(directory)
        if folder.for_this_machine():
            require_complete(folder, directory)
        else:
            say(
                f"the wheels are for Python {folder.python} on {folder.machine}, so whether they "
                "are complete shows only there: try the bundle on such a machine first"
            )
        yield folder


@contextlib.contextmanager
def _progress() -> Generator[Callable[[int], Observe]]:
    """Yield what begins a bar; nothing is shown where there is no terminal."""
    bar = Progress(
        TextColumn("bundling"),
        BarColumn(bar_width=24),
        DownloadColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=people,
        disable=not people.is_terminal,
    )

    def begin(total: int) -> Observe:
        task = bar.add_task("bundling", total=total)
        return partial(bar.advance, task)

    with bar:
        yield begin
