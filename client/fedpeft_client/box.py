"""A clinic box on disk: its directory with configuration, key and received adapter.

client.toml     what the clinic's people decide
key.pem         the private key, mode 600; it never leaves the box
ca.pem          the certificate authority of the federation
adapter/        the last adapter that the server sent (stock PEFT)
"""

from dataclasses import dataclass
from pathlib import Path

from fedpeft.config import load_settings
from fedpeft.errors import EnrolmentError
from fedpeft_client.clinic import CONFIG_FILE, Clinic, clinic_of
from fedpeft_client.settings import ClientSettings


@dataclass(frozen=True)
class Box:
    """An enrolled clinic box."""

    directory: Path
    settings: ClientSettings

    @property
    def key(self) -> Path:
        """The private key."""
        return self.directory / "key.pem"

    @property
    def ca(self) -> Path:
        """The federation's certificate authority."""
        return self.directory / "ca.pem"

    @property
    def clinic(self) -> Clinic:
        """The clinic as the client app sees it."""
        return clinic_of(self.settings, self.directory)


def open_box(directory: Path) -> Box:
    """Read the box in ``directory``.

    Raises:
        EnrolmentError: this directory has not joined a federation.
        ConfigError: ``client.toml`` cannot be used.
    """
    if not (directory / CONFIG_FILE).is_file():
        raise EnrolmentError(
            f"{directory} has no {CONFIG_FILE}; join a federation first: "
            "fedpeft-client join INVITATION --dir DIRECTORY"
        )
    return Box(directory, load_settings(ClientSettings, directory / CONFIG_FILE))
