"""The package for Debian: what it holds, that it is reproducible, what it refuses."""

import gzip
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from fedpeft.bundle import Ingredients, WheelFolder, make_bundle
from fedpeft.sealing.identity import Identity

DEBIAN = Path(__file__).resolve().parents[2] / "deploy" / "debian"
SCRIPTS = ("fedpeft-install", "postinst", "prerm", "postrm")

pytestmark = pytest.mark.skipif(
    shutil.which("dpkg-deb") is None, reason="dpkg-deb is not installed here"
)


def build(out: Path) -> Path:
    command = [sys.executable, str(DEBIAN / "build.py"), str(out)]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("deb"))


@pytest.fixture(scope="module")
def root(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's files, as they would lie on the machine."""
    root = tmp_path_factory.mktemp("root")
    subprocess.run(["dpkg-deb", "--extract", package, root], check=True)
    subprocess.run(["dpkg-deb", "--control", package, root / "DEBIAN"], check=True)
    return root


def test_it_holds_units_account_pages_completion_and_the_installer(root: Path):
    found = {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir()}
    programs = ("fedpeft", "fedpeft-client", "fedpeft-server")
    units = ("fedpeft-client", "fedpeft-server", "fedpeft-serve")
    assert {f"usr/lib/systemd/system/{name}.service" for name in units} <= found
    assert {f"usr/share/man/man1/{name}.1.gz" for name in programs} <= found
    assert {f"usr/share/bash-completion/completions/{name}" for name in programs} <= found
    assert {f"usr/bin/{name}" for name in programs} <= found
    assert {
        "usr/lib/sysusers.d/fedpeft.conf",
        "usr/lib/tmpfiles.d/fedpeft.conf",
        "usr/sbin/fedpeft-install",
        "usr/lib/fedpeft/check_signature.py",
        "usr/share/doc/fedpeft/copyright",
    } <= found


def test_a_page_is_the_manual_of_its_program(root: Path):
    page = gzip.decompress((root / "usr/share/man/man1/fedpeft-client.1.gz").read_bytes())
    assert page.startswith(b'.TH FEDPEFT\\-CLIENT 1 "2023-11-14"')


def test_everything_belongs_to_root_and_nobody_else_may_write(package: Path):
    done = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], capture_output=True, check=True)
    listing = Path(package.parent, "files.tar")
    listing.write_bytes(done.stdout)
    with tarfile.open(listing) as archive:
        for entry in archive:
            assert (entry.uname, entry.gname) == ("root", "root")
            assert entry.issym() or entry.mode & 0o022 == 0


def test_the_same_sources_give_the_same_package(package: Path, tmp_path: Path):
    assert build(tmp_path).read_bytes() == package.read_bytes()


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_scripts_are_plain_shell(name: str):
    done = subprocess.run(["sh", "-n", DEBIAN / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_removing_keeps_keys_and_ledger():
    text = (DEBIAN / "postrm").read_text()
    assert "rm -rf /opt/fedpeft\n" in text
    assert "rm -rf /var" not in text


@pytest.fixture
def installer(root: Path, tmp_path: Path) -> Path:
    """fedpeft-install for paths below ``tmp_path`` instead of the machine's own."""
    text = (root / "usr/sbin/fedpeft-install").read_text()
    text = text.replace("/usr/lib/fedpeft", str(root / "usr/lib/fedpeft"))
    text = text.replace("/opt/fedpeft", str(tmp_path / "opt")).replace("/var/tmp", str(tmp_path))
    text = text.replace('"$(id -u)" = 0', "0 = 0")
    text = text.replace('install.sh"\n', f'install.sh" --prefix {tmp_path / "opt"}\n')
    path = tmp_path / "fedpeft-install"
    path.write_text(text)
    return path


def run(installer: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = ["sh", str(installer), *map(str, arguments)]
    environment = {"PATH": f"{Path(sys.base_prefix, 'bin')}:/usr/bin:/bin"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture
def bundle(tmp_path: Path, embedded_model: Path) -> Path:
    """A bundle whose wheels are none: what is tested ends before they are opened."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("fedpeft-0.1.0-py3-none-any.whl", "pip-26.0-py3-none-any.whl"):
        zipfile.ZipFile(wheels / name, "w").close()
    given = Ingredients(
        wheels=WheelFolder.of(wheels),
        model=embedded_model,
        fingerprint="0" * 64,
        config=(),
        signer=Identity(bytes(128)),
    )
    return make_bundle(given, tmp_path / "bundle.tar").path


def test_the_first_bundle_needs_the_fingerprint_of_the_telephone(installer: Path, bundle: Path):
    done = run(installer, bundle)
    assert done.returncode == 1
    assert "--fingerprint SIGNER" in done.stderr


def test_a_bundle_of_another_signer_never_runs(installer: Path, bundle: Path, tmp_path: Path):
    done = run(installer, bundle, "--fingerprint", "aaaa-bbbb")
    assert done.returncode == 1
    assert "and not by aaaa-bbbb" in done.stderr
    assert not (tmp_path / "opt").exists()


def test_an_exchanged_installer_never_runs(installer: Path, bundle: Path, tmp_path: Path):
    data, mark = bundle.read_bytes(), b"# Install fedpeft from this bundle"
    assert data.count(mark) == 1
    bundle.write_bytes(data.replace(mark, b"echo EVIL >&2 #".ljust(len(mark), b"#")))
    done = run(installer, bundle, "--fingerprint", Identity(bytes(128)).public.fingerprint)
    assert done.returncode == 1
    assert "is damaged" in done.stderr
    assert "EVIL" not in done.stderr
    assert [path.name for path in tmp_path.glob("fedpeft-install.*")] == []


def test_what_is_no_bundle_is_refused(installer: Path, tmp_path: Path):
    (tmp_path / "bundle.tar").write_bytes(b"not a tar file")
    done = run(installer, tmp_path / "bundle.tar", "--fingerprint", "aaaa")
    assert done.returncode == 1
    assert "cannot be unpacked" in done.stderr
