"""A signed lineage: the adapter is what the server says it made, or it is refused."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpeft.adapters import AdapterSchema, AdapterState, save_adapter
from fedpeft.adapters.peft_directory import weights_bytes
from fedpeft.adapters.schema import TensorSpec
from fedpeft.config import AdapterSettings, PrivacySettings
from fedpeft.errors import LineageRefused
from fedpeft.protocol.lineage import (
    Base,
    Contributor,
    Lineage,
    LogEnd,
    Parent,
    Protection,
    SignedLineage,
    Spent,
    Weights,
    read_lineage,
    rounds_in,
    sign,
    with_round,
)
from fedpeft.protocol.lineage_check import check_directory, report, sentences, to_keep
from fedpeft.sealing import Identity

SERVER, OTHER = Identity(bytes(range(128))), Identity.generate()
CLINIC = Identity(bytes(128)).public.fingerprint
FINGERPRINT = "5a" * 32
SCHEMA = AdapterSchema(
    (TensorSpec("m.lora_A.weight", (2, 3)), TensorSpec("m.lora_B.weight", (3, 2))), FINGERPRINT
)
SETTINGS = AdapterSettings(rank=2, alpha=4.0, target_modules=("m",))
ROUNDS = 3


def state_of(number: int) -> AdapterState:
    return AdapterState(SCHEMA, torch.arange(12, dtype=torch.float32) + number)


def lineage_of(number: int, before: SignedLineage | None) -> Lineage:
    import hashlib

    terms = PrivacySettings(unit="patient", epsilon=8.0)
    names = ("lindenpark", "northfield") if number % 2 else ("northfield",)
    rounds = {name: one.rounds for name, one in before.lineage.clinics.items()} if before else {}
    for name in names if number else ():
        rounds[name] = with_round(rounds.get(name, ""), number)
    return Lineage(
        federation="heart",
        run="0123456789abcdef" * 2,
        round=number,
        time="2026-01-02T03:04:05+00:00",
        base=Base(fingerprint=FINGERPRINT, quantization="none"),
        weights=Weights(
            sha256=hashlib.sha256(weights_bytes(state_of(number))).hexdigest(), rank=2, alpha=4.0
        ),
        parent=before
        and Parent(round=number - 1, lineage=before.digest, weights=before.lineage.weights.sha256),
        clinics={
            name: Contributor(fingerprint=CLINIC, rounds=of) for name, of in sorted(rounds.items())
        },
        strategy="fedavg",
        mode="secagg",
        privacy=Protection.of(terms, Spent(epsilon=1.25, delta=1e-5) if number else None),
        settings="c3" * 32,
        log=LogEnd(seq=12, hash="d4" * 32),
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's directory with rounds 0 to 2, and the last adapter again in ``adapter``."""
    before: SignedLineage | None = None
    for number in range(ROUNDS):
        before = sign(lineage_of(number, before), SERVER)
        for place in (tmp_path / "rounds" / str(number) / "adapter", tmp_path / "adapter"):
            save_adapter(state_of(number), SETTINGS, place, base_name="base")
            (place / "lineage.json").write_bytes(before.to_bytes())
    return tmp_path


def leaves(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in items:
        if isinstance(value, dict | list) and value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key)


def changed(value: Any) -> Any:
    """Another value of the same form."""
    if isinstance(value, str):
        swap = {"secagg": "sealed", "none": "nf4", "local": "central", "patient": "record"}
        last = "1" if value[-1:] != "1" else "2"
        return swap.get(value, value[:-1] + last)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return None if value is not None else "x"


EXAMPLE = json.loads(sign(lineage_of(1, sign(lineage_of(0, None), SERVER)), SERVER).to_bytes())


def test_an_adapter_and_all_before_it_are_what_the_server_signed(run: Path):
    for directory in (run / "adapter", run / "rounds" / "2" / "adapter"):
        found = check_directory(directory, SERVER.public)
        assert (found.checked, found.unchecked) == ((1, 0), None)
    text = "\n".join(sentences(found))
    assert "round 2 of federation heart" in text
    assert "the updates of northfield, on the adapter of round 1" in text
    assert f"lindenpark ({CLINIC}) in rounds 1" in text
    assert f"northfield ({CLINIC}) in rounds 1-2" in text
    assert "each patient protected, local noise; spent at most epsilon 1.250 at delta" in text
    assert report(found)["parents_checked"] == [1, 0]


@pytest.mark.parametrize("path", list(leaves(EXAMPLE)), ids=lambda path: ".".join(map(str, path)))
def test_no_field_can_be_changed(run: Path, path: tuple[Any, ...]):
    file = run / "rounds" / "1" / "adapter" / "lineage.json"
    content = json.loads(file.read_bytes())
    part = content
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = changed(part[path[-1]])
    file.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    with pytest.raises(LineageRefused):
        check_directory(file.parent, SERVER.public)


@pytest.mark.parametrize("path", list(leaves(EXAMPLE)), ids=lambda path: ".".join(map(str, path)))
def test_no_field_can_be_left_out(path: tuple[Any, ...]):
    content = json.loads(json.dumps(EXAMPLE))
    part = content
    for key in path[:-1]:
        part = part[key]
    del part[path[-1]]
    with pytest.raises(LineageRefused):
        read_lineage((json.dumps(content, indent=1, sort_keys=True) + "\n").encode(), source="it")


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"\xff", b"[]\n", b"null", json.dumps(EXAMPLE).encode(), b"[" * 100_000]
)
def test_what_is_no_lineage_or_written_in_another_way_is_refused(data: bytes):
    with pytest.raises(LineageRefused, match="no lineage of this release"):
        read_lineage(data, source="it")


def test_a_lineage_signed_by_somebody_else_is_refused(run: Path):
    forged = sign(lineage_of(0, None), OTHER)
    (run / "rounds" / "0" / "adapter" / "lineage.json").write_bytes(forged.to_bytes())
    with pytest.raises(LineageRefused, match="was signed by"):
        check_directory(run / "rounds" / "0" / "adapter", SERVER.public)
    named = forged.model_copy(update={"signer": SERVER.public.fingerprint})
    with pytest.raises(LineageRefused, match="was changed after"):
        named.require_signed(SERVER.public)


def test_other_weights_are_refused(run: Path):
    save_adapter(state_of(1), SETTINGS, run / "adapter", base_name="base")
    with pytest.raises(LineageRefused, match="is not what the server signed for round 2"):
        check_directory(run / "adapter", SERVER.public)


@pytest.mark.parametrize(("key", "value"), [("r", 1), ("lora_alpha", 400.0), ("use_dora", True)])
def test_a_configuration_that_changes_what_the_weights_do_is_refused(
    run: Path, key: str, value: object
):
    path = run / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(LineageRefused):
        check_directory(run / "adapter", SERVER.public)


def test_another_base_model_is_refused(run: Path):
    path = run / "adapter" / "fedpeft.json"
    path.write_text(path.read_text().replace(FINGERPRINT, "6b" * 32))
    with pytest.raises(LineageRefused, match="names base model"):
        check_directory(run / "adapter", SERVER.public)


def test_a_missing_lineage_is_refused(run: Path):
    (run / "adapter" / "lineage.json").unlink()
    with pytest.raises(LineageRefused, match="nobody vouches"):
        check_directory(run / "adapter", SERVER.public)


def test_a_parent_whose_weights_were_changed_is_refused(run: Path):
    save_adapter(state_of(7), SETTINGS, run / "rounds" / "1" / "adapter", base_name="base")
    with pytest.raises(LineageRefused, match="rounds/1/adapter"):
        check_directory(run / "adapter", SERVER.public)


def test_a_parent_that_is_not_there_is_said(run: Path):
    shutil.rmtree(run / "rounds" / "0")
    found = check_directory(run / "adapter", SERVER.public)
    assert (found.checked, found.unchecked) == ((1,), 0)
    shutil.copytree(run / "adapter", run / "alone" / "here")
    found = check_directory(run / "alone" / "here", SERVER.public)
    assert (found.checked, found.unchecked) == ((), 1)
    assert "the signature names them only" in sentences(found)[-1]


def test_a_parent_that_was_replaced_is_not_taken_for_it(run: Path):
    other = lineage_of(1, sign(lineage_of(0, None), SERVER)).model_copy(update={"strategy": "x"})
    (run / "rounds" / "1" / "adapter" / "lineage.json").write_bytes(sign(other, SERVER).to_bytes())
    assert check_directory(run / "adapter", SERVER.public).unchecked == 1


def test_a_lineage_is_kept_only_beside_the_adapter_that_was_signed():
    signed = sign(lineage_of(0, None), SERVER)
    assert to_keep(signed, state_of(0)) == signed.to_bytes()
    assert to_keep(signed, state_of(1)) is None
    assert to_keep(None, state_of(0)) is None


def test_rounds_are_written_as_ranges():
    text = ""
    for number in (1, 2, 3, 5, 7, 8):
        text = with_round(text, number)
    assert text == "1-3,5,7-8"
    assert rounds_in(text) == {1, 2, 3, 5, 7, 8}
    assert rounds_in("") == set()


def test_only_round_zero_has_no_parent():
    first = sign(lineage_of(0, None), SERVER)
    content = lineage_of(1, first).model_dump(by_alias=True)
    for wrong in ({"parent": None}, {"round": 2}, {"round": 0}):
        with pytest.raises(ValueError):
            Lineage.model_validate({**content, **wrong})


def test_the_documented_vector_is_what_the_code_signs():
    text = (Path(__file__).parents[2] / "docs" / "spec" / "lineage.md").read_text("utf-8")
    first, second = re.findall(r"^```json\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    start = sign(lineage_of(0, None), SERVER)
    after = sign(lineage_of(1, start), SERVER)
    assert [first, second] == [start.to_bytes().decode(), after.to_bytes().decode()]
    assert f"`{SERVER.public.fingerprint}`" in text
    assert f"`{SERVER.public.signing_bytes.hex()}`" in text
    assert f"`{start.digest}`" in text
