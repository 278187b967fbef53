"""Every mistake at the command line ends with one clear sentence and its exit code."""

import json
import re
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fedpeft.cli import program as fedpeft
from fedpeft.console import Program
from fedpeft_client.cli import program as client
from fedpeft_server.cli import program as server

Run = Callable[[Program, Sequence[str | Path]], tuple[int, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(program: Program, arguments: Sequence[str | Path]) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stopped:
            program.run([str(argument) for argument in arguments])
        code = stopped.value.code
        assert isinstance(code, int)
        return code, capsys.readouterr().err

    return call


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "What is it?", "answer": "A test."}\n' * 4)
    return path


def one_sentence(text: str, program: str) -> str:
    """Return the only line, which must be an error with something to do after it."""
    lines = [line for line in text.splitlines() if line.startswith(f"{program}: error:")]
    assert len(lines) == 1, text
    assert "Traceback" not in text
    assert re.search(r"[;:,] ", lines[0].removeprefix(f"{program}: error: "))
    return lines[0]


def federation(tmp_path: Path, train: Path, extra: str = "", base: str = "embedded") -> Path:
    path = tmp_path / "federation.toml"
    path.write_text(
        f'{extra}\n[model]\nbase = "{base}"\n[training]\nlocal_steps = 1\nmax_length = 64\n'
        '[aggregation]\nconfidentiality = "sealed"\n'
        f"[rounds]\nminimum_clinics = 1\nretries = 0\ncount = 1\n"
        f'[[clinic]]\nname = "a"\ntrain = "{train}"\n'
    )
    return path


@pytest.mark.parametrize(
    ("overrides", "code", "says"),
    [
        (["adapter.rank=0"], 3, "adapter.rank = 0 is refused"),
        (["adapter.rnak=4"], 3, "nearest known key is 'adapter.rank'"),
        (["adapter.target_modules=['q_porj']"], 6, "matches no module"),
        (["strategy.name=fedavgg"], 3, "the nearest name is 'fedavg'"),
        (["model.base=nowhere"], 5, "does not exist"),
        (["model.base=meta-llama/Llama-3.2-1B"], 5, "hubs are off"),
        ([f"model.fingerprint={'0' * 64}"], 5, "fingerprint"),
        (["training.local_steps=0"], 3, "training.local_steps = 0"),
        (["training.learning_rate=nan"], 3, "learning_rate"),
        (["rounds.minimum_clinics=2"], 3, "add clinics or lower the minimum"),
        (["training"], 3, "table.key=value"),
        (["aggregation.confidentiality=secagg"], 3, "too few for secure aggregation"),
        (["aggregation.confidentiality=plain"], 3, "aggregation.confidentiality"),
        (["aggregation.threshold=2"], 3, "aggregation.threshold = 2"),
        (["aggregation.bits=99"], 3, "aggregation.bits = 99"),
    ],
)
def test_bad_configuration(
    run: Run, tmp_path: Path, rows: Path, overrides: list[str], code: int, says: str
) -> None:
    config = federation(tmp_path, rows)
    options = [part for override in overrides for part in ("--set", override)]
    found, text = run(fedpeft, ["simulate", config, "--out", tmp_path / "out", *options])
    assert found == code, text
    assert says in one_sentence(text, "fedpeft")


@pytest.mark.parametrize("kind", ["missing", "empty", "no-answer", "too-long"])
def test_data_that_cannot_be_trained_on_ends_the_run(
    run: Run, tmp_path: Path, rows: Path, kind: str
) -> None:
    reasons = {"missing": "bad-data", "empty": "bad-data", "no-answer": "bad-data"}
    path, extra = rows, []
    if kind == "missing":
        path = tmp_path / "absent.jsonl"
    elif kind == "empty":
        path.write_text("")
    elif kind == "no-answer":
        path.write_text('{"question": "Canary-4711?", "answer": ""}\n')
    else:
        extra, reasons[kind] = ["--set", "training.max_length=100000"], "bad-config"
    config = federation(tmp_path, path)
    found, text = run(fedpeft, ["simulate", config, "--out", tmp_path / "out", *extra])
    assert found == 8, text
    assert f"a: {reasons[kind]}" in one_sentence(text, "fedpeft")
    assert "Canary" not in text


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--model", "embedded", "--data", "absent.jsonl"], 4, "absent.jsonl"),
        (["--model", "embedded", "--data", "ROWS", "--format", "alpaca"], 4, "question-answer"),
        (["--model", "embedded", "--data", "ROWS", "--adapter", "nowhere"], 6, "nowhere"),
        (["--model", "embedded", "--data", "ROWS", "--max-length", "1000000"], 3, "--max-length"),
        (["--model", "embedded", "--data", "ROWS", "--quantization", "int3"], 3, "int3"),
        (["--model", "NO-TOKENIZER", "--data", "ROWS"], 5, "no tokenizer"),
        (["--model", "embedded"], 2, ""),
    ],
)
def test_bad_evaluation(
    run: Run,
    tmp_path: Path,
    rows: Path,
    embedded_model: Path,
    arguments: list[str],
    code: int,
    says: str,
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(embedded_model, bare)
    (bare / "tokenizer.json").unlink()
    names = {"ROWS": str(rows), "NO-TOKENIZER": str(bare)}
    found, text = run(fedpeft, ["evaluate", *(names.get(each, each) for each in arguments)])
    assert found == code, text
    assert says in (one_sentence(text, "fedpeft") if says else text)


def test_an_adapter_of_another_base_model_is_refused(
    run: Run, tmp_path: Path, rows: Path, tiny_model: Path
) -> None:
    config = federation(tmp_path, rows)
    assert run(fedpeft, ["simulate", config, "--out", tmp_path / "out"])[0] == 0
    adapter = tmp_path / "out" / "adapter"
    found, text = run(
        fedpeft, ["evaluate", "--model", tiny_model, "--data", rows, "--adapter", adapter]
    )
    assert found == 6
    assert "base model" in one_sentence(text, "fedpeft")


def test_an_output_directory_of_something_else_is_refused(
    run: Run, tmp_path: Path, rows: Path
) -> None:
    config = federation(tmp_path, rows)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    found, text = run(fedpeft, ["simulate", config, "--out", tmp_path / "out"])
    assert found == 11
    assert "name another directory with --out" in one_sentence(text, "fedpeft")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


@pytest.fixture
def site(run: Run, tmp_path: Path) -> Path:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    directory = tmp_path / "site"
    assert run(server, ["init", directory, "--address", f"127.0.0.1:{port}"])[0] == 0
    return directory


def test_a_taken_port_is_named(run: Run, site: Path) -> None:
    address = re.search(r'address = "127\.0\.0\.1:(\d+)"', (site / "server.toml").read_text())
    assert address is not None
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", int(address[1])))
        taken.listen()
        found, text = run(server, ["start", site])
    assert found == 9
    assert address[1] in one_sentence(text, "fedpeft-server")


def test_a_site_is_made_once(run: Run, site: Path) -> None:
    found, text = run(server, ["init", site, "--address", "127.0.0.1:1"])
    assert found == 11
    one_sentence(text, "fedpeft-server")


@pytest.mark.parametrize("expires", ["0h", "soon", "-1d", "99999h"])
def test_an_odd_period_is_refused(run: Run, site: Path, tmp_path: Path, expires: str) -> None:
    options = ["--dir", site, "--expires", expires, "--out", tmp_path / "i.json"]
    found, text = run(server, ["invite", "clinic-a", *options])
    assert found in (2, 3), text
    assert not (tmp_path / "i.json").exists()


def test_an_invitation_with_no_server_behind_it(
    run: Run, site: Path, tmp_path: Path, rows: Path, embedded_model: Path
) -> None:
    invitation = tmp_path / "i.json"
    assert run(server, ["invite", "clinic-a", "--dir", site, "--out", invitation])[0] == 0
    assert invitation.stat().st_mode & 0o077 == 0
    box = tmp_path / "box"
    options = ["--dir", box, "--model", embedded_model, "--train", rows]
    found, text = run(client, ["join", invitation, *options])
    assert found == 9
    one_sentence(text, "fedpeft-client")
    assert json.loads(invitation.read_text())["token"] not in text
    found, text = run(client, ["start", box])
    assert found == 10
    assert "join a federation first" in one_sentence(text, "fedpeft-client")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "absent.json"),
        ("not json", ""),
        ('{"schema": 99}', ""),
        ("{}", ""),
    ],
)
def test_a_bad_invitation(
    run: Run, tmp_path: Path, rows: Path, embedded_model: Path, content: str | None, says: str
) -> None:
    invitation = tmp_path / "absent.json"
    if content is not None:
        invitation.write_text(content)
    options = ["--dir", tmp_path / "box", "--model", embedded_model, "--train", rows]
    found, text = run(client, ["join", invitation, *options])
    assert found == 10
    assert says in one_sentence(text, "fedpeft-client")
    assert not (tmp_path / "box" / "client.toml").exists()
