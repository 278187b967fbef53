"""The bundle installs where there is no network, and a damaged one changes nothing.

The wheels of the fast tests are small ones (small_wheels.py); `make offline-install` does
it with the real ones.
"""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fedpeft.bundle import Ingredients, WheelFolder, make_bundle
from fedpeft.bundle.layout import ROOT, read_sums, signed, sums_of
from fedpeft.cli import program
from fedpeft.sealing.identity import Identity
from tests.integration.small_wheels import make_wheel, small_wheels

SIGNER = Identity(bytes(range(128)))
FULL = "FEDPEFT_FULL_BUNDLE"
Say = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    return small_wheels(tmp_path / "wheels")


@pytest.fixture
def unpacked(wheels: Path, tmp_path: Path, embedded_model: Path) -> Path:
    """A bundle as a person unpacks it."""
    return unpack(bundle(wheels, embedded_model, tmp_path / "bundle.tar"), tmp_path)


def bundle(wheels: Path, model: Path, out: Path, signer: Identity = SIGNER) -> Path:
    given = Ingredients(
        wheels=WheelFolder.of(wheels),
        model=model,
        fingerprint="0123456789abcdef" * 4,
        config=(),
        signer=signer,
    )
    return make_bundle(given, out).path


def unpack(path: Path, directory: Path) -> Path:
    shutil.rmtree(directory / ROOT, ignore_errors=True)
    with tarfile.open(path) as archive:
        archive.extractall(directory, filter="data")
    return directory / ROOT


@pytest.fixture
def install(unpacked: Path, tmp_path: Path) -> Say:
    """Run the installer in an empty environment: ``install(*options, **environment)``."""

    def run(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        python = f"{sys.base_prefix}/bin/python3.{sys.version_info.minor}"
        given = {"PATH": "/usr/bin:/bin", "PYTHON": python, "HOME": "/nowhere", **environment}
        command = ["sh", str(unpacked / "install.sh"), "--prefix", str(tmp_path / "opt"), *options]
        return subprocess.run(command, capture_output=True, text=True, env=given, timeout=300)

    return run


def refused(done: subprocess.CompletedProcess[str], says: str, place: Path) -> None:
    """The installer ended with one sentence and nothing was changed."""
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert done.returncode == 1, done.stderr
    assert len(errors) == 1
    assert says in errors[0]
    assert errors[0].endswith("; nothing was changed")
    assert not place.exists()


def resigned(folder: Path) -> None:
    """Make the list of sums anew, as somebody without the key could."""
    digests = read_sums((folder / "SHA256SUMS").read_bytes())
    fresh = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in digests}
    (folder / "SHA256SUMS").write_bytes(sums_of(fresh))


def signed_facts(folder: Path, old: str, new: str) -> None:
    """Change a fact of the bundle and sign it again, as its maker could."""
    facts = (folder / "bundle.json").read_text()
    assert old in facts
    (folder / "bundle.json").write_text(facts.replace(old, new))
    resigned(folder)
    signature = SIGNER.sign(signed((folder / "SHA256SUMS").read_bytes()))
    (folder / "SHA256SUMS.sig").write_text(signature.hex() + "\n")


# a bundle that is not right


@pytest.mark.parametrize("name", ["wheels/fedpeft-0.1.0-py3-none-any.whl", "bundle.json"])
def test_a_changed_file_is_refused(install: Say, unpacked: Path, tmp_path: Path, name: str):
    with (unpacked / name).open("ab") as file:
        file.write(b" ")
    refused(install(), f"the bundle is damaged ({name}: FAILED)", tmp_path / "opt")


def test_a_missing_file_is_refused(install: Say, unpacked: Path, tmp_path: Path):
    (unpacked / "model" / "model.safetensors").unlink()
    refused(install(), "the bundle is damaged", tmp_path / "opt")


@pytest.mark.parametrize("name", ["wheels/evil-1.0-py3-none-any.whl", ".hidden"])
def test_an_added_file_is_refused(install: Say, unpacked: Path, tmp_path: Path, name: str):
    (unpacked / name).write_text("x")
    refused(install(), "files were added to the bundle", tmp_path / "opt")


def test_a_list_made_anew_without_the_key_is_refused(install: Say, unpacked: Path, tmp_path: Path):
    with (unpacked / "model" / "config.json").open("a") as file:
        file.write(" ")
    resigned(unpacked)
    refused(install(), "the signature of the bundle is not right", tmp_path / "opt")


def test_another_signer_than_the_one_of_the_telephone_is_refused(install: Say, tmp_path: Path):
    refused(install("--fingerprint", "aaaa-bbbb"), "and not by aaaa-bbbb", tmp_path / "opt")


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.99])
def test_an_installer_that_was_cut_short_does_nothing(
    install: Say, unpacked: Path, tmp_path: Path, share: float
):
    script = unpacked / "install.sh"
    whole = script.read_bytes()
    script.write_bytes(whole[: int(share * len(whole))])
    install()
    assert not (tmp_path / "opt").exists()


# a machine that does not fit


def test_another_machine_is_said(install: Say, unpacked: Path, tmp_path: Path):
    signed_facts(unpacked, '"machine": "any"', '"machine": "vax"')
    refused(install(), "this bundle is for vax and this machine is", tmp_path / "opt")


def test_another_python_is_said(install: Say, unpacked: Path, tmp_path: Path):
    signed_facts(unpacked, '"python": ">=3.11"', '"python": "3.99"')
    refused(install(), "this bundle is for Python 3.99 and python3 is 3.", tmp_path / "opt")


def test_a_python_that_is_too_old_is_said(install: Say, tmp_path: Path):
    old = tmp_path / "bin"
    old.mkdir()
    for name in ("python3", "python3.11"):
        (old / name).write_text('#!/bin/sh\ncase "$3" in *print*) echo 3.9 ;; *) exit 1 ;; esac\n')
        (old / name).chmod(0o755)
    done = install(PATH=f"{old}:/usr/bin:/bin", PYTHON="")
    refused(done, "this bundle is for Python >=3.11 and python3 is 3.9", tmp_path / "opt")


def test_an_older_c_library_is_said(install: Say, unpacked: Path, tmp_path: Path):
    signed_facts(unpacked, '"glibc": "0"', '"glibc": "2.99"')
    refused(install(), "needs the GNU C library 2.99 or newer", tmp_path / "opt")


def test_a_disk_without_space_is_said(install: Say, unpacked: Path, tmp_path: Path):
    facts = (unpacked / "bundle.json").read_text()
    size = re.search(r'"installed_kib": \d+', facts)
    assert size is not None
    signed_facts(unpacked, size[0], f'"installed_kib": {10**12}')
    refused(install(), "MiB free and", tmp_path / "opt")


def test_a_place_that_holds_something_else_is_left_alone(install: Say, tmp_path: Path):
    (tmp_path / "opt" / "bin").mkdir(parents=True)
    done = install()
    assert done.returncode == 1
    assert "holds something else" in done.stderr
    assert [path.name for path in (tmp_path / "opt").iterdir()] == ["bin"]


@pytest.mark.parametrize("options", [["--prefix"], ["--force"], ["stray"]])
def test_a_wrong_command_line_exits_2(install: Say, tmp_path: Path, options: list[str]):
    assert install(*options).returncode == 2
    assert not (tmp_path / "opt").exists()


@pytest.mark.parametrize("prefix", ["relative/opt", "/opt/with space", "/opt/$(id)"])
def test_a_prefix_that_no_script_could_name_is_refused(install: Say, prefix: str):
    done = install("--prefix", prefix)
    assert done.returncode == 1
    assert "the prefix" in done.stderr


# installing


def test_an_installation_that_fails_leaves_nothing(
    install: Say, wheels: Path, tmp_path: Path, embedded_model: Path
):
    next(wheels.glob("tinydep-*")).unlink()
    unpack(bundle(wheels, embedded_model, tmp_path / "bundle.tar"), tmp_path)
    done = install()
    assert done.returncode == 1
    assert "what was begun is removed" in done.stderr
    assert not (tmp_path / "opt").exists()


def test_an_installation_that_is_stopped_leaves_nothing(unpacked: Path, tmp_path: Path):
    command = ["sh", str(unpacked / "install.sh"), "--prefix", str(tmp_path / "opt")]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": f"{sys.base_prefix}/bin/python3"}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as running:
        assert running.stderr is not None
        while "installing" not in running.stderr.readline():
            pass
        os.killpg(running.pid, signal.SIGTERM)
        said = running.stderr.read()
    assert running.returncode == 1, said
    assert not (tmp_path / "opt").exists()


def tree(directory: Path) -> dict[str, tuple[float, int]]:
    found = {path: path.lstat() for path in directory.rglob("*")}
    return {str(path): (stat.st_mtime, stat.st_ino) for path, stat in found.items()}


def test_a_second_run_changes_nothing_and_an_upgrade_keeps_the_release_before(
    install: Say, wheels: Path, tmp_path: Path, embedded_model: Path
):
    place = tmp_path / "opt"
    assert install("--fingerprint", SIGNER.public.fingerprint).returncode == 0
    before = tree(place / "releases")
    again = install()
    assert again.returncode == 0
    assert "this release is installed already" in again.stderr
    assert tree(place / "releases") == before

    next(wheels.glob("fedpeft-*")).unlink()
    make_wheel(wheels, "fedpeft", "0.2.0", "def run():\n    print('fedpeft', 'newer')\n")
    other = bundle(wheels, embedded_model, tmp_path / "b.tar", Identity(bytes(128)))
    unpack(other, tmp_path)
    foreign = install()
    assert foreign.returncode == 1
    assert "was signed by another key" in foreign.stderr

    unpack(bundle(wheels, embedded_model, tmp_path / "c.tar"), tmp_path)
    assert install().returncode == 0
    assert len(list((place / "releases").iterdir())) == 2
    assert len(list((place / "models").iterdir())) == 1
    assert says(place) == "fedpeft newer\n"
    # Rolling back, as docs/operations.md has it.
    old = next((place / "releases").glob("0.1.0-*"))
    subprocess.run(["ln", "-sfn", f"releases/{old.name}", str(place / "current")], check=True)
    assert says(place) == "fedpeft 42\n"


def says(place: Path) -> str:
    program_ = str(place / "bin" / "fedpeft")
    return subprocess.run([program_], capture_output=True, text=True, check=True).stdout


# without a network, in a root of its own

_ENTER = """
set -eu
root=$1
mkdir -p "$root/dev/shm" "$root/tmp" "$root/etc" "$root/root" "$root/opt" "$root/proc"
for place in /usr "$4"; do
    mkdir -p "$root$place"
    mount --rbind "$place" "$root$place"
    mount -o remount,bind,ro "$root$place"
done
for name in bin sbin lib lib64; do
    if [ -L "/$name" ]; then cp -P "/$name" "$root/$name"
    elif [ -d "/$name" ]; then mkdir "$root/$name"; mount --rbind "/$name" "$root/$name"; fi
done
cp /etc/ld.so.cache "$root/etc/"
echo root:x:0:0:root:/root:/bin/sh >"$root/etc/passwd"
mount -t proc proc "$root/proc"
for device in null urandom; do
    : >"$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
exec chroot "$root" /usr/bin/env -i PATH=/usr/bin:/bin HOME=/root PYTHON="$2" /bin/sh -eu -c "$3"
"""
_WITHOUT_NETWORK = """
"$PYTHON" -c '
import socket
try:
    socket.create_connection(("192.0.2.1", 80), timeout=5)
except OSError as error:
    print("no network:", error.strerror)
'
cd /root
tar xf bundle.tar
sh fedpeft-offline/install.sh
ls /opt/fedpeft
"""


def in_a_root_without_network(
    root: Path, script: str, timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """Run ``script`` in a network namespace without a route and a root of this system's /usr.

    That is the nearest to a bare Debian that needs no network to make: everything else
    than /usr and Python is new, and no variable of this process's environment is there.
    """
    python = Path(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}")
    unshare = shutil.which("unshare")
    command = [unshare or "unshare", "-rnmpf"]
    if unshare is None or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("network namespaces cannot be made here (unshare -rnmpf)")
    command += ["sh", "-c", _ENTER, "sh", str(root), str(python), script, sys.base_prefix]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)


def test_it_installs_without_a_network_in_an_empty_root(
    wheels: Path, tmp_path: Path, embedded_model: Path
):
    home = tmp_path / "root" / "root"
    home.mkdir(parents=True)
    bundle(wheels, embedded_model, home / "bundle.tar")
    script = _WITHOUT_NETWORK + "/opt/fedpeft/bin/fedpeft\nls -L /opt/fedpeft/model\n"
    done = in_a_root_without_network(tmp_path / "root", script, 300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no network: Network is unreachable\n")
    assert "fedpeft 42\n" in done.stdout
    assert "model.safetensors" in done.stdout
    assert SIGNER.public.fingerprint in done.stderr


@pytest.mark.skipif(os.environ.get(FULL) != "1", reason="slow: run `make offline-install`")
@pytest.mark.timeout(3600)
def test_the_whole_of_fedpeft_installs_without_a_network_and_runs_a_round(tmp_path: Path):
    home = tmp_path / "root" / "root"
    home.mkdir(parents=True)
    with pytest.raises(SystemExit) as ended:
        program.run(["bundle", "--model", "embedded", "--out", str(home / "bundle.tar")])
    assert ended.value.code == 0
    round_ = "cd /tmp; /opt/fedpeft/bin/fedpeft simulate --out /tmp/run --set rounds.count=1\n"
    script = _WITHOUT_NETWORK + round_ + "ls /tmp/run/adapter\n"
    done = in_a_root_without_network(tmp_path / "root", script, 3000)
    assert done.returncode == 0, done.stderr
    assert "adapter_model.safetensors" in done.stdout
