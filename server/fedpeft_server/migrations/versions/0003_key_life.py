"""Keys that were revoked or renewed never come back, under whatever name."""

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the age of keys, and the table of those that are retired."""
    op.execute("ALTER TABLE clinics ADD COLUMN seen_at REAL")
    op.execute("ALTER TABLE clinics ADD COLUMN keys_at REAL")
    op.execute("UPDATE clinics SET keys_at = enrolled_at")
    op.execute("""
CREATE TABLE retired (
    name TEXT NOT NULL,
    public_key TEXT NOT NULL UNIQUE,
    identity TEXT,
    retired_at REAL NOT NULL,
    why TEXT NOT NULL
) STRICT""")
    op.execute("CREATE INDEX retired_signing_key ON retired (substr(identity, 1, 44))")
