"""docs/spec/words.md and its test vector against the code."""

import hashlib
import re
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from fedpeft.sealing import Identity
from fedpeft.sealing.words import COUNT, WORDS, federation_words

PAGE = (Path(__file__).parents[2] / "docs/spec/words.md").read_text("utf-8")
(CERTIFICATE,) = re.findall(r"^```\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
DIGEST, SHOWN = (line.strip() for line in PAGE.rstrip().splitlines()[-2:])
SERVER = Identity(bytes(range(128))).public
LISTED = re.findall(r"^    ([0-9a-f]{2})((?:  ?[a-z]+ *){8})$", PAGE, flags=re.MULTILINE)


def test_the_documented_list_is_that_of_the_code_in_its_order():
    assert [int(number, 16) for number, _ in LISTED] == list(range(0, 256, 8))
    assert [word for _, line in LISTED for word in line.split()] == list(WORDS)
    shortest, longest = min(map(len, WORDS)), max(map(len, WORDS))
    assert f"{len(WORDS)} words of {shortest} to {longest} letters" in PAGE
    assert f"{COUNT} words stand for {8 * COUNT} bits" in PAGE


def test_the_vector_is_what_the_code_shows():
    assert federation_words("heart", CERTIFICATE, SERVER) == SHOWN


def test_a_reader_made_from_the_document_alone_finds_the_same_words():
    listed = [word for _, line in LISTED for word in line.split()]
    certificate = x509.load_pem_x509_certificate(CERTIFICATE.encode())
    fields = (b"heart", certificate.public_bytes(Encoding.DER), SERVER.data)
    framed = b"".join(len(field).to_bytes(4, "little") + field for field in fields)
    digest = hashlib.sha256(b"fedpeft federation words, version 1\x00" + framed).digest()
    assert digest[:10].hex() == DIGEST
    assert " ".join(listed[byte] for byte in digest[:10]) == SHOWN
