"""The ``flower`` engine: the real server and one real client process a clinic.

Everything that a hospital network would run, over TLS on the loopback
interface: own CA, invitations, keys made by each clinic, Flower's wire.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from pathlib import Path

from fedpeft.config import FederationSettings
from fedpeft.errors import FederationError
from fedpeft.models import fingerprint
from fedpeft.sealing.identity import Identity
from fedpeft.sealing.keyfile import Protection
from fedpeft.storage import explained
from fedpeft_client.keys.enrolment import Enrolment, join
from fedpeft_client.rounds.clinic import Clinic
from fedpeft_client.settings import (
    CONFIG_FILE,
    BoxModelSettings,
    ClientSettings,
    LimitSettings,
    ServerSettings,
    settings_toml,
)
from fedpeft_server.enrolments.enrolment import Enrolments
from fedpeft_server.link.app import build_server_app
from fedpeft_server.link.superlink import SuperLink, SuperLinkSettings
from fedpeft_server.rounds.loop import Federation
from fedpeft_server.site.pki import create_authority

_HOST = "127.0.0.1"
_CONNECT_S_PER_CLINIC = 60.0
_STOP_S = 15.0
_POLL_S = 0.3
_INVITATION_S = 3600.0


def run_flower(
    federation: Federation,
    clinics: Sequence[Clinic],
    settings: FederationSettings,
    server: Identity,
    out: Path,
) -> None:
    """Run ``federation`` with a process for each clinic; their logs go to ``out/logs``.

    ``server`` is the identity by which the federation signs; the clinics make their own.

    Raises:
        FederationError: a clinic's process ended before it connected.
    """
    with tempfile.TemporaryDirectory(prefix="fedpeft-") as private:
        root = Path(private)
        port = _free_port()
        authority = create_authority(root / "server", f"{_HOST}:{port}")
        enrolments = Enrolments(
            root / "server" / "enrolment.db",
            federation=settings.name,
            server=f"{_HOST}:{port}",
            ca_pem=authority.ca_pem(),
            identity=server.public,
        )
        place = SuperLinkSettings(directory=root / "server", host=_HOST, port=port)
        with SuperLink(place, authority, enrolments) as link:
            threads = max(1, (os.cpu_count() or 1) // len(clinics))
            boxes = [_enrol(clinic, threads, enrolments, root) for clinic in clinics]
            with _running(boxes, out / "logs") as processes:
                _wait_until_connected(link, processes, out / "logs")
                link.run(build_server_app(federation, link))


def _enrol(clinic: Clinic, threads: int, enrolments: Enrolments, root: Path) -> Path:
    """Invite, join and configure a clinic as its administrator would; return its directory."""
    directory = root / "clinics" / clinic.name
    invitation = root / f"{clinic.name}.json"
    enrolments.create_invitation(
        clinic.name, _INVITATION_S, fingerprint=fingerprint(clinic.model)
    ).write(invitation)
    enrolment = join(invitation, directory, Protection.none())
    (directory / CONFIG_FILE).write_text(
        settings_toml(_settings(clinic, threads, enrolment)), "utf-8"
    )
    return directory


def _settings(clinic: Clinic, threads: int, enrolment: Enrolment) -> ClientSettings:
    return ClientSettings(
        clinic=clinic.name,
        server=ServerSettings(address=enrolment.server, federation=enrolment.federation),
        model=BoxModelSettings(directory=clinic.model.resolve(), dtype=clinic.dtype),
        data=clinic.data.model_copy(
            update={
                "train": clinic.data.train.resolve(),
                "valid": clinic.data.valid and clinic.data.valid.resolve(),
            }
        ),
        limits=LimitSettings(threads=threads, max_rank=clinic.limits.max_rank, min_free_disk_mb=0),
        aggregation=clinic.aggregation,
        privacy=clinic.privacy.model_copy(update={"ledger": clinic.ledger.resolve()}),
    )


@contextlib.contextmanager
def _running(boxes: Sequence[Path], logs: Path) -> Generator[dict[str, "subprocess.Popen[bytes]"]]:
    """Start the clinics' processes, and stop them however the body ends."""
    with explained("write", logs):
        logs.mkdir(parents=True, exist_ok=True)
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for box in boxes:
            with (logs / f"{box.name}.log").open("ab") as log:
                # A session of its own: Ctrl-C reaches this process alone, which stops them.
                processes[box.name] = subprocess.Popen(  # noqa: S603
                    [sys.executable, "-m", "fedpeft_client", "start", str(box)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        yield processes
    finally:
        for process in processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + _STOP_S
        for process in processes.values():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_connected(
    link: SuperLink, processes: dict[str, "subprocess.Popen[bytes]"], logs: Path
) -> None:
    deadline = time.monotonic() + _CONNECT_S_PER_CLINIC * len(processes)
    while len(link.connected()) < len(processes):
        for name, process in processes.items():
            if (code := process.poll()) is not None:
                raise FederationError(
                    f"clinic {name}'s process ended with exit code {code} before it connected; "
                    f"see {logs / f'{name}.log'}"
                )
        if time.monotonic() > deadline:
            raise FederationError(
                f"{len(link.connected())} of {len(processes)} clinics connected in time; see {logs}"
            )
        time.sleep(_POLL_S)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])
