import datetime
import ipaddress
import ssl
import stat

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fedpeft.errors import ConfigError, StorageError
from fedpeft_server.site.pki import (
    Authority,
    create_authority,
    renew_server_certificate,
    split_address,
)


def server_certificate(authority):
    return x509.load_pem_x509_certificate(authority.server_certificate.read_bytes())


def test_private_keys_are_readable_by_their_owner_only(tmp_path):
    authority = create_authority(tmp_path / "pki", "fl.example.org:8443")

    for key in (authority.ca_key, authority.server_key):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(authority.directory.stat().st_mode) == 0o700


def test_nothing_but_the_four_files_is_left(tmp_path):
    create_authority(tmp_path / "pki", "fl.example.org:8443")

    names = sorted(path.name for path in (tmp_path / "pki").iterdir())
    assert names == ["ca.key", "ca.pem", "server.key", "server.pem"]


@pytest.mark.parametrize(
    ("address", "dns", "ips"),
    [
        ("fl.example.org:8443", ["fl.example.org", "localhost"], ["127.0.0.1"]),
        ("10.1.2.3:8443", ["localhost"], ["10.1.2.3", "127.0.0.1"]),
        ("[fd00::1]:8443", ["localhost"], ["fd00::1", "127.0.0.1"]),
        ("localhost", ["localhost"], ["127.0.0.1"]),
    ],
)
def test_certificate_names_the_address_and_this_machine(tmp_path, address, dns, ips):
    certificate = server_certificate(create_authority(tmp_path / "pki", address))

    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == dns
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address(ip) for ip in ips]


def test_keys_are_on_p384_and_the_ca_may_sign_no_further_ca(tmp_path):
    authority = create_authority(tmp_path / "pki", "localhost:1")

    ca = x509.load_pem_x509_certificate(authority.ca_certificate.read_bytes())
    for certificate in (ca, server_certificate(authority)):
        key = certificate.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        assert isinstance(key.curve, ec.SECP384R1)
    constraints = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert constraints.value == x509.BasicConstraints(ca=True, path_length=0)


def test_certificates_hold_already_for_a_clock_that_is_behind(tmp_path):
    certificate = server_certificate(create_authority(tmp_path / "pki", "localhost:1"))

    now = datetime.datetime.now(datetime.UTC)
    assert certificate.not_valid_before_utc < now - datetime.timedelta(hours=23)
    assert certificate.not_valid_after_utc > now + datetime.timedelta(days=700)


def test_chain_passes_strict_verification(tmp_path):
    authority = create_authority(tmp_path / "pki", "fl.example.org:8443")

    store = x509.verification.Store(
        [x509.load_pem_x509_certificate(authority.ca_certificate.read_bytes())]
    )
    verifier = x509.verification.PolicyBuilder().store(store)
    server = verifier.build_server_verifier(x509.DNSName("fl.example.org"))
    assert len(server.verify(server_certificate(authority), [])) == 2


def test_second_authority_in_a_directory_is_refused_and_changes_nothing(tmp_path):
    authority = create_authority(tmp_path / "pki", "localhost:1")
    before = authority.ca_key.read_bytes()

    with pytest.raises(StorageError, match="already holds a certificate authority"):
        create_authority(tmp_path / "pki", "localhost:1")

    assert authority.ca_key.read_bytes() == before


def test_load_finds_what_create_made(tmp_path):
    made = create_authority(tmp_path / "pki", "localhost:1")

    loaded = Authority.load(tmp_path / "pki")

    assert loaded.fingerprint() == made.fingerprint()
    assert len(loaded.fingerprint()) == 32 * 3 - 1


def test_load_names_the_missing_file(tmp_path):
    authority = create_authority(tmp_path / "pki", "localhost:1")
    authority.server_key.unlink()

    with pytest.raises(StorageError, match=r"server\.key is missing"):
        Authority.load(tmp_path / "pki")


def test_load_refuses_a_key_that_others_can_read(tmp_path):
    authority = create_authority(tmp_path / "pki", "localhost:1")
    authority.ca_key.chmod(0o640)

    with pytest.raises(StorageError, match="chmod 600"):
        Authority.load(tmp_path / "pki")


def test_renewal_changes_the_server_certificate_and_keeps_the_ca(tmp_path):
    authority = create_authority(tmp_path / "pki", "old.example.org:1")
    fingerprint, before = authority.fingerprint(), authority.server_certificate.read_bytes()

    renew_server_certificate(tmp_path / "pki", "new.example.org:1")

    assert authority.fingerprint() == fingerprint
    assert authority.server_certificate.read_bytes() != before
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
        authority.server_certificate, authority.server_key
    )


@pytest.mark.parametrize(
    ("address", "split"),
    [
        ("a.example:1", ("a.example", 1)),
        ("a.example", ("a.example", None)),
        ("10.0.0.1:65535", ("10.0.0.1", 65535)),
        ("[::1]:8443", ("::1", 8443)),
        ("::1", ("::1", None)),
    ],
)
def test_addresses_split(address, split):
    assert split_address(address) == split


@pytest.mark.parametrize(
    "address",
    ["", ":1", "a:", "a:0", "a:65536", "a:b", "a b:1", "[::1", "[::1]x", "-a:1", "a..b:1", "ü:1"],
)
def test_what_is_no_address_is_refused(address):
    with pytest.raises(ConfigError, match="is not an address"):
        split_address(address)
