"""Build the package for Debian: ``python deploy/debian/build.py OUT``; needs dpkg-deb.

The package brings units, account, manual pages, completion and ``fedpeft-install``, which
puts the programs themselves in place from a bundle. The same sources and
SOURCE_DATE_EPOCH give the same bytes.
"""

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
MATERIAL = PROJECT / "fedpeft" / "bundle" / "material"
PROGRAMS = ("fedpeft", "fedpeft-client", "fedpeft-server")
CONTROL = """Package: fedpeft
Version: {version}-1
Architecture: all
Maintainer: The fedpeft project <fedpeft@localhost>
Section: science
Priority: optional
Depends: python3 (>= 3.11), coreutils, tar, systemd
Recommends: nftables
Installed-Size: {size}
Description: private, offline, federated fine-tuning of language models
 Clinics fine-tune one language model together without sharing records.
 This package brings the services, their account, the manual pages, and
 fedpeft-install, which installs the programs from a signed bundle without
 a network.
"""
COPYRIGHT = """Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: fedpeft

Files: *
Copyright: The fedpeft project
License: Apache-2.0
 On Debian the text is in /usr/share/common-licenses/Apache-2.0.
"""


def build(out: Path) -> Path:
    """Write the package into ``out`` and return its path.

    Raises:
        CalledProcessError: dpkg-deb or a program of fedpeft failed; it said why.
    """
    version = metadata.version("fedpeft")
    target = out / f"fedpeft_{version}-1_all.deb"
    moment = int(os.environ.get("SOURCE_DATE_EPOCH", "0"))
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "root"
        stage(root, moment)
        _control(root, version)
        for path in (root, *root.rglob("*")):
            os.utime(path, (moment, moment), follow_symlinks=False)
        environment = {**os.environ, "SOURCE_DATE_EPOCH": str(moment)}
        command = ["dpkg-deb", "--root-owner-group", "-Zxz", "--build", str(root), str(target)]
        _run(command, environment)
    return target


def stage(root: Path, moment: int) -> None:
    """Lay the files out below ``root`` as they will lie on the machine."""
    root.mkdir(mode=0o755)
    for unit in sorted((MATERIAL / "systemd").glob("*.service")):
        _put(root / "usr/lib/systemd/system" / unit.name, unit.read_bytes())
    systemd = MATERIAL / "systemd"
    _put(root / "usr/lib/sysusers.d/fedpeft.conf", (systemd / "fedpeft.sysusers").read_bytes())
    _put(root / "usr/lib/tmpfiles.d/fedpeft.conf", (systemd / "fedpeft.tmpfiles").read_bytes())
    check = (MATERIAL / "check_signature.py").read_bytes()
    _put(root / "usr/lib/fedpeft/check_signature.py", check)
    _put(root / "usr/sbin/fedpeft-install", (HERE / "fedpeft-install").read_bytes(), mode=0o755)
    (root / "usr/bin").mkdir(mode=0o755)
    for program in PROGRAMS:
        (root / "usr/bin" / program).symlink_to(f"/opt/fedpeft/bin/{program}")
        _put(root / "usr/share/bash-completion/completions" / program, _completion(program))
    _manual_pages(root / "usr/share/man/man1", moment)
    doc = root / "usr/share/doc/fedpeft"
    _put(doc / "copyright", COPYRIGHT.encode())
    _put(doc / "changelog.gz", _packed((PROJECT / "CHANGELOG.md").read_bytes()))
    for example in ("firewall/fedpeft.nft", "sysctl/60-fedpeft.conf"):
        _put(doc / "examples" / Path(example).name, (HERE.parent / example).read_bytes())


def _manual_pages(directory: Path, moment: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        environment = {**os.environ, "SOURCE_DATE_EPOCH": str(moment)}
        command = [sys.executable, str(PROJECT / "tools" / "make_manpages.py"), place]
        _run(command, environment)
        for page in sorted(Path(place).iterdir()):
            _put(directory / f"{page.name}.gz", _packed(page.read_bytes()))


def _control(root: Path, version: str) -> None:
    files = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    size = -(-sum(path.stat().st_size for path in files) // 1024)
    sums = [f"{_md5(path)}  {path.relative_to(root)}\n" for path in files]
    _put(root / "DEBIAN/control", CONTROL.format(version=version, size=size).encode())
    _put(root / "DEBIAN/md5sums", "".join(sums).encode())
    for script in ("postinst", "prerm", "postrm"):
        _put(root / "DEBIAN" / script, (HERE / script).read_bytes(), mode=0o755)


def _md5(path: Path) -> str:
    # dpkg --verify knows no other digest; it finds damage, not forgery.
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def _put(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(mode)
    for folder in path.parents:
        if folder.name == "root":
            break
        folder.chmod(0o755)


def _packed(data: bytes) -> bytes:
    return gzip.compress(data, compresslevel=9, mtime=0)


def _completion(program: str) -> bytes:
    command = shutil.which(program, path=str(Path(sys.executable).parent))
    if command is None:
        raise FileNotFoundError(f"{program} is not installed beside {sys.executable}")
    # Not --show-completion: that is for the shell it was started from, and a service has none.
    variable = f"_{program.upper().replace('-', '_')}_COMPLETE"
    return _run([command], {**os.environ, variable: "source_bash"})


def _run(command: list[str], environment: dict[str, str]) -> bytes:
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE)  # noqa: S603
    return done.stdout


if __name__ == "__main__":
    sys.stdout.write(f"{build(Path(sys.argv[1]))}\n")
