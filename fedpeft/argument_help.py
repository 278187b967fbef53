"""Give the arguments of commands their explanation back, which click 8.5 takes from typer 0.20.

Typer notes the help of an argument before it calls click's constructor; since 8.5 that has
a ``help`` of its own and writes None over it. To be removed with the next typer.
"""

import inspect
from collections.abc import Iterator
from typing import Any, get_args

import click
from typer.core import TyperArgument, TyperGroup
from typer.models import ArgumentInfo


class ExplainedGroup(TyperGroup):
    """A group whose commands, and those of its groups, explain their arguments."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for command in _below(self):
            explained = _explanations(command)
            for parameter in command.params:
                if isinstance(parameter, TyperArgument) and parameter.help is None:
                    parameter.help = explained.get(parameter.name or "")


def _below(group: click.Group) -> Iterator[click.Command]:
    for command in group.commands.values():
        if isinstance(command, click.Group):
            yield from _below(command)
        else:
            yield command


def _explanations(command: click.Command) -> dict[str, str | None]:
    """Return what the command's function says of each of its arguments."""
    function = inspect.unwrap(command.callback) if command.callback else None
    if function is None:
        return {}
    signature = inspect.signature(function, eval_str=True)
    return {
        name: told.help
        for name, parameter in signature.parameters.items()
        for told in get_args(parameter.annotation)
        if isinstance(told, ArgumentInfo)
    }
