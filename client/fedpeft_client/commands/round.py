"""Rounds without a network: questions come on a stick, and answers go back on it."""

import logging
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from fedpeft.console import ask_passphrase
from fedpeft.errors import StickRefused, StorageError
from fedpeft.storage import explained, write_atomically
from fedpeft_client.commands.program import BoxDirectory, program

if TYPE_CHECKING:
    from fedpeft.protocol.stick_file import ReadFile
    from fedpeft_client.box import Box
    from fedpeft_client.sticks.answering import Answered

app = typer.Typer()
_round = typer.Typer(help="Take part in rounds by files on a stick, without a network.")
app.add_typer(_round, name="round")


@app.command()
def ticket(
    file: Annotated[Path, typer.Argument(help="the file of `fedpeft-server admit`")],
    directory: BoxDirectory = Path(),
) -> None:
    """Complete a join by stick with the ticket of the central site.

    Reads the ticket and DIR/joining.json; writes DIR (server.identity, ca.pem, client.toml);
    sends nothing.
    """
    from fedpeft_client.settings import CONFIG_FILE
    from fedpeft_client.sticks.joining import take_ticket
    from fedpeft_client.trail import joined

    invitation = take_ticket(file, directory)
    joined(directory, invitation.clinic)
    program.say(
        f"joined federation {invitation.federation} as {invitation.clinic}; look at "
        f"{directory / CONFIG_FILE}, then wait for the first stick and run: fedpeft-client round "
        f"run FILE --dir {quote(str(directory))}"
    )


@_round.command()
def run(
    question: Annotated[Path, typer.Argument(help="the file of `fedpeft-server round export`")],
    directory: Annotated[
        Path, typer.Option("--dir", help="where this box keeps its files")
    ] = Path(),
    out: Annotated[
        Path | None, typer.Option(help="the file or folder to write; default: beside the question")
    ] = None,
) -> None:
    """Answer one question of the central site: train, measure, or do a step of a secure sum.

    Reads the file, the records and the base model; writes what `fedpeft-client start` writes,
    and DIR/sums and DIR/sticks; writes the answer into one file (mode 600), which holds what
    would go over the network, sealed, or the name of the rule that forbids it; sends nothing.
    Ctrl-C keeps the last checkpoint, and the same file goes on from there. The same file once
    more gives the same answer, at no further cost.
    """
    from fedpeft.protocol.stick_file import read_stick_file
    from fedpeft_client.box import open_box
    from fedpeft_client.box_lock import only_program

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.captureWarnings(capture=True)
    box = open_box(directory)
    if not box.ca.is_file():
        raise StickRefused(
            f"{directory} has not been admitted yet: bring the ticket of the central site, and run "
            "fedpeft-client ticket"
        )
    # The file holds an adapter and a little beside it.
    limit = (box.settings.limits.max_message_mb << 20) + (1 << 20)
    with only_program(directory):
        try:
            answered = _answered(box, read_stick_file(question, limit))
        except StickRefused as error:
            raise StickRefused(f"{question} {error}") from None
        target = _target(out or question.parent, answered)
        write_atomically(target, answered.content, mode=0o600)
    _tell(target, answered)


def _answered(box: "Box", read: "ReadFile") -> "Answered":
    """Answer a file with the app that answers the network, and keep what that keeps."""
    from fedpeft_client.limits.processors import bound_processors
    from fedpeft_client.rounds.app import ClinicDesk, build_client_app
    from fedpeft_client.rounds.mailbox import Mailbox
    from fedpeft_client.rounds.narration import narrate_steps
    from fedpeft_client.rounds.work import ClinicWork
    from fedpeft_client.sticks.answering import StickDesk, own_question
    from fedpeft_client.sticks.memory import KeptPlaces, KeptShelf, StickMemory
    from fedpeft_client.trail import BoxTrail, unlocking

    if box.settings.limits.threads is not None:
        bound_processors(box.settings.limits.threads)
    with unlocking(box.audit):
        identity = box.load_identity(partial(ask_passphrase, confirm=False))
    clinic = box.clinic(identity)
    question = own_question(clinic, read)
    memory = StickMemory(box.directory, identity)
    trail = BoxTrail.open(box.audit, clinic, program.say)
    desk = ClinicDesk(
        lambda _context: clinic,
        ClinicWork(narrate_steps(program.say), program.say),
        seen=box.status.saw,
        refused=lambda error: box.refusals.note(error.reason, str(error)),
        tell=program.say,
        trail=trail,
        mailbox=Mailbox(KeptPlaces(memory)),
        shelf=KeptShelf(memory),
    )
    limit = box.settings.limits.max_message_mb << 20
    with trail.session():
        return StickDesk(clinic, build_client_app(desk), memory, trail, limit).answer(question)


def _target(out: Path, answered: "Answered") -> Path:
    """Return the file to write: ``out``, or if that is a folder, one in it.

    Raises:
        StorageError: a file of that name holds something else.
    """
    if out.is_dir():
        return out / answered.file.name
    with explained("read", out):
        if out.exists() and out.read_bytes() != answered.content:
            raise StorageError(f"{out} exists; name another file with --out")
    return out


def _tell(target: Path, answered: "Answered") -> None:
    if answered.reason:
        program.say(
            f"this question was not answered ({answered.reason}), and {target} tells the central "
            "site that word alone; the sentence above says why"
        )
    elif answered.again:
        program.say(f"this question was answered before; wrote the same answer to {target}")
    else:
        program.say(f"wrote the answer to {target}; bring it to the central site")
