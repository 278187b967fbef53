"""The limits of a release, from a file and from the command line."""

from pathlib import Path

import pytest

from fedpeft.audit.command import limits_of, show_progress
from fedpeft.config import ReleaseSettings
from fedpeft.errors import ConfigError


def write_gate(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_options_lie_over_the_table_of_the_file(tmp_path: Path):
    gate = write_gate(tmp_path / "f.toml", "[release]\nmax_auc = 0.6\nmax_exposure = 10.0\n")
    found = limits_of(gate, max_auc=0.55, max_exposure=None, needed=True)
    assert found == ReleaseSettings(max_auc=0.55, max_exposure=10.0)


def test_no_limit_is_no_limit_unless_one_is_needed():
    assert limits_of(None, max_auc=None, max_exposure=None, needed=False) == ReleaseSettings()
    with pytest.raises(ConfigError, match="--release needs a limit"):
        limits_of(None, max_auc=None, max_exposure=None, needed=True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('name = "x"\n', r"no \[release\] table"),
        ("[release]\nmax_acu = 0.6\n", "max_auc"),
        ("[release]\nmax_auc = 0.2\n", "max_auc"),
    ],
)
def test_a_gate_that_cannot_be_used_is_refused(tmp_path: Path, text: str, words: str):
    with pytest.raises(ConfigError, match=words):
        limits_of(
            write_gate(tmp_path / "f.toml", text), max_auc=None, max_exposure=None, needed=True
        )


def test_progress_can_be_shown_without_a_terminal():
    with show_progress() as progress:
        progress(1, 2)
        progress(2, 2)
