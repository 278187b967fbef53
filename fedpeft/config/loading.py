"""Read a TOML file into a settings model, with errors that a person can act on."""

import difflib
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fedpeft.errors import ConfigError

S = TypeVar("S", bound=BaseModel)


def load_settings(model: type[S], path: Path, overrides: Sequence[str] = ()) -> S:
    """Read ``path`` as ``model``; ``overrides`` are ``table.key=value`` strings.

    Raises:
        ConfigError: the file is missing, no TOML, has an unknown key (the nearest
            known one is named), or a value out of its range.
    """
    return parse_settings(model, read_toml(path), overrides, where=str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """Return the parsed file.

    Raises:
        ConfigError: it cannot be read, or is not TOML (with line and column).
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; name an existing configuration file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}; correct that line") from None


def parse_settings(
    model: type[S], values: Mapping[str, Any], overrides: Sequence[str], *, where: str
) -> S:
    """Validate ``values`` with ``overrides`` laid over them; ``where`` names their source.

    Raises:
        ConfigError: see :func:`load_settings`.
    """
    merged = _merge(values, overrides)
    try:
        return model.model_validate(merged)
    except ValidationError as error:
        # An unknown key is the likeliest cause of a missing one: say it first.
        first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        raise ConfigError(_sentence(model, first, where)) from None


def _merge(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    merged: dict[str, Any] = {**values}
    for override in overrides:
        key, separator, text = override.partition("=")
        path = key.strip().split(".")
        if not separator or not all(path):
            raise ConfigError(
                f"--set {override!r} is not of the form table.key=value, "
                "for example --set training.learning_rate=1e-4"
            )
        table = merged
        for part in path[:-1]:
            inner = table.get(part, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"--set {override!r}: {part!r} is not a table of settings")
            table[part] = {**cast("dict[str, Any]", inner)}
            table = table[part]
        table[path[-1]] = _toml_value(text.strip())
    return merged


def _toml_value(text: str) -> Any:
    """Read ``text`` as a TOML value; a bare word is a string, as a person would type it."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _sentence(model: type[BaseModel], error: ErrorDetails, where: str) -> str:
    key = ".".join(str(part) for part in error["loc"] if not _is_union_tag(part))
    if error["type"] == "extra_forbidden":
        bare = ".".join(part for part in key.split(".") if not part.isdigit())
        near = difflib.get_close_matches(bare, list(_known_keys(model)), n=1, cutoff=0.0)
        return f"{where}: unknown key {key!r}; the nearest known key is {near[0]!r}"
    if error["type"] == "missing":
        return f"{where}: the key {key!r} is missing; add it"
    problem = error["msg"].removeprefix("Value error, ")
    if not key or isinstance(error["input"], dict):
        return f"{where}: {key}{': ' if key else ''}{problem}"
    return f"{where}: {key} = {error['input']!r} is refused: {_lower_first(problem)}"


def _is_union_tag(part: int | str) -> bool:
    return isinstance(part, str) and ("[" in part or part == "float" or part.startswith("literal"))


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = _model_inside(field.annotation)
        if inner is None:
            yield prefix + name
        else:
            yield prefix + name
            yield from _known_keys(inner, f"{prefix}{name}.")


def _model_inside(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    for argument in typing.get_args(annotation):
        if (inner := _model_inside(argument)) is not None:
            return inner
    return None
