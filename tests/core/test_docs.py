"""The documents against the code: what they name exists, and what exists is named."""

import re
import shlex
import struct
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import click
import pytest
import torch
import typer
from pydantic import BaseModel

import fedpeft.cli
import fedpeft.errors
import fedpeft_client.cli
import fedpeft_server.cli
from fedpeft import console, offline
from fedpeft.adapters import AdapterSchema, AdapterState, to_bytes, wire
from fedpeft.adapters.schema import TensorSpec
from fedpeft.config import FederationSettings
from fedpeft.errors import INTERRUPTED_EXIT_CODE, FedpeftError
from fedpeft_client.settings import ClientSettings
from fedpeft_server.site.directory import ListenSettings

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
MODELS: dict[str, type[BaseModel]] = {
    "federation.toml": FederationSettings,
    "client.toml": ClientSettings,
    "server.toml": ListenSettings,
}
PROGRAMS = {
    "fedpeft": fedpeft.cli.program,
    "fedpeft-client": fedpeft_client.cli.program,
    "fedpeft-server": fedpeft_server.cli.program,
}

each_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)


def read(name: str) -> str:
    return (ROOT / "docs" / name).read_text("utf-8")


def section(text: str, heading: str) -> str:
    """Return what stands under a level-two heading."""
    parts = re.split(r"^## ", text, flags=re.MULTILINE)
    return next(part for part in parts if part.splitlines()[0].strip() == heading)


def rows(text: str) -> list[list[str]]:
    """Return the cells of all table rows, headings and rules included."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# configuration.md


def model_inside(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (model_inside(part) for part in get_args(annotation))
    return next((model for model in found if model is not None), None)


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted key and default: ``...`` where the key is required."""
    for name, field in model.model_fields.items():
        inner = model_inside(field.annotation)
        if inner is not None:
            yield from keys_of(inner, f"{prefix}{name}.")
        else:
            default = str(field.default) if isinstance(field.default, Path) else field.default
            yield prefix + name, ... if field.is_required() else default


def documented_keys(file: str) -> dict[str, str]:
    """Return key and default: a TOML value, ``required`` or ``not set``."""
    table = rows(section(read("configuration.md"), f"`{file}`"))
    return {row[0].strip("`"): row[3].strip("`") for row in table if row[0].startswith("`")}


@pytest.mark.parametrize("file", MODELS)
def test_every_key_is_documented_and_every_documented_key_exists(file: str):
    assert sorted(documented_keys(file)) == sorted(key for key, _ in keys_of(MODELS[file]))


@pytest.mark.parametrize("file", MODELS)
def test_documented_defaults_are_those_of_the_code(file: str):
    words = {"required": ..., "not set": None}
    documented = {
        key: words[text] if text in words else tomllib.loads(f"value = {text}")["value"]
        for key, text in documented_keys(file).items()
    }

    assert documented == dict(keys_of(MODELS[file]))


def test_every_environment_variable_is_documented():
    switches = {**offline._PHONE_HOME_OFF, **offline._HUB_OFF}
    wanted = [offline.ALLOW_HUB, console.DEBUG, *(f"{k}={v}" for k, v in switches.items())]
    text = section(read("configuration.md"), "Environment variables")

    assert [name for name in wanted if f"`{name}`" not in text] == []


# exit-codes.md


def errors() -> set[type[FedpeftError]]:
    found = vars(fedpeft.errors).values()
    return {it for it in found if isinstance(it, type) and issubclass(it, FedpeftError)}


def test_exit_code_table_is_that_of_the_errors():
    table = [row for row in rows(read("exit-codes.md")) if row[0].isdigit()]
    documented = {(int(row[0]), row[1].strip("`"), row[2].strip("`")) for row in table}
    without_error = {(0, "", ""), (2, "", ""), (INTERRUPTED_EXIT_CODE, "", "")}

    assert documented == without_error | {
        (error.exit_code, error.__name__, error.reason) for error in errors()
    }


# spec/adapter-wire.md


def test_documented_header_is_the_struct_of_the_code():
    fields = [row for row in rows(read("spec/adapter-wire.md")) if row[0].isdigit()]
    formats = [row[2].strip("`") for row in fields]
    sizes = [struct.calcsize("<" + each) for each in formats]

    assert "<" + "".join(formats) == wire._HEADER.format
    assert [int(row[1]) for row in fields] == sizes
    assert [int(row[0]) for row in fields] == [sum(sizes[:at]) for at in range(len(sizes))]
    assert f"header of {wire.HEADER_BYTES} bytes" in read("spec/adapter-wire.md")
    assert f"Version {wire.VERSION}." in read("spec/adapter-wire.md")


def test_documented_test_vector_is_what_the_code_writes():
    vector = section(read("spec/adapter-wire.md"), "Test vector")
    fingerprint = re.search(r"`([0-9a-f]{64})`", vector)
    digest, data = re.findall(r"(?:^    [0-9a-f]+\n)+", vector, flags=re.MULTILINE)
    tensors = [row for row in rows(vector) if row[0].startswith("`")]
    shapes = [[int(size) for size in re.findall(r"\d+", row[1])] for row in tensors]
    specs = [
        TensorSpec(row[0].strip("`"), (shape[0], shape[1]))
        for row, shape in zip(tensors, shapes, strict=True)
    ]
    values = [float(value) for row in tensors for value in row[2].split(",")]
    assert fingerprint is not None
    schema = AdapterSchema(tuple(specs), fingerprint[1])

    written = to_bytes(AdapterState(schema, torch.tensor(values)), "update")

    assert schema.hash == digest.strip()
    assert written.hex() == re.sub(r"\s", "", data)


# links


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


@each_document
def test_every_relative_link_resolves(document: Path):
    broken: list[str] = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(document.read_text("utf-8"))):
        name, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (document.parent / name).resolve() if name else document
        if not target.exists():
            broken.append(link)
        elif anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), flags=re.MULTILINE)
            if anchor not in map(slug, headings):
                broken.append(link)

    assert broken == []


def test_every_document_is_in_the_index():
    index = read("README.md")
    names = [str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")]

    assert [name for name in names if name != "README.md" and f"({name})" not in index] == []


# commands

_COMMAND = re.compile(r"^(?:\S+=\S+ )*(?:\.venv/bin/)?(fedpeft(?:-client|-server)?) (.+)$")


def code_blocks(text: str) -> str:
    """Return the lines of fenced and of indented code."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^ {4}(\S.*)$", without_code(text), flags=re.MULTILINE)
    return "\n".join([*fenced, *indented])


def shown_command_lines() -> list[str]:
    lines = [
        line.strip()
        for document in DOCUMENTS
        for line in code_blocks(document.read_text("utf-8")).splitlines()
    ]
    return sorted({line for line in lines if _COMMAND.match(line)})


def mentioned_commands() -> list[str]:
    """Return the inline code that begins with a program; it may leave arguments out."""
    found = [
        code
        for document in DOCUMENTS
        for code in re.findall(r"`([^`\n]+)`", without_code(document.read_text("utf-8")))
    ]
    return sorted({code for code in found if _COMMAND.match(code)})


class Call(NamedTuple):
    program: str
    name: str
    command: click.Command
    arguments: list[str]


def call(line: str) -> Call:
    """Return which command a line calls, and with what.

    Raises:
        AssertionError: the program has no such command.
    """
    match = _COMMAND.match(line)
    assert match is not None
    name, *arguments = shlex.split(match[2], comments=True)
    program = typer.main.get_command(PROGRAMS[match[1]].app)
    assert isinstance(program, click.Group)
    assert name in program.commands, f"{match[1]} has no command {name!r}"
    return Call(match[1], name, program.commands[name], arguments)


def test_documents_show_every_command():
    shown = {call(line)[:2] for line in shown_command_lines() + mentioned_commands()}
    every: set[tuple[str, str]] = set()
    for name, program in PROGRAMS.items():
        group = typer.main.get_command(program.app)
        assert isinstance(group, click.Group)
        every |= {(name, command) for command in group.commands}

    assert shown == every


@pytest.mark.parametrize("line", shown_command_lines())
def test_command_line_is_accepted(line: str):
    _, name, command, arguments = call(line)

    command.make_context(name, arguments)


@pytest.mark.parametrize("code", mentioned_commands())
def test_mentioned_command_and_options_exist(code: str):
    _, _, command, arguments = call(code)
    known = {option for parameter in command.params for option in parameter.opts}

    assert [it for it in arguments if it.startswith("-") and it not in known] == []


@each_document
def test_every_make_target_exists(document: Path):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    text = document.read_text("utf-8")
    named = set(re.findall(r"`make ([a-z]+)|^make ([a-z]+)", text, flags=re.MULTILINE))

    assert {first or second for first, second in named} <= targets
