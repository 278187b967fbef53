"""How messages come to a clinic: over its connection, or on a stick."""

from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Say of every clinic that it is reached over the network, as all were until now."""
    op.execute("ALTER TABLE clinics ADD COLUMN carrier TEXT NOT NULL DEFAULT 'network'")
