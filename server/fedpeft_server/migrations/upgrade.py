"""Runs alembic's revisions on a file; imported only when there is something to run."""

import sqlite3
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, NullPool, create_engine, event
from sqlalchemy.exc import DBAPIError

# Alembic keeps the migration that is under way in a global.
_ONE_AT_A_TIME: Final = threading.Lock()


def upgrade(path: Path, head: str, *, timeout_s: float) -> None:
    """Bring the file from whatever revision it has to ``head``, in one transaction.

    Raises:
        sqlite3.Error: it cannot be done; the file is as it was.
    """
    with _ONE_AT_A_TIME, _transaction(path, timeout_s) as connection:
        config = Config(attributes={"connection": connection})
        config.set_main_option("script_location", "fedpeft_server:migrations")
        config.set_main_option("path_separator", "os")
        # Read again: another process may have done it while this one waited for its turn.
        number = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
        if number and MigrationContext.configure(connection).get_current_revision() is None:
            command.stamp(config, f"{number:04d}")
        command.upgrade(config, head)
        connection.exec_driver_sql(f"PRAGMA user_version = {int(head)}")


@contextmanager
def _transaction(path: Path, timeout_s: float) -> Generator[Connection]:
    def connect() -> sqlite3.Connection:
        # Without an isolation level Python begins and ends no transaction of its own.
        return sqlite3.connect(path, timeout=timeout_s, isolation_level=None)

    engine = create_engine("sqlite://", creator=connect, poolclass=NullPool)
    event.listen(engine, "begin", _begin)
    try:
        with engine.begin() as connection:
            yield connection
    except DBAPIError as error:
        if isinstance(error.orig, sqlite3.Error):
            raise error.orig from error
        raise
    finally:
        engine.dispose()


def _begin(connection: Any) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")
