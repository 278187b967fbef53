"""Rounds without a network: questions come on a stick, and answers go back on it."""

import logging
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from fedpeft.console import ask_passphrase
from fedpeft.errors import StickRefused
from fedpeft.storage import write_atomically
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
    """Take in what the central site answers to a request by stick: to join, or to renew keys.

    Reads the file and DIR/joining.json or DIR/renewing.json; writes DIR (server.identity,
    ca.pem, client.toml; of a renewal key.pem, identity.key, membership.json and DIR/audit); sends
    nothing.
    """
    from fedpeft_client.sticks.joining import is_joining, require_asked
    from fedpeft_client.sticks.renewing import is_renewing

    if is_joining(directory):
        _join(file, directory)
        return
    if not is_renewing(directory):
        require_asked(directory)
    _renew(file, directory)


def _join(ticket_file: Path, directory: Path) -> None:
    from fedpeft_client.settings import CONFIG_FILE
    from fedpeft_client.sticks.joining import take_ticket
    from fedpeft_client.trail import joined

    invitation = take_ticket(ticket_file, directory)
    joined(directory, invitation.clinic)
    program.say(
        f"joined federation {invitation.federation} as {invitation.clinic}; look at "
        f"{directory / CONFIG_FILE}, then run: fedpeft-client check {quote(str(directory))}"
    )


def _renew(confirmation: Path, directory: Path) -> None:
    from fedpeft_client.box import open_box
    from fedpeft_client.box_lock import only_program
    from fedpeft_client.commands.keys import tell_renewed
    from fedpeft_client.sticks.renewing import take_confirmation

    box = open_box(directory)
    before = box.server_identity
    with only_program(directory):
        protection = box.protection(partial(ask_passphrase, confirm=False))
        renewed = take_confirmation(box, protection, confirmation)
    tell_renewed(renewed)
    if (server := box.server_identity) != before:
        program.say(f"the server's identity was renewed too; it is now {server.fingerprint}")


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
    # The file holds an adapter and a little beside it.
    limit = (box.settings.limits.max_message_mb << 20) + (1 << 20)
    with only_program(directory):
        try:
            read = read_stick_file(question, limit)
            target, answered = _answered(box, read, out or question.parent)
        except StickRefused as error:
            raise StickRefused(f"{question} {error}") from None
        write_atomically(target, answered.content, mode=0o600)
    _tell(target, answered)


def _answered(box: "Box", read: "ReadFile", out: Path) -> tuple[Path, "Answered"]:
    """Answer a file with the app that answers the network, and keep what that keeps.

    Returns:
        The file to write, in the folder ``out`` or ``out`` itself, and what goes into it.
    """
    from fedpeft.sealing.keyfile import load_identity
    from fedpeft_client.keys.key_life import expiry_warnings
    from fedpeft_client.limits.processors import bound_processors
    from fedpeft_client.rounds.app import ClinicDesk, build_client_app
    from fedpeft_client.rounds.mailbox import Mailbox
    from fedpeft_client.rounds.narration import narrate_steps
    from fedpeft_client.rounds.work import ClinicWork
    from fedpeft_client.sticks.answering import StickDesk, own_question
    from fedpeft_client.sticks.memory import KeptPlaces, KeptShelf, StickMemory
    from fedpeft_client.sticks.outlet import answer_path, require_outlet
    from fedpeft_client.sticks.renewing import require_confirmed
    from fedpeft_client.trail import BoxTrail, unlocking

    if box.settings.limits.threads is not None:
        bound_processors(box.settings.limits.threads)
    with unlocking(box.audit):
        protection = box.protection(partial(ask_passphrase, confirm=False))
        identity = load_identity(box.identity_path, protection)
    for warning in expiry_warnings(box.directory, box.ca):
        program.say(f"warning: {warning}")
    clinic = box.clinic(identity)
    question = own_question(clinic, read)
    require_confirmed(box, question, protection)
    target = answer_path(out, question)
    require_outlet(target, question)
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
        app = build_client_app(desk)
        return target, StickDesk(clinic, app, memory, trail, limit).answer(question)


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
