"""Wheels of a `fedpeft` of one module with one dependency, and Python's own pip, for bundles."""

import base64
import ensurepip
import hashlib
import shutil
import zipfile
from pathlib import Path


def small_wheels(directory: Path) -> Path:
    """Fill a new folder with wheels that install in a moment."""
    directory.mkdir()
    make_wheel(directory, "tinydep", "2.0", "answer = 42\n")
    source = "import tinydep\n\n\ndef run():\n    print('fedpeft', tinydep.answer)\n"
    make_wheel(directory, "fedpeft", "0.1.0", source, "Requires-Dist: tinydep==2.0\n")
    (pip,) = (Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl")
    shutil.copy(pip, directory)
    return directory


def make_wheel(directory: Path, name: str, version: str, source: str, metadata: str = "") -> None:
    """Write a wheel of one module."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": source,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{metadata}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    if name == "fedpeft":
        scripts = ("fedpeft", "fedpeft-client", "fedpeft-server")
        lines = "".join(f"{script} = fedpeft:run\n" for script in scripts)
        files[f"{info}/entry_points.txt"] = f"[console_scripts]\n{lines}"
    record = f"{info}/RECORD"
    lines = [f"{path},sha256={_digest(text)},{len(text)}\n" for path, text in files.items()]
    with zipfile.ZipFile(directory / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in {**files, record: "".join(lines) + f"{record},,\n"}.items():
            archive.writestr(path, text)


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
