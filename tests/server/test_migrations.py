"""The enrolment file's schema: whatever is killed or runs at once, a file is old or new."""

import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory

from fedpeft.errors import StorageError
from fedpeft_server.enrolments.file import EnrolmentFile
from fedpeft_server.migrations import HEAD

# What the release before alembic left: each of its schemas, built from the one before.
_SCHEMAS = {
    1: """
CREATE TABLE invitations (
    id TEXT PRIMARY KEY,
    token_sha256 BLOB NOT NULL,
    name TEXT NOT NULL UNIQUE,
    expires_at REAL NOT NULL,
    used_at REAL,
    used_key TEXT
) STRICT;
CREATE TABLE clinics (
    name TEXT PRIMARY KEY,
    public_key TEXT NOT NULL UNIQUE,
    node_id TEXT,
    enrolled_at REAL NOT NULL
) STRICT;
INSERT INTO clinics VALUES ('anna', 'key of anna', '7', 1.0);
""",
    2: """
ALTER TABLE clinics ADD COLUMN identity TEXT;
CREATE UNIQUE INDEX clinics_signing_key ON clinics (substr(identity, 1, 44));
""",
    3: """
ALTER TABLE clinics ADD COLUMN seen_at REAL;
ALTER TABLE clinics ADD COLUMN keys_at REAL;
UPDATE clinics SET keys_at = enrolled_at;
CREATE TABLE retired (
    name TEXT NOT NULL,
    public_key TEXT NOT NULL UNIQUE,
    identity TEXT,
    retired_at REAL NOT NULL,
    why TEXT NOT NULL
) STRICT;
CREATE INDEX retired_signing_key ON retired (substr(identity, 1, 44));
""",
}


def old_file(path: Path, schema: int) -> Path:
    with closing(sqlite3.connect(path)) as database:
        for number in range(1, schema + 1):
            database.executescript(_SCHEMAS[number])
        database.execute(f"PRAGMA user_version = {schema}")
        database.commit()
    return path


def schema_of(path: Path) -> tuple[int, str | None]:
    with closing(sqlite3.connect(path)) as database:
        number = database.execute("PRAGMA user_version").fetchone()[0]
        query = "SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'"
        if database.execute(query).fetchone() is None:
            return number, None
        (row,) = database.execute("SELECT version_num FROM alembic_version")
        return number, row[0]


def structure(path: Path) -> list[tuple[str, str, str]]:
    with closing(sqlite3.connect(path)) as database:
        return sorted(database.execute("SELECT type, name, coalesce(sql, '') FROM sqlite_master"))


@pytest.mark.parametrize("schema", _SCHEMAS)
def test_a_file_of_an_older_release_becomes_like_a_new_one(schema: int, tmp_path: Path):
    path = old_file(tmp_path / "old.db", schema)
    EnrolmentFile(path)
    EnrolmentFile(tmp_path / "new.db")

    assert schema_of(path) == (int(HEAD), HEAD)
    assert structure(path) == structure(tmp_path / "new.db")
    with closing(sqlite3.connect(path)) as database:
        row = database.execute("SELECT name, node_id, keys_at FROM clinics").fetchone()
    assert row == ("anna", "7", 1.0)


@pytest.mark.parametrize(
    "newer", ["PRAGMA user_version = 99", "UPDATE alembic_version SET version_num = '0099'"]
)
def test_a_file_of_a_newer_release_is_refused_and_left_alone(newer: str, tmp_path: Path):
    path = tmp_path / "enrolment.db"
    EnrolmentFile(path)
    with closing(sqlite3.connect(path)) as database:
        database.execute(newer)
        database.commit()
    before = schema_of(path)

    with pytest.raises(StorageError, match=r"schema 99, but this fedpeft knows those up to \d+:"):
        EnrolmentFile(path)
    assert schema_of(path) == before


@pytest.mark.parametrize(
    "changed", ["PRAGMA user_version = -1", "UPDATE alembic_version SET version_num = 'b3f'"]
)
def test_a_schema_that_was_never_written_is_damage(changed: str, tmp_path: Path):
    path = tmp_path / "enrolment.db"
    EnrolmentFile(path)
    with closing(sqlite3.connect(path)) as database:
        database.execute(changed)
        database.commit()

    with pytest.raises(StorageError, match=r"none of fedpeft's\): check its rights, or restore"):
        EnrolmentFile(path)


def test_releases_before_alembic_refuse_a_file_that_they_do_not_know(tmp_path: Path):
    EnrolmentFile(tmp_path / "enrolment.db")

    # They compare this number with their own, 3 at most.
    assert schema_of(tmp_path / "enrolment.db")[0] == int(HEAD)


_KILLED = """
import os, shutil, signal, sys
from pathlib import Path

import fedpeft_server.migrations.upgrade
from fedpeft_server.enrolments.file import EnrolmentFile
from sqlalchemy import Engine, event

old, point = Path(sys.argv[1]), 0
while True:
    point += 1
    path = old.with_name(f"{point}.db")
    shutil.copy(old, path)
    if (child := os.fork()) == 0:
        left = [point]

        def count(*_: object) -> None:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

        event.listen(Engine, "before_cursor_execute", count)
        EnrolmentFile(path)
        os._exit(0)
    if not os.waitpid(child, 0)[1]:
        break  # it has fewer statements than that
print(point)
"""


def test_a_kill_at_any_statement_leaves_the_old_schema_and_the_next_start_goes_on(tmp_path: Path):
    old = old_file(tmp_path / "old.db", 1)
    command = [sys.executable, "-c", _KILLED, str(old)]
    ran = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)

    points = int(ran.stdout)
    assert points > 10
    for point in range(1, points):
        path = tmp_path / f"{point}.db"
        assert schema_of(path) == (1, None)
        EnrolmentFile(path)
        assert schema_of(path) == (int(HEAD), HEAD)
    assert schema_of(tmp_path / f"{points}.db") == (int(HEAD), HEAD)


_AT_ONCE = """
import sys
from pathlib import Path

import fedpeft_server.migrations.upgrade
from fedpeft_server.enrolments.file import EnrolmentFile

print("ready", flush=True)
for path in sys.stdin:
    EnrolmentFile(Path(path.strip()))
    print("done", flush=True)
"""


def test_processes_that_bring_a_file_up_at_once_all_succeed(tmp_path: Path):
    old = old_file(tmp_path / "old.db", 1)
    others = [
        subprocess.Popen(
            [sys.executable, "-c", _AT_ONCE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    try:
        for other in others:
            assert other.stdout is not None
            assert other.stdout.readline() == "ready\n"
        for attempt in range(10):
            path = Path(shutil.copy(old, tmp_path / f"{attempt}.db"))
            for other in others:
                assert other.stdin is not None
                other.stdin.write(f"{path}\n")
                other.stdin.flush()
            for other in others:
                assert other.stdout is not None
                assert other.stdout.readline() == "done\n"
            assert schema_of(path) == (int(HEAD), HEAD)
    finally:
        for other in others:
            other.communicate(timeout=30)


def test_a_file_that_is_up_to_date_is_opened_without_alembic(tmp_path: Path):
    EnrolmentFile(tmp_path / "enrolment.db")
    program = (
        "import sys; from pathlib import Path; "
        "from fedpeft_server.enrolments.file import EnrolmentFile; "
        f"EnrolmentFile(Path({str(tmp_path / 'enrolment.db')!r})); "
        "print('alembic' in sys.modules, 'sqlalchemy' in sys.modules)"
    )

    ran = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert ran.stdout == "False False\n"


def test_revisions_are_one_line_whose_numbers_are_the_names_of_their_files():
    config = Config()
    config.set_main_option("script_location", "fedpeft_server:migrations")
    config.set_main_option("path_separator", "os")
    scripts = ScriptDirectory.from_config(config)

    revisions = [each.revision for each in scripts.walk_revisions("base", "heads")][::-1]
    assert revisions == [f"{number:04d}" for number in range(1, len(revisions) + 1)]
    assert scripts.get_heads() == [HEAD]
    for each in scripts.walk_revisions("base", "heads"):
        assert Path(each.path).name.startswith(f"{each.revision}_")
