"""The commands ``adapters``: the versions that a box keeps, and which one is used."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedpeft_client.commands.program import BoxDirectory, program

if TYPE_CHECKING:
    from fedpeft_client.versions.store import AdapterStore
    from fedpeft_client.versions.version import Version

app = typer.Typer(
    name="adapters",
    help="The versions of the adapter on this box: which there are, and which one answers.",
    no_args_is_help=True,
)
_Name = Annotated[str, typer.Argument(help="a name of `fedpeft-client adapters list`")]
_AsJson = Annotated[bool, typer.Option("--json", help="for programs")]


@app.command("list")
def list_versions(directory: BoxDirectory = Path(), as_json: _AsJson = False) -> None:
    """List the versions, the oldest first: name, state, date, size, and the loss here.

    Reads DIR/adapters; writes and sends nothing.
    """
    store = _store(directory)
    rows = [_row(store, version) for version in store.versions()]
    wrong = store.damaged()
    if as_json:
        typer.echo(json.dumps({"schema": 1, "versions": rows, "damaged": sorted(wrong)}, indent=2))
        return
    for row in rows:
        own = "-" if row["loss"] is None else f"{row['loss']:.4f}"
        state = "damaged" if row["name"] in wrong else row["state"]
        size = f"{row['bytes'] / 2**20:.1f} MiB"
        typer.echo(f"{row['name']}\t{state}\t{row['received']}\t{size}\tloss {own}")
    for text in wrong.values():
        program.say(text)
    if not rows:
        program.say("no adapter has come yet; the base model answers")


@app.command()
def show(name: _Name, directory: BoxDirectory = Path(), as_json: _AsJson = False) -> None:
    """Say all that is known of a version: where it comes from, its losses, and the verdict.

    Reads DIR/adapters; writes and sends nothing.
    """
    from fedpeft_client.versions.version import LINEAGE_FILE

    store = _store(directory)
    version = store.find(_version_name(name))
    lineage = version.path / LINEAGE_FILE
    if as_json:
        about = json.loads(version.about.model_dump_json(by_alias=True))
        content = json.loads(lineage.read_bytes()) if lineage.is_file() else None
        row = _row(store, version)
        typer.echo(json.dumps({**row, "about": about, "lineage": content}, indent=2))
        return
    for line in _lines(store, version):
        typer.echo(line)
    typer.echo(f"lineage\t{lineage if lineage.is_file() else 'none came with it'}")


@app.command()
def use(name: _Name, directory: BoxDirectory = Path()) -> None:
    """Let a version answer from now on, or the base model alone (base).

    Reads and writes DIR/adapters and the link DIR/adapter; sends nothing. Running answers end with
    what they began with. An adapter that comes later is compared with this one.
    """
    _store(directory).use(name)
    program.say(f"{name} is in use")


@app.command()
def rollback(directory: BoxDirectory = Path()) -> None:
    """Let the version answer that was used before; once more goes further back.

    Reads and writes DIR/adapters and the link DIR/adapter; sends nothing.
    """
    program.say(f"{_store(directory).rollback()} is in use again")


@app.command()
def pin(name: _Name, directory: BoxDirectory = Path()) -> None:
    """Keep a version whatever the quota of client.toml.

    Reads and writes DIR/adapters; sends nothing.
    """
    _store(directory).pin(_version_name(name))
    program.say(f"{name} is pinned")


@app.command()
def unpin(name: _Name, directory: BoxDirectory = Path()) -> None:
    """Let a version go when the quota asks for it.

    Reads and writes DIR/adapters; sends nothing.
    """
    _store(directory).unpin(_version_name(name))
    program.say(f"{name} is not pinned any more")


@app.command()
def remove(name: _Name, directory: BoxDirectory = Path()) -> None:
    """Remove a version for good; one in use only if it is damaged, and none that is pinned.

    Reads and writes DIR/adapters; sends nothing.
    """
    store = _store(directory)
    before = store.in_use_name()
    store.remove(_version_name(name))
    program.say(f"{name} is removed")
    if (now := store.in_use_name()) != before:
        program.say(f"{now} is in use again")


def _store(directory: Path) -> "AdapterStore":
    from fedpeft_client.box import open_box

    return open_box(directory).adapter_store


def _version_name(name: str) -> str:
    """Return a name that can be a version's.

    Raises:
        UnknownAdapter: it is that of the base model.
    """
    from fedpeft.errors import UnknownAdapter
    from fedpeft_client.inference.catalogue import BASE

    if name == BASE:
        raise UnknownAdapter(
            f"{BASE} is the base model alone, no version of the adapter: name one of "
            "`fedpeft-client adapters list`"
        )
    return name


def _row(store: "AdapterStore", version: "Version") -> dict[str, Any]:
    about, verdict = version.about, version.verdict
    return {
        "name": version.name,
        "state": _state(store, version),
        "received": about.received,
        "federation": about.federation,
        "round": about.round,
        "bytes": version.size_bytes,
        "loss": None if verdict.new is None else verdict.new.own,
        "path": str(version.path),
    }


def _state(store: "AdapterStore", version: "Version") -> str:
    words = [
        "in use" if version.name == store.in_use_name() else "",
        "pinned" if version.name in store.pinned() else "",
        "" if version.verdict.accepted else "not taken",
    ]
    return ", ".join(word for word in words if word) or "kept"


def _lines(store: "AdapterStore", version: "Version") -> list[str]:
    about, verdict = version.about, version.verdict
    lines = [
        f"name\t{version.name} ({_state(store, version)})",
        f"received\t{about.received}",
        f"from\tround {about.round} of federation {about.federation}, run {about.run}"
        if about.federation
        else "from\tan earlier release, which kept no record of it",
        f"base\t{about.base_fingerprint or 'see fedpeft.json'}",
        f"weights\t{version.digest}",
        f"size\t{version.size_bytes / 2**20:.1f} MiB in {version.path}",
        f"verdict\t{'taken' if verdict.accepted else 'not taken'}: {verdict.reason}",
    ]
    measured = (("new", verdict.new), ("in use then", verdict.in_use), ("base", verdict.base))
    for title, losses in measured:
        if losses is not None:
            own = "not measured" if losses.own is None else f"{losses.own:.4f}"
            lines.append(f"loss\t{title}: own rows {own}, general language {losses.general:.4f}")
    return lines
