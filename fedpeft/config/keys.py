"""How the private identity of a site or box lies on its disk."""

from pathlib import Path

from pydantic import model_validator

from fedpeft.config.settings import Settings


class KeySettings(Settings):
    """The ``[keys]`` table of ``client.toml`` and ``server.toml``."""

    passphrase: bool = False
    """The identity is encrypted with a passphrase, asked for at every start."""
    key_file: Path | None = None
    """The identity is encrypted with the content of this file, on a USB stick for example.

    A relative path counts from the folder of the configuration."""

    @model_validator(mode="after")
    def _one_lock(self) -> "KeySettings":
        if self.passphrase and self.key_file is not None:
            raise ValueError("passphrase and key_file exclude each other; keep one")
        return self
