"""docs/spec/backup.md against the code."""

import io
import re
from pathlib import Path

import pytest

from fedpeft.sealing.keyfile import COST, COSTS, Protection
from fedpeft_server.backup import container, snapshot
from fedpeft_server.backup.archive import SCHEMA, Manifest
from fedpeft_server.backup.container import ChunkReader

PAGE = (Path(__file__).parents[2] / "docs" / "spec" / "backup.md").read_text("utf-8")
SECRETS = (Protection.none(), Protection.passphrase("four random words"))


def vectors() -> list[bytes]:
    section = PAGE.split("## Test vector")[1]
    found = re.findall(r"(?:^    [0-9a-f]+\n)+", section, flags=re.MULTILINE)
    return [bytes.fromhex(re.sub(r"\s", "", each)) for each in found]


@pytest.mark.parametrize("number", [0, 1], ids=["plain", "encrypted"])
def test_the_documented_bytes_are_read_as_documented(number: int):
    reader = ChunkReader(io.BytesIO(vectors()[number]), SECRETS[number], "vector")
    assert reader.readall() == b"a site"


def test_versions_and_numbers_are_those_of_the_code():
    assert PAGE.startswith("# Backup of a site\n\nFormat 1. ")
    assert (container.VERSION, SCHEMA, container.CHUNK_BYTES) == (1, 1, 2**20)
    assert COST == 2**17
    assert (COSTS[0], COSTS[-1]) == (2**14, 2**18)


def test_every_field_of_the_list_is_documented():
    names = {field.alias or name for name, field in Manifest.model_fields.items()}
    section = PAGE.split("## Content")[1].split("## Rules")[0]
    documented = {
        name
        for row in re.findall(r"^\| (`.*?) \|", section, flags=re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row)
    }
    assert documented == names


def test_everything_that_is_left_out_is_documented():
    section = PAGE.split("## What is in it")[1].split("## Order")[0]
    assert [name for name in snapshot._LEFT_OUT if f"`{name}" not in section] == []
