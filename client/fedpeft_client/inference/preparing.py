"""Convert a box's files in a process of its own, which goes away afterwards.

Converting needs torch, and reading the store needs more; a server that stays for weeks
should not keep either in memory. Started as ``python -m fedpeft_client.inference.preparing
DIR``; what it found is one JSON object on stdout, what people should know goes to stderr.
"""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fedpeft import errors
from fedpeft.errors import FedpeftError, InferenceError
from fedpeft_client.inference.opening import Choice, Place, choose, has_cuda, preparing
from fedpeft_client.inference.prepared import Prepared


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Which engine to use, and its files; ``prepared`` is None where it needs none."""

    choice: Choice
    prepared: Prepared | None


class Apart:
    """Converts the files of the box in ``directory`` each time it is called."""

    def __init__(self, directory: Path) -> None:
        self._command = [sys.executable, "-m", __name__, str(directory)]
        self._running: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._stopped = False

    def __call__(self) -> Outcome:
        """Wait for the files, and return what to load.

        Raises:
            FedpeftError: what went wrong there.
            InferenceError: it was stopped.
        """
        with self._lock:
            if self._stopped:
                raise InferenceError("the conversion was stopped; start again")
            # In a session of its own, so that Ctrl-C reaches only the server, which stops it.
            self._running = subprocess.Popen(  # noqa: S603
                self._command, stdout=subprocess.PIPE, text=True, start_new_session=True
            )
        out, _ = self._running.communicate()
        return _outcome(out, self._running.returncode)

    def stop(self) -> None:
        """End a conversion that runs; what it was writing is left out."""
        with self._lock:
            self._stopped = True
            if self._running is not None and self._running.poll() is None:
                self._running.kill()


def _outcome(out: str, status: int) -> Outcome:
    try:
        found = cast("dict[str, Any]", json.loads(out))
    except ValueError:
        raise InferenceError(
            f"the process that converts the adapters ended with status {status} and no "
            "result: see what it printed above, and check memory and disk"
        ) from None
    if "error" in found:
        kind = cast("type[FedpeftError]", getattr(errors, found["error"]))
        raise kind(found["text"])
    files = found["prepared"]
    return Outcome(
        choice=Choice(**found["choice"]),
        prepared=files
        and Prepared(
            base=Path(files["base"]),
            default=files["default"],
            adapters={name: Path(path) for name, path in files["adapters"].items()},
            broken=files["broken"],
        ),
    )


def _found(directory: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    place = Place.at(directory)
    prepare = preparing(place, place.look, tell)
    choice = choose(place, prepare, cuda=has_cuda())
    files = prepare() if choice.kind == "llama.cpp" else None
    return {
        "choice": {"kind": choice.kind, "why": choice.why},
        "prepared": files
        and {
            "base": str(files.base),
            "default": files.default,
            "adapters": {name: str(path) for name, path in files.adapters.items()},
            "broken": dict(files.broken),
        },
    }


def _main() -> None:
    from fedpeft_client.commands.program import program

    try:
        found = _found(Path(sys.argv[1]), program.say)
    except FedpeftError as error:
        found = {"error": type(error).__name__, "text": str(error)}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    _main()
