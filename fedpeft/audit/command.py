"""What the command line needs for an audit beside the audit itself: limits, and a progress bar."""

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fedpeft.audit import attack
from fedpeft.config import ReleaseSettings, parse_settings, read_toml
from fedpeft.console import people
from fedpeft.errors import ConfigError


def limits_of(
    gate: Path | None, *, max_auc: float | None, max_exposure: float | None, needed: bool
) -> ReleaseSettings:
    """Return the limits of the ``[release]`` table of ``gate``, with those given laid over it.

    Raises:
        ConfigError: the file cannot be read or has no such table, a limit is out of its
            range, or limits are ``needed`` and there is none.
    """
    table: Any = {}
    if gate is not None:
        table = read_toml(gate).get("release")
        if not isinstance(table, dict):
            raise ConfigError(
                f"{gate} has no [release] table to be a gate; add one with max_auc or max_exposure"
            )
    given = {"max_auc": max_auc, "max_exposure": max_exposure}
    values = {**table, **{key: value for key, value in given.items() if value is not None}}
    limits = parse_settings(
        ReleaseSettings,
        values,
        [],
        where="the command line" if gate is None else f"{gate} [release]",
    )
    if needed and limits == ReleaseSettings():
        raise ConfigError(
            "--release needs a limit to keep: name --gate, --max-auc or --max-exposure"
        )
    return limits


@contextlib.contextmanager
def show_progress() -> Generator[attack.Progress]:
    """Show how many rows are scored while the body runs; nothing where there is no terminal."""
    bar = Progress(
        TextColumn("scoring"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=people,
        disable=not people.is_terminal,
    )
    with bar:
        task = bar.add_task("scoring")
        yield lambda done, total: bar.update(task, completed=done, total=total)
