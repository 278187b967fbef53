"""A clinic box on disk: its directory with configuration, keys and received adapter.

client.toml     what the clinic's people decide
key.pem         the private key of the connection, mode 600; it never leaves the box
ca.pem          the certificate authority of the federation
identity.key    the private identity, mode 600, encrypted if ``[keys]`` says so
identity.next.key  the one that is to take its place, while ``rotate --identity`` runs
earlier-*.keys  what opens checkpoints of before the identity was renewed, encrypted
server.identity the server's public identity, pinned when the box joined
peers.json      the keys of other clinics, as this box has seen them
status.json     what the client last took part in
checkpoints/    the round that is under way, encrypted; empty between rounds
sums/           the secure sum that is under way, encrypted, and which ones were opened
renewing.json   what a box without a network asked for, until its new keys are confirmed
sticks/         what a box without a network remembers from one stick to the next
client.lock     held by the one program that takes part with this box
standing.json   under which number it does, and what it was asked last
refusal.json    the last order that a rule of client.toml forbade
traffic.json    the bytes of the present day, where client.toml limits them
adapters/       the adapters that the server sent, and which one of them is in use
adapter         a link to the one in use (stock PEFT)
audit/          the audit log: what this box did, in lines that show when they were changed

The privacy ledger lies beside this directory, so that joining anew in another one goes
on with it: fedpeft-ledger.sqlite, and fedpeft-ledger.sqlite.head, its last row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedpeft.config import load_settings
from fedpeft.errors import EnrolmentError, SealingError
from fedpeft.sealing.identity import Identity, PublicIdentity
from fedpeft.sealing.keyfile import Protection, load_identity, protection_from
from fedpeft.sealing.public_file import load_public_identity
from fedpeft.sealing.words import federation_words
from fedpeft_client.keys.enrolment import CA_FILE, IDENTITY_FILE, KEY_FILE, SERVER_IDENTITY_FILE
from fedpeft_client.keys.peers import PeerBook
from fedpeft_client.limits.refusals import RefusalFile
from fedpeft_client.limits.traffic import TrafficMeter
from fedpeft_client.link.fleet import read_ca
from fedpeft_client.reports.status import StatusFile
from fedpeft_client.rounds.clinic import Clinic, Membership, clinic_of
from fedpeft_client.settings import CONFIG_FILE, ClientSettings
from fedpeft_client.sticks.joining import is_joining
from fedpeft_client.versions.store import AdapterStore

AUDIT_FOLDER = "audit"

if TYPE_CHECKING:
    from fedpeft.privacy.law import Law


@dataclass(frozen=True)
class Box:
    """An enrolled clinic box."""

    directory: Path
    settings: ClientSettings

    @property
    def key(self) -> Path:
        """The private key."""
        return self.directory / KEY_FILE

    @property
    def ca(self) -> Path:
        """The federation's certificate authority."""
        return self.directory / CA_FILE

    @property
    def identity_path(self) -> Path:
        """The private identity."""
        return self.directory / IDENTITY_FILE

    @property
    def server_identity(self) -> PublicIdentity:
        """The server's identity that was pinned when this box joined.

        Raises:
            StorageError: the file cannot be read.
            SealingError: it is damaged.
        """
        path = self.directory / SERVER_IDENTITY_FILE
        try:
            return load_public_identity(path)
        except SealingError as error:
            raise SealingError(
                f"{path} is damaged, so the server cannot be recognised: restore it from the "
                "backup, or ask for a new invitation and join in another directory"
            ) from error

    def words(self) -> str:
        """Return the words by which people recognise the federation.

        Raises:
            EnrolmentError, StorageError, SealingError: a file of the box is damaged.
        """
        return federation_words(
            self.settings.server.federation, read_ca(self.ca), self.server_identity
        )

    @property
    def peers_path(self) -> Path:
        """Where the other clinics that this box has seen are kept."""
        return self.directory / "peers.json"

    @property
    def peers(self) -> PeerBook:
        """The other clinics that this box has seen."""
        accept_new = self.settings.aggregation.new_peers == "accept"
        return PeerBook(self.peers_path, accept_new=accept_new)

    @property
    def status(self) -> StatusFile:
        """What the running client last took part in."""
        return StatusFile(self.directory / "status.json")

    @property
    def adapter_store(self) -> AdapterStore:
        """The versions of the adapter that came, and which one of them is in use."""
        return AdapterStore(self.directory / "adapters", self.settings.adapters)

    @property
    def refusals(self) -> RefusalFile:
        """The last order that a rule of this clinic forbade."""
        return RefusalFile(self.directory / "refusal.json")

    @property
    def traffic_path(self) -> Path:
        """How many bytes passed today, where there is a limit."""
        return self.directory / "traffic.json"

    def traffic(self) -> TrafficMeter | None:
        """Return the counter of today's bytes, if ``client.toml`` limits them.

        Raises:
            StorageError: its file is damaged.
        """
        limit = self.settings.limits.max_mb_per_day
        return None if limit is None else TrafficMeter(self.traffic_path, limit << 20)

    @property
    def audit(self) -> Path:
        """The audit log."""
        return self.directory / AUDIT_FOLDER

    @property
    def ledger_path(self) -> Path:
        """What was spent of the privacy of the people in the records."""
        return (self.directory / self.settings.privacy.ledger).resolve()

    @property
    def law(self) -> "Law":
        """The most privacy loss that this box allows for each data set."""
        # Imported here: the accounting takes a second to load, which few commands need.
        from fedpeft.privacy.law import Law

        return Law(max_epsilon=self.settings.privacy.max_epsilon, delta=self.settings.privacy.delta)

    @property
    def model(self) -> Path:
        """The directory of the base model."""
        return self.directory / self.settings.model.directory

    @property
    def records(self) -> list[Path]:
        """The files of records: to train on, and to measure with if there is one."""
        files = (self.settings.data.train, self.settings.data.valid)
        return [self.directory / path for path in files if path is not None]

    def clinic(self, identity: Identity, others: tuple[Identity, ...] = ()) -> Clinic:
        """Return the clinic as the client app sees it; ``identity`` is its own, unlocked.

        For ``others`` see :class:`Membership`.

        Raises:
            SealingError, StorageError: the server's identity cannot be read.
        """
        membership = Membership(identity, self.server_identity, self.peers_path, others)
        return clinic_of(self.settings, self.directory, membership)

    def load_identity(self, ask: Callable[[], str]) -> Identity:
        """Return the private identity; ``ask`` returns the passphrase where there is one.

        Raises:
            KeyLocked: the passphrase or key file is missing or wrong.
            SealingError: the file is damaged.
            StorageError: other users can read it.
        """
        return load_identity(self.identity_path, self.protection(ask))

    def protection(self, ask: Callable[[], str]) -> Protection:
        """Return how the private identity is encrypted; ``ask`` as of :meth:`load_identity`.

        Raises:
            KeyLocked: the passphrase or key file is missing.
        """
        return protection_from(self.settings.keys, self.directory, ask)


def open_box(directory: Path) -> Box:
    """Read the box in ``directory``.

    Raises:
        EnrolmentError: this directory has not joined a federation, awaits its ticket, or joined
            with a release before sealing.
        ConfigError: ``client.toml`` cannot be used.
    """
    if is_joining(directory):
        raise EnrolmentError(
            f"{directory} has asked to join and was not admitted yet: bring its request to the "
            "central site, and with the ticket that comes back run: fedpeft-client ticket FILE "
            f"{directory}"
        )
    if not (directory / CONFIG_FILE).is_file():
        raise EnrolmentError(
            f"{directory} has no {CONFIG_FILE}; join a federation first: "
            "fedpeft-client join INVITATION --dir DIRECTORY"
        )
    for name in (IDENTITY_FILE, SERVER_IDENTITY_FILE):
        if not (directory / name).is_file():
            raise EnrolmentError(
                f"{directory} has no {name}, as it was made by an older release or the file was "
                "lost: ask the central site for a new invitation, and join again in a new directory"
            )
    return Box(directory, load_settings(ClientSettings, directory / CONFIG_FILE))
