"""Secure aggregation and sealing draw from cryptographic generators and need no heavy library."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedpeft

PACKAGES = ("secagg", "sealing")
FORBIDDEN = ("random", "numpy.random", "torch", "flwr")


def sources() -> list[Path]:
    root = Path(fedpeft.__file__).parent
    return [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]


def forbidden_names(source: str) -> set[str]:
    """Return which of the forbidden modules a module's source imports or reaches by name."""
    reached = {name for node in ast.walk(ast.parse(source)) for name in names_of(node)}
    return {
        module
        for module in FORBIDDEN
        if any(name == module or name.startswith(module + ".") for name in reached)
    }


def names_of(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Import(names=names):
            yield from (alias.name for alias in names)
        case ast.ImportFrom(module=str(module), names=names, level=0):
            yield module
            yield from (f"{module}.{alias.name}" for alias in names)
        case ast.Attribute(value=ast.Name(id="np" | "numpy"), attr=attribute):
            yield f"numpy.{attribute}"
        case ast.Call(func=ast.Name(id="__import__"), args=[ast.Constant(value=str(name)), *_]):
            yield name
        case ast.Call(
            func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]
        ):
            yield name
        case _:
            pass


@pytest.mark.parametrize("path", sources(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_module_has_no_source_of_weak_randomness(path: Path):
    assert forbidden_names(path.read_text(encoding="utf-8")) == set()


def test_the_modules_of_secure_aggregation_are_checked():
    assert {"masking.py", "quantise.py", "shamir.py"} <= {path.name for path in sources()}


@pytest.mark.parametrize(
    ("tampered", "found"),
    [
        ("import random", "random"),
        ("def f():\n    import random as r", "random"),
        ("from random import SystemRandom", "random"),
        ("import numpy.random", "numpy.random"),
        ("from numpy import random", "numpy.random"),
        ("from numpy.random import default_rng", "numpy.random"),
        ("import numpy as np\nnoise = np.random.rand(3)", "numpy.random"),
        ("import numpy\nnoise = numpy.random.default_rng()", "numpy.random"),
        ("import torch", "torch"),
        ("from torch.nn import functional", "torch"),
        ("import flwr", "flwr"),
        ("from flwr.common import log", "flwr"),
        ("__import__('random')", "random"),
        ("import importlib\nimportlib.import_module('torch')", "torch"),
    ],
)
def test_tampering_is_caught(tampered: str, found: str):
    assert forbidden_names(tampered) == {found}


@pytest.mark.parametrize("clean", ["import secrets", "import numpy as np", "from . import random"])
def test_other_modules_are_let_through(clean: str):
    assert forbidden_names(clean) == set()
