"""A site with finished rounds, as a server leaves it, made without a network."""

from pathlib import Path
from typing import Any

import torch

from fedpeft.adapters import AdapterSchema, AdapterState
from fedpeft.config import KeySettings
from fedpeft.models import adapter_schema
from fedpeft.sealing.identity import Identity
from fedpeft.sealing.possession import prove_possession
from fedpeft_server.enrolments.enrolment import Enrolments
from fedpeft_server.rounds.lineage import Made, Scribe
from fedpeft_server.rounds.outcome import Outcome
from fedpeft_server.runs.directory import RoundRecord, RunDirectory
from fedpeft_server.site.directory import Site, create_site, open_site
from fedpeft_server.trail import Trail
from tests.server.test_enrolment import HOUR_S, new_key

CLINICS = ("anna", "bert", "carl")
_SCHEMAS: dict[tuple[Path, int], AdapterSchema] = {}
_FEDERATION = """
name = "sea"
[model]
base = "embedded"
[adapter]
rank = 2
[rounds]
count = 5
minimum_clinics = 3
"""


def make_site(directory: Path, *, rounds: int = 3, keys: KeySettings | None = None) -> Site:
    """Make a site, enrol three clinics, and finish round 0 and ``rounds - 1`` more."""
    create_site(
        directory,
        address="127.0.0.1:8443",
        name="sea",
        base="embedded",
        keys=keys or KeySettings(),
    )
    (directory / "federation.toml").write_text(_FEDERATION)
    site = open_site(directory)
    enrolments = site.enrolments()
    for name in CLINICS:
        enrol(enrolments, name)
    finish_rounds(site, range(rounds))
    return site


def enrol(enrolments: Enrolments, name: str) -> None:
    """Let a new clinic take up an invitation."""
    invitation = enrolments.create_invitation(name, HOUR_S, fingerprint="f" * 64)
    redeem_in_sea(enrolments, invitation.token)


def redeem_in_sea(enrolments: Enrolments, token: str) -> str:
    """Take up an invitation of the federation "sea" as an honest clinic does."""
    identity, key = Identity.generate(), new_key()
    proof = prove_possession(identity, federation="sea", token=token, public_key_pem=key)
    return enrolments.redeem(token, key, identity.public.to_text(), proof)


def finish_rounds(site: Site, numbers: range) -> None:
    """Finish rounds: signed, noted in the audit log, saved."""
    schema = schema_of(site)
    trail = Trail.open(site.audit, site.identity)
    directory = RunDirectory(site.directory / "run", site.federation, engine="flower")
    directory.open(schema.fingerprint)
    scribe = Scribe(site.federation, site.identity, directory, trail)
    with trail.session("sea", site.identity.public):
        for number in numbers:
            outcome = Outcome(adapter=_state(schema, number))
            names = CLINICS if number else ()
            lineage = scribe.signed(Made(round=number, participants=names), outcome)
            directory.save_round(record(number), outcome, lineage=lineage)


def schema_of(site: Site) -> AdapterSchema:
    """Return the federation's schema; built once for each base model, as that takes a second."""
    key = (site.model(), site.federation.adapter.rank)
    if key not in _SCHEMAS:
        _SCHEMAS[key] = adapter_schema(key[0], site.federation.adapter)
    return _SCHEMAS[key]


def record(number: int) -> RoundRecord:
    content: dict[str, Any] = {
        "round": number,
        "participants": CLINICS if number else (),
        "failed": (),
        "train_loss": 3.0 - number if number else None,
        "valid_loss": 4.0 - number,
        "per_clinic": {},
        "bytes_up": 10 * number,
        "bytes_down": 20 * number,
        "seconds": 1.5,
    }
    return RoundRecord.model_validate(content)


def _state(schema: AdapterSchema, number: int) -> AdapterState:
    return AdapterState(schema, torch.full((schema.numel,), float(number)))


def content_of(folder: Path) -> dict[str, bytes]:
    """Return what all files below a folder hold."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
