"""What alembic runs for each command: the revisions, on the connection that it is handed.

The transaction is the caller's, see ``upgrade``.
"""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
