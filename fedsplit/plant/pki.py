"""The federation's own keys and certificates: a CA, what it signs, and the keys of Flower's nodes.

Keys of TLS are EC P-256. A node's key is EC P-384 in OpenSSH's form, for Flower asks for that. Nothing here reads
the clock of a peer, knows a folder or writes a file; `join` and `renew` (enrolment) and `server init` do.
Certificates start an hour early, because clocks differ, and none outlives who signed it.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedsplit.core.errors import ConfigError

Key = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey
CLOCK_SLACK = datetime.timedelta(hours=1)
MAX_PEM_BYTES = 16 * 2**10


@dataclass(frozen=True)
class Pair:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: Key

    @classmethod
    def read(cls, certificate: Path, key: Path) -> Pair:
        """From two PEM files. Raises OSError, and ConfigError where they are no pair."""
        made = read_certificate(certificate.read_bytes(), what=str(certificate))
        loaded = read_key(key.read_bytes(), what=str(key))
        if loaded.public_key() != made.public_key():
            raise ConfigError(f"{key} is not the key of {certificate}; restore both")
        return cls(made, loaded)

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        return key_pem(self.key)


def new_key() -> Key:
    """A key for TLS."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: Key) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def read_key(pem: bytes, *, what: str = "the key") -> Key:
    """Raises ConfigError for anything but an EC key without a passphrase."""
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as err:
        raise ConfigError(f"{what} is not a private key in PEM without a passphrase") from err
    if not isinstance(key, Key):
        raise ConfigError(f"{what} is of another kind; an EC key is wanted")
    return key


def read_certificate(pem: bytes, *, what: str = "the certificate") -> x509.Certificate:
    """The first certificate of a PEM text. Raises ConfigError."""
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as err:
        raise ConfigError(f"{what} is not a certificate in PEM") from err


def may_sign(certificate: x509.Certificate) -> bool:
    """Is it a CA's?"""
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def make_ca(name: str, *, days: int) -> Pair:
    """A new CA that signs itself."""
    key = new_key()
    subject = _subject(name)
    builder = _builder(key.public_key(), issuer=subject, subject=subject, end=_end(days))
    usage = _usage(signs=True)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(usage, critical=True)
    return Pair(builder.sign(key, hashes.SHA256()), key)


def issue(
    ca: Pair,
    wanted: PublicKey | bytes,
    *,
    common_name: str,
    hosts: Sequence[str] = (),
    days: float,
    client: bool,
) -> bytes:
    """The PEM of a certificate for a public key, or for the key in a signing request (PEM).

    Of a request only the key counts: the name is the caller's. `hosts` are the names and addresses for which it
    stands, `common_name` where there are none. A `client` shows it to a server; else it is a server's, who may
    show it to another one. Raises ConfigError for a request or a name that cannot be used.
    """
    key = read_csr(wanted) if isinstance(wanted, bytes) else wanted
    issuer = ca.certificate
    end = min(_end(days), issuer.not_valid_after_utc)
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if not client:
        usages.insert(0, ExtendedKeyUsageOID.SERVER_AUTH)
    try:
        alternatives = x509.SubjectAlternativeName(
            [_general_name(h) for h in hosts or [common_name]]
        )
        subject = _subject(common_name if client else common_name[:64])
    except ValueError as err:
        raise ConfigError(f"no certificate can be made for {hosts or common_name}: {err}") from err
    known = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.key.public_key())
    builder = (
        _builder(key, issuer=issuer.subject, subject=subject, end=end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(alternatives, critical=False)
        .add_extension(known, critical=False)
    )
    signed = builder.sign(ca.key, hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM)


def csr(key: Key, name: str) -> bytes:
    """A signing request (PEM): the proof that its sender holds `key`."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(_subject(name))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def read_csr(pem: bytes) -> PublicKey:
    """The key that a signing request asks for. Raises ConfigError for any but an EC P-256 key that signed it."""
    if len(pem) > MAX_PEM_BYTES:
        raise ConfigError(
            f"the signing request has {len(pem)} bytes, at most {MAX_PEM_BYTES} are read"
        )
    try:
        request = x509.load_pem_x509_csr(pem)
        key = request.public_key()
        signed = request.is_signature_valid
    except (ValueError, UnsupportedAlgorithm, InvalidSignature) as err:
        raise ConfigError("the signing request is not one in PEM; `site join` makes it") from err
    if not isinstance(key, PublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ConfigError(
            "the signing request is for a key of another kind; an EC key on P-256 is wanted, as `site join` makes it"
        )
    if not signed:
        raise ConfigError("the signing request is not signed by its own key; make it again")
    return key


def new_node_key() -> tuple[bytes, str]:
    """A key for Flower's node: the private part (OpenSSH PEM) and the public line."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    return private, _ssh_line(key.public_key())


def read_node_key(line: str) -> str:
    """The public key of a node in one form, without a comment. Raises ConfigError for another kind of key."""
    return _ssh_line(_node_key(line))


def node_key_pem(line: str) -> bytes:
    """The same key as Flower's own calls want it. Raises ConfigError."""
    return _node_key(line).public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of a certificate, in lower hex."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def serial(certificate: x509.Certificate) -> str:
    """A certificate's number as it is kept and compared: capital hexadecimal digits (core/proxied.py: bare_serial)."""
    return f"{certificate.serial_number:X}"


def _node_key(line: str) -> PublicKey:
    try:
        key = serialization.load_ssh_public_key(line.strip().encode())
    except (ValueError, UnsupportedAlgorithm) as err:
        raise ConfigError("the node's key is not a public key in OpenSSH's form") from err
    if not isinstance(key, PublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ConfigError("the node's key is of another kind; EC P-384 is wanted")
    return key


def _ssh_line(key: PublicKey) -> str:
    return key.public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    ).decode("ascii")


def _end(days: float) -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    key: PublicKey, *, issuer: x509.Name, subject: x509.Name, end: datetime.datetime
) -> x509.CertificateBuilder:
    start = datetime.datetime.now(datetime.UTC) - CLOCK_SLACK
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(max(end, start + datetime.timedelta(seconds=1)))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)
