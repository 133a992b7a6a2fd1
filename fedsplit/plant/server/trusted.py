"""What sites dial and whom they believe: the public address, and the CA behind the public port's certificate."""

from __future__ import annotations

import contextlib
import ipaddress

from cryptography import x509

from fedsplit.core.errors import ConfigError
from fedsplit.plant.server.folder import FederationFolder


def public_address(folder: FederationFolder) -> str:
    """HOST:PORT that sites dial."""
    host, port = folder.settings.server.host, folder.settings.server.port
    # Most are names.
    with contextlib.suppress(ValueError):
        host = f"[{host}]" if ipaddress.ip_address(host).version == 6 else host
    return f"{host}:{port}"


def public_ca(folder: FederationFolder) -> list[x509.Certificate]:
    """The chain at whose end stands the CA that sites believe: the federation's, or that of your own certificate.

    Raises ConfigError where it cannot be read.
    """
    own = folder.settings.tls.certificate
    path = folder.certificate if own else folder.ca
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError) as err:
        raise ConfigError(
            f"{path} cannot be read as certificates ({err}); restore it from the backup"
        ) from err
