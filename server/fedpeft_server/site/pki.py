"""The server's certificate, and the authority that clinics recognise it by.

That is the federation's own, made here, or the hospital's, whose files are only used.
Clinics trust this authority alone, by the copy in their invitation, so no public CA and
no name service can speak for the server. Must not know Flower.
"""

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from fedpeft.errors import ConfigError, StorageError
from fedpeft.storage import explained, write_atomically, write_once

CA_VALIDITY_DAYS = 3650
SERVER_VALIDITY_DAYS = 730
# A clinic whose clock is behind must not find a certificate "not yet valid".
_BACKDATED_DAYS = 1


@dataclass(frozen=True)
class Issued:
    """Where the files lie that the hospital's own certificate authority gave out."""

    certificate: Path
    key: Path
    ca: Path


@dataclass(frozen=True)
class Authority:
    """Where the certificate authority and the server certificate lie.

    ``issued`` names the hospital's; without it they are the federation's own.
    """

    directory: Path
    issued: Issued | None = None

    @property
    def ca_certificate(self) -> Path:
        """The CA certificate, PEM; not secret."""
        return self.issued.ca if self.issued else self.directory / "ca.pem"

    @property
    def ca_key(self) -> Path:
        """The CA's private key, PEM; whoever has it can pose as the server."""
        return self.directory / "ca.key"

    @property
    def server_certificate(self) -> Path:
        """The server certificate, PEM, with those between it and the CA; not secret."""
        return self.issued.certificate if self.issued else self.directory / "server.pem"

    @property
    def server_key(self) -> Path:
        """The server's private key, PEM."""
        return self.issued.key if self.issued else self.directory / "server.key"

    @classmethod
    def load(cls, directory: Path, issued: Issued | None = None) -> Self:
        """Find an authority made by :func:`create_authority`, or the hospital's files.

        Raises:
            StorageError: a file is missing, or a private key is open to other users.
        """
        found = cls(directory, issued)
        private = (found.server_key,) if issued else (found.server_key, found.ca_key)
        for path in (found.ca_certificate, found.server_certificate, *private):
            if not path.is_file():
                raise StorageError(
                    f"{path} is missing, so the server cannot prove who it is: "
                    "restore it from the backup, or set the server up again"
                )
        for path in private:
            if path.stat().st_mode & 0o077:
                raise StorageError(
                    f"{path} can be read by other users of this machine: run `chmod 600 {path}`"
                )
        return found

    def ca_pem(self) -> str:
        """Return the CA certificate as PEM text."""
        return self.ca_certificate.read_text("ascii")

    def fingerprint(self) -> str:
        """Return the SHA-256 of the CA certificate as ``AB:CD:...``, to compare by telephone."""
        certificate = x509.load_pem_x509_certificate(self.ca_certificate.read_bytes())
        return certificate.fingerprint(hashes.SHA256()).hex(":").upper()

    def server_certificate_expires(self) -> datetime.datetime:
        """Return the moment (UTC) after which clinics refuse the server certificate."""
        certificate = x509.load_pem_x509_certificate(self.server_certificate.read_bytes())
        return certificate.not_valid_after_utc

    def ca_expires(self) -> datetime.datetime:
        """Return the moment (UTC) after which clinics refuse whatever the CA has signed."""
        certificate = x509.load_pem_x509_certificate(self.ca_certificate.read_bytes())
        return certificate.not_valid_after_utc

    def require_usable(self, address: str) -> None:
        """Check certificate, key and CA as a clinic will that connects to ``address``.

        Raises:
            ConfigError: ``address`` is none, or the three do not fit each other or it.
        """
        host, _ = split_address(address)
        ip = _as_ip(host)
        name = x509.DNSName(host) if ip is None else x509.IPAddress(ip)
        try:
            roots = x509.load_pem_x509_certificates(self.ca_certificate.read_bytes())
            leaf, *between = x509.load_pem_x509_certificates(self.server_certificate.read_bytes())
            key = serialization.load_pem_private_key(self.server_key.read_bytes(), None)
            if key.public_key() != leaf.public_key():
                raise VerificationError("the key is of another certificate")
            verifier = PolicyBuilder().store(Store(roots)).build_server_verifier(name)
            verifier.verify(leaf, between)
        except (ValueError, TypeError, UnsupportedAlgorithm, VerificationError) as error:
            raise ConfigError(
                f"{self.server_certificate} with {self.server_key} proves to no clinic that it is "
                f"{host} by the authority in {self.ca_certificate} ({error}): ask the hospital's "
                "CA for a server certificate of that name, and name its files in [tls]"
            ) from error


def create_authority(directory: Path, address: str) -> Authority:
    """Make a new authority and a server certificate for ``address``.

    Args:
        directory: made if missing, mode 700; must hold no authority yet.
        address: ``host``, ``host:port`` or ``[ipv6]:port`` as clinics will use
            it. The certificate is also good for ``localhost`` and 127.0.0.1.

    Raises:
        ConfigError: ``address`` is not an address.
        StorageError: the directory already holds an authority, or cannot be written.
    """
    host, _ = split_address(address)
    authority = Authority(directory)
    if authority.ca_key.exists() or authority.ca_certificate.exists():
        raise StorageError(
            f"{directory} already holds a certificate authority and clinics may rely on it: "
            "keep it, or choose another directory"
        )
    ca_key = ec.generate_private_key(ec.SECP384R1())
    ca_certificate = _self_signed(ca_key)
    with explained("write", directory):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_once(authority.ca_key, _key_pem(ca_key), mode=0o600)
        write_once(authority.ca_certificate, _certificate_pem(ca_certificate), mode=0o644)
    _issue_server_certificate(authority, ca_key, ca_certificate, host)
    return authority


def renew_server_certificate(directory: Path, address: str) -> Authority:
    """Replace the server's key and certificate; clinics keep their CA and notice nothing.

    Raises:
        ConfigError: ``address`` is not an address.
        StorageError: there is no authority, or the directory cannot be written.
    """
    host, _ = split_address(address)
    authority = Authority.load(directory)
    ca_key = serialization.load_pem_private_key(authority.ca_key.read_bytes(), None)
    if not isinstance(ca_key, ec.EllipticCurvePrivateKey):
        raise StorageError(f"{authority.ca_key} is not an elliptic-curve key: restore the backup")
    ca_certificate = x509.load_pem_x509_certificate(authority.ca_certificate.read_bytes())
    _issue_server_certificate(authority, ca_key, ca_certificate, host)
    return authority


def split_address(address: str) -> tuple[str, int | None]:
    """Split ``host``, ``host:port`` or ``[ipv6]:port``.

    Returns:
        The host without brackets, and the port or None.

    Raises:
        ConfigError: it is none of these, or the port is not 1 to 65535.
    """
    rest = ""
    if address.startswith("["):
        host, closed, rest = address[1:].partition("]")
        port_text = rest[1:] if rest.startswith(":") else rest
        sound = bool(closed) and (not rest or rest.startswith(":"))
    elif address.count(":") > 1:
        host, port_text, sound = address, "", True
    else:
        host, colon, port_text = address.partition(":")
        rest, sound = colon, True
    port = int(port_text) if port_text.isascii() and port_text.isdigit() else None
    if not sound or not _is_host(host) or (rest and not (port and port <= 65535)):
        raise ConfigError(
            f"{address!r} is not an address: write it as host:port, "
            "for example fl.hospital.example:8443"
        )
    return host, port


def _is_host(host: str) -> bool:
    if _as_ip(host) is not None:
        return True
    labels = host.split(".")
    return len(host) <= 253 and all(
        0 < len(label) <= 63
        and label.isascii()
        and label.replace("-", "").isalnum()
        and not label.startswith("-")
        and not label.endswith("-")
        for label in labels
    )


def _as_ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _self_signed(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedpeft federation CA")])
    return (
        _builder(name, name, key.public_key(), CA_VALIDITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )


def _issue_server_certificate(
    authority: Authority,
    ca_key: ec.EllipticCurvePrivateKey,
    ca_certificate: x509.Certificate,
    host: str,
) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    # A name longer than 64 characters does not fit here; only the SANs count.
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedpeft server")])
    certificate = (
        _builder(subject, ca_certificate.subject, key.public_key(), SERVER_VALIDITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(_alternative_names(host)), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()),
            critical=False,
        )
        .sign(ca_key, hashes.SHA384())
    )
    write_atomically(authority.server_key, _key_pem(key), mode=0o600)
    write_atomically(authority.server_certificate, _certificate_pem(certificate))


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=_BACKDATED_DAYS))
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative_names(host: str) -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = []
    for each in (host, "localhost", "127.0.0.1"):
        ip = _as_ip(each)
        name = x509.DNSName(each) if ip is None else x509.IPAddress(ip)
        if name not in names:
            names.append(name)
    return names


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _certificate_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
