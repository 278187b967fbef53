"""Where an answer goes: a file on the stick, which must take it before any work is done for it.

Must not know how a question is answered.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Final

from fedpeft.errors import StickRefused, StorageError
from fedpeft.protocol.stick_file import StickFile, read_stick_file
from fedpeft.storage import explained, require_folder

_SLACK_BYTES: Final = 1 << 20
"""What an answer is longer, at the most, than the adapter that it changes."""


def answer_path(out: Path, question: StickFile) -> Path:
    """Return the file for the answer to ``question``: ``out``, or if that is a folder, one in it.

    ``question`` must be known to be the central site's, as it gives the name.
    """
    # All answers to one question have one name.
    return out / question.answered(reason="none").name if out.is_dir() else out


def require_outlet(path: Path, question: StickFile) -> None:
    """Check that the answer to ``question`` can be written to ``path``; leaves nothing there.

    Raises:
        StorageError: its folder is missing, full, or cannot be written; or ``path`` is there, and
            is no answer to this question.
    """
    require_folder(path.parent)
    if path.exists() and not _answers(path, question):
        raise StorageError(f"{path} exists and is something else; name another file with --out")
    with explained("write", path):
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.") as probe:
            probe.write(b"fedpeft")
            probe.flush()
        free = shutil.disk_usage(path.parent).free
    needed = len(question.broadcast or b"") + _SLACK_BYTES
    if free < needed:
        raise StorageError(
            f"{free >> 10} KiB are free in {path.parent}, where the answer may need "
            f"{needed >> 10}: nothing was computed; free some space, or name another place with "
            "--out"
        )


def _answers(path: Path, question: StickFile) -> bool:
    try:
        found = read_stick_file(path, path.stat().st_size).file
    except (StickRefused, StorageError, OSError):
        return False
    return (found.kind, found.question) == ("answer", question.question)
