"""The table of strategies, made from their declarations: for a terminal, for programs, for a page.

    python -m fedpeft_strategies.table docs/strategies.md

writes it into a page, between two comments. It knows no strategy, only declarations.
"""

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from fedpeft.errors import StorageError
from fedpeft.storage import explained, write_atomically
from fedpeft_strategies.declaration import Declaration

SECTION = "strategies"
_MECHANISMS = ("local", "distributed", "central")
_SHORT = {
    "strategy": "strategy",
    "exact mean": "exact\nmean",
    "secure aggregation": "secure\nsum",
    "changes the base": "changes\nbase",
    "ranks": "ranks",
    "up": "up",
    "down": "down",
    "noise": "noise",
}
"""Properties with heads for 80 columns; what is tolerated is told beside the strategy."""
_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
_LEGEND = (
    "P = r(d + k) parameters, of which A has rk and B has dr; n clinics; up and down are a "
    "clinic's parameters in a round. Without a secure sum the server opens each clinic's update. "
    "noise: the mechanisms of differential privacy that it keeps."
)


def print_table(declarations: Iterable[Declaration], console: Console) -> None:
    """Print what each strategy is, and below it what each needs and gives."""
    kinds = _grid(("strategy", "what it does"))
    properties = _grid(_SHORT.values())
    for declaration in declarations:
        kinds.add_row(declaration.name, _described(declaration))
        cells = _properties(declaration)
        properties.add_row(*(cells[head] for head in _SHORT))
    for part in (kinds, properties):
        console.print(part)
        console.print()
    console.print(_LEGEND, markup=False)


def as_json(declarations: Iterable[Declaration]) -> str:
    """Return a JSON array with one object a strategy."""
    return json.dumps([_object(each) for each in declarations], indent=2) + "\n"


def as_markdown(declarations: Sequence[Declaration]) -> str:
    """Return a Markdown table with one row a strategy."""
    rows = [_properties(each) | {"source": _linked(each.source)} for each in declarations]
    heads = list(rows[0])
    lines = [heads, ["---"] * len(heads), *([row[head] for head in heads] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def with_section(text: str, name: str, content: str, *, source: Path) -> str:
    """Return a page with ``content`` between the comments of the section ``name``.

    Raises:
        StorageError: the page in ``source`` has no such section.
    """
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->\n"
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise StorageError(
            f"{source} has no lines {begin.strip()} and {end.strip()} to write between; put them "
            "where the table belongs"
        )
    return f"{head}{begin}{content}{end}{tail}"


def write_section(page: Path, name: str, content: str) -> None:
    """Replace what stands in a section of a page.

    Raises:
        StorageError: the page cannot be read or written, or has no such section.
    """
    with explained("read", page):
        text = page.read_text("utf-8")
    write_atomically(page, with_section(text, name, content, source=page).encode())


def _properties(declaration: Declaration) -> dict[str, str]:
    mechanisms = _mechanisms(declaration)
    return {
        "strategy": declaration.name,
        "exact mean": declaration.exact,
        "secure aggregation": _yes(declaration.linear),
        "changes the base": _yes(declaration.changes_base),
        "ranks": "as inner" if declaration.wraps else declaration.ranks,
        "up": declaration.up,
        "down": declaration.down,
        "noise": "any" if len(mechanisms) == len(_MECHANISMS) else ", ".join(mechanisms),
        "tolerates": declaration.tolerates or "–",
    }


def _object(declaration: Declaration) -> dict[str, Any]:
    return {
        "name": declaration.name,
        "what": declaration.what,
        "source": declaration.source,
        "exact": declaration.exact,
        "secure_aggregation": declaration.linear,
        "sees_single_updates": not declaration.linear,
        "changes_base": declaration.changes_base,
        "personal": declaration.personal,
        "ranks": declaration.ranks,
        "up": declaration.up,
        "down": declaration.down,
        "mechanisms": _mechanisms(declaration),
        "tolerates": declaration.tolerates or None,
        "wraps": list(declaration.wraps),
    }


def _described(declaration: Declaration) -> str:
    parts = [declaration.what.rstrip(".")]
    if declaration.wraps:
        parts.append(f"goes around {' or '.join(declaration.wraps)}")
    if declaration.tolerates:
        parts.append(f"tolerates {declaration.tolerates}")
    return "; ".join(parts)


def _mechanisms(declaration: Declaration) -> list[str]:
    return [name for name in _MECHANISMS if name in declaration.mechanisms]


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _linked(source: str) -> str:
    return _ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", source)


def _grid(heads: Iterable[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for head in heads:
        table.add_column(head, overflow="fold", no_wrap=head not in ("what it does", "noise"))
    return table


def main(arguments: Sequence[str]) -> None:
    """Write the table into the pages that are named."""
    from fedpeft_strategies.registry import declarations

    for page in arguments:
        write_section(Path(page), SECTION, as_markdown(declarations()))


if __name__ == "__main__":
    main(sys.argv[1:])
