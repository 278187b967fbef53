"""`fedpeft bundle` and `fedpeft check-bundle`, as they are typed."""

import hashlib
import re
from pathlib import Path

import pytest

from fedpeft.cli import program
from tests.integration.small_wheels import small_wheels


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    return small_wheels(tmp_path / "wheels")


def test_the_command_line_bundles_checks_and_names_the_signer(
    wheels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out" / "bundle.tar"
    with pytest.raises(SystemExit) as ended:
        program.run(["bundle", "--model", "embedded", "--wheels", str(wheels), "--out", str(out)])
    told = capsys.readouterr().err
    assert ended.value.code == 0, told
    assert hashlib.sha256(out.read_bytes()).hexdigest() in told
    signer = re.search(r"signed by +([0-9a-f-]{39})\n", told)
    assert signer is not None
    with pytest.raises(SystemExit) as ended:
        program.run(["check-bundle", str(out), "--fingerprint", signer[1]])
    assert ended.value.code == 0
    assert "is whole: release 0.1.0" in capsys.readouterr().err


def test_wheels_that_lack_a_dependency_are_refused_before_anything_is_written(
    wheels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    next(wheels.glob("tinydep-*")).unlink()
    out = tmp_path / "out" / "bundle.tar"
    with pytest.raises(SystemExit) as ended:
        program.run(["bundle", "--model", "embedded", "--wheels", str(wheels), "--out", str(out)])
    assert ended.value.code == 3
    assert "tinydep" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--model", "nowhere"], 5, "nowhere"),
        (["--model", "embedded", "--wheels", "nowhere"], 3, "folder of wheels nowhere"),
        (["--model", "embedded", "--config", "nowhere"], 3, "configuration file nowhere"),
        (["--model", "embedded", "--sign-key", "nowhere"], 3, "no key nowhere to sign with"),
    ],
)
def test_what_does_not_exist_is_said_before_anything_is_written(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    says: str,
):
    with pytest.raises(SystemExit) as ended:
        program.run(["bundle", *arguments, "--out", str(tmp_path / "out" / "bundle.tar")])
    assert ended.value.code == code
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_bundle_is_not_written_into_what_it_is_made_of(
    wheels: Path, capsys: pytest.CaptureFixture[str]
):
    options = ["--model", "embedded", "--wheels", str(wheels), "--out", str(wheels / "b.tar")]
    with pytest.raises(SystemExit) as ended:
        program.run(["bundle", *options])
    assert ended.value.code == 11
    assert "lies among what goes into it" in capsys.readouterr().err
