"""Run a site's federation: listen, enrol, and go through the rounds."""

from collections.abc import Callable
from pathlib import Path

from flwr.app import Message

from fedpeft.models import adapter_schema, fingerprint, require_fingerprint, resolve_base
from fedpeft_server.app import build_server_app
from fedpeft_server.narration import Narration
from fedpeft_server.rounds import Federation
from fedpeft_server.run_directory import RunDirectory
from fedpeft_server.site import Site
from fedpeft_server.superlink import SuperLink, SuperLinkSettings
from fedpeft_strategies import build_strategy


def serve_federation(site: Site, results: Path, say: Callable[[str], None]) -> None:
    """Serve ``site`` until its rounds are finished; ``say`` is told how it goes.

    Raises:
        FedpeftError: of the kind that says what went wrong; finished rounds are kept.
    """
    settings = site.federation
    model = resolve_base(settings.model.base, relative_to=site.directory)
    if settings.model.fingerprint is not None:
        require_fingerprint(fingerprint(model), settings.model.fingerprint, model)
    schema = adapter_schema(model, settings.adapter)
    federation = Federation(
        settings,
        schema,
        build_strategy(settings.strategy.name, schema),
        RunDirectory(results, settings, engine="flower"),
        Narration(say, settings.rounds.count),
    )
    place = SuperLinkSettings(
        directory=site.state,
        host=site.listen.listen,
        port=site.host_and_port[1],
        max_message_bytes=site.listen.max_message_mb << 20,
    )
    enrolments = site.enrolments()

    def heard(node: int, _reply: Message) -> None:
        say(f"clinic {link.names().get(node, 'unknown')} answered")

    with SuperLink(place, site.authority, enrolments, on_arrival=heard) as link:
        say(f"listening on {site.listen.address} for federation {settings.name}")
        link.run(build_server_app(federation, link))
