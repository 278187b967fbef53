"""Keys renewed by stick: a request nobody else can write, and a confirmation that fits it alone."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from fedpeft.errors import StickRefused
from fedpeft.sealing import SERVER, Identity, clinic_role
from fedpeft.sealing.carried import FILE_LIMIT
from fedpeft.sealing.renewal_file import MOST_LINES, RenewalConfirmation, RenewalRequest
from fedpeft.sealing.succession import Succession

OLD, NEW, OTHER, SITE, HEIR = (Identity.generate() for _ in range(5))


def statement(old: Identity, new: Identity, *, clinic: str = "north", key: str = "a key") -> str:
    return Succession.sign(
        old, new, federation="sea", holder=clinic_role(clinic), key=key
    ).to_json()


REQUEST = RenewalRequest(
    federation="sea",
    clinic="north",
    key=statement(OLD, OLD),
    identity=statement(OLD, NEW),
)
CONFIRMATION = RenewalConfirmation(
    federation="sea",
    clinic="north",
    request=REQUEST.digest,
    keys_expire="2028-01-01T00:00:00+00:00",
    identity_expires="2030-01-01T00:00:00+00:00",
    succession="",
)
PASSED_ON = Succession.sign(SITE, HEIR, federation="sea", holder=SERVER).to_json()


@pytest.mark.parametrize(
    "changed",
    [
        {"key": ""},
        {"key": "nonsense"},
        {"key": statement(OLD, NEW)},
        {"identity": statement(OLD, OLD)},
        {"identity": statement(OTHER, NEW)},
        {"identity": statement(OLD, NEW, key="another key")},
        {"identity": statement(OLD, NEW, clinic="south")},
        {"key": statement(OLD, OLD).replace("a key", "b key")},
        {"clinic": "south"},
        {"federation": "lake"},
    ],
)
def test_statements_that_are_forged_or_do_not_belong_together_are_refused(
    changed: dict[str, str],
) -> None:
    with pytest.raises(StickRefused, match="not the file that is asked for"):
        dataclasses.replace(REQUEST, **changed).statements()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        REQUEST.to_json().encode()[:-5],
        CONFIRMATION.to_json(SITE).encode(),
        REQUEST.to_json().replace('"schema": 1', '"schema": 2').encode(),
        REQUEST.to_json().encode() + b" " * FILE_LIMIT,
    ],
)
def test_what_is_no_request_is_refused(content: bytes) -> None:
    with pytest.raises(StickRefused):
        RenewalRequest.from_json(content)


@pytest.mark.parametrize("field", [each.name for each in dataclasses.fields(CONFIRMATION)])
def test_a_confirmation_that_was_changed_is_refused(field: str) -> None:
    text = dataclasses.replace(CONFIRMATION, succession=PASSED_ON).to_json(HEIR)
    value = getattr(dataclasses.replace(CONFIRMATION, succession=""), field)
    changed = text.replace(f'"{field}": "{value}"', f'"{field}": "{value}0"')
    if field == "succession":
        changed = text.replace('\\"federation\\": \\"sea\\"', '\\"federation\\": \\"see\\"')
    assert changed != text
    with pytest.raises(StickRefused):
        RenewalConfirmation.from_json(changed.encode(), SITE.public)


def test_a_confirmation_of_another_server_is_refused() -> None:
    with pytest.raises(StickRefused, match="not signed by the central site"):
        RenewalConfirmation.from_json(CONFIRMATION.to_json(OTHER).encode(), SITE.public)
    # Who took the server's place without its signature is another one.
    alien = Succession.sign(OTHER, HEIR, federation="sea", holder=SERVER).to_json()
    with_alien = dataclasses.replace(CONFIRMATION, succession=alien)
    with pytest.raises(StickRefused, match="not signed by the central site"):
        RenewalConfirmation.from_json(with_alien.to_json(HEIR).encode(), SITE.public)


def test_what_was_written_is_read_and_leads_to_the_server_of_today() -> None:
    assert RenewalRequest.from_json(REQUEST.to_json().encode()) == REQUEST
    assert [each.new for each in REQUEST.statements()] == [OLD.public, NEW.public]
    key_alone = dataclasses.replace(REQUEST, identity="")
    assert len(key_alone.statements()) == 1
    assert key_alone.digest != REQUEST.digest
    passed_on = dataclasses.replace(CONFIRMATION, succession=PASSED_ON)
    read = RenewalConfirmation.from_json(passed_on.to_json(HEIR).encode(), SITE.public)
    assert read == passed_on
    assert read.signer(SITE.public) == HEIR.public
    assert RenewalConfirmation.from_json(passed_on.to_json(HEIR).encode(), HEIR.public) == read


def test_the_page_says_what_the_code_does() -> None:
    page = (Path(__file__).parents[2] / "docs" / "spec" / "stick.md").read_text("utf-8")
    for text in (REQUEST.to_json(), CONFIRMATION.to_json(SITE)):
        fields = json.loads(text)
        assert f'"fedpeft": "{fields["fedpeft"]}"' in page
        section = page.split("## Renewing keys")[1].split("\n## ")[0]
        for field in fields.keys() - {"fedpeft", "schema"}:
            assert f"`{field}`" in section
    assert f"the newest {MOST_LINES} statements" in page
    # By the page alone: parts after their lengths, and what is signed.
    parts = [
        getattr(REQUEST, name).encode() for name in ("federation", "clinic", "key", "identity")
    ]
    framed = b"".join(len(part).to_bytes(4, "little") + part for part in parts)
    assert hashlib.sha256(framed).hexdigest() == REQUEST.digest
    names = ("federation", "clinic", "request", "keys_expire", "identity_expires", "succession")
    signed = [getattr(CONFIRMATION, name).encode() for name in names]
    message = b"fedpeft renewal, version 1\0" + b"".join(
        len(part).to_bytes(4, "little") + part for part in signed
    )
    signature = bytes.fromhex(json.loads(CONFIRMATION.to_json(SITE))["signature"])
    SITE.public.verify(signature, message, source="the page")


def test_the_longest_files_are_within_the_limit() -> None:
    assert len(REQUEST.to_json()) < FILE_LIMIT
    longest = "\n".join([PASSED_ON] * MOST_LINES)
    assert len(dataclasses.replace(CONFIRMATION, succession=longest).to_json(SITE)) < FILE_LIMIT
