"""A clinic's identity has an age of its own, and passes its place on by a signed statement.

What other clinics are shown of a statement is kept in its short form, see
docs/spec/succession.md. ``old_key`` and ``new_key`` are the first 44 characters of the
identities, version and signing key. An old one never comes back, under whatever name.
"""

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Give every clinic's identity the age of its enrolment, and make the table."""
    op.execute("ALTER TABLE clinics ADD COLUMN identity_at REAL")
    op.execute("UPDATE clinics SET identity_at = enrolled_at")
    op.execute(
        "CREATE TABLE successions (name TEXT NOT NULL, old_key TEXT NOT NULL UNIQUE, "
        "new_key TEXT NOT NULL UNIQUE, link BLOB NOT NULL, at REAL NOT NULL) STRICT"
    )
