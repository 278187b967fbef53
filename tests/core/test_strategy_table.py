import json
import subprocess
import sys
from dataclasses import fields, replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from fedpeft.errors import StorageError
from fedpeft_strategies.declaration import Declaration
from fedpeft_strategies.registry import declarations
from fedpeft_strategies.table import (
    SECTION,
    as_json,
    as_markdown,
    print_table,
    with_section,
    write_section,
)

PAGE = Path(__file__).parents[2] / "docs" / "strategies.md"
MADE_UP = Declaration(
    name="made-up",
    what="the mean of what nobody sent",
    source="Nobody 2025, arXiv:2501.00001",
    exact="to rank r",
    linear=False,
    up="P/2",
    down="nP",
    changes_base=True,
    tolerates="any f < n/2",
    wraps=("fedavg", "ffa"),
)


def shown(declarations: list[Declaration], width: int) -> str:
    text = StringIO()
    print_table(declarations, Console(file=text, width=width))
    return text.getvalue()


def words(text: str) -> str:
    """Return only what matters of a text that may be broken anywhere."""
    return "".join(text.split())


# bad input


@pytest.mark.parametrize("page", ["no section", "<!-- begin other -->\n<!-- end other -->\n"])
def test_a_page_without_the_section_is_refused_and_left_alone(tmp_path: Path, page: str):
    path = tmp_path / "page.md"
    path.write_text(page)

    with pytest.raises(StorageError, match=r"page\.md has no lines <!-- begin strategies -->"):
        write_section(path, SECTION, "content\n")

    assert path.read_text() == page


def test_a_page_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(StorageError, match=r"cannot read .*nowhere\.md"):
        write_section(tmp_path / "nowhere.md", SECTION, "content\n")


# the page


def test_the_page_shows_the_table_of_the_declarations():
    text = PAGE.read_text("utf-8")

    assert with_section(text, SECTION, as_markdown(declarations()), source=PAGE) == text


def test_the_page_describes_every_strategy_and_no_other():
    text = PAGE.read_text("utf-8")
    described = [line[5:-1] for line in text.splitlines() if line.startswith("### `")]

    assert sorted(described) == sorted(each.name for each in declarations())


def test_a_section_is_replaced_and_the_rest_stays():
    page = "a\n<!-- begin s -->\nold\n<!-- end s -->\nb\n"

    written = with_section(page, "s", "new\n", source=Path("page.md"))

    assert written == page.replace("old", "new")
    assert with_section(written, "s", "new\n", source=Path("page.md")) == written


def test_every_row_of_the_markdown_has_a_cell_for_every_column():
    lines = as_markdown([MADE_UP, replace(MADE_UP, name="other", linear=True)]).splitlines()

    assert len({line.count("|") for line in lines}) == 1
    assert "https://arxiv.org/abs/2501.00001" in lines[2]


# the command


@pytest.mark.parametrize("width", [80, 120, 160])
def test_nothing_is_cut_off_and_no_line_is_too_long(width: int):
    text = shown([MADE_UP, *declarations()], width)

    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for each in declarations():
        assert any(line.startswith(each.name) for line in text.splitlines())


def test_every_word_of_a_declaration_is_printed():
    text = words(shown([MADE_UP], 200))

    for value in ("made-up", MADE_UP.what, "to rank r", "P/2", "nP", "local", "any f < n/2"):
        assert words(value) in text


def test_a_mechanism_that_is_not_kept_is_not_shown():
    assert "central" not in shown([MADE_UP], 160)
    assert "central" in shown([replace(MADE_UP, mechanisms=frozenset({"central"}))], 160)


def test_json_has_every_field_of_every_declaration():
    found = json.loads(as_json([MADE_UP, replace(MADE_UP, linear=True)]))

    wanted = {field.name for field in fields(Declaration)} - {"linear"}
    assert wanted <= set(found[0])
    assert found[0]["sees_single_updates"]
    assert not found[0]["secure_aggregation"]
    assert found[1]["secure_aggregation"]


def test_the_command_prints_json_alone_on_stdout():
    command = [sys.executable, "-m", "fedpeft", "strategies", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)

    assert [each["name"] for each in json.loads(done.stdout)] == [
        each.name for each in declarations()
    ]
    assert done.stderr == ""
