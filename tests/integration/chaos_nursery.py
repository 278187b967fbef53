"""A process that has the libraries loaded, and forks one for every program it is asked to run.

Run as a script. A line of JSON on stdin asks for a program (its name, arguments, the file
for what it prints, and where it shall be killed, if so); the answers on stdout are lines,
``born NUMBER PID`` and ``dead PID CODE``, where a signal that ended a program is a negative
code. When stdin ends, so does every program. It saves each start the seconds that importing
takes, and nothing else: what runs is the whole program, in a process of its own, which may be
killed.
"""

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

_POLL_S = 0.05
# What the programs would import by themselves, before they do anything.
_NEEDED = (
    "transformers.models.llama.modeling_llama",
    "fedpeft.privacy.ledger",
    "fedpeft_client.cli",
    "fedpeft_client.rounds.live_clinic",
    "fedpeft_client.rounds.work",
    "fedpeft_server.cli",
    "fedpeft_server.service",
)


def main() -> None:
    """Serve until stdin ends."""
    _load()
    living: set[int] = set()
    number = 0
    while True:
        ready, _, _ = select.select([sys.stdin], [], [], _POLL_S)
        if ready:
            line = os.read(0, 1 << 16).decode()
            if not line:
                break
            for order in line.splitlines():
                number += 1
                child = os.fork()
                if child == 0:
                    _become(json.loads(order))
                living.add(child)
                _tell("born", number, child)
        for child, code in _ended(living):
            _tell("dead", child, code)
    for child in living:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def _tell(kind: str, first: int, second: int) -> None:
    sys.stdout.write(f"{kind} {first} {second}\n")
    sys.stdout.flush()


def _load() -> None:
    from fedpeft.offline import enforce

    enforce()
    for name in _NEEDED:
        importlib.import_module(name)
    # What is not collected is not copied when a fork begins to write.
    gc.collect()
    gc.freeze()


def _ended(living: set[int]) -> list[tuple[int, int]]:
    """Take the programs that have ended out of ``living``."""
    found: list[tuple[int, int]] = []
    while living:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child == 0:
            break
        living.discard(child)
        found.append((child, os.waitstatus_to_exitcode(status)))
    return found


def _become(order: dict[str, Any]) -> NoReturn:
    """Turn this fork into the program, as its console script would start it."""
    os.setsid()
    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    if order["dies_at"]:
        _die_at(order["dies_at"])
    if order["program"] == "fedpeft-client":
        from fedpeft_client.cli import program
    else:
        from fedpeft_server.cli import program
    try:
        program.run(order["arguments"])
    except SystemExit as ended:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended.code if isinstance(ended.code, int) else 1)
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(70)


def _die_at(fatal: dict[str, Any]) -> None:
    """Kill this process (-9) as soon as a line with all these facts stands in an audit log."""
    from fedpeft.audit_log import AuditLog, Kind, Value

    append = AuditLog.append

    def append_and_die(self: AuditLog, kind: Kind, about: Mapping[str, Value]) -> Any:
        place = append(self, kind, about)
        if fatal.items() <= {"kind": kind, **about}.items():
            os.kill(os.getpid(), signal.SIGKILL)
        return place

    AuditLog.append = append_and_die


if __name__ == "__main__":
    main()
