"""What is sealed to a clinic, and what it signs with.

A clinic of schema 1 keeps NULL: nothing can be sealed to it until it enrols again. The first
44 characters are version and signing key (33 bytes), the part that its owner proves to hold
and that other clinics know it by, so no two clinics may share it.
"""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the column."""
    op.execute("ALTER TABLE clinics ADD COLUMN identity TEXT")
    op.execute("CREATE UNIQUE INDEX clinics_signing_key ON clinics (substr(identity, 1, 44))")
