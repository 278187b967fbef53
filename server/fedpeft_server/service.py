"""Run a site's federation: listen, enrol, and go through the rounds."""

from collections.abc import Callable
from pathlib import Path

from flwr.app import Message

from fedpeft.errors import ConfigError
from fedpeft.models import adapter_schema
from fedpeft.protocol import KINDS
from fedpeft.secagg import STAGES
from fedpeft_server.link.app import build_server_app
from fedpeft_server.link.superlink import SuperLink, SuperLinkSettings
from fedpeft_server.rounds.loop import Federation
from fedpeft_server.rounds.narration import Narration
from fedpeft_server.runs.directory import RunDirectory
from fedpeft_server.site.directory import Site
from fedpeft_server.site.expiry import expiry_warnings
from fedpeft_server.sticks.post import StickPost
from fedpeft_server.trail import RecordedLink, Trail
from fedpeft_strategies import build_strategy

_LEAST_CLINICS = 2


def serve_federation(site: Site, results: Path, say: Callable[[str], None]) -> None:
    """Serve ``site`` until its rounds are finished; ``say`` is told how it goes.

    Raises:
        FedpeftError: of the kind that says what went wrong; finished rounds are kept.
    """
    settings = site.federation
    if settings.rounds.minimum_clinics < _LEAST_CLINICS:
        raise ConfigError(
            "rounds.minimum_clinics = 1 would show one clinic's update to all the others; raise it "
            f"to {_LEAST_CLINICS} or more in {site.directory / 'federation.toml'}"
        )
    if settings.privacy is not None and settings.privacy.test_seed is not None:
        raise ConfigError(
            "privacy.test_seed makes noise that anyone can take away again, for simulations; take "
            f"it out of {site.directory / 'federation.toml'}"
        )
    identity = site.identity
    schema = adapter_schema(site.model(), settings.adapter)
    trail = Trail.open(site.audit, identity)
    if trail.repaired_bytes:
        say(
            f"the last line of the audit log {site.audit} was torn, as after a power cut, and its "
            f"{trail.repaired_bytes} bytes were cut away: what it was to tell was not done"
        )
    post = StickPost(
        site.state,
        signer=identity,
        tell=lambda name: say(
            f"clinic {name} is asked by stick: run fedpeft-server round export in {site.directory}"
        ),
    )
    federation = Federation(
        settings,
        schema,
        build_strategy(settings, schema),
        RunDirectory(results, settings, engine="flower"),
        Narration(say, settings.rounds.count),
        identity,
        trail,
        post,
    )
    place = SuperLinkSettings(
        directory=site.state,
        host=site.listen.listen,
        port=site.host_and_port[1],
        max_message_bytes=site.listen.max_message_mb << 20,
    )
    enrolments = site.enrolments()
    say(f"the fingerprint of this server's identity is {identity.public.fingerprint}")
    if old := [each.name for each in enrolments.clinics() if each.identity is None]:
        say(
            f"{', '.join(old)} enrolled with an older release, take no part, and must enrol "
            "again: fedpeft-server remove NAME, then fedpeft-server invite NAME"
        )

    for warning in expiry_warnings(site.authority, enrolments):
        say(f"warning: {warning}")

    def heard(node: int, reply: Message) -> None:
        # The later steps of a secure sum take moments, and would be five lines a clinic.
        first = reply.metadata.message_type.removesuffix(f".{STAGES[0]}") in KINDS
        if first and not reply.has_error():
            say(f"clinic {link.names().get(node, 'unknown')} answered")

    with (
        trail.session(settings.name, identity.public),
        SuperLink(
            place,
            site.authority,
            enrolments,
            on_arrival=heard,
            succession=site.sealing.succession,
            post=post,
            stick_timeout_s=settings.rounds.stick_timeout_s,
        ) as link,
    ):
        say(
            f"listening on {site.listen.address} for federation {settings.name}; confidentiality "
            f"{settings.aggregation.confidentiality}"
        )
        link.run(build_server_app(federation, RecordedLink(link, trail)))
