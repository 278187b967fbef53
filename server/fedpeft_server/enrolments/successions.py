"""How clinics' identities passed their places on, in the enrolment file.

Of each signed statement the short form is kept (docs/spec/succession.md), for the other
clinics to follow. An identity that passed its place on never comes back.
"""

import sqlite3

from fedpeft.errors import EnrolmentError
from fedpeft.sealing.succession import MOST_LINKS, Succession
from fedpeft_server.enrolments.retired_keys import require_fresh, signing_part, taken_keys_explained


def change_identity(
    database: sqlite3.Connection, name: str, key: str, statement: Succession, moment: float
) -> bool:
    """Put a clinic's new identity in the old one's place; say whether anything changed.

    Nothing does when the clinic asks again, as the answer was lost on the way.

    Args:
        database: inside of a transaction.
        name: of the clinic.
        key: its connection key (canonical PEM), which stays.
        statement: signed by both identities; whose it is was checked before.
        moment: seconds since the epoch.

    Raises:
        EnrolmentError: these are not the clinic's present keys, or the new identity belongs
            or belonged to somebody.
    """
    old, new = statement.old.to_text(), statement.new.to_text()
    query = "SELECT public_key, identity FROM clinics WHERE name = ?"
    known = database.execute(query, (name,)).fetchone()
    if known == (key, new):
        return False
    if known != (key, old):
        raise EnrolmentError(
            "the renewal is not of the keys by which this server knows the clinic: join anew"
        )
    require_fresh(database, "", new)
    with taken_keys_explained():
        database.execute(
            "INSERT INTO successions (name, old_key, new_key, link, at) VALUES (?, ?, ?, ?, ?)",
            (name, signing_part(old), signing_part(new), statement.link.to_bytes(), moment),
        )
        database.execute(
            "UPDATE clinics SET identity = ?, identity_at = ? WHERE name = ?", (new, moment, name)
        )
    return True


def all_links(database: sqlite3.Connection) -> dict[str, tuple[bytes, ...]]:
    """Return by name how each clinic came to its present identity, where it had another.

    At most ``MOST_LINKS`` for each, the oldest first.
    """
    rows = database.execute(
        "SELECT name, identity FROM clinics WHERE name IN (SELECT name FROM successions) "
        "AND identity IS NOT NULL ORDER BY name"
    ).fetchall()
    found = {name: _links(database, name, identity) for name, identity in rows}
    return {name: links for name, links in found.items() if links}


def _links(database: sqlite3.Connection, name: str, identity: str) -> tuple[bytes, ...]:
    links: list[bytes] = []
    key = signing_part(identity)
    while len(links) < MOST_LINKS:
        row = database.execute(
            "SELECT link, old_key FROM successions WHERE name = ? AND new_key = ?", (name, key)
        ).fetchone()
        if row is None:
            break
        links.insert(0, row[0])
        key = row[1]
    return tuple(links)
