"""The exception tree: what its docstring promises to other machines and to scripts."""

import re

import pytest

from fedpeft import errors
from fedpeft.errors import FedpeftError


def _descendants(root: type[FedpeftError]) -> list[type[FedpeftError]]:
    return [root] + [one for child in root.__subclasses__() for one in _descendants(child)]


CLASSES = [one for one in _descendants(FedpeftError) if one.__module__ == errors.__name__]


def _table() -> dict[str, tuple[int, int, str]]:
    """Return name -> (depth, exit code, reason) as the docstring draws them."""
    rows = re.findall(r"^ {4}([│├└─ ]*)(\w+) +(\d+) +([a-z-]+)$", errors.__doc__ or "", re.M)
    return {name: (len(lead) // 4, int(code), reason) for lead, name, code, reason in rows}


def test_the_docstring_lists_every_error_class_and_no_other():
    assert set(_table()) == {one.__name__ for one in CLASSES}


@pytest.mark.parametrize("one", CLASSES, ids=lambda one: one.__name__)
def test_the_docstring_says_each_class_as_it_is(one: type[FedpeftError]):
    depth = len([base for base in one.__mro__ if issubclass(base, FedpeftError)]) - 1
    assert _table()[one.__name__] == (depth, one.exit_code, one.reason)


def test_no_two_errors_share_a_reason():
    reasons = [one.reason for one in CLASSES]
    assert len(reasons) == len(set(reasons))


def test_an_exit_code_belongs_to_one_branch_of_the_tree():
    branches = FedpeftError.__subclasses__()
    codes = [branch.exit_code for branch in branches if branch in CLASSES]
    assert len(codes) == len(set(codes))
    assert not {0, 1, 2, errors.INTERRUPTED_EXIT_CODE} & set(codes)


@pytest.mark.parametrize("one", CLASSES, ids=lambda one: one.__name__)
def test_a_child_exits_as_its_branch_does(one: type[FedpeftError]):
    for child in one.__subclasses__():
        if one is not FedpeftError:
            assert child.exit_code == one.exit_code
