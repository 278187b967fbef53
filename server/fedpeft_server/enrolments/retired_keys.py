"""Keys that clinics had once and nobody may enrol with again, in the enrolment file."""

import sqlite3
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

from fedpeft.errors import EnrolmentError

_SIGNING_PART: Final = 44
"""Characters of an identity's text: version and signing key, by which others know it."""


@contextmanager
def taken_keys_explained() -> Generator[None]:
    """Turn a key that another clinic has into a sentence.

    Raises:
        EnrolmentError: the body wrote one.
    """
    try:
        yield
    except sqlite3.IntegrityError as error:
        raise EnrolmentError(
            "this machine's keys already belong to an enrolled clinic: "
            "join with an empty directory, so that new keys are made"
        ) from error


def retire(
    database: sqlite3.Connection, name: str, why: str, moment: float, *, kept_identity: str = ""
) -> int:
    """Write down a clinic's keys as gone for good, and return how many clinics that were.

    ``kept_identity`` is the one that it keeps, if it does.
    """
    return database.execute(
        "INSERT INTO retired (name, public_key, identity, retired_at, why) "
        "SELECT name, public_key, nullif(identity, ?), ?, ? FROM clinics WHERE name = ?",
        (kept_identity, moment, why, name),
    ).rowcount


def require_fresh(database: sqlite3.Connection, key: str, identity: str) -> None:
    """Refuse keys that were revoked or renewed once: whoever has them may be a thief.

    Raises:
        EnrolmentError: one of them is gone.
    """
    known = signing_part(identity)
    gone = database.execute(
        "SELECT 1 FROM retired WHERE public_key = ? OR substr(identity, 1, 44) = ? "
        "UNION ALL SELECT 1 FROM successions WHERE old_key = ?",
        (key, known, known),
    ).fetchone()
    if gone:
        raise EnrolmentError(
            "this machine's keys were revoked or renewed: "
            "join with an empty directory, so that new keys are made"
        )


def signing_part(identity: str) -> str:
    """Return what of an identity's text no two clinics may share, ever."""
    return identity[:_SIGNING_PART]
