"""The certificate at the public port: the federation's own renews itself, one of your own PKI is looked at."""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from fedsplit.core.errors import ConfigError
from fedsplit.core.whole_files import write_whole
from fedsplit.plant import pki
from fedsplit.plant.server.folder import FederationFolder
from fedsplit.plant.server.init import LOOPBACK, server_certificate

_SOON = timedelta(days=14)
Say = Callable[[str], None]


def renew_certificate(folder: FederationFolder, say: Say) -> bool:
    """Issue the federation's own server certificate anew where a third or less is left, or the host is another now.

    Returns whether it did. Raises ConfigError where the CA cannot be used, OSError for a disk that is full.
    """
    settings, now = folder.settings, datetime.now(UTC)
    path = folder.loopback_certificate
    old = pki.read_certificate(_bytes(path), what=str(path))
    left = old.not_valid_after_utc - now
    days = settings.certificates.server_days
    whole = min(timedelta(days=days), old.not_valid_after_utc - old.not_valid_before_utc)
    why = f"it ends in {left.days} days" if left < whole / 3 else ""
    if missing := {settings.server.host, *LOOPBACK} - set(hosts_of(old)):
        why = f"it is not for {', '.join(sorted(missing))}"
    if not why:
        return False
    ca = pki.Pair.read(folder.ca, folder.ca_key)
    certificate, key = server_certificate(ca, settings.server.host, days=days)
    write_whole(folder.loopback_certificate_key, key.decode("ascii"), mode=0o600)
    write_whole(path, certificate.decode("ascii"))
    say(f"the server has a new certificate: {why}")
    return True


def check_own_certificate(folder: FederationFolder, say: Say) -> None:
    """The certificate of a PKI of your own: a pair, in force, and for the public host. Raises ConfigError."""
    if not folder.settings.tls.certificate:
        return
    certificate = pki.read_certificate(_bytes(folder.certificate), what=str(folder.certificate))
    try:
        key = load_pem_private_key(_bytes(folder.certificate_key), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as err:
        raise ConfigError(
            f"{folder.certificate_key} is not a private key in PEM without a passphrase"
        ) from err
    if key.public_key() != certificate.public_key():
        raise ConfigError(
            f"{folder.certificate_key} is not the key of {folder.certificate}; correct the table [tls]"
        )
    left = certificate.not_valid_after_utc - datetime.now(UTC)
    host = folder.settings.server.host
    if left <= timedelta(0):
        raise ConfigError(
            f"{folder.certificate} has expired ({certificate.not_valid_after_utc:%Y-%m-%d}); put a new one there"
        )
    if not _stands_for(certificate, host):
        raise ConfigError(
            f"{folder.certificate} is for {', '.join(hosts_of(certificate)) or 'no host'}; sites dial {host}: "
            "put a certificate for it there, or correct [server] host"
        )
    if left < _SOON:
        say(f"{folder.certificate} ends in {left.days} days; put a new one there and start again")


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """The names and addresses that a certificate is for."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    names = found.get_values_for_type(x509.DNSName)
    return [*names, *map(str, found.get_values_for_type(x509.IPAddress))]


def _stands_for(certificate: x509.Certificate, host: str) -> bool:
    found = {name.lower() for name in hosts_of(certificate)}
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(host)) in found
    # "*." stands for one label.
    return host.lower() in found or f"*.{host.lower().partition('.')[2]}" in found


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as err:
        raise ConfigError(
            f"{path} cannot be read: {err.strerror}; restore it from the backup, or correct federation.toml"
        ) from err
