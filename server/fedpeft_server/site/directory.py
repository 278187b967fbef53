"""The central site on disk: the directory that ``fedpeft-server init`` makes.

federation.toml     what the federation does
server.toml         where the server listens
keys/               certificate authority, server certificate, identity (private parts mode 600)
state/              enrolments and Flower's messages
audit/              the audit log: lines that show when they were changed
run/                rounds, adapter and summary (see fedpeft_server.runs)
"""

import json
import os
import tomllib
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Final

from pydantic import Field

from fedpeft.audit_log import AuditLog, note_handover
from fedpeft.config import (
    FederationSettings,
    KeySettings,
    Name,
    Settings,
    load_settings,
    parse_settings,
)
from fedpeft.console import ask_passphrase
from fedpeft.errors import ConfigError, StorageError
from fedpeft.models import fingerprint, require_fingerprint, resolve_base
from fedpeft.sealing.identity import Identity, PublicIdentity
from fedpeft.sealing.keyfile import protection_from
from fedpeft.sealing.words import federation_words
from fedpeft.storage import explained, require_folder, write_atomically
from fedpeft_server.enrolments.enrolment import Enrolments
from fedpeft_server.enrolments.recorded import RecordedEnrolments
from fedpeft_server.site.identity import KEY_FILE_SETTING, SiteIdentity
from fedpeft_server.site.pki import Authority, Issued, create_authority, split_address

FEDERATION_FILE = "federation.toml"
SERVER_FILE = "server.toml"
DEFAULT_PORT = 8443
_BOX_FILES: Final = ("client.toml", "joining.json")
"""What a clinic's box has; never a site."""


class TlsSettings(Settings):
    """What the hospital's certificate authority gave out; relative paths count from the site."""

    certificate: Path
    """PEM: the server's, then those between it and the CA's."""
    key: Path
    """PEM, not encrypted, mode 600."""
    ca: Path
    """PEM: what clinics recognise the server by; invitations carry it."""


class ListenSettings(Settings):
    """The whole of ``server.toml``."""

    address: str
    """``host:port`` as the clinics reach it; the certificate is made out to this host."""
    listen: str = "0.0.0.0"  # noqa: S104 - clinics are on other machines
    """The local interface to listen on."""
    max_message_mb: int = Field(default=1024, ge=1)
    """MiB of one clinic's answer."""
    tls: TlsSettings | None = None
    """Certificate files of the hospital's own authority; None: the federation has its own."""
    keys: KeySettings = KeySettings()
    """How ``keys/identity.key`` is protected."""


@dataclass(frozen=True)
class Site:
    """A central site whose configuration was read."""

    directory: Path
    listen: ListenSettings
    federation: FederationSettings
    authority: Authority
    sealing: SiteIdentity

    @cached_property
    def identity(self) -> Identity:
        """The private identity, unlocked on first use; a passphrase is asked for at the terminal.

        Raises:
            KeyLocked: the passphrase or key file is missing or wrong.
            SealingError: the file is damaged.
            StorageError: other users can read it, or it does not fit ``identity.pub``.
        """
        ask = partial(ask_passphrase, confirm=False)
        return self.sealing.unlock(self.listen.keys, self.directory, ask)

    @property
    def host_and_port(self) -> tuple[str, int]:
        """Host and port of the public address."""
        host, port = split_address(self.listen.address)
        return host, port or DEFAULT_PORT

    @property
    def audit(self) -> Path:
        """Directory of the audit log."""
        return self.directory / "audit"

    @property
    def state(self) -> Path:
        """Directory of the server's databases."""
        return self.directory / "state"

    def model(self) -> Path:
        """Return the directory of the federation's base model.

        Raises:
            ModelError: it is not there or incomplete.
            FingerprintMismatch: it is not the one that ``federation.toml`` names.
        """
        settings = self.federation.model
        directory = resolve_base(settings.base, relative_to=self.directory)
        if settings.fingerprint is not None:
            require_fingerprint(fingerprint(directory), settings.fingerprint, directory)
        return directory

    def renew_identity(self) -> PublicIdentity:
        """Put a new identity in the place of the present one, protected as that is.

        Raises:
            KeyLocked, SealingError, StorageError: see ``SiteIdentity``.
        """
        ask = cache(partial(ask_passphrase, confirm=False))
        old = self.sealing.unlock(self.listen.keys, self.directory, ask)
        protection = protection_from(self.listen.keys, self.directory, ask, named=KEY_FILE_SETTING)
        renewed = self.sealing.rotate(old, protection, self.federation.name)
        signer = renewed.unlock(self.listen.keys, self.directory, ask)
        note_handover(self.audit, old.public, signer, "server")
        return renewed.public

    def words(self) -> str:
        """Return the words by which clinics recognise this federation."""
        return federation_words(self.federation.name, self.authority.ca_pem(), self.sealing.public)

    def fingerprint(self) -> str:
        """Return the base model's fingerprint."""
        return fingerprint(self.model())

    def enrolments(self) -> Enrolments:
        """Open the invitations and clinics.

        Raises:
            StorageError: the file cannot be used.
        """
        self.state.mkdir(mode=0o700, exist_ok=True)
        host, port = self.host_and_port
        name = f"[{host}]" if ":" in host else host
        return RecordedEnrolments(
            self.state / "enrolment.db",
            lambda: AuditLog(self.audit),
            federation=self.federation.name,
            server=f"{name}:{port}",
            ca_pem=self.authority.ca_pem(),
            identity=self.sealing.public,
        )


def create_site(
    directory: Path,
    *,
    address: str,
    name: Name,
    base: str,
    keys: KeySettings,
) -> Site:
    """Make a new site with its own certificate authority and identity.

    Args:
        directory: made if missing, in a folder that is there; must be empty.
        address: ``host:port`` as clinics reach it.
        name: of the federation.
        base: directory of the base model, or ``embedded``.
        keys: how the identity is protected; a new passphrase is asked for at the terminal.

    Raises:
        StorageError: the directory is not empty or cannot be written.
        ConfigError: ``address`` or ``name`` cannot be used.
        KeyLocked: the passphrase or key file cannot be used; nothing was made.
    """
    with explained("look into", directory):
        if os.path.lexists(directory) and any(directory.iterdir()):
            raise StorageError(f"{directory} is not empty; name a new directory for the site")
    require_folder(directory.parent)
    split_address(address)
    # A path is meant from where it was typed; the file is read from the site's folder.
    base = str(Path(base).resolve()) if Path(base).is_dir() else base
    text = _FEDERATION.format(name=json.dumps(name), base=json.dumps(base))
    parse_settings(FederationSettings, tomllib.loads(text), [], where="the command line")
    ask = partial(ask_passphrase, confirm=True)
    protection = protection_from(keys, directory, ask, named="--key-file")
    create_authority(directory / "keys", address)
    SiteIdentity.create(directory / "keys", protection)
    listen = _server_toml(address, keys)
    write_atomically(directory / FEDERATION_FILE, text.encode())
    write_atomically(directory / SERVER_FILE, listen.encode())
    return open_site(directory)


def open_site(directory: Path, overrides: list[str] | None = None) -> Site:
    """Read a site; ``overrides`` are ``--set`` values for its ``federation.toml``.

    Raises:
        ConfigError: there is no site, or a file has a fault.
        StorageError: keys or identity are missing or open to other users.
    """
    require_no_box(directory)
    if not (directory / SERVER_FILE).is_file():
        why = f"it has no {SERVER_FILE}" if directory.is_dir() else "there is no such folder"
        raise ConfigError(
            f"{directory} is not the directory of a site, as {why}: name the one that "
            "fedpeft-server init made"
        )
    listen = load_settings(ListenSettings, directory / SERVER_FILE)
    return Site(
        directory=directory,
        listen=listen,
        federation=load_settings(FederationSettings, directory / FEDERATION_FILE, overrides or []),
        authority=_authority(directory, listen),
        sealing=SiteIdentity.load(directory / "keys"),
    )


def require_no_box(
    directory: Path, instead: str = "fedpeft-client has the commands for it"
) -> None:
    """Check that ``directory`` is not a clinic's box, which another program is for.

    ``instead`` says what to do with a box.

    Raises:
        ConfigError: it is one.
    """
    if (directory / SERVER_FILE).is_file():
        return
    if any((directory / name).is_file() for name in _BOX_FILES):
        raise ConfigError(f"{directory} is a clinic's box, not the directory of a site: {instead}")


def _authority(directory: Path, listen: ListenSettings) -> Authority:
    tls = listen.tls
    if tls is None:
        return Authority.load(directory / "keys")
    issued = Issued(directory / tls.certificate, directory / tls.key, directory / tls.ca)
    authority = Authority.load(directory / "keys", issued)
    authority.require_usable(listen.address)
    return authority


def _server_toml(address: str, keys: KeySettings) -> str:
    # For these strings and booleans JSON is TOML.
    path = '# key_file = "/media/usb/fedpeft.key"'
    if keys.key_file is not None:
        path = f"key_file = {json.dumps(str(keys.key_file))}"
    return _SERVER.format(
        address=json.dumps(address), passphrase=json.dumps(keys.passphrase), key_file=path
    )


_SERVER = """# Where the server listens. Invitations carry this address.
address = {address}
listen = "0.0.0.0"            # the local interface
max_message_mb = 1024         # MiB of one clinic's answer

[keys]                        # how keys/identity.key lies on the disk
passphrase = {passphrase}            # asked for at every start
{key_file}
"""

_FEDERATION = """# What the federation does. Every setting stands in docs/configuration.md.
name = {name}

[model]
base = {base}                 # directory of the base model; never loaded here, only identified
quantization = "none"         # "nf4": clinics hold the base in 4 bits

[adapter]
rank = 8
alpha = 16.0
target_modules = "all-linear"

[training]
learning_rate = 2e-4
batch_size = 8                # rows in one optimiser step
local_epochs = 1              # passes over the clinic's rows in a round
max_length = 512              # tokens
schedule = "cosine"           # over all rounds

[rounds]
count = 5
minimum_clinics = 3           # answers that a round needs; of fewer, a sum hides nothing
timeout_s = 3600.0            # for one answer
wait_s = 86400.0              # for the minimum of clinics to connect
gather_s = 30.0               # for the other enrolled clinics

[strategy]
name = "alternating"          # how updates become the next adapter: fedpeft strategies

[aggregation]
confidentiality = "secagg"    # the server learns sums only; "sealed": it opens each update
adversary = "active"          # "curious": a server that keeps to the protocol
"""
