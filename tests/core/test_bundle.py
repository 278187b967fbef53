"""A bundle is the same for the same inputs, holds no secret, and a changed one is found out."""

import hashlib
import io
import os
import runpy
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.bundle import Bundle, Ingredients, WheelFolder, check_bundle, make_bundle
from fedpeft.bundle.layout import ROOT, read_sums, sums_of
from fedpeft.bundle.making import MATERIAL
from fedpeft.bundle.signing import bundle_key
from fedpeft.errors import ConfigError, KeyLocked, SealingError, StorageError, WrongSignature
from fedpeft.sealing.identity import Identity
from fedpeft.sealing.keyfile import Protection

verifies: Callable[[bytes, bytes, bytes], bool]
SCRIPT = runpy.run_path(str(MATERIAL / "check_signature.py"))
verifies = SCRIPT["verifies"]
SIGNER = Identity(bytes(range(128)))
# RFC 8032, section 7.1: secret key, message.
VECTORS = [
    ("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60", ""),
    ("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb", "72"),
    ("c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7", "af82"),
]


def wheel(directory: Path, name: str) -> Path:
    """Write a wheel whose name says what it is for."""
    directory.mkdir(exist_ok=True)
    path = directory / f"{name}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("content.py", "value = 1\n" * 100)
    return path


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    for name in (
        "fedpeft-0.1.0-py3-none-any",
        "pip-26.0-py3-none-any",
        "fast-1.0-cp311-cp311-manylinux_2_28_x86_64",
        "seals-5.0-cp39-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64",
    ):
        wheel(tmp_path / "wheels", name)
    return tmp_path / "wheels"


@pytest.fixture
def make(wheels: Path, tmp_path: Path) -> Callable[..., Bundle]:
    """Make a bundle: ``make(name, **changed ingredients)``."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(bytes(3000))
    (model / "config.json").write_text("{}")
    (model / ".cache").write_text("of another program")

    def call(name: str = "bundle.tar", **changes: Any) -> Bundle:
        given: dict[str, Any] = {
            "wheels": WheelFolder.of(wheels),
            "model": model,
            "fingerprint": "0" * 64,
            "config": (),
            "signer": SIGNER,
        }
        return make_bundle(Ingredients(**{**given, **changes}), tmp_path / name)

    return call


# wheels


def test_a_folder_of_wheels_says_which_machines_it_is_for(wheels: Path):
    found = WheelFolder.of(wheels)
    said = (found.release, found.python, found.machine, found.glibc)
    assert said == ("0.1.0", "3.11", "x86_64", "2.28")
    assert found.installed_bytes == 4 * 1000


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("fast-1.1-cp311-cp311-manylinux_2_28_x86_64", "more than one wheel of fast"),
        ("other-1.0-cp312-cp312-manylinux_2_28_x86_64", "different Pythons"),
        ("other-1.0-cp311-cp311-manylinux_2_28_aarch64", "different machines"),
        ("other-1.0-cp311-cp311-win_amd64", "bundles are for Linux"),
        ("other-1.0-cp311-cp311-musllinux_1_2_x86_64", "bundles are for Linux"),
        ("other", "is no whole wheel"),
    ],
)
def test_wheels_that_do_not_belong_together_are_refused(wheels: Path, name: str, says: str):
    wheel(wheels, name)
    with pytest.raises(ConfigError, match=says):
        WheelFolder.of(wheels)


@pytest.mark.parametrize("needed", ["fedpeft", "pip"])
def test_a_folder_without_what_installs_it_is_refused(wheels: Path, needed: str):
    next(wheels.glob(f"{needed}-*")).unlink()
    with pytest.raises(ConfigError, match=f"no wheel of {needed}"):
        WheelFolder.of(wheels)


def test_a_wheel_that_was_cut_short_is_refused(wheels: Path):
    path = next(wheels.glob("fast-*"))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ConfigError, match="no whole wheel"):
        WheelFolder.of(wheels)


# making


def test_the_same_inputs_give_the_same_bytes(make: Callable[..., Bundle], wheels: Path):
    first = make("first.tar")
    for number, path in enumerate(sorted(wheels.iterdir(), reverse=True)):
        os.utime(path, (number, number))
        path.chmod(0o600 + number)
    old = os.umask(0o077)
    try:
        second = make("second.tar")
    finally:
        os.umask(old)
    assert first.path.read_bytes() == second.path.read_bytes()
    assert first.sha256 == second.sha256 == hashlib.sha256(first.path.read_bytes()).hexdigest()


def test_entries_are_sorted_of_nobody_of_one_time_and_the_installer_is_last(
    make: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    with tarfile.open(make().path) as archive:
        entries = archive.getmembers()
    files = [entry.name for entry in entries if entry.isfile()]
    assert files[-1] == f"{ROOT}/install.sh"
    assert files[:-1] == sorted(files[:-1])
    assert {(e.uid, e.gid, e.uname, e.gname, int(e.mtime)) for e in entries} == {
        (0, 0, "", "", 1700000000)
    }
    assert {entry.name for entry in entries if entry.isfile() and entry.mode != 0o644} == {
        f"{ROOT}/install.sh"
    }
    assert not any(".cache" in name for name in files)


@pytest.mark.parametrize("secret", ['{"kind":"fedpeft-identity"}', "-----BEGIN PRIVATE KEY-----"])
def test_a_private_key_does_not_get_into_a_bundle(
    make: Callable[..., Bundle], tmp_path: Path, secret: str
):
    (tmp_path / "harmless.toml").write_text(f"# {secret}")
    with pytest.raises(ConfigError, match="private key"):
        make(config=(tmp_path / "harmless.toml",))
    assert not (tmp_path / "bundle.tar").exists()


def test_two_configurations_of_one_name_are_refused(make: Callable[..., Bundle], tmp_path: Path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "client.toml").write_text("")
    both = (tmp_path / "a" / "client.toml", tmp_path / "b" / "client.toml")
    with pytest.raises(ConfigError, match=r"two files would be config/client\.toml"):
        make(config=both)


def test_a_full_disk_leaves_the_old_bundle_and_no_litter(
    make: Callable[..., Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "bundle.tar").write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="no space left on device; check the disk"):
        make()
    assert (tmp_path / "bundle.tar").read_bytes() == b"old"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".bundle")]


def test_a_stop_in_the_middle_leaves_no_bundle(
    wheels: Path, tmp_path: Path, make: Callable[..., Bundle]
):
    make("whole.tar")
    done = 0

    def begin(total: int) -> Callable[[int], None]:
        def observe(count: int) -> None:
            nonlocal done
            done += count
            if done > 0.75 * total:
                raise KeyboardInterrupt

        return observe

    given = Ingredients(
        wheels=WheelFolder.of(wheels),
        model=tmp_path / "model",
        fingerprint="0" * 64,
        config=(),
        signer=SIGNER,
    )
    with pytest.raises(KeyboardInterrupt):
        make_bundle(given, tmp_path / "out" / "bundle.tar", begin)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_that_changes_meanwhile_is_noticed(
    wheels: Path, tmp_path: Path, make: Callable[..., Bundle]
):
    make("whole.tar")
    weights = tmp_path / "model" / "model.safetensors"

    def begin(total: int) -> Callable[[int], None]:
        done = 0

        def observe(count: int) -> None:
            nonlocal done
            done += count
            if done == total // 2:
                weights.write_bytes(b"\1" * 3000)

        return observe

    given = Ingredients(
        wheels=WheelFolder.of(wheels),
        model=tmp_path / "model",
        fingerprint="0" * 64,
        config=(),
        signer=SIGNER,
    )
    with pytest.raises(StorageError, match=r"model/model\.safetensors changed while"):
        make_bundle(given, tmp_path / "bundle.tar", begin)


# keys


def test_a_key_is_made_once_for_its_owner_alone_and_then_kept(tmp_path: Path):
    first, made = bundle_key(tmp_path / "keys" / "bundle.key", Protection.none())
    again, made_again = bundle_key(tmp_path / "keys" / "bundle.key", Protection.none())
    assert (made, made_again) == (True, False)
    assert first.seeds == again.seeds
    assert stat.S_IMODE((tmp_path / "keys" / "bundle.key").stat().st_mode) == 0o600


def test_an_encrypted_key_needs_its_passphrase(tmp_path: Path):
    bundle_key(tmp_path / "bundle.key", Protection.passphrase("four random words"))
    with pytest.raises(KeyLocked):
        bundle_key(tmp_path / "bundle.key", Protection.none())


# checking


def test_a_whole_bundle_is_whole(make: Callable[..., Bundle]):
    found = check_bundle(make().path, signer=SIGNER.public.fingerprint.upper())
    assert (found.release, found.signer) == ("0.1.0", SIGNER.public.fingerprint)


def test_a_bundle_of_another_signer_is_refused(make: Callable[..., Bundle]):
    path = make(signer=Identity(bytes(128))).path
    with pytest.raises(WrongSignature, match="do not install it"):
        check_bundle(path, signer=SIGNER.public.fingerprint)


def test_every_changed_file_is_found_out(make: Callable[..., Bundle], tmp_path: Path):
    path = make().path
    with tarfile.open(path) as archive:
        names = [entry.name for entry in archive if entry.isfile()]
    for name in names:
        with pytest.raises(SealingError):
            check_bundle(rewritten(path, tmp_path / "bad.tar", {name: b"changed\n"}), signer=None)


def test_an_added_file_is_found_out(make: Callable[..., Bundle], tmp_path: Path):
    added = {f"{ROOT}/wheels/evil-1.0-py3-none-any.whl": b"x"}
    with pytest.raises(SealingError, match="evil"):
        check_bundle(rewritten(make().path, tmp_path / "bad.tar", added), signer=None)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", f"{ROOT}/../../etc/passwd", "elsewhere/file", f"{ROOT}//etc/passwd"]
)
def test_a_file_outside_the_folder_is_found_out(
    make: Callable[..., Bundle], tmp_path: Path, name: str
):
    with pytest.raises(SealingError):
        check_bundle(rewritten(make().path, tmp_path / "bad.tar", {name: b"x"}), signer=None)


def test_a_list_that_was_made_anew_does_not_pass_for_signed(
    make: Callable[..., Bundle], tmp_path: Path
):
    path = make().path
    with tarfile.open(path) as archive:
        sums = archive.extractfile(f"{ROOT}/SHA256SUMS")
        assert sums is not None
        digests = read_sums(sums.read())
    digests["install.sh"] = hashlib.sha256(b"rm -rf /\n").hexdigest()
    changes = {f"{ROOT}/install.sh": b"rm -rf /\n", f"{ROOT}/SHA256SUMS": sums_of(digests)}
    with pytest.raises(WrongSignature):
        check_bundle(rewritten(path, tmp_path / "bad.tar", changes), signer=None)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_a_bundle_that_was_cut_short_is_refused(
    make: Callable[..., Bundle], tmp_path: Path, share: float
):
    whole = make().path.read_bytes()
    (tmp_path / "short.tar").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(SealingError, match="not a whole fedpeft bundle"):
        check_bundle(tmp_path / "short.tar", signer=None)


def rewritten(path: Path, out: Path, changes: dict[str, bytes]) -> Path:
    """Copy a tar file with some files replaced or added."""
    left = dict(changes)
    with tarfile.open(path) as old, tarfile.open(out, "w") as new:
        for entry in old:
            content = old.extractfile(entry)
            data = left.pop(entry.name, content.read() if content else b"")
            entry.size = len(data)
            new.addfile(entry, io.BytesIO(data))
        for name, data in left.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            new.addfile(entry, io.BytesIO(data))
    return out


# the installer's own check of the signature


@pytest.mark.parametrize(("secret", "message"), VECTORS)
def test_the_vectors_of_the_rfc_verify(secret: str, message: str):
    key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(secret))
    public = key.public_key().public_bytes_raw()
    assert verifies(public, key.sign(bytes.fromhex(message)), bytes.fromhex(message))


@settings(max_examples=25, deadline=None)
@given(secret=st.binary(min_size=32, max_size=32), message=st.binary(), at=st.integers(0, 511))
def test_one_changed_bit_of_a_signature_does_not_verify(secret: bytes, message: bytes, at: int):
    key = Ed25519PrivateKey.from_private_bytes(secret)
    public, signature = key.public_key().public_bytes_raw(), bytearray(key.sign(message))
    assert verifies(public, bytes(signature), message)
    signature[at // 8] ^= 1 << at % 8
    assert not verifies(public, bytes(signature), message)


def test_a_signature_is_not_stretched_by_the_order_of_the_group():
    key = Ed25519PrivateKey.from_private_bytes(bytes(32))
    signature = key.sign(b"m")
    s = int.from_bytes(signature[32:], "little") + SCRIPT["L"]
    stretched = signature[:32] + s.to_bytes(32, "little")
    assert not verifies(key.public_key().public_bytes_raw(), stretched, b"m")


@pytest.mark.parametrize("y", [0, 1, SCRIPT["P"] - 1, SCRIPT["P"], SCRIPT["P"] + 1])
def test_under_a_key_of_small_order_nothing_verifies(y: int):
    neutral = (1).to_bytes(32, "little")
    assert not verifies(y.to_bytes(32, "little"), neutral + bytes(32), b"m")


def test_the_script_names_the_signer_as_the_programs_do(
    make: Callable[..., Bundle], tmp_path: Path
):
    with tarfile.open(make().path) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    folder = tmp_path / "unpacked" / ROOT
    assert SCRIPT["signer_of"](folder) == SIGNER.public.fingerprint
    (folder / "SHA256SUMS").write_bytes(b"")
    assert SCRIPT["signer_of"](folder) is None
