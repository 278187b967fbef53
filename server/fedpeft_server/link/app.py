"""The ServerApp: Flower's entry point around our round loop."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedpeft_server.link.link import Link
from fedpeft_server.rounds.loop import Federation


def build_server_app(federation: Federation, link: Link) -> ServerApp:
    """Return the app that runs ``federation`` over ``link`` when the engine calls it."""
    app = ServerApp()

    def main(_grid: Grid, _context: Context) -> None:
        federation.run(link)

    app.main()(main)
    return app
